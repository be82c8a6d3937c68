"""L-BFGS and conjugate gradient against SciPy and problems whose answer is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from gpudbn.batch import Arrays, Minimiser
from gpudbn.errors import NonFiniteError

METHODS = ("lbfgs", "cg")


class Problem(Arrays):
    """An objective in float64 on float32 vectors; keeps what was asked of it."""

    def __init__(self, objective, start):
        self.objective, self.calls, self.asked = objective, 0, []
        self.x, self.g = np.array(start, np.float32), np.zeros(len(start), np.float32)
        super().__init__(self.x, self.g, self.value)

    def value(self):
        self.calls += 1
        value, gradient = self.objective(self.x.astype(np.float64))
        self.g[...] = gradient
        return float(value)

    def combine(self, to, terms):
        self.asked.append("combine")
        super().combine(to, terms)

    def dots(self, pairs):
        self.asked.append("dots")
        return super().dots(pairs)


def quadratic(size, condition, seed=3):
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    A = basis * np.geomspace(1, condition, size) @ basis.T
    solution = rng.standard_normal(size)
    return (lambda x: ((x - solution) @ A @ (x - solution) / 2, A @ (x - solution))), solution


def rosenbrock(x):
    a, b = x[:-1], x[1:]
    value = np.sum(100 * (b - a**2) ** 2 + (1 - a) ** 2)
    gradient = np.zeros_like(x)
    gradient[:-1] = -400 * a * (b - a**2) - 2 * (1 - a)
    gradient[1:] += 200 * (b - a**2)
    return value, gradient


def logistic(rows=211, columns=17, decay=1e-2, seed=0):
    """Logistic regression with decay: convex, its minimum is one point."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((rows, columns)) * np.geomspace(0.2, 3, columns)
    y = np.where(X @ rng.standard_normal(columns) + rng.standard_normal(rows) > 0, 1.0, -1.0)

    def objective(w):
        margin = y * (X @ w)
        return (np.logaddexp(0, -margin).mean() + decay / 2 * w @ w,
                -(X.T @ (y / (1 + np.exp(margin)))) / rows + decay * w)

    return objective, np.zeros(columns)


@pytest.mark.parametrize("method", METHODS)
def test_a_quadratic_is_solved(method):
    objective, solution = quadratic(23, 50)
    problem = Problem(objective, np.zeros(23))
    last = list(Minimiser(problem, method, gradient=1e-4, progress=0).run(200))[-1]
    assert last.ended == "gradient"
    assert np.abs(problem.x - solution).max() < 2e-4
    assert last.evaluations == problem.calls


@pytest.mark.parametrize("method", METHODS)
def test_rosenbrock_with_a_history_that_is_full(method):
    problem = Problem(rosenbrock, np.tile([-1.2, 1.0], 3))
    records = list(Minimiser(problem, method, history=4, gradient=1e-3, progress=0).run(400))
    assert records[-1].value < 1e-6
    assert np.abs(problem.x - 1).max() < 1e-3
    assert all(a.value >= b.value for a, b in itertools.pairwise(records)), "it only goes downhill"


@pytest.mark.parametrize("method", METHODS)
def test_the_minimum_of_a_convex_loss_is_scipys(method):
    optimize = pytest.importorskip("scipy.optimize")
    objective, start = logistic()
    problem = Problem(objective, start)
    ours = list(Minimiser(problem, method, progress=0, gradient=1e-6).run(300))[-1]
    theirs = optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9})
    assert abs(ours.value - theirs.fun) < 1e-6
    assert np.abs(problem.x - theirs.x).max() < 1e-3


def test_lbfgs_takes_about_as_many_evaluations_as_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    problem = Problem(rosenbrock, np.tile([-1.2, 1.0], 5))
    for record in Minimiser(problem, history=10, progress=0, gradient=1e-3).run(500):
        if record.value < 1e-5:
            break
    theirs = []
    optimize.minimize(lambda x: (theirs.append(rosenbrock(x)[0]), rosenbrock(x))[1], np.tile([-1.2, 1.0], 5),
                      jac=True, method="L-BFGS-B", options={"maxcor": 10})
    assert record.evaluations < 1.5 * next(i for i, value in enumerate(theirs, 1) if value < 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_step_satisfies_the_strong_wolfe_conditions(method):
    problem = Problem(rosenbrock, [-1.2, 1.0, 0.3])
    minimiser, curvature = Minimiser(problem, method, gradient=1e-2, progress=0), {"lbfgs": 0.9, "cg": 0.1}[method]
    value, start = problem.value(), problem.x.astype(np.float64)
    seen = 0
    for record in minimiser.run(100):
        # x0, g0 and d of the iteration that is just over, before the next overwrites them
        d = problem._arrays["d"].astype(np.float64)
        slope = rosenbrock(start)[1] @ d
        reached, gradient = rosenbrock(problem.x.astype(np.float64))
        assert slope < 0
        assert reached <= value + 1e-4 * record.step * slope + 1e-6
        assert abs(gradient @ d) <= curvature * abs(slope) + 1e-4
        value, start = reached, problem.x.astype(np.float64)
        seen += 1
    assert seen > 5


def test_the_direction_is_that_of_the_two_loops():
    """The coefficients against the recursion on vectors, Nocedal & Wright algorithm 7.4."""
    problem = Problem(rosenbrock, np.tile([-1.2, 1.0], 4))
    minimiser = Minimiser(problem, history=3, progress=0, gradient=0)
    list(minimiser.run(8))
    problem_arrays = {name: array.astype(np.float64) for name, array in problem._arrays.items()}
    q, alphas = problem_arrays["g"].copy(), {}
    pairs = [(problem_arrays[f"s{i}"], problem_arrays[f"y{i}"]) for i in minimiser._pairs]
    assert len(pairs) == 3
    for i, (s, y) in reversed(list(enumerate(pairs))):
        alphas[i] = s @ q / (s @ y)
        q -= alphas[i] * y
    s, y = pairs[-1]
    q *= s @ y / (y @ y)
    for i, (s, y) in enumerate(pairs):
        q += (alphas[i] - y @ q / (s @ y)) * s
    found = sum(factor * problem_arrays[name] for factor, name in minimiser._lbfgs())
    assert np.abs(found + q).max() < 1e-4 * np.abs(q).max()


def test_an_iteration_sends_few_commands_whatever_the_history():
    problem = Problem(rosenbrock, np.tile([-1.2, 1.0], 4))
    minimiser = Minimiser(problem, history=8, progress=0, gradient=0)
    list(minimiser.run(9))
    before, calls = len(problem.asked), problem.calls
    (record,) = minimiser.run(1)
    tried = problem.calls - calls
    assert record.step > 0
    assert problem.asked[before:].count("dots") == tried + 2  # the first is of the run
    assert problem.asked[before:].count("combine") <= 2 * tried + 5


def test_a_step_into_the_infinite_is_too_far():
    def barrier(x):
        inside = 1 - x @ x
        return (math.inf, x * np.nan) if inside <= 0 else (-np.log(inside) + 3 * x[0], 2 * x / inside + [3.0, 0.0])

    problem = Problem(barrier, [0.5, 0.6])
    last = list(Minimiser(problem, progress=0, gradient=1e-4).run(50))[-1]
    assert last.ended == "gradient"
    assert abs(problem.x[0] - (1 - math.sqrt(10)) / 3) < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_direction_that_misleads_is_dropped(method):
    """The objective turns over between two runs, without a word: what was remembered points uphill."""
    sign = [1.0]
    objective, _ = quadratic(7, 10)

    def turned(x):
        value, gradient = objective(sign[0] * x)
        return value, sign[0] * gradient

    problem = Problem(turned, np.ones(7))
    minimiser = Minimiser(problem, method, gradient=1e-4, progress=0)
    list(minimiser.run(4))
    sign[0] = -1.0
    minimiser._value = minimiser._evaluate()
    minimiser._products |= {("g", "g"): float(problem.g @ problem.g)}
    last = list(minimiser.run(100))[-1]
    assert last.ended == "gradient"


def test_what_it_begins_with_must_be_finite():
    problem = Problem(lambda x: (math.nan, x), [1.0])
    with pytest.raises(NonFiniteError, match="lbfgs: objective and gradient must be finite; got nan"):
        list(Minimiser(problem).run(1))


def test_it_ends_where_nothing_is_lower():
    """A wrong gradient: the line search finds nothing, and x stays where it was."""
    problem = Problem(lambda x: (float(x @ x), -2 * x), [1.0, 2.0])
    (record,) = Minimiser(problem).run(10)
    assert record.ended == "line search"
    assert problem.x.tolist() == [1.0, 2.0]
    assert problem.g.tolist() == [-2.0, -4.0]


def test_a_search_that_runs_out_of_tries_goes_back_to_the_best():
    """Steps of 1 and 4 on the way to 2: the first is still steep, the second too far, a third is not allowed."""
    problem = Problem(lambda x: (float((x[0] - 2) ** 2 / 4), (x - 2) / 2), [0.0])
    (record,) = Minimiser(problem, "cg", tries=2, progress=0).run(1)
    assert (record.step, record.value, problem.x[0], problem.g[0]) == (1, 0.25, 1, -0.5)


def test_it_ends_after_so_many_evaluations():
    problem = Problem(rosenbrock, [-1.2, 1.0])
    records = list(Minimiser(problem, progress=0).run(100, evaluations=9))
    assert records[-1].ended == "evaluations"
    assert 9 <= problem.calls < 9 + 20


def test_another_method_is_refused():
    with pytest.raises(ValueError, match="method: must be one of lbfgs, cg; got newton"):
        Minimiser(Problem(rosenbrock, [0.0, 0.0]), "newton")
