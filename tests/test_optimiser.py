"""Step rules against the papers' formulas in float64, and the ends of the schedules."""

from __future__ import annotations

import doctest
from functools import partial

import numpy as np
import pytest

from gpudbn import optimiser, reference
from gpudbn.optimiser import SGD, Adagrad, Adam, Momentum, schedule
from gpudbn.reference import PIECE

from .helpers import assert_close, assert_notices

pytestmark = pytest.mark.usefixtures("by_numpy")
SCALE = 1 / 7
RATES = (0.1, 0.05, 0.05, 0.02, 0.1, 0.1, 0.01, 0.03, 0.03, 0.2)


def adam_of_the_paper(gradients, start, weights, decay, b1=0.9, b2=0.999, eps=1e-8):
    """Kingma & Ba (2015), algorithm 1 with the order of section 2's last paragraph; decoupled decay. float64."""
    theta, m, v = start.astype(np.float64), np.zeros(start.size), np.zeros(start.size)
    decays = np.arange(start.size) < weights
    for t, (g, rate) in enumerate(zip(gradients, RATES, strict=True), 1):
        g = g.astype(np.float64) * SCALE
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        theta = theta - rate * decay * theta * decays
        theta = theta + rate * np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)  # uphill
        yield theta, {"mean": m, "square": v, "steps": np.array([t])}


def momentum_of_the_guide(gradients, start, weights, decay, momentum=0.8):
    """Hinton (2012), sections 9 and 10, in float64."""
    theta, velocity = start.astype(np.float64), np.zeros(start.size)
    decays = np.arange(start.size) < weights
    for g, rate in zip(gradients, RATES, strict=True):
        velocity = momentum * velocity + rate * (g.astype(np.float64) * SCALE - decay * theta * decays)
        theta = theta + velocity
        yield theta, {"velocity": velocity}


def adagrad_of_the_paper(gradients, start, weights, decay, eps=1e-8):
    """Duchi, Hazan & Singer (2011), figure 1 with the diagonal matrix; decoupled decay. float64."""
    theta, squares = start.astype(np.float64), np.zeros(start.size)
    decays = np.arange(start.size) < weights
    for g, rate in zip(gradients, RATES, strict=True):
        g = g.astype(np.float64) * SCALE
        squares = squares + g * g
        theta = theta - rate * decay * theta * decays + rate * g / (np.sqrt(squares) + eps)
        yield theta, {"squares": squares}


def plain_steps(gradients, start, weights, decay):
    """Gradient ascent with decay, in float64."""
    theta = start.astype(np.float64)
    for g, rate in zip(gradients, RATES, strict=True):
        theta = theta + rate * (g.astype(np.float64) * SCALE - decay * theta * (np.arange(start.size) < weights))
        yield theta, {}


RULES = {"adam": (Adam, adam_of_the_paper), "adagrad": (Adagrad, adagrad_of_the_paper), "sgd": (SGD, plain_steps),
         "momentum": (partial(Momentum, momentum=0.8), momentum_of_the_guide)}


def check_rule(name, size, weights, decay):
    rng = np.random.default_rng(size)
    # entries of very different sizes, as gradients of layers are; the first one always zero
    widths = 10.0 ** rng.uniform(-4, 2, size) * (np.arange(size) > 0)
    gradients = [(widths * rng.standard_normal(size)).astype(np.float32) for _ in RATES]
    parameters = rng.standard_normal(size).astype(np.float32)
    make, truth = RULES[name]
    rule, truth = make(parameters, decay=decay), truth(gradients, parameters, weights, decay)
    for gradient, rate, (theta, state) in zip(gradients, RATES, truth, strict=True):
        rule.step(parameters, gradient.copy(), weights=weights, scale=SCALE, rate=rate)
        assert_close(parameters, theta, atol=5e-6, rtol=2e-6)
        assert set(rule.state) == set(state)
        for key, expected in state.items():
            assert_close(rule.state[key], expected, atol=1e-6 * np.abs(expected).max(), rtol=2e-5)
            assert rule.state[key].dtype == (np.int64 if key == "steps" else np.float32)


CASES = [("adam", 13, 7, 0.0), ("adam", 13, 7, 0.3), ("adam", 2 * PIECE + 17, PIECE + 5, 0.3),
         ("momentum", 13, 7, 0.0), ("momentum", 13, 7, 0.3), ("momentum", 2 * PIECE + 17, PIECE + 5, 0.3),
         ("adagrad", 13, 7, 0.0), ("adagrad", 13, 7, 0.3), ("adagrad", 2 * PIECE + 17, PIECE + 5, 0.3),
         ("sgd", 13, 7, 0.0), ("sgd", 2 * PIECE + 17, PIECE + 5, 0.3)]


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_are_those_of_the_paper(case):
    check_rule(*case)


@pytest.mark.parametrize(("case", "module", "line", "fault"), [
    (CASES[0], reference, "rate * np.sqrt(1 - b2**steps) / (1 - b1**steps)", "rate"),
    (CASES[0], optimiser, "self.state[\"steps\"] += 1", "pass"),
    (CASES[0], reference, "np.multiply(g, np.float32(scale), out=g)", "pass"),
    (CASES[0], reference, "np.add(t, np.float32(eps), out=t)", "np.add(t, np.float32(1e-3), out=t)"),
    (CASES[0], reference, "np.multiply(t, np.float32(1 - b2), out=t)", "np.multiply(t, np.float32(1 - b1), out=t)"),
    (CASES[0], reference, "np.subtract(t, s, out=t)", "np.subtract(s, t, out=t)"),
    (CASES[1], optimiser, "decay=self.decay, steps=", "decay=0.1, steps="),
    (CASES[2], reference, "yield min(max(weights - start, 0), parts[0].size),", "yield min(weights, parts[0].size),"),
    (CASES[3], optimiser, "   rate=rate, momentum=self.momentum", "   rate=rate, momentum=0.9"),
    (CASES[4], optimiser, "   rate=rate, momentum=self.momentum, decay=self.decay",
     "   rate=rate, momentum=self.momentum, decay=0"),
    (CASES[4], reference, "np.float32(rate_decay)", "np.float32(decay)"),
    (CASES[6], reference, "        if scale != 1:\n            g = ", "        if scale == 1:\n            g = "),
    (CASES[6], reference, "np.add(q, step, out=q)", "np.copyto(q, step)"),
    (CASES[6], reference, "np.add(step, np.float32(eps), out=step)", "pass"),
    (CASES[7], optimiser, "\"squares\": module_of(like).zeros_like(like)", "\"squares\": like * like"),
    (CASES[7], reference, "return scale, rate, 1 - rate * decay\n", "return scale, rate, 1 - decay\n"),
    (CASES[8], reference, "yield min(max(weights - start, 0), parts[0].size),", "yield parts[0].size,"),
    (CASES[8], reference, "for start in range(0, arrays[0].size, PIECE)", "for start in range(0, weights, PIECE)"),
    (CASES[9], reference, "np.multiply(g, np.float32(rate * scale), out=t)", "np.multiply(g, np.float32(rate), out=t)"),
    (CASES[10], reference, "if shrink != 1:", "if shrink == 1:"),
])
def test_another_rule_is_noticed(case, module, line, fault):
    assert_notices(lambda: check_rule(*case), module, line, fault)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_goes_on_from_a_copy_of_its_state(name):
    new = partial(RULES[name][0], decay=0.1)
    rng = np.random.default_rng(3)
    one = rng.standard_normal(11).astype(np.float32)
    first = new(one)
    first.step(one, rng.standard_normal(11).astype(np.float32), weights=5, scale=1, rate=0.1)
    two, second = one.copy(), new(one)
    for key, array in first.state.items():
        second.state[key][...] = array
    gradient = rng.standard_normal(11).astype(np.float32)
    first.step(one, gradient.copy(), weights=5, scale=1, rate=0.1)
    second.step(two, gradient.copy(), weights=5, scale=1, rate=0.1)
    assert np.array_equal(one, two)


def check_activations(name):
    """A step with activations is a step with their gradient, to the bit: W, b, c end to end, of which W decays."""
    n, m, rows = 5, 3, 7
    rng = np.random.default_rng(1)
    v, h = rng.random((rows + 4, n), np.float32), rng.random((rows + 4, m), np.float32)
    dense = rng.standard_normal(n * m + n + m).astype(np.float32)
    sums, factored = np.empty_like(dense), dense.copy()
    one, other = (RULES[name][0](dense, decay=0.2) for _ in range(2))
    for rate in (0.3, 0.1):
        reference.cd_sums(sums[: n * m].reshape(n, m), sums[n * m : -m], sums[-m:], v, h, rows, model_weight=0.5)
        one.step(dense, sums, weights=n * m, scale=1 / rows, rate=rate)
        other.step_with_activations(factored, v, h, rows, model_weight=0.5, rate=rate)
    assert np.array_equal(dense, factored)
    for key, array in one.state.items():
        assert np.array_equal(array, other.state[key])


@pytest.mark.parametrize("name", ["sgd", "momentum", "adagrad"])
def test_a_step_with_activations_is_a_step_with_their_gradient(name):
    check_activations(name)


@pytest.mark.parametrize(("name", "line", "fault"), [
    ("sgd", "twins.cd_sgd(parameters, _work(parameters), v.shape[1], h.shape[1], v, h, rows,",
     "twins.cd_sgd(parameters, _work(parameters), v.shape[1], h.shape[1], v, h, rows + 1,"),
    ("momentum", "twins.cd_update(parameters, self.state[\"velocity\"],",
     "twins.cd_update(parameters, 0 * parameters,"),
    ("adagrad", "twins.cd_adagrad(parameters, self.state[\"squares\"],",
     "twins.cd_adagrad(parameters, 0 * parameters,"),
])
def test_a_step_with_other_activations_is_noticed(name, line, fault):
    assert_notices(lambda: check_activations(name), optimiser, line, fault)


def check_schedules():
    for name in ("constant", "linear", "exponential", "cosine"):
        end = 1.0 if name == "constant" else 0.05
        for epochs in (2, 7):
            rates = [schedule(name, 0.4, 0.05, epoch, epochs) for epoch in range(epochs)]
            assert rates[0] == pytest.approx(0.4, rel=1e-12)
            assert rates[-1] == pytest.approx(0.4 * end, rel=1e-12)
            assert rates == sorted(rates, reverse=True)
            assert all(type(rate) is float for rate in rates)
        assert schedule(name, 0.4, 0.05, 0, 1) == 0.4  # an only epoch is the first
    # half-way: the arithmetic mean, the geometric mean, the arithmetic mean
    assert schedule("linear", 0.4, 0.05, 3, 7) == pytest.approx(0.4 * 1.05 / 2, rel=1e-12)
    assert schedule("exponential", 0.4, 0.05, 3, 7) == pytest.approx(0.4 * 0.05**0.5, rel=1e-12)
    assert schedule("cosine", 0.4, 0.05, 3, 7) == pytest.approx(0.4 * 1.05 / 2, rel=1e-12)
    # a third of the way cos is 1/2
    assert schedule("cosine", 0.4, 0.05, 2, 7) == pytest.approx(0.4 * (0.05 + 0.95 * 0.75), rel=1e-12)


def test_schedules_begin_at_the_rate_and_end_at_its_fraction():
    check_schedules()


@pytest.mark.parametrize(("line", "fault"), [
    ("epoch / (epochs - 1)", "epoch / epochs"),
    ("rate * (1 - t * (1 - end))", "rate * (1 - t * end)"),
    ("rate * end**t", "rate * end ** (t * t)"),
    ("np.cos(np.pi * t)", "np.cos(np.pi * t / 2)"),
    ("if epochs > 1 else 0.0", "if epochs > 1 else 1.0"),
])
def test_another_schedule_is_noticed(line, fault):
    assert_notices(check_schedules, optimiser, line, fault)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule: must be constant, linear, exponential or cosine; got step"):
        schedule("step", 1.0, 0.5, 0, 3)


def test_the_examples_in_the_docstrings_are_true():
    found = doctest.testmod(optimiser)
    assert found.attempted
    assert not found.failed
