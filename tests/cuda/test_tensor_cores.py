"""The products of ``product_mma.cuh``, as ``half_step.cu`` makes them: rounded operands, float64 as the judge."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from gpudbn import reference
from gpudbn.cuda.door import Unit
from gpudbn.cuda.layers import TENSOR_TILES
from gpudbn.precision import TENSOR_CORES
from tests.cuda.checks import (
    COLUMNS,
    EPS,
    NEAR,
    ON_CPU,
    ON_GPU,
    ONE_SCHEDULE,
    SMALL_TILES,
    Arrays,
    barriers,
    sees_fault,
)
from tests.cuda.test_layers import (
    CD_SIZES,
    REAL_SIZES,
    both_ways,
    cd_case,
    check_cd_sums,
    check_cd_update,
    check_half_step,
    exact_product,
    exact_sums,
)
from tests.cuda_on_cpu import runtime
from tests.helpers import assert_close

# B, n, m: one, primes, whole tiles, multiples of 4 with tails; and more than one of the large tiles
SIZES = [(1, 1, 1), (17, 131, 37), (64, 128, 64), (70, 200, 92), (131, 37, 269), (132, 36, 260)]

in_every_precision = pytest.mark.parametrize("precision", TENSOR_CORES)


@pytest.fixture(params=list(TENSOR_TILES))
def tensor_launcher(launcher, request):
    """The launcher with one tile for tensor cores."""
    found = copy.copy(launcher)
    found.tensor_tiles = {request.param: TENSOR_TILES[request.param]}
    return found


def binary(B, n, seed=0):
    return (np.random.default_rng([B, n, seed]).random((B, n)) < 0.3).astype(np.float32)


@SMALL_TILES
@both_ways
def test_half_step(tensor_launcher, transpose):
    for sizes in SIZES:
        check_half_step(tensor_launcher, *sizes, transpose=transpose, precision="bf16x2")


@ONE_SCHEDULE
@SMALL_TILES
@both_ways
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_half_step_in_other_precisions(tensor_launcher, transpose, precision):
    for sizes in SIZES:
        check_half_step(tensor_launcher, *sizes, transpose=transpose, precision=precision)


@ONE_SCHEDULE
@SMALL_TILES
@both_ways
@in_every_precision
def test_half_step_of_zeros_and_ones(tensor_launcher, transpose, precision):
    """They have no low part: a product is left out. One value elsewhere that has one calls for it."""
    x = binary(37, 200)
    check_half_step(tensor_launcher, 37, 200, 70, transpose=transpose, precision=precision, x=x)
    for r, i in [(36, 199), (3, 40)]:
        x[r, i] = 1 / 3
    check_half_step(tensor_launcher, 37, 200, 70, transpose=transpose, precision=precision, x=x)


PLACES = """
template <int LINES, Neighbours N> __device__ void places(int* read, int* written)
{
    using P = Piece<LINES, N>;
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {  // as read() goes, in the first span and chunk
            int line = lane / 4 * 4 + (N == ALONG_DEPTH ? i : 0), k = lane % 4 * 4 + (N == ALONG_DEPTH ? 0 : i);
            read[i * 32 + lane] = P::offset(line, k);
        }
    for (int quad = 0; quad < LINES * TILE_DEPTH / 4; quad++) {  // as copy() goes
        int row = quad / P::QUADS_IN_ROW, first = quad % P::QUADS_IN_ROW * 4;
        written[quad] = N == ALONG_DEPTH ? P::offset(row, first) : P::offset(first, row);
    }
}
extern "C" __global__ void lines(int* read, int* written) { places<TILE_COLUMNS, ALONG_LINES>(read, written); }
extern "C" __global__ void depth(int* read, int* written) { places<TILE_COLUMNS, ALONG_DEPTH>(read, written); }
"""


@pytest.mark.skipif(runtime.why_not() is not None, reason=f"kernels on the CPU: {runtime.why_not()}")
@pytest.mark.parametrize("size", TENSOR_TILES)
def test_no_two_lanes_are_in_the_way_of_each_other(size):
    """Shared memory serves eight lanes with 16 bytes each at a time, if these are of eight groups of banks."""
    tile = TENSOR_TILES[size]
    module = runtime.Module(Unit("product.cuh", {}, tile.constants("bf16")).source() + PLACES)
    for kernel in ("lines", "depth"):
        read, written = np.zeros(4 * 32, np.int32), np.zeros(tile.columns * tile.depth // 4, np.int32)
        module.get_function(kernel)((1,), (1,), (read, written))
        assert np.array_equal(np.sort(written), np.arange(written.size) * 4), "each quad has a place of its own"
        for places in (read, written):
            assert (np.sort(places.reshape(-1, 8) // 4 % 8) == np.arange(8)).all(), kernel


@ONE_SCHEDULE
@SMALL_TILES
@both_ways
@pytest.mark.parametrize(("column", "columns"), COLUMNS)
def test_half_step_of_a_shard(tensor_launcher, column, columns, transpose):
    for sizes in [(17, 31, 37), (9, 20, 64)]:
        check_half_step(tensor_launcher, *sizes, transpose=transpose, precision="bf16x2", column=column,
                        columns=columns)


@ONE_SCHEDULE
@SMALL_TILES
@both_ways
def test_half_step_without_one_output_and_at_odd_addresses(tensor_launcher, transpose):
    check_half_step(tensor_launcher, 17, 31, 37, transpose=transpose, precision="bf16x2", sample=False)
    check_half_step(tensor_launcher, 17, 31, 37, transpose=transpose, precision="bf16x2", mean=False)
    check_half_step(tensor_launcher, 17, 32, 36, transpose=transpose, precision="bf16x2", offset=1)


@ONE_SCHEDULE
@SMALL_TILES
@in_every_precision
def test_half_step_of_nothing_is_the_bias(tensor_launcher, precision):
    arrays = Arrays(tensor_launcher)
    p = arrays.empty(5, 3)
    tensor_launcher.half_step(None, p, arrays.empty(5, 0), arrays.empty(0, 3), arrays.put(np.zeros(3)),
                              precision=precision)
    assert (arrays.get(p) == 0.5).all()


@ONE_SCHEDULE
@SMALL_TILES
@both_ways
@in_every_precision
def test_half_step_is_its_twin(tensor_launcher, transpose, precision):
    """Means to the rounding of two float32 sums; samples but for those."""
    rng, arrays = np.random.default_rng(1), Arrays(tensor_launcher)
    B, n, m = 70, 131, 92
    x, W, bias = (a.astype(np.float32) for a in (rng.random((B, n)), rng.normal(0, 0.3, (n, m)), rng.normal(0, 1, m)))
    given = np.ascontiguousarray(W.T) if transpose else W
    sample, mean, twin_sample, twin_mean = arrays.empty(B, m), arrays.empty(B, m), *np.empty((2, B, m), np.float32)
    tensor_launcher.half_step(sample, mean, arrays.put(x), arrays.put(given), arrays.put(bias), transpose=transpose,
                              precision=precision, **NEAR)
    reference.half_step(twin_sample, twin_mean, x, given, bias, transpose=transpose, precision=precision, **NEAR)
    rounding = 2 * (exact_product(x, W, precision)[1] + EPS * (2 + np.abs(bias)))
    assert_close(arrays.get(mean) / rounding, twin_mean / rounding, atol=1.0)
    assert (arrays.get(sample) != twin_sample).mean() < 1e-3


@ONE_SCHEDULE
@SMALL_TILES
@pytest.mark.parametrize(("grey", "lost"), [(False, 2.0**-17), (True, 2.0**-16)])
def test_two_bf16_are_nearly_float32(tensor_launcher, grey, lost):
    """What is lost of every product adds up like a random walk; of a mean, a quarter at most."""
    rng, arrays = np.random.default_rng(2), Arrays(tensor_launcher)
    B, n, m = 40, 784, 68
    W, bias = rng.normal(0, 0.1, (n, m)).astype(np.float32), rng.normal(0, 1, m).astype(np.float32)
    x = rng.random((B, n), np.float32) if grey else binary(B, n)
    mean = arrays.empty(B, m)
    tensor_launcher.half_step(None, mean, arrays.put(x), arrays.put(W), arrays.put(bias), precision="bf16x2")
    rounding = exact_product(x, W, "bf16x2")[1]
    x, W = x.astype(np.float64), W.astype(np.float64)
    exact = 1 / (1 + np.exp(-(x @ W + bias)))
    error = (6 * lost * np.sqrt(x**2 @ W**2) + rounding) / 4 + EPS
    assert error.max() < (2e-4 if grey else 6e-5)
    assert_close(arrays.get(mean) / error, exact / error, atol=1.0)


# --------------------------------------------------------------------------------------- gradient and the step


@SMALL_TILES
def test_cd_sums(tensor_launcher):
    for sizes in [*CD_SIZES[1:], (131, 257, 70, 70)]:
        check_cd_sums(tensor_launcher, *sizes, precision="bf16x2")


@ONE_SCHEDULE
@SMALL_TILES
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_cd_sums_in_other_precisions(tensor_launcher, precision):
    for sizes in CD_SIZES:
        check_cd_sums(tensor_launcher, *sizes, precision=precision)


@ONE_SCHEDULE
@SMALL_TILES
@in_every_precision
def test_cd_sums_of_samples_are_exact(tensor_launcher, precision):
    check_cd_sums(tensor_launcher, 37, 131, 41, 41, w=1.0, binary=True, precision=precision)


@ONE_SCHEDULE
@SMALL_TILES
@in_every_precision
def test_cd_sums_of_centred_units_and_at_odd_addresses(tensor_launcher, precision):
    for sizes in [(37, 131, 17, 5), (63, 31, 5, 5), (62, 30, 5, 5), (127, 255, 3, 3)]:
        check_cd_sums(tensor_launcher, *sizes, centred=True, precision=precision)
    check_cd_sums(tensor_launcher, 32, 36, 17, 17, offset=1, precision=precision)


@ONE_SCHEDULE
@SMALL_TILES
@in_every_precision
def test_centred_samples_lose_nothing(tensor_launcher, precision):
    """Their offsets are multiples of 1/256: every product is exact, and so is their sum."""
    rng, arrays, (n, m, rows) = np.random.default_rng(4), Arrays(tensor_launcher), (37, 31, 50)
    v, h = (x.astype(np.float64) for x in cd_case(n, m, rows, rows, binary=True))
    v, h = v - rng.integers(0, 257, n) / 256, h - rng.integers(0, 257, m) / 256
    dW = arrays.empty(n, m)
    tensor_launcher.cd_sums(dW, arrays.empty(n), arrays.empty(m), arrays.put(v), arrays.put(h), rows,
                            precision=precision)
    assert np.array_equal(arrays.get(dW), v[:rows].T @ h[:rows] - v[rows:].T @ h[rows:])


@SMALL_TILES
def test_cd_update(tensor_launcher):
    for sizes in CD_SIZES[1:4]:
        check_cd_update(tensor_launcher, *sizes, precision="bf16x2")


@ONE_SCHEDULE
@SMALL_TILES
@in_every_precision
def test_cd_update_in_every_precision(tensor_launcher, precision):
    check_cd_update(tensor_launcher, 131, 67, 41, 7, precision=precision)
    check_cd_update(tensor_launcher, 37, 131, 17, 5, centred=True, precision=precision)
    check_cd_update(tensor_launcher, 32, 36, 17, 17, offset=1, momentum=0.0, decay=0.0, precision=precision)


@ONE_SCHEDULE
@SMALL_TILES
@in_every_precision
def test_cd_sums_are_their_twin(tensor_launcher, precision):
    """To the rounding of two float32 sums; also of centred units."""
    arrays, (n, m, rows, C) = Arrays(tensor_launcher), (67, 92, 41, 17)
    v, h = cd_case(n, m, rows, C)
    ones = np.random.default_rng(3).normal(1, 0.5, 2 * (rows + C)).astype(np.float32)
    for units in (None, ones):
        shapes = [(n, m), (n,), (m,), (n + m,)][: 3 if units is None else 4]
        found, twin = [arrays.empty(*shape) for shape in shapes], [np.empty(shape, np.float32) for shape in shapes]
        for call, out, a, b, of in ((tensor_launcher.cd_sums, found, arrays.put(v), arrays.put(h), arrays.put(ones)),
                                    (reference.cd_sums, twin, v, h, ones)):
            centred = {} if units is None else {"ones": of, "moved": out[3]}
            call(*out[:3], a, b, rows, model_weight=rows / C, precision=precision, **centred)
        got, expected = (np.concatenate([np.ravel(x) for x in parts])
                         for parts in ([arrays.get(x) for x in found], twin))
        error = 2 * exact_sums(v, h, rows, rows / C, units, precision)[1][: got.size]
        assert_close(got / error, expected / error, atol=1.0)


@ON_CPU
@SMALL_TILES
def test_the_size_of_a_real_layer(launcher):
    check_half_step(launcher, 100, 784, 500, precision="bf16x2", x=binary(100, 784))
    check_half_step(launcher, 100, 500, 784, precision="bf16x2", x=binary(100, 500), transpose=True)
    check_cd_update(launcher, 784, 500, 100, 100, precision="bf16x2")


@ON_GPU
@SMALL_TILES
@both_ways
@in_every_precision
def test_half_step_of_real_layers(tensor_launcher, transpose, precision):
    for B, n, m in REAL_SIZES:
        check_half_step(tensor_launcher, B, n, m, transpose=transpose, precision=precision)
        check_half_step(tensor_launcher, B, n, m, transpose=transpose, precision=precision, x=binary(B, n))


@ON_GPU
@SMALL_TILES
@in_every_precision
def test_gradients_of_real_layers(tensor_launcher, precision):
    for sizes in [(784, 500, 100, 100), (1031, 1009, 500, 300)]:
        check_cd_sums(tensor_launcher, *sizes, precision=precision)
        check_cd_update(tensor_launcher, *sizes, centred=True, precision=precision)
    check_cd_sums(tensor_launcher, 1031, 1009, 500, 500, w=1.0, binary=True, precision=precision)


# -------------------------------------------------------------------------------------------- planted faults


def half_step_check(launcher):
    for transpose in (False, True):
        check_half_step(launcher, 37, 396, 36, transpose=transpose, precision="bf16x2")  # pieces for all stages


def odd_check(launcher):
    for transpose in (False, True):
        check_half_step(launcher, 17, 131, 37, transpose=transpose, precision="bf16x2")


def shard_check(launcher):
    check_half_step(launcher, 17, 31, 37, column=7, columns=157, precision="bf16x2")


def tf32_check(launcher):
    check_half_step(launcher, 17, 131, 37, precision="tf32")


def cd_check(launcher):
    check_cd_sums(launcher, 37, 70, 150, 41, centred=True, precision="bf16x2")


def cd_update_check(launcher):
    check_cd_update(launcher, 37, 37, 41, 17, precision="bf16x2")


FAULTS = {  # name: text, what it becomes, the check that must see it
    "no wait": ("cp_async_wait<STAGES - 2>();", "", half_step_check),
    "a wait too short": ("cp_async_wait<STAGES - 2>();", "cp_async_wait<STAGES - 1>();", half_step_check),
    "a copy into the piece in use": ("start(piece + STAGES - 1);", "start(piece + STAGES);", half_step_check),
    "a piece's tail not guarded": ("inside && first < matrix.size ? 16 : 0", "inside ? 16 : 0", half_step_check),
    "an odd tail not guarded": ("first + j < matrix.size ? 4 : 0", "true ? 4 : 0", odd_check),
    "rows not guarded": ("&& first_row + row < matrix.rows;", ";", half_step_check),
    "taken for aligned": ("if (matrix.aligned)\n                cp", "if (true)\n                cp", odd_check),
    "not turned": ("(N == ALONG_DEPTH ? out[i][j] : out[j][i])", "out[i][j]", half_step_check),
    "another slice's terms": ("int k = slice * SLICE_DEPTH + chunk", "int k = chunk", half_step_check),
    "rows of an mma exchanged": ("a[2 * i + 1][s], a[2 * i][s + 1]", "a[2 * i][s + 1], a[2 * i + 1][s]",
                                 half_step_check),
    "columns of an mma exchanged": ("{b[j][s], b[j][s + 1]}", "{b[j][s + 1], b[j][s]}", half_step_check),
    "sums exchanged": ("int reg = r % 2 * 2 + c;", "int reg = c * 2 + r % 2;", half_step_check),
    "quads exchanged": ("4 * (2 * t + c);", "4 * (t + 4 * c);", half_step_check),
    "no low part of W": ("if (PARTS == 2) multiply(", "if (false) multiply(", half_step_check),
    "no low part of x": ("if (low_products) multiply(", "if (false) multiply(", half_step_check),
    "tf32 not rounded": ("part[0][i][s] = tf32(x[i][s]);", "part[0][i][s] = __float_as_uint(x[i][s]);", tf32_check),
    "draws: next block": ("(column / 4 + (u64)q)", "(column / 4 + (u64)q + 1)", half_step_check),
    "draws: start of a shard": ("(column / 4 + (u64)q)", "((u64)q)", shard_check),
}
FAULTS |= {
    "gradient: sign": (": -model_weight", ": model_weight", cd_update_check),
    "gradient: ones behind the last row": ("if (k < K) set_ones(quad, line, n,", "set_ones(quad, line, n,", cd_check),
    "gradient: units of another row": ("adjust_b(quad, first_column + line, piece * TILE_DEPTH + k)",
                                       "adjust_b(quad, first_column + line, k)", cd_check),
    "gradient: units of another column": ("adjust_a(quad, first_row + line,", "adjust_a(quad, line,", cd_check),
    "gradient: no low part of h": ("if (PARTS == 2) multiply(", "if (false) multiply(", cd_check),
    "gradient: no low part of v": ("if (low_products) multiply(", "if (false) multiply(", cd_check),
    "gradient: biases exchanged": ("(visible ? p.b : p.c)[i]", "(visible ? p.c : p.b)[i]", cd_update_check),
}
FAULTS |= {f"no barrier, {line.partition('// ')[2]}": (line, "", half_step_check)
           for line in barriers("product_mma.cuh")}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_seen(fault):
    assert sees_fault(*FAULTS[fault])
