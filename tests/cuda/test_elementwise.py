"""``elementwise.cu``: passes over flat arrays."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn import reference
from tests.cuda.checks import EPS, ON_GPU, ONE_SCHEDULE, SMALL_TILES, Arrays, sees_fault
from tests.helpers import assert_close


def check_step(launch, arrays, size, weights, gradient, error, *, rate=0.3, scale=1.0, momentum=0.9, decay=0.01):
    """velocity and parameters to rounding against float64; the gradient may err by ``error``."""
    rng = np.random.default_rng(size)
    p, u = rng.normal(size=size).astype(np.float32), rng.normal(size=size).astype(np.float32)
    parameters, velocity = arrays.put(p), arrays.put(u)
    launch(parameters, velocity, rate=rate, momentum=momentum, decay=decay)
    p, u = p.astype(np.float64), u.astype(np.float64)
    new_u = momentum * u + rate * scale * gradient - rate * decay * np.where(np.arange(size) < weights, p, 0)
    error = rate * scale * error + 4 * EPS * (np.abs(u) + np.abs(rate * scale * gradient) + np.abs(p))
    assert_close(arrays.get(velocity) / error, new_u / error, atol=1.0)
    assert_close(arrays.get(parameters) / error, (p + new_u) / error, atol=1.5)


def check_momentum_step(launcher, size, weights, **step):
    arrays, g = Arrays(launcher), np.random.default_rng(1).normal(size=size).astype(np.float32)
    gradient = arrays.put(g)

    def launch(parameters, velocity, **numbers):
        launcher.momentum_step(parameters, velocity, gradient, weights=weights, scale=0.25, **numbers)

    check_step(launch, arrays, size, weights, g.astype(np.float64), 0.0, scale=0.25, **step)
    arrays.passed("momentum_step")


KEPT = {"sgd": 0, "adagrad": 1, "adam": 2}  # numbers that a rule keeps for each parameter
NUMBERS = {"sgd": {}, "adagrad": {"eps": 1e-3}, "adam": {"eps": 1e-3, "b1": 0.8, "b2": 0.95, "steps": 3}}


def decoupled64(rule, p, kept, g, *, rate, decays, eps=0.0, b1=0.0, b2=0.0, steps=1):
    """The step in float64: parameters and what is kept; and for each of these the size of its terms."""
    sizes = [np.abs(a) + np.abs(g) * (1 + np.abs(g)) for a in kept]
    if rule == "sgd":
        direction, size = g, np.abs(g)
    elif rule == "adagrad":
        kept = [kept[0] + g * g]
        direction = g / (np.sqrt(kept[0]) + eps)
        size = np.abs(direction)
    else:
        rate *= np.sqrt(1 - b2**steps) / (1 - b1**steps)
        size = (np.abs(kept[0]) + np.abs(g)) / (np.sqrt(b2 * kept[1] + (1 - b2) * g * g) + eps)
        kept = [b1 * kept[0] + (1 - b1) * g, b2 * kept[1] + (1 - b2) * g * g]
        direction = kept[0] / (np.sqrt(kept[1]) + eps)
    return [p * (1 - decays) + rate * direction, *kept], [np.abs(p) + rate * size, *sizes]


def check_decoupled(launch, arrays, rule, size, weights, gradient, error, *, rate=0.3, decay=0.01):
    """Parameters and what the rule keeps, to rounding against float64; the gradient, which has its scale, may err."""
    rng = np.random.default_rng(size)
    p, *kept = rng.random((1 + KEPT[rule], size), np.float32) + np.float32(0.1)
    p[::2] *= -1
    on_device = [arrays.put(a) for a in (p, *kept)]
    launch(*on_device, rate=rate, decay=decay, **NUMBERS[rule])
    decays = np.where(np.arange(size) < weights, rate * decay, 0)
    (new, sizes), *others = (
        decoupled64(rule, p.astype(np.float64), [a.astype(np.float64) for a in kept], g, rate=rate, decays=decays,
                    **NUMBERS[rule]) for g in (gradient, gradient + error, gradient - error))
    for found, exact, size_of_terms, *near in zip(on_device, new, sizes, *(other for other, _ in others), strict=True):
        bound = 8 * EPS * size_of_terms + sum(np.abs(one - exact) for one in near)
        assert_close(arrays.get(found) / bound, exact / bound, atol=1.0)


def check_decoupled_step(launcher, rule, size, weights, **step):
    arrays, g = Arrays(launcher), np.random.default_rng(1).normal(size=size).astype(np.float32)
    gradient = arrays.put(g)

    def launch(*changed, **numbers):
        getattr(launcher, f"{rule}_step")(*changed, gradient, weights=weights, scale=0.25, **numbers)

    check_decoupled(launch, arrays, rule, size, weights, 0.25 * g.astype(np.float64), 0.0, **step)
    assert np.array_equal(arrays.get(gradient), g), "the gradient was changed"
    arrays.passed(f"{rule}_step")


def check_sigmoid(launcher):
    x = np.concatenate([np.linspace(-120, 120, 4999), [-1e38, 1e38, 0]]).astype(np.float32)
    exact = 1 / (1 + np.exp(-np.clip(x.astype(np.float64), -700, 700)))
    arrays = Arrays(launcher)
    on_device = arrays.put(x.reshape(2, -1))
    assert launcher.sigmoid(on_device) is on_device
    y = arrays.get(on_device).ravel()
    assert_close(y, exact, atol=1.5e-7)
    assert_close(y[x > -80], exact[x > -80], rtol=4e-7)
    arrays.passed("sigmoid")


def check_sigmoid_backward(launcher, shape, keep, offset=0):
    rng, arrays = np.random.default_rng(3), Arrays(launcher, offset)
    d = rng.normal(size=shape).astype(np.float32)
    a = (rng.random(shape) / keep * (rng.random(shape) < keep)).astype(np.float32)
    delta, out = arrays.put(d), arrays.put(a)
    assert launcher.sigmoid_backward(delta, out, keep=keep) is delta
    d64, a64 = d.astype(np.float64), a.astype(np.float64)
    exact, bound = d64 * a64 * (1 - keep * a64), 4 * EPS * np.abs(d64 * a64) + 1e-30
    assert_close(arrays.get(delta) / bound, exact / bound, atol=1.0)
    assert_close(reference.sigmoid_backward(d, a, keep=keep) / bound, exact / bound, atol=1.0)
    assert np.array_equal(arrays.get(out), a)
    arrays.passed("sigmoid_backward")


@SMALL_TILES
@pytest.mark.parametrize("keep", [1.0, 0.7])
def test_sigmoid_backward(launcher, keep):
    for shape in [(1, 1), (37, 131), (16, 64)]:
        check_sigmoid_backward(launcher, shape, keep)
    check_sigmoid_backward(launcher, (5, 8), keep, offset=1)


@SMALL_TILES
def test_momentum_step(launcher):
    for size, weights in [(1, 1), (1009, 900), (10007, 0), (4096, 4096)]:
        check_momentum_step(launcher, size, weights)
    check_momentum_step(launcher, 1009, 900, decay=0.0)


@SMALL_TILES
@pytest.mark.parametrize("rule", KEPT)
def test_decoupled_steps(launcher, rule):
    for size, weights in [(1, 1), (1009, 900), (10007, 0), (4096, 4096)]:
        check_decoupled_step(launcher, rule, size, weights)
    check_decoupled_step(launcher, rule, 1009, 900, decay=0.0)


@ONE_SCHEDULE
@SMALL_TILES
def test_a_first_step_where_no_gradient_is_does_not_divide_by_zero(launcher):
    arrays = Arrays(launcher)
    for rule in ("adagrad", "adam"):
        changed = [arrays.put([0.5, -0.5]), *(arrays.put([0, 0]) for _ in range(KEPT[rule]))]
        steps = {"steps": 1} if rule == "adam" else {}
        getattr(launcher, f"{rule}_step")(*changed, arrays.put([0, 1]), weights=2, scale=1, rate=0.25, decay=0, **steps)
        assert_close(arrays.get(changed[0]), [0.5, -0.25], atol=1e-6)


@ON_GPU
@SMALL_TILES
def test_steps_of_ten_million(launcher):
    check_momentum_step(launcher, 10_000_019, 10_000_000)
    for rule in KEPT:
        check_decoupled_step(launcher, rule, 10_000_019, 10_000_000)


@ONE_SCHEDULE
@SMALL_TILES
@pytest.mark.parametrize("rule", KEPT)
def test_rates_in_device_memory_count_instead(launcher, rule):
    arrays, rng = Arrays(launcher), np.random.default_rng(0)
    gradient, start = rng.normal(size=997), rng.random((1 + KEPT[rule], 997))
    numbers = {"scale": 0.25, "rate": 0.3, "decay": 0.01, **({"steps": 3} if rule == "adam" else {})}
    rates = arrays.put(reference.adam_rates(**numbers) if rule == "adam" else reference.decoupled(**numbers))
    results = []
    for given in (numbers, {**dict.fromkeys(numbers, 2), "rates": rates}):
        changed = [arrays.put(a) for a in start]
        getattr(launcher, f"{rule}_step")(*changed, arrays.put(gradient), weights=900, **given)
        results.append([arrays.get(a) for a in changed])
    assert np.array_equal(*results)


FAULTS = {  # text, what it becomes, the check that must see it
    "momentum": ("gradient[i], r, i < weights", "gradient[i], r, i <= weights",
                 lambda launcher: check_momentum_step(launcher, 1009, 900)),
    "dropout on the way back": ("1.0f - keep * a[i]", "1.0f - a[i]",
                                lambda launcher: check_sigmoid_backward(launcher, (37, 131), 0.7)),
    "decay": ("decays ? shrink * parameter", "!decays ? shrink * parameter",
              lambda launcher: check_decoupled_step(launcher, "sgd", 1009, 900)),
    "scale": ("move(parameter, scale * gradient", "move(parameter, gradient",
              lambda launcher: check_decoupled_step(launcher, "sgd", 1009, 900)),
    "squares": ("squares += g * g", "squares += gradient * gradient",
                lambda launcher: check_decoupled_step(launcher, "adagrad", 1009, 900)),
    "root": ("sqrtf(squares) + eps", "sqrtf(squares + eps)",
             lambda launcher: check_decoupled_step(launcher, "adagrad", 1009, 900)),
    "mean": ("mean += rest1", "mean += rest2", lambda launcher: check_decoupled_step(launcher, "adam", 1009, 900)),
    "square": ("rest2 * (g * g - square)", "rest2 * (g * g) - square",
               lambda launcher: check_decoupled_step(launcher, "adam", 1009, 900)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_seen(fault):
    assert sees_fault(*FAULTS[fault])


@ONE_SCHEDULE
@SMALL_TILES
def test_momentum_step_leaves_infinite_parameters_alone_without_decay(launcher):
    arrays = Arrays(launcher)
    parameters, velocity = arrays.put([np.inf, 1]), arrays.put([0, 0])
    launcher.momentum_step(parameters, velocity, arrays.put([1, 1]), weights=2, scale=1, rate=0.5, momentum=0, decay=0)
    assert arrays.get(velocity).tolist() == [0.5, 0.5]


@SMALL_TILES
def test_sigmoid(launcher):
    check_sigmoid(launcher)


@ON_GPU
@SMALL_TILES
def test_the_current_stream_is_used(launcher):
    """Launches are in order with CuPy's own on the same stream, and can be captured in a graph."""
    import cupy

    x = cupy.zeros(1000, np.float32)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        launcher.sigmoid(x)
        graph = stream.end_capture()
        assert float(x.sum().get()) == 0
        graph.launch(stream)
        stream.synchronize()
    assert (x == 0.5).all()


@ON_GPU
@SMALL_TILES
def test_arrays_of_the_cpu_are_refused(launcher):
    with pytest.raises(TypeError, match=r"sigmoid: x must be a cupy.ndarray; got numpy.ndarray"):
        launcher.sigmoid(np.zeros(3, np.float32))
