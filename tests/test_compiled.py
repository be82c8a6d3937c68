"""Machine code, where numba is, has the bits of NumPy. Without it the same source runs as Python. Draws: test_draws."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn import compiled, reference

from .helpers import assert_notices

RULES = {"momentum_step": (1, {"rate": 0.3, "momentum": 0.7}), "sgd_step": (0, {"rate": 0.3}),
         "adagrad_step": (1, {"rate": 0.3}), "adam_step": (2, {"rate": 0.3, "steps": 3})}  # how much state; options


def check_step(monkeypatch, name, make, decay=0.1, size=53, weights=31):
    """Three steps by NumPy and by what ``make`` makes of the sources are the same to the bit."""
    states, options = RULES[name]
    rng = np.random.default_rng(1)
    found = (10 ** rng.uniform(-3, 1, (1 + states, size)) * rng.random((1 + states, size))).astype(np.float32)
    found[0] -= np.float32(0.5)
    expected, used = found.copy(), []

    def quick(function):
        used.append(function)
        return make(function)

    monkeypatch.setattr(compiled, "MANY", size)
    for scale in (1, 1 / 7, 1 / 3):
        gradient = rng.standard_normal(size).astype(np.float32)
        gradient[:2] = 0
        for arrays, how in ((found, quick), (expected, lambda _: None)):
            monkeypatch.setattr(compiled, "quick", how)
            getattr(reference, name)(*arrays, gradient.copy(), weights=weights, scale=scale, decay=decay, **options)
    assert used == [getattr(compiled, name.removesuffix("_step"))] * 3
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", RULES)
def test_steps_as_machine_code_have_the_bits_of_numpy(monkeypatch, name, decay):
    check_step(monkeypatch, name, lambda function: function, decay)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", RULES)
def test_numba_makes_the_same_steps(monkeypatch, name, decay):
    """At a size for which it takes vectors: nothing is contracted."""
    pytest.importorskip("numba")
    made = compiled.quick.__wrapped__
    check_step(monkeypatch, name, made, decay, size=10_007, weights=9_001)


@pytest.mark.parametrize(("name", "module", "line", "fault"), [
    ("momentum_step", compiled, "u[i] * keep + g[i] * scale", "u[i] * keep + g[i]"),
    ("momentum_step", compiled, "t - p[i] * decay if decay", "t + p[i] * decay if decay"),
    ("momentum_step", compiled, "p[i] += u[i]", "p[i] += t"),
    ("sgd_step", compiled, "p[i] = p[i] * shrink + g[i] * rate", "p[i] += g[i] * rate"),
    ("adagrad_step", compiled, "q[i] += x * x", "q[i] += g[i] * g[i]"),
    ("adagrad_step", compiled, "x / (np.sqrt(q[i]) + eps) * rate", "x * rate / (np.sqrt(q[i]) + eps)"),
    ("adam_step", compiled, "m[i] += (x - m[i]) * a1", "m[i] = m[i] * (1 - a1) + x * a1"),
    ("adam_step", compiled, "s[i] += (x * x - s[i]) * a2", "s[i] += (x * x - s[i]) * a1"),
    ("momentum_step", reference, "(slice(weights), of_weights)", "(slice(weights - 1), of_weights)"),
    ("sgd_step", reference, "(slice(weights, None), of_biases)", "(slice(weights, None), of_weights)"),
    ("adam_step", reference, "compiled.adam, weights, (parameters, mean, square",
     "compiled.adam, weights, (parameters, square, mean"),
    ("adagrad_step", reference, "(scale, eps, rate), shrink, 1)", "(scale, rate, eps), shrink, 1)"),
])
def test_another_step_is_noticed(monkeypatch, name, module, line, fault):
    assert_notices(lambda: check_step(monkeypatch, name, lambda function: function), module, line, fault)


def test_steps_of_few_entries_or_through_strides_are_numpys(monkeypatch):
    monkeypatch.setattr(compiled, "quick", lambda _: pytest.fail("compiled"))
    few, many = np.ones(compiled.MANY - 1, np.float32), np.ones(2 * compiled.MANY, np.float32)
    for p, g in ((few, few.copy()), (many[::2], few[:1].repeat(compiled.MANY))):
        reference.sgd_step(p, g, weights=3, scale=1, rate=0.5, decay=1)
        assert p[2:4].tolist() == [1.0, 1.5]


# Half-steps, from their product on


def check_activation(monkeypatch, make, samples, means, rows=5, m=13):
    """Samples and means by NumPy and by what ``make`` makes of the sources are the same to the bit."""
    rng = np.random.default_rng(1)
    x, bias = (4 * rng.standard_normal(shape).astype(np.float32) for shape in ((rows, m), (m,)))
    x[0, :4] = -200, 200, -bias[2], np.nextafter(-bias[3], np.float32(1))
    found, used = [], []

    def quick(function):
        used.append(function)
        return make(function)

    monkeypatch.setattr(compiled, "MANY", rows * m)
    for how in (quick, lambda _: None):
        monkeypatch.setattr(compiled, "quick", how)
        sample, mean = (np.empty_like(x) if wanted else None for wanted in (samples, means))
        reference.activate(sample, mean, x.copy(), bias, seed=3, update=5, site=7, row=11)
        found += [array.view(np.uint32) for array in (sample, mean) if array is not None]
    half = len(found) // 2
    assert all(map(np.array_equal, found[:half], found[half:]))
    assert used[:2] == [compiled.halve, compiled.lift if means else compiled.toss]


WANTED = [(True, False), (False, True), (True, True)]  # samples, means


@pytest.mark.parametrize(("samples", "means"), WANTED)
def test_activations_as_machine_code_have_the_bits_of_numpy(monkeypatch, samples, means):
    check_activation(monkeypatch, lambda function: function, samples, means)


@pytest.mark.parametrize(("samples", "means"), WANTED)
def test_numba_makes_the_same_activations(monkeypatch, samples, means):
    pytest.importorskip("numba")
    check_activation(monkeypatch, compiled.quick.__wrapped__, samples, means, rows=100, m=103)


@pytest.mark.parametrize(("wanted", "module", "line", "fault"), [
    (0, compiled, "(row[j] + bias[j]) * np.float32(0.5)", "row[j] * np.float32(0.5) + bias[j]"),
    (0, compiled, "np.float32(u[i] < ", "np.float32(u[i] > "),
    (1, compiled, "t[i] = t[i] * np.float32(0.5) + np.float32(0.5)", "t[i] = t[i] + np.float32(0.5)"),
    (0, reference, "u = uniforms(_scratch.get(\"u\", out.shape), **address)",
     "u = uniforms(_scratch.get(\"u\", out.shape), **address | {\"row\": 0})"),
    (2, reference, "        if mean is None:\n            u =", "        if sample is not None:\n            u ="),
])
def test_another_activation_is_noticed(monkeypatch, wanted, module, line, fault):
    assert_notices(lambda: check_activation(monkeypatch, lambda function: function, *WANTED[wanted]), module, line,
                   fault)
