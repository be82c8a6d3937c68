"""The specification of the kernels, against the formulas written out in float64 and explicit loops."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from gpudbn import draws, reference
from gpudbn.draws import Purpose, site
from gpudbn.reference import PIECE

from .helpers import assert_close, assert_notices

pytestmark = pytest.mark.usefixtures("by_numpy")
ADDRESS = {"seed": 2**40 + 3, "update": 17, "site": site(Purpose.CD, 2, 5), "row": 2**32 + 1}


def layer(n, m, rows, seed=0):
    """x (rows, n) in [0, 1], W (n, m), bias (m,): asymmetric, strong enough for probabilities near 0 and 1."""
    rng = np.random.default_rng(seed)
    return (rng.random((rows, n), np.float32), 2 * rng.standard_normal((n, m), np.float32) + np.float32(0.3),
            rng.standard_normal(m, np.float32) - np.float32(1))


# Sigmoid


def check_sigmoid():
    x = np.concatenate([np.linspace(-100, 100, 400_001), [0, -0.0, 1e-30, -1e-45, 3e38, -3e38]]).astype(np.float32)
    with np.errstate(all="raise", under="ignore"):
        y = reference.sigmoid(x.copy())
    exact = 1 / (1 + np.exp(-np.clip(x, -700, None).astype(np.float64)))
    assert y.dtype == np.float32
    assert_close(y, exact, atol=1.2e-7)
    assert y.min() >= 0
    assert y.max() <= 1
    assert (np.diff(y[:400_001]) >= 0).all()


def test_sigmoid_is_within_its_bound_and_raises_no_warning():
    check_sigmoid()


@pytest.mark.parametrize(("line", "fault"), [
    ("np.tanh(x, out=x)", "np.divide(x, np.float32(1) + np.abs(x), out=x)"),
    ("return np.add(x, half, out=x)", "return np.add(x, np.float32(0.500001), out=x)"),
    ("    np.tanh(x, out=x)\n    np.multiply(x, half, out=x)\n    return np.add(x, half, out=x)",
     "    return np.divide(1, 1 + np.exp(-2 * x), out=x)"),  # overflows
])
def test_another_sigmoid_is_noticed(line, fault):
    assert_notices(check_sigmoid, reference, line, fault)


# Half-steps


def check_half_step(transpose, column, columns):
    rows, n, m = 11, 7, 5
    x, W, bias = layer(n, m, rows)
    mean, sample = np.full((2, rows, m), 9, np.float32)
    given = np.ascontiguousarray(W.T) if transpose else W
    before = [a.copy() for a in (x, given, bias)]
    address = ADDRESS | {"column": column, "columns": columns}
    reference.half_step(sample, mean, x, given, bias, transpose=transpose, **address)
    expected = np.array([[1 / (1 + np.exp(-(sum(float(x[r, i]) * float(W[i, j]) for i in range(n)) + float(bias[j]))))
                          for j in range(m)] for r in range(rows)])
    assert_close(mean, expected, atol=1e-6)
    u = draws.uniforms(np.empty((rows, m), np.float32), **address)
    assert np.array_equal(sample, (u < mean).astype(np.float32))
    assert 0 < sample.sum() < sample.size
    alone = np.full((rows, m), 9, np.float32)
    reference.half_step(None, alone, x, given, bias, transpose=transpose)
    assert np.array_equal(alone, mean)
    reference.half_step(alone, None, x, given, bias, transpose=transpose, **address)
    assert np.array_equal(alone, sample)
    for a, b in zip((x, given, bias), before, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("column", "columns"), [(0, None), (3, 13)])
def test_a_half_step_is_the_plain_formula_and_a_comparison_with_u(transpose, column, columns):
    check_half_step(transpose, column, columns)


@pytest.mark.parametrize(("line", "fault"), [
    ("W.T if transpose else W", "W"),
    ("np.add(x, bias, out=out)", "np.subtract(x, bias, out=out)"),
    ("np.add(x, bias, out=out)", "np.add(x, bias[::-1], out=out)"),
    ("np.less(u, mean, out=sample", "np.greater(u, mean, out=sample"),
    ("\"row\": row, \"column\": column, \"columns\": columns,\n               \"clock\"", "\"row\": row, \"clock\""),
    ("out = sample if mean is None else mean\n    product", "out = mean\n    product"),
])
def test_a_wrong_half_step_is_noticed(line, fault):
    assert_notices(lambda: check_half_step(True, 3, 13), reference, line, fault)


def check_bernoulli():
    """u < p is strict: a unit of probability 0 is never on, even where u is 0; one of probability 1 always."""
    u = np.array([[0, 0.5, 1 - 2.0**-24, 0.25]], np.float32)
    p = np.array([[0, 0.5, 1, 0.26]], np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "uniforms", lambda *_, **__: u)
        assert reference.bernoulli(p, p, seed=0, update=0, site=0).tolist() == [[0, 0, 1, 1]]


def test_certain_units_are_certain():
    check_bernoulli()


def test_a_comparison_that_is_not_strict_is_noticed():
    assert_notices(check_bernoulli, reference, "np.less(u", "np.less_equal(u")


def check_threads():
    """Two threads, each stopped between its draws and the comparison with them, until both are there."""
    barrier, found = threading.Barrier(2, timeout=20), {}
    arguments = [layer(7, 5, 11, seed) for seed in (0, 1)]

    def stopping(out, **address):
        draws.uniforms(out, **address)
        barrier.wait()
        return out

    def run(number):
        sample = np.empty((11, 5), np.float32)
        reference.half_step(sample, None, *arguments[number], **ADDRESS | {"update": number})
        found[number] = sample

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "uniforms", stopping)
        threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, given in enumerate(arguments):
        sample = np.empty((11, 5), np.float32)
        reference.half_step(sample, None, *given, **ADDRESS | {"update": number})
        assert np.array_equal(found[number], sample)


def test_threads_have_work_space_of_their_own():
    check_threads()


def test_work_space_shared_by_threads_is_noticed(monkeypatch):
    class Shared:
        buffers: dict = {}  # noqa: RUF012
        get = reference.Scratch.get

    monkeypatch.setattr(reference, "_scratch", Shared())
    with pytest.raises(AssertionError):
        check_threads()


# Sums


def phases(rows, model, n, m, seed=3):
    rng = np.random.default_rng(seed)
    return rng.random((rows + model, n), np.float32), rng.random((rows + model, m), np.float32)


def sums_by_loops(v, h, rows, weight):
    """(W, b, c) sums, every product on its own, in float64."""
    n, m = v.shape[1], h.shape[1]
    dW, db, dc = np.zeros((n, m)), np.zeros(n), np.zeros(m)
    for r in range(len(v)):
        sign = 1.0 if r < rows else -weight
        for i in range(n):
            db[i] += sign * float(v[r, i])
            for j in range(m):
                dW[i, j] += sign * float(v[r, i]) * float(h[r, j])
        for j in range(m):
            dc[j] += sign * float(h[r, j])
    return dW, db, dc


def check_sums(rows, model, weight):
    n, m = 7, 5
    v, h = phases(rows, model, n, m)
    before = v.copy(), h.copy()
    out = [np.full(shape, 9, np.float32) for shape in ((n, m), (n,), (m,))]
    reference.cd_sums(*out, v, h, rows, model_weight=weight)
    for got, expected in zip(out, sums_by_loops(v, h, rows, weight), strict=True):
        assert_close(got, expected, atol=1e-5)
    assert np.array_equal(v, before[0])
    assert np.array_equal(h, before[1])


@pytest.mark.parametrize(("rows", "model", "weight"), [(11, 11, 1.0), (11, 3, 11 / 3), (3, 11, 3 / 13), (0, 5, 0.7),
                                                       (5, 0, 1.0), (1, 1, 1.0)])
def test_sums_are_those_of_explicit_loops(rows, model, weight):
    check_sums(rows, model, weight)


@pytest.mark.parametrize(("line", "fault"), [
    ("signs[rows:] = -model_weight", "signs[rows:] = model_weight"),
    ("signs[rows:] = -model_weight", "signs[rows:] = -1"),
    ("signs[rows:] = -model_weight", "signs[rows] = 1; signs[rows + 1 :] = -model_weight"),
    ("np.matmul(signs, v, out=db)", "np.sum(v, axis=0, out=db)"),
    ("np.sum(signed, axis=0, out=dc)", "np.sum(h, axis=0, out=dc)"),
    ("product(dW, v.T, signed, precision)", "product(dW, v[:rows].T, signed[:rows], precision)"),
])
def test_wrong_sums_are_noticed(line, fault):
    assert_notices(lambda: check_sums(11, 3, 11 / 3), reference, line, fault)


# Steps


def check_momentum(size, weights, decay):
    rng = np.random.default_rng(size)
    parameters, velocity = rng.standard_normal((2, size), np.float32)
    p, u = parameters.astype(np.float64), velocity.astype(np.float64)
    decays = np.arange(size) < weights
    for step, (rate, momentum) in enumerate([(0.1, 0.5), (0.1, 0.9), (0.03, 0.9), (0.03, 0.0)], 1):
        gradient = 7 * rng.standard_normal(size, np.float32)
        kept = gradient.copy()
        reference.momentum_step(parameters, velocity, gradient, weights=weights, scale=1 / 7, rate=rate,
                                momentum=momentum, decay=decay)
        u = momentum * u + rate * (gradient.astype(np.float64) / 7 - decay * p * decays)
        p = p + u
        assert_close(velocity, u, atol=step * 2e-6)
        assert_close(parameters, p, atol=step * 2e-6)
        assert np.array_equal(gradient, kept)


SIZES = [(13, 7), (13, 0), (13, 13), (2 * PIECE + 17, PIECE + 5), (PIECE, PIECE), (2 * PIECE, PIECE)]


@pytest.mark.parametrize(("size", "weights"), SIZES)
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_momentum_steps_are_those_by_hand_and_only_weights_decay(size, weights, decay):
    check_momentum(size, weights, decay)


@pytest.mark.parametrize(("size", "line", "fault"), [
    (SIZES[0], "yield min(max(weights - start, 0), parts[0].size),", "yield parts[0].size,"),
    (SIZES[3], "yield min(max(weights - start, 0), parts[0].size),", "yield min(weights, parts[0].size),"),
    (SIZES[0], "np.float32(rate_decay)", "np.float32(decay)"),
    (SIZES[0], "np.subtract(u[:decaying]", "np.add(u[:decaying]"),
    (SIZES[0], "np.float32(rate_scale)", "np.float32(rate)"),
    (SIZES[0], "np.multiply(u, np.float32(momentum), out=u)", "pass"),
    (SIZES[3], "for start in range(0, arrays[0].size, PIECE)", "for start in range(0, weights, PIECE)"),
    (SIZES[0], "np.add(p, u, out=p)", "np.subtract(p, u, out=p)"),
])
def test_a_wrong_momentum_step_is_noticed(size, line, fault):
    assert_notices(lambda: check_momentum(*size, 0.3), reference, line, fault)


def check_update(name):
    """A CD update is cd_sums, the mean over the data rows, and a step on W, b, c end to end: to the bit."""
    whole, step_alone, states, step = {
        "momentum": (reference.cd_update, reference.momentum_step, 1, {"rate": 0.1, "momentum": 0.7, "decay": 0.2}),
        "sgd": (reference.cd_sgd, reference.sgd_step, 0, {"rate": 0.1, "decay": 0.2}),
        "adagrad": (reference.cd_adagrad, reference.adagrad_step, 1, {"rate": 0.1, "decay": 0.2, "eps": 0.3}),
    }[name]
    n, m, rows, model = 7, 5, 11, 3
    v, h = phases(rows, model, n, m)
    size = n * m + n + m
    rng = np.random.default_rng(1)
    found = rng.random((1 + states, size), np.float32)
    expected = found.copy()
    dW, db, dc = (np.empty(shape, np.float32) for shape in ((n, m), (n,), (m,)))
    reference.cd_sums(dW, db, dc, v, h, rows, model_weight=rows / model)
    sums = np.concatenate([dW.ravel(), db, dc])
    step_alone(*expected, sums, weights=n * m, scale=1 / rows, **step)
    whole(*found, np.full(size, np.nan, np.float32), n, m, v, h, rows, model_weight=rows / model, **step)
    assert np.array_equal(found, expected)


def test_what_fades_is_in_the_gradient():
    """What fades is a part of the gradient: by hand, from sums that are none."""
    n, m, zeros = 1, 2, np.zeros((1, 2), np.float32)
    p, q = np.float32([2, -4, 7, 8, 9]), np.ones(5, np.float32)
    reference.cd_adagrad(p, q, np.empty(5, np.float32), n, m, zeros[:, :1], zeros, 1, rate=1, decay=0, fade=0.5)
    assert_close(q, np.float32([2, 5, 1, 1, 1]), atol=1e-6)
    assert_close(p, np.float32([2 - 1 / 2**0.5, -4 + 2 / 5**0.5, 7, 8, 9]), atol=1e-6)


@pytest.mark.parametrize("name", ["momentum", "sgd", "adagrad"])
def test_an_update_is_sums_and_a_step(name):
    check_update(name)


@pytest.mark.parametrize(("name", "line", "fault"), [
    ("momentum", "scale=1 / rows, rate=rate, momentum", "scale=1 / len(v), rate=rate, momentum"),
    ("sgd", "scale=1 / rows, rate=rate, decay=decay, rates", "scale=1 / len(v), rate=rate, decay=decay, rates"),
    ("adagrad", "scale=1 / rows, rate=rate, decay=decay, eps", "scale=1 / len(v), rate=rate, decay=decay, eps"),
    ("momentum", "model_weight=model_weight, ones=ones,", "ones=ones,"),
    ("sgd", "weights = n * m\n", "weights = n * m + n\n"),
    ("adagrad", "gradient[weights : weights + n], gradient[weights + n :]",
     "gradient[weights + m :], gradient[weights : weights + m]"),
])
def test_a_wrong_update_is_noticed(name, line, fault):
    assert_notices(lambda: check_update(name), reference, line, fault)
