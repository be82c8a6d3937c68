"""Every kernel on a real GPU, through CuPy: what is demanded on the CPU, and the error of the plain CuPy formula."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from gpudbn import cuda
from tests.kernel_checks import (
    CD_SIZES,
    COLUMNS,
    FAR,
    LARGE_TILES,
    NEAR,
    SIZES,
    SMALL_TILES,
    check_bernoulli,
    check_cd_sums,
    check_cd_update,
    check_half_step,
    check_momentum_step,
    check_sigmoid,
    check_uniforms,
)

pytestmark = pytest.mark.gpu

REAL_SIZES = [(100, 784, 500), (128, 784, 2000), (1000, 1031, 1009)]


@pytest.fixture(scope="module", params=["small", "large", "chosen"])
def launcher(request):
    """The launcher of this process, choosing small tiles, large ones, or as it likes."""
    cuda.compile_all()
    launcher = copy.copy(cuda._gpu())
    launcher.processors = {"small": SMALL_TILES, "large": LARGE_TILES, "chosen": launcher.processors}[request.param]
    return launcher


@pytest.mark.parametrize(("column", "columns"), COLUMNS)
def test_draws(launcher, column, columns):
    for B, m in [(1, 1), (37, 131), (70, 92)]:
        for address in (NEAR, FAR):
            check_uniforms(launcher, B, m, address, column, columns)
            check_bernoulli(launcher, B, m, address, column, columns)
            check_bernoulli(launcher, B, m, address, column, columns, in_place=True)
    check_uniforms(launcher, 5, 8, FAR, column, columns, offset=1)
    check_uniforms(launcher, 2049, 2047, FAR, column, 3001)


@pytest.mark.parametrize("transpose", [False, True])
def test_half_step(launcher, transpose):
    for sizes in SIZES + REAL_SIZES:
        check_half_step(launcher, *sizes, transpose=transpose)
    for column, columns in COLUMNS:
        check_half_step(launcher, 17, 31, 37, transpose=transpose, column=column, columns=columns)
    check_half_step(launcher, 17, 31, 37, transpose=transpose, sample=False)
    check_half_step(launcher, 17, 31, 37, transpose=transpose, mean=False)
    check_half_step(launcher, 17, 32, 36, transpose=transpose, offset=1)


def test_gradient_and_step(launcher):
    for sizes in [*CD_SIZES, (784, 500, 100, 100), (1031, 1009, 500, 300)]:
        check_cd_sums(launcher, *sizes)
        if sizes[2]:
            check_cd_update(launcher, *sizes)
    check_cd_sums(launcher, 37, 131, 41, 41, w=1.0, binary=True)
    check_cd_sums(launcher, 32, 36, 17, 17, offset=1)
    check_cd_update(launcher, 32, 36, 17, 17, offset=1, momentum=0.0, decay=0.0)


def test_elementwise(launcher):
    check_sigmoid(launcher)
    for size, weights in [(1, 1), (1009, 900), (10_000_019, 10_000_000)]:
        check_momentum_step(launcher, size, weights)


@pytest.mark.parametrize(("B", "n", "m"), REAL_SIZES)
def test_half_step_errs_at_most_twice_as_much_as_the_plain_formula(launcher, B, n, m):
    import cupy

    rng = np.random.default_rng(0)
    x, W, bias = (rng.random((B, n)) < 0.2, rng.normal(0, 0.1, (n, m)), rng.normal(0, 1, m))
    x, W, bias = (cupy.asarray(a, np.float32) for a in (x, W, bias))
    exact = 1 / (1 + cupy.exp(-(x.astype(np.float64) @ W.astype(np.float64) + bias)))
    mean = cupy.empty((B, m), np.float32)
    launcher.half_step(None, mean, x, W, bias)
    plain = 1 / (1 + cupy.exp(-(x @ W + bias)))
    assert abs(mean - exact).max() <= 2 * abs(plain - exact).max()


def test_cd_sums_err_at_most_twice_as_much_as_the_plain_formula(launcher):
    import cupy

    rng, n, m, rows = np.random.default_rng(0), 784, 500, 100
    v, h = (cupy.asarray(rng.random((2 * rows, size)), np.float32) for size in (n, m))
    dW, db, dc = cupy.empty((n, m), np.float32), cupy.empty(n, np.float32), cupy.empty(m, np.float32)
    launcher.cd_sums(dW, db, dc, v, h, rows)
    v64, h64 = v.astype(np.float64), h.astype(np.float64)
    exact = v64[:rows].T @ h64[:rows] - v64[rows:].T @ h64[rows:]
    plain = v[:rows].T @ h[:rows] - v[rows:].T @ h[rows:]
    assert abs(dW - exact).max() <= 2 * abs(plain - exact).max()


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


def test_arrays_of_the_cpu_are_refused(launcher):
    with pytest.raises(TypeError, match=r"sigmoid: x must be a cupy.ndarray; got numpy.ndarray"):
        launcher.sigmoid(np.zeros(3, np.float32))
