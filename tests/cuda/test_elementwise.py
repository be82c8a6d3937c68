"""``elementwise.cu``: passes over flat arrays."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.checks import EPS, ON_GPU, ONE_SCHEDULE, SMALL_TILES, Arrays
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


@ONE_SCHEDULE
@SMALL_TILES
def test_momentum_step(launcher):
    for size, weights in [(1, 1), (1009, 900), (10007, 0), (4096, 4096)]:
        check_momentum_step(launcher, size, weights)
    check_momentum_step(launcher, 1009, 900, decay=0.0)


@ON_GPU
@SMALL_TILES
def test_momentum_step_of_ten_million(launcher):
    check_momentum_step(launcher, 10_000_019, 10_000_000)


@ONE_SCHEDULE
@SMALL_TILES
def test_momentum_step_leaves_infinite_parameters_alone_without_decay(launcher):
    arrays = Arrays(launcher)
    parameters, velocity = arrays.put([np.inf, 1]), arrays.put([0, 0])
    launcher.momentum_step(parameters, velocity, arrays.put([1, 1]), weights=2, scale=1, rate=0.5, momentum=0, decay=0)
    assert arrays.get(velocity).tolist() == [0.5, 0.5]


@ONE_SCHEDULE
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
