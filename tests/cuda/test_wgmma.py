"""``half_step_wgmma.cu`` and ``cd_update_wgmma.cu``: float64 is the judge, over operands that are exactly bf16.

On the CPU they run over ``tests/cuda_on_cpu/wgmma.h``; on a GPU only where there is wgmma.
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gpudbn import cuda, reference
from gpudbn.arrays import to_cpu, to_gpu
from gpudbn.cuda import door, wgmma
from gpudbn.cuda.wgmma import TensorMap, padded
from gpudbn.precision import from_bf16, round_to_bf16
from tests.cuda.checks import EPS, FAR, GPU, NEAR, SURE, Arrays, host_uniforms, sees_fault
from tests.cuda.test_compile import cubin_of, why_no_compiler
from tests.cuda.test_elementwise import check_step
from tests.cuda.test_layers import exact_sums
from tests.cuda_on_cpu import runtime
from tests.helpers import assert_close

# B, n, m: one, primes, whole tiles, several tiles with tails each way, depths of several stages and rounds of them
SIZES = [(1, 1, 1), (5, 3, 2), (64, 64, 64), (131, 67, 263), (128, 320, 256), (300, 130, 523), (7, 64 * 9 + 5, 30)]
# n, m, rows, C
CD_SIZES = [(1, 1, 1, 1), (3, 2, 5, 4), (64, 64, 64, 64), (131, 263, 67, 41), (256, 512, 320, 64), (300, 523, 130, 131),
            (31, 30, 3, 0)]
PROCESSORS = 3  # blocks that go round among the tiles
LARGE = (1024, 4096, 4096)

both_ways = pytest.mark.parametrize("transpose", [False, True])
one_schedule = pytest.mark.parametrize("place", ["forward", GPU], indirect=True)
on_gpu = pytest.mark.parametrize("place", [GPU], indirect=True)


@pytest.fixture
def launcher(place):
    """The project's launcher for a device with wgmma."""
    if place == "gpu":
        found = copy.copy(cuda.gpu())
        if found.architecture != wgmma.ARCHITECTURE:
            pytest.skip(f"wgmma: the device is {found.architecture}")
        yield found
    elif runtime.why_not():
        pytest.skip(f"kernels on the CPU: {runtime.why_not()}")
    else:
        with runtime.scheduled(place):
            yield runtime.launcher(PROCESSORS, architecture=wgmma.ARCHITECTURE)


class Rows(Arrays):
    """Matrices between NaNs too, and padded with NaNs: the rows begin at multiples of 16 bytes."""

    def __init__(self, launcher, offset=0):
        super().__init__(launcher, offset)
        self.matrices = []

    def rows(self, values, dtype=np.uint16):
        """A copy of the values: bf16, which they must be exactly, or float32."""
        values = np.asarray(values, np.float32)
        wide = 16 // np.dtype(dtype).itemsize
        B, m = values.shape
        pitch = (-(-m // wide) + 1) * wide
        buffer = np.full(2 * PADDING_BYTES + B * pitch * np.dtype(dtype).itemsize, 0xFF, np.uint8)
        inner = slice(PADDING_BYTES, len(buffer) - PADDING_BYTES)
        buffer[inner].view(dtype).reshape(B, pitch)[:, :m] = round_to_bf16(values) if dtype == np.uint16 else values
        buffer = buffer if self.on_cpu else to_gpu(buffer)
        self.matrices.append(buffer)
        return buffer[inner].view(dtype).reshape(B, pitch)[:, :m]

    def empty_rows(self, B, m, dtype=np.uint16):
        """NaNs."""
        return self.rows(np.full((B, m), np.nan), dtype)

    def values(self, matrix):
        """What is in a matrix, float32, after a look at the bytes around all of them."""
        for buffer in self.matrices:
            buffer = to_cpu(buffer)
            assert (buffer[:PADDING_BYTES] == 0xFF).all(), "wrote before a matrix"
            assert (buffer[-PADDING_BYTES:] == 0xFF).all(), "wrote behind a matrix"
        matrix = to_cpu(matrix)
        return from_bf16(matrix) if matrix.dtype == np.uint16 else matrix


PADDING_BYTES = 2048  # more than a row of the smaller matrices


def as_bf16(values):
    """The values, rounded to bf16, as float32."""
    return from_bf16(round_to_bf16(np.asarray(values, np.float32)))


def check_half_step(launcher, B, n, m, *, transpose=False, low=False, address=FAR, column=0, columns=None,
                    sample=np.uint16, mean=np.float32, offset=0):
    """Means to the rounding of a float32 sum, samples where they are sure, both against float64."""
    rng = np.random.default_rng([B, n, m])
    x, W, bias = as_bf16(rng.random((B, n))), rng.normal(0, 0.3, (n, m)).astype(np.float32), rng.normal(0, 1, m)
    bias, high = bias.astype(np.float32), as_bf16(W)
    rest = as_bf16(W - high) if low else np.zeros_like(W)
    turned = (lambda a: a.T) if transpose else (lambda a: a)
    arrays = Rows(launcher, offset)
    inputs = [arrays.rows(x), arrays.rows(turned(high)), arrays.put(bias)]
    W_low = arrays.rows(turned(rest)) if low else None
    s, p = (arrays.empty_rows(B, m, dtype) if dtype else None for dtype in (sample, mean))
    launcher.half_step_wgmma(s, p, *inputs, W_low=W_low, transpose=transpose, **address, column=column, columns=columns)

    W64 = high.astype(np.float64) + rest
    exact = 1 / (1 + np.exp(-(x @ W64 + bias)))
    if mean:
        rounding = EPS * (2 + (1 + low) * (x @ np.abs(W64)) + np.abs(bias)) + (mean == np.uint16) * 2.0**-8 * exact
        assert_close(arrays.values(p) / rounding, exact / rounding, atol=1.0)
    if sample:
        u, got = host_uniforms(B, m, address, column, columns), arrays.values(s)
        assert np.isin(got, (0, 1)).all()
        assert (got == (u < exact))[np.abs(u - exact) > SURE].all(), "samples differ"
    assert np.array_equal(arrays.values(inputs[0]), x), "an input was changed"
    assert np.array_equal(arrays.values(inputs[1]), turned(high)), "an input was changed"
    assert np.array_equal(arrays.get(inputs[2]), bias), "an input was changed"
    arrays.passed("half_step_wgmma_transposed" if transpose else "half_step_wgmma")


def check_cd_update(launcher, n, m, rows, C, *, w=0.7, offset=0, low=False, binary=False, **step):
    rng = np.random.default_rng([n, m, rows])
    arrays, values = Rows(launcher, offset), [rng.random(shape) for shape in ((rows, n), (rows, m), (C, n), (C, m))]
    values = [a < 0.5 for a in values] if binary else [as_bf16(a) for a in values]
    v, h = (np.concatenate(values[i::2]).astype(np.float32) for i in (0, 1))
    on_device, W = [arrays.rows(a) for a in values], arrays.empty_rows(n, m)
    W_low = arrays.empty_rows(n, m) if low else None
    kept = []

    def launch(parameters, velocity, **numbers):
        kept.append(parameters)
        launcher.cd_update_wgmma(parameters, velocity, W, *on_device, W_low=W_low, model_weight=w, **numbers)

    sums, error = (x[: n * m + n + m] for x in exact_sums(v, h, rows, w))
    check_step(launch, arrays, n * m + n + m, n * m, sums, 0 * error if binary else error, scale=1 / rows, **step)
    weights = arrays.get(kept[0])[: n * m].reshape(n, m)
    high = arrays.values(W)
    assert np.array_equal(high, as_bf16(weights))
    if low:
        assert np.array_equal(arrays.values(W_low), as_bf16(weights - high))
    arrays.passed("cd_update_wgmma")


# --------------------------------------------------------------------------------------------------- half_step


@both_ways
def test_half_step(launcher, transpose):
    for sizes in SIZES:
        check_half_step(launcher, *sizes, transpose=transpose)
    check_half_step(launcher, 130, 70, 523, transpose=transpose, mean=None)  # samples alone go another way inside


@both_ways
def test_weights_in_two_parts(launcher, transpose):
    check_half_step(launcher, 131, 200, 67, transpose=transpose, low=True)


@one_schedule
@both_ways
@pytest.mark.parametrize(("column", "columns"), [(16, 1001), (4, None)])
def test_half_step_of_a_shard(launcher, column, columns, transpose):
    """A shard of a layer draws what the whole layer would."""
    check_half_step(launcher, 70, 31, 263, transpose=transpose, address=NEAR, column=column, columns=columns)


@one_schedule
@pytest.mark.parametrize("sample", [None, np.uint16, np.float32])
@pytest.mark.parametrize("mean", [None, np.uint16, np.float32])
def test_half_step_in_every_type(launcher, sample, mean):
    if sample or mean:
        check_half_step(launcher, 67, 31, 37, sample=sample, mean=mean)


@one_schedule
def test_half_step_where_the_bias_is_at_an_odd_address(launcher):
    check_half_step(launcher, 67, 31, 37, offset=1)


@one_schedule
def test_half_step_of_saturated_units(launcher):
    """Sums so large that the exponential is infinite or 0: no NaN, and nothing fires that must not."""
    x, W = padded(np, 3, 8), padded(np, 8, 6)
    x[:] = round_to_bf16(np.ones((3, 8), np.float32))
    W[:] = round_to_bf16(np.float32([[100, -100, 15, -15, 3e38, -3e38]]))
    bias, s, p = np.zeros(6, np.float32), padded(np, 3, 6), padded(np, 3, 6, np.float32)
    arrays = [a if launcher.array_type is np.ndarray else to_gpu(a.base)[:, : a.shape[1]] for a in (s, p, x, W)]
    launcher.half_step_wgmma(*arrays, bias if launcher.array_type is np.ndarray else to_gpu(bias), **NEAR)
    s, p = to_cpu(arrays[0]), to_cpu(arrays[1])
    assert (from_bf16(s) == [1, 0, 1, 0, 1, 0]).all()
    assert (p == np.float32([1, 0, 1, 0, 1, 0])).all()


def test_half_step_of_nothing(launcher):
    """No rows, or no columns: nothing is launched."""
    xp = np if launcher.array_type is np.ndarray else pytest.importorskip("cupy")
    for B, m in [(0, 5), (5, 0)]:
        bias = xp.zeros(m, np.float32)
        launcher.half_step_wgmma(padded(xp, B, m), None, padded(xp, B, 3), padded(xp, 3, m), bias, **NEAR)


@one_schedule
def test_rates_and_clock_in_device_memory(launcher):
    xp = np if launcher.array_type is np.ndarray else pytest.importorskip("cupy")
    rng, found = np.random.default_rng(0), []
    x, W = (round_to_bf16(rng.random((8, 16)).astype(np.float32)) for _ in range(2))
    for clock, update in [(None, 7), (xp.full(1, 4, np.uint32), 3)]:
        s = padded(xp, 8, 8)
        launcher.half_step_wgmma(s, None, xp.asarray(x), xp.asarray(W), xp.zeros(8, np.float32), transpose=True,
                                 **NEAR | {"update": update}, clock=clock)
        found.append(to_cpu(s).copy())
    assert np.array_equal(*found)
    stepped = []
    for numbers in [(0.3, 0.9, 0.01, None), (9, 9, 9, xp.asarray(np.float32([0.3 / 8, 0.9, 0.3 * 0.01])))]:
        parameters, velocity = xp.ones(16 * 16 + 32, np.float32), xp.ones(16 * 16 + 32, np.float32)
        launcher.cd_update_wgmma(parameters, velocity, padded(xp, 16, 16), *[xp.asarray(x)] * 4, model_weight=0.5,
                                 rate=numbers[0], momentum=numbers[1], decay=numbers[2], rates=numbers[3])
        stepped.append(to_cpu(parameters))
    assert np.array_equal(*stepped)


# ------------------------------------------------------------------------------------------- gradient and the step


def test_cd_update(launcher):
    for sizes in CD_SIZES:
        check_cd_update(launcher, *sizes)


@one_schedule
def test_cd_update_in_two_parts_and_at_odd_addresses(launcher):
    check_cd_update(launcher, 131, 264, 70, 70, low=True)
    check_cd_update(launcher, 131, 264, 70, 70, low=True, offset=1)
    check_cd_update(launcher, 37, 31, 17, 17, momentum=0.0, decay=0.0)


@one_schedule
def test_cd_update_by_samples_is_exact(launcher):
    """Sums of zeros and ones have no rounding: what is left is that of the step."""
    check_cd_update(launcher, 67, 263, 131, 131, w=1.0, binary=True)


# ------------------------------------------------------------------------------------------------- matrices of bf16


def check_bf16(launcher, rows=7, m=13, offset=0, low=True):
    """Both ways, with the bits of the twins."""
    arrays, x = Rows(launcher, offset), np.random.default_rng(m).normal(size=(rows, m)).astype(np.float32)
    x[0, 0], x[-1, -1] = 1 + 2.0**-8, np.nan
    high, rest, back = arrays.empty_rows(rows, m), arrays.empty_rows(rows, m) if low else None, arrays.empty(rows, m)
    launcher.to_bf16(high, arrays.put(x), low=rest)
    launcher.to_float(back, high)
    twin, twin_rest, twin_back = np.empty((rows, m), np.uint16), np.empty((rows, m), np.uint16), np.empty_like(x)
    reference.to_bf16(twin, x, low=twin_rest)
    reference.to_float(twin_back, twin)
    assert np.array_equal(arrays.values(high), as_bf16(x), equal_nan=True)
    assert np.array_equal(to_cpu(high), twin)
    if low:
        assert np.array_equal(arrays.values(rest), as_bf16(x - as_bf16(x)), equal_nan=True)
        assert np.array_equal(to_cpu(rest), twin_rest)
    assert np.array_equal(arrays.get(back), as_bf16(x), equal_nan=True)
    assert np.array_equal(twin_back, as_bf16(x), equal_nan=True)
    arrays.passed("to_bf16")
    arrays.passed("to_float")


@pytest.mark.parametrize("m", [1, 2, 3, 16, 523])
def test_matrices_are_rounded_and_come_back(launcher, m):
    check_bf16(launcher, m=m)
    check_bf16(launcher, rows=1, m=m, offset=1, low=False)


@pytest.mark.parametrize(("text", "becomes"), [
    ("first.y, rest.y)", "first.y, rest.x)"), ("low + r * pitch", "low + r * m"), ("high + r * pitch + j) = first",
                                                                               "high + r * m + j) = first"),
    ("bf16_second(pairs.x)", "bf16_first(pairs.x)"), ("* quads; i += step", "* quads - 1; i += step")])
def test_other_rounding_is_noticed(text, becomes):
    assert sees_fault(text, becomes, lambda launcher: check_bf16(launcher, m=12))


# ------------------------------------------------------------------------------------------------ sizes of use


@on_gpu
@both_ways
def test_half_step_of_a_large_layer(launcher, transpose):
    check_half_step(launcher, *LARGE, transpose=transpose)
    check_half_step(launcher, 1000, 4001, 3999, transpose=transpose, low=True)


@on_gpu
def test_cd_update_of_a_large_layer(launcher):
    B, n, m = LARGE
    check_cd_update(launcher, n, m, B, B, low=True)
    check_cd_update(launcher, 4001, 3999, 1000, 500, binary=True, w=1.0)


@on_gpu
def test_launches_can_be_captured_in_a_graph(launcher):
    import cupy

    x, W, bias, s = padded(cupy, 64, 64), padded(cupy, 64, 64), cupy.full(64, 50, np.float32), padded(cupy, 64, 64)
    launcher.half_step_wgmma(s, None, x, W, bias, **NEAR)  # compiled, and its maps encoded
    s[:] = 0
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        launcher.half_step_wgmma(s, None, x, W, bias, **NEAR)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    assert (from_bf16(to_cpu(s)) == 1).all()


# ------------------------------------------------------------------------------------------------ the twins


def test_rounding_to_bf16():
    """To nearest, ties to even, for numbers of both signs and all sizes."""
    x = [1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 0.0, -0.0, np.inf, 3.4e38, 2.0**-133]
    found = from_bf16(round_to_bf16(np.float32(x)))
    assert np.array_equal(found, np.float32([1, 1, 1 + 2**-6, 1 + 2**-7, -1, 0, -0.0, np.inf, np.inf, 2.0**-133]))
    assert np.signbit(found[6])
    assert np.isnan(from_bf16(round_to_bf16(np.float32([np.nan, -np.nan])))).all()
    x = np.random.default_rng(0).normal(size=10007).astype(np.float32)
    assert np.abs(from_bf16(round_to_bf16(x)) / x - 1).max() <= 2.0**-8 / (1 + 2.0**-8)


def test_the_twins_do_what_the_float32_twins_do():
    rng, (B, n, m) = np.random.default_rng(0), (7, 5, 3)
    x, W, bias = as_bf16(rng.random((B, n))), as_bf16(rng.normal(size=(n, m))), rng.random(m).astype(np.float32)
    s, p, s16, p16 = (np.empty((B, m), t) for t in (np.float32, np.float32, np.uint16, np.uint16))
    reference.half_step(s, p, x, W, bias, **NEAR)
    reference.half_step_wgmma(s16, p16, round_to_bf16(x), round_to_bf16(W), bias, **NEAR)
    assert np.array_equal(from_bf16(s16), s)
    assert np.array_equal(from_bf16(p16), as_bf16(p))
    v, h = as_bf16(rng.random((2 * B, n))), as_bf16(rng.random((2 * B, m)))
    ones, size = np.ones, n * m + n + m
    first, second = ((ones(size, np.float32), ones(size, np.float32)) for _ in range(2))
    numbers = {"model_weight": 0.5, "rate": 0.1, "momentum": 0.5, "decay": 0.1}
    reference.cd_update(*first, np.empty(size, np.float32), n, m, v, h, B, **numbers)
    W16, low = np.empty((n, m), np.uint16), np.empty((n, m), np.uint16)
    phases = [round_to_bf16(a) for a in (v[:B], h[:B], v[B:], h[B:])]
    reference.cd_update_wgmma(*second, W16, *phases, W_low=low, **numbers)
    assert np.array_equal(first, second)
    weights = first[0][: n * m].reshape(n, m)
    assert np.array_equal(from_bf16(W16), as_bf16(weights))
    assert np.abs(from_bf16(W16) + from_bf16(low) - weights).max() <= 2.0**-17 * np.abs(weights).max()


# ------------------------------------------------------------------------------------------------- refusals


def refused(error, message, call):
    with pytest.raises(error) as info:
        call()
    assert str(info.value).startswith(message)


def test_what_the_kernels_could_not_read_is_refused():
    launcher = runtime.launcher(architecture="sm_90")
    half_step, f32 = launcher.half_step_wgmma, np.zeros(32, np.float32)
    x, W, s = padded(np, 8, 16), padded(np, 16, 32), padded(np, 8, 32)
    refused(RuntimeError, "half_step_wgmma: the device must be of compute capability 9.0 (H100, H200); got sm_80",
            lambda: runtime.launcher().half_step_wgmma(s, None, x, W, f32))
    numbers = {"rate": 1, "momentum": 0, "decay": 0}
    refused(RuntimeError, "cd_update_wgmma: the device must be of compute capability 9.0 (H100, H200); got sm_100",
            lambda: runtime.launcher(architecture="sm_100").cd_update_wgmma(f32, f32, W, x, s, x, s, **numbers))
    refused(ValueError, "half_step_wgmma: column must be a multiple of 4; got 6",
            lambda: half_step(s, None, x, W, f32, column=6))
    begin = "with rows that begin at multiples of 16 bytes; got strides"
    refused(ValueError, f"half_step_wgmma: W must be uint16 of shape (n, m), {begin} (62, 2) in uint16 (16, 31). "
            "See gpudbn.cuda.wgmma.padded", lambda: half_step(s, None, x, np.zeros((16, 31), np.uint16), f32))
    refused(ValueError, f"half_step_wgmma: x must be uint16 of shape (B, 16), {begin} (48, 2) in uint16 (8, 16)",
            lambda: half_step(s, None, padded(np, 8, 24)[:, 4:20], W, f32))
    refused(TypeError, f"half_step_wgmma: x must be uint16 of shape (B, 16), {begin} (64, 4) in float32 (8, 16).",
            lambda: half_step(s, None, np.zeros((8, 16), np.float32), W, f32))
    refused(ValueError, f"half_step_wgmma: x must be uint16 of shape (B, 16), {begin} (2, 16) in uint16 (8, 16)",
            lambda: half_step(s, None, np.asfortranarray(x), W, f32))
    refused(TypeError, "half_step_wgmma: sample must be uint16", lambda: half_step(np.zeros((8, 32)), None, x, W, f32))
    refused(ValueError, "half_step_wgmma: one of sample and mean", lambda: half_step(None, None, x, W, f32))
    refused(ValueError, "half_step_wgmma: n must be positive",
            lambda: half_step(s, None, padded(np, 8, 0), padded(np, 0, 32), f32))
    refused(ValueError, "half_step_wgmma: sample must not share memory with x",
            lambda: half_step(s[:, :16], None, s, padded(np, 32, 16), f32[:16]))
    refused(ValueError, "half_step_wgmma: mean must not share memory with sample", lambda: half_step(s, s, x, W, f32))
    refused(ValueError, "half_step_wgmma: sample and mean of one type must have rows equally far apart; got 32 and 40",
            lambda: half_step(s, padded(np, 8, 40)[:, :32], x, W, f32))
    flat, wide = np.zeros(16 * 32 + 48, np.float32), padded(np, 16, 40)[:, :32]
    refused(ValueError, "cd_update_wgmma: h0 must be uint16 of shape (8, 32)",
            lambda: launcher.cd_update_wgmma(flat, flat.copy(), W, x, padded(np, 7, 32), x, s, **numbers))
    refused(ValueError, "cd_update_wgmma: velocity must not share memory with parameters",
            lambda: launcher.cd_update_wgmma(flat, flat, W, x, s, x, s, **numbers))
    refused(ValueError, "cd_update_wgmma: W_low must not share memory with W",
            lambda: launcher.cd_update_wgmma(flat, flat.copy(), W, x, s, x, s, W_low=W, **numbers))
    refused(ValueError, "cd_update_wgmma: W and W_low must have rows equally far apart; got 64 and 80 bytes",
            lambda: launcher.cd_update_wgmma(flat, flat.copy(), W, x, s, x, s, W_low=wide, **numbers))
    refused(ValueError, "cd_update_wgmma: rows, n and m must be positive; got 0, 16, 32",
            lambda: launcher.cd_update_wgmma(flat, flat.copy(), W, x[:0], s[:0], x, s, **numbers))


@pytest.mark.parametrize(("change", "message"), [
    ({"address": 8}, "address and pitch must be multiples of 16; got 8 and 64"),
    ({"pitch": 40}, "address and pitch must be multiples of 16; got 16 and 40"),
    ({"rows": 0}, "rows and columns must lie between 1 and 2**32; got 0 and 30"),
    ({"columns": 2**32 + 1}, "rows and columns must lie between 1 and 2**32; got 5 and 4294967297"),
    ({"columns": 33}, "pitch must lie between the 66 bytes of a row and 2**40; got 64"),
    ({"pitch": 1 << 40}, "pitch must lie between the 60 bytes of a row and 2**40; got 1099511627776"),
    ({"box_rows": 257}, "box_rows must lie between 1 and 256; got 257"),
    ({"box_rows": 0}, "box_rows must lie between 1 and 256; got 0"),
])
def test_maps_that_the_copy_engine_cannot_follow_are_refused(change, message):
    refused(ValueError, f"tensor map: {message}",
            lambda: TensorMap(**{"address": 16, "rows": 5, "columns": 30, "pitch": 64, "box_rows": 128} | change))


def test_the_driver_is_asked_as_its_header_says(monkeypatch):
    """Map, type, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill."""
    calls = []

    def call(room, *arguments):
        calls.append([list(a) if isinstance(a, ctypes.Array) else a for a in arguments])
        assert room % 64 == 0
        ctypes.memset(room, 0xA5, 128)
        return len(calls) - 1

    monkeypatch.setattr(wgmma, "_driver_call", lambda: call)
    wgmma.encode.cache_clear()
    found = wgmma.encode(TensorMap(address=4096, rows=5, columns=30, pitch=64, box_rows=128))
    assert found.dtype == "V128"
    assert found.shape == (1,)
    assert found.tobytes() == b"\xa5" * 128
    assert calls == [[9, 2, 4096, [30, 5], [64], [64, 128], [1, 1], 0, 3, 3, 0]]
    assert wgmma.encode(TensorMap(address=4096, rows=5, columns=30, pitch=64, box_rows=128)) is found
    refused(RuntimeError, "tensor map: the driver must accept it; got CUDA error 1 for TensorMap(address=4096, rows=6",
            lambda: wgmma.encode(TensorMap(address=4096, rows=6, columns=30, pitch=64, box_rows=128)))
    wgmma.encode.cache_clear()


@pytest.mark.skipif(runtime.why_not() is not None, reason=f"kernels on the CPU: {runtime.why_not()}")
@pytest.mark.parametrize("unit", wgmma.UNITS)
def test_parameters_are_what_the_launcher_casts_to(unit):
    module, kinds = runtime.Module(wgmma.UNITS[unit].source()), wgmma.UNITS[unit].kernels

    def code(to):
        if to in (door.POINTER, wgmma.TENSOR_MAP):
            return None if to is door.POINTER else "V128"
        return f"{np.dtype(to).kind}{np.dtype(to).itemsize}"

    for kernel in kinds:
        assert [None if found[0] == "*" else found for found in module.get_function(kernel).parameters] == \
            [code(to) for to in kinds[kernel]]


def disassembler():
    """The path of nvdisasm, or None."""
    places = getattr(importlib.util.find_spec("nvidia"), "submodule_search_locations", None) or []
    installed = [str(found) for place in places for found in Path(place).glob("cu*/bin/nvdisasm")]
    return shutil.which("nvdisasm") or next(iter(installed), None)


@pytest.mark.skipif(why_no_compiler() is not None, reason=f"kernels are not compiled: {why_no_compiler()}")
@pytest.mark.skipif(disassembler() is None, reason="nvdisasm is not installed")
@pytest.mark.parametrize("unit", [unit for unit in wgmma.UNITS if unit.endswith("_wgmma")])
def test_registers_and_instructions_are_those_meant(unit, tmp_path):
    """Neither side of setmaxnreg, of which the compiler's report tells nothing, needs more than it has."""
    found = wgmma.UNITS[unit]
    cubin, _ = cubin_of(found.source(), "sm_90a", found.options)
    (tmp_path / "cubin").write_bytes(cubin + b"\0")  # CuPy leaves out the last byte
    told = subprocess.run([disassembler(), "-c", tmp_path / "cubin"], capture_output=True, text=True, check=True)
    kernels = dict(re.findall(r"\.section\s+\.text\.(\w+)(.*?)(?=\.section|\Z)", told.stdout, flags=re.S))
    assert set(kernels) == set(found.kernels)
    for kernel, text in kernels.items():
        code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", text, flags=re.M)

        def most(instructions):
            return 1 + max(int(register) for line in instructions for register in re.findall(r"\bR(\d+)\b", line))

        copying = next(i for i, line in enumerate(code) if "USETMAXREG.DEALLOC" in line)
        end = max(i for i, line in enumerate(code) if "EXIT" in line)
        assert any("UTMALDG.2D" in line for line in code[copying:end]), kernel
        assert most(code[copying:end]) <= 24, kernel
        assert 128 < most(code) <= 240, kernel
        products = [line for line in code if "HGMMA.64x256x16.F32.BF16" in line]
        turned = [("tnspA" in line, "tnspB" in line) for line in products]
        assert turned == [{"half_step_wgmma": (False, True), "half_step_wgmma_transposed": (False, False),
                           "cd_update_wgmma": (True, True)}[kernel]] * len(products)
        assert len(products) % 4 == 0, kernel
        assert sum("HGMMA.64x8x16" in line for line in code) == (12 if kernel == "cd_update_wgmma" else 0)


def test_shared_memory_fits_the_chip():
    assert wgmma.SHARED_BYTES <= 227 << 10


# -------------------------------------------------------------------------------------------- planted faults


def half_step_check(launcher):
    check_half_step(launcher, 131, 67, 263)


def deep_check(launcher):
    """More steps than stages, in several tiles."""
    check_half_step(launcher, 131, 64 * 6, 263)


def transposed_check(launcher):
    check_half_step(launcher, 131, 67, 263, transpose=True)


def sample_check(launcher):
    check_half_step(launcher, 130, 70, 523, mean=None)


def cd_update_check(launcher):
    check_cd_update(launcher, 131, 264, 67, 130, low=True)


FAULTS = {  # name: text, what it becomes, the check that must see it
    "descriptor: terms of another line": ("tile + line * 128 + k * 2", "tile + line * 128 + k", transposed_check),
    "descriptor: strides exchanged":
        ("k * 128, BOX_BYTES, SWIZZLE_BYTES", "k * 128, SWIZZLE_BYTES, BOX_BYTES", half_step_check),
    "descriptor: rows of the other warpgroup":
        ("WGMMA_ROWS * warpgroup, k)", "0, k)", half_step_check),
    "stages: begin off the pattern": ("/ SWIZZLE_BYTES * SWIZZLE_BYTES;", "/ 128 * 128;", half_step_check),
    "copy: rows and columns exchanged":
        ("copy_box(there, from, k, line, arrived)", "copy_box(there, from, line, k, arrived)", half_step_check),
    "copy: into a stage that is still read": ("barrier_wait(empty(stage), ring.parity_before());", "", deep_check),
    "multiply: before the copies are there": ("barrier_wait(full(stage), ring.parity());", "", half_step_check),
    "multiply: a stage given back while it is read":
        ("(empty(ring.stage_before()));\n        }", "(empty(stage));\n        }", deep_check),
    "multiply: not waited for": ("wgmma_wait(sums.products);", "", half_step_check),
    "multiply: one warp leaves for all": ("MULTIPLYING_WARPS);", "1);", deep_check),
    "ring: parity": ("turn / STAGES % 2", "turn % 2", deep_check),
    "quads: not exchanged": ("odd ? x : below_x, 1", "odd ? below_x : x, 1", half_step_check),
    "tiles: order with holes": ("within / rows_in_group", "within / ROW_GROUP", half_step_check),
    "half_step: another draw": ("address.draw(index + step / 4)", "address.draw(index + q)", half_step_check),
    "half_step: another draw inside": ("q * (QUAD_STEP / 4)), e)", "q), e)", sample_check),
    "half_step: a tail not guarded": ("r < B ? m - first", "r <= B ? m - first", half_step_check),
    "cd_update: another velocity inside": ("speeds + first + (batch", "weights + first + (batch", cd_update_check),
    "cd_update: the model's weight": ("scale(sums, -model_weight)", "scale(sums, model_weight)", cd_update_check),
    "cd_update: hidden sums one block off":
        ("sums.columns[block][2 * half]", "sums.columns[1 - block][2 * half]", cd_update_check),
    "cd_update: half of the visible sums": ("sums.rows[2 * half]", "sums.rows[0]", cd_update_check),
}


@pytest.mark.skipif(runtime.why_not() is not None, reason=f"kernels on the CPU: {runtime.why_not()}")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_seen(fault):
    assert sees_fault(*FAULTS[fault], tiles="large", architecture=wgmma.ARCHITECTURE)
