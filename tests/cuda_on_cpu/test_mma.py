"""The instructions of mma.cuh: fragments as the PTX ISA lays them out, on the CPU's stand-in and on a GPU alike."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn.cuda.door import kernels_folder
from tests.cuda.test_compile import ARCHITECTURES, compiled, why_no_compiler
from tests.cuda_on_cpu import runtime
from tests.helpers import nearest

MMA = r"""
template <class Sum, class Instruction>
__device__ void one(Sum* d, const unsigned* a, const unsigned* b, Instruction mma)
{
    int lane = threadIdx.x;
    Sum sum[4];
    unsigned a_fragment[4], b_fragment[2];
    for (int i = 0; i < 4; i++) sum[i] = d[4 * lane + i], a_fragment[i] = a[4 * lane + i];
    for (int i = 0; i < 2; i++) b_fragment[i] = b[2 * lane + i];
    mma(sum, a_fragment, b_fragment);
    for (int i = 0; i < 4; i++) d[4 * lane + i] = sum[i];
}
#define ONE(instruction) [](auto& d, auto& a, auto& b) { instruction(d, a, b); }
extern "C" __global__ void bf16(float* d, const unsigned* a, const unsigned* b) { one(d, a, b, ONE(mma_bf16)); }
extern "C" __global__ void f16(float* d, const unsigned* a, const unsigned* b) { one(d, a, b, ONE(mma_f16)); }
extern "C" __global__ void tf32_(float* d, const unsigned* a, const unsigned* b) { one(d, a, b, ONE(mma_tf32)); }
extern "C" __global__ void s8(int* d, const unsigned* a, const unsigned* b) { one(d, a, b, ONE(mma_s8)); }

// Rows of 8 values lie anywhere in x; `at` says where: of four matrices, of two, and both transposed.
extern "C" __global__ void matrices(unsigned* out, const unsigned short* x, const int* at)
{
    __shared__ __align__(16) unsigned short rows[64 * 8];
    int lane = threadIdx.x;
    for (int i = lane; i < 64 * 8; i += 32) rows[i] = x[i];
    __syncthreads();
    const unsigned short *four_row = rows + 8 * at[lane], *two_row = rows + (lane < 16 ? 8 * at[lane] : 1);
    unsigned four[4], two[2], four_trans[4], two_trans[2];
    ldmatrix(four, four_row);
    ldmatrix(two, two_row);
    ldmatrix_trans(four_trans, four_row);
    ldmatrix_trans(two_trans, two_row);
    for (int i = 0; i < 4; i++) out[12 * lane + i] = four[i], out[12 * lane + 6 + i] = four_trans[i];
    for (int i = 0; i < 2; i++) out[12 * lane + 4 + i] = two[i], out[12 * lane + 10 + i] = two_trans[i];
}

// d (16, 8) = a (16, 16) b: ldmatrix gives the fragments that mma wants, of b^T as it lies and of b transposed.
extern "C" __global__ void products(float* d, float* d_trans, const float* a, const float* b)
{
    __shared__ __align__(16) unsigned a_rows[16 * 8], b_rows[16 * 4], b_columns[8 * 8];
    int lane = threadIdx.x;
    for (int i = lane; i < 16 * 8; i += 32) a_rows[i] = bf16_pair(a[2 * i], a[2 * i + 1]);
    for (int i = lane; i < 16 * 4; i += 32) {
        b_rows[i] = bf16_pair(b[2 * i], b[2 * i + 1]);
        int column = i / 8, k = i % 8 * 2;
        b_columns[i] = bf16_pair(b[k * 8 + column], b[(k + 1) * 8 + column]);
    }
    __syncthreads();
    unsigned a_fragment[4], b_fragment[2];
    float sum[4] = {}, sum_trans[4] = {};
    ldmatrix(a_fragment, a_rows + lane % 16 * 8 + lane / 16 * 4);
    ldmatrix(b_fragment, b_columns + lane % 8 * 8 + lane / 8 % 2 * 4);
    mma_bf16(sum, a_fragment, b_fragment);
    ldmatrix_trans(b_fragment, b_rows + lane % 16 * 4);
    mma_bf16(sum_trans, a_fragment, b_fragment);
    for (int i = 0; i < 4; i++) {
        int at = (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2;
        d[at] = sum[i], d_trans[at] = sum_trans[i];
    }
}

template <int BYTES> __device__ void copy(float* out, const float* x, int bytes)
{
    __shared__ __align__(16) float shared[32 * BYTES / 4];
    float* mine = shared + threadIdx.x * BYTES / 4;
    cp_async<BYTES>(mine, x + threadIdx.x * BYTES / 4, bytes);
    cp_async_commit();
    cp_async_wait<0>();
    for (int i = 0; i < BYTES / 4; i++) out[threadIdx.x * BYTES / 4 + i] = mine[i];
}
extern "C" __global__ void copies_4(float* out, const float* x, const int* bytes)
{
    copy<4>(out, x, bytes[threadIdx.x]);
}
extern "C" __global__ void copies_8(float* out, const float* x, const int* bytes)
{
    copy<8>(out, x, bytes[threadIdx.x]);
}
extern "C" __global__ void copies_16(float* out, const float* x, const int* bytes)
{
    copy<16>(out, x, bytes[threadIdx.x]);
}

// What may be read when: two groups of one copy each, and a third copy that no group has.
extern "C" __global__ void arrivals(float* out, const float* x)
{
    __shared__ float shared[3];
    if (threadIdx.x > 0) return;
    for (int i = 0; i < 3; i++) {
        cp_async<4>(shared + i, x + i);
        if (i < 2) cp_async_commit();
    }
    for (int i = 0; i < 3; i++) out[i] = shared[i];
    cp_async_wait<1>();
    for (int i = 0; i < 3; i++) out[3 + i] = shared[i];
    cp_async_wait<0>();
    for (int i = 0; i < 3; i++) out[6 + i] = shared[i];
}

extern "C" __global__ void rounded(unsigned* pair, unsigned* single, unsigned* high, unsigned* low, const float* x,
                                   int pairs)
{
    for (int i = threadIdx.x; i < pairs; i += 32) {
        pair[i] = bf16_pair(x[2 * i], x[2 * i + 1]);
        split_pair(x[2 * i], x[2 * i + 1], high[i], low[i]);
        for (int s = 0; s < 2; s++) single[2 * i + s] = tf32(x[2 * i + s]);
    }
}
extern "C" __global__ void halves(unsigned* pair, float* back, unsigned* product, const float* x, int pairs)
{
    for (int i = threadIdx.x; i < pairs; i += 32) {
        pair[i] = f16_pair(x[2 * i], x[2 * i + 1]);
        back[2 * i] = f16_first(pair[i]), back[2 * i + 1] = f16_second(pair[i]);
        product[i] = f16_product(pair[i], f16_pair(x[0], x[1]));
    }
}
"""

FAULTY = r"""
extern "C" __global__ void divergent(float* x)
{
    unsigned a[4] = {}, b[2] = {};
    float d[4] = {};
    if (threadIdx.x < 16)
        mma_bf16(d, a, b);
    else
        mma_bf16(d, a, b);
    x[threadIdx.x] = d[0];
}
extern "C" __global__ void incomplete(float* x)
{
    unsigned a[4] = {}, b[2] = {};
    float d[4] = {};
    if (threadIdx.x == 7) return;
    mma_bf16(d, a, b);
    x[threadIdx.x] = d[0];
}
extern "C" __global__ void odd_row(float* x)
{
    __shared__ __align__(16) float shared[256];
    unsigned r[4];
    ldmatrix(r, shared + 4 * threadIdx.x + (threadIdx.x == 9 ? 2 : 0));
    x[threadIdx.x] = r[0];
}
extern "C" __global__ void odd_source(float* x)
{
    __shared__ __align__(16) float shared[4];
    cp_async<16>(shared, x + 1);
}
"""


def text(kernels=MMA):
    return (kernels_folder() / "mma.cuh").read_text().replace("#pragma once", "") + kernels


on_cpu = pytest.mark.skipif(runtime.why_not() is not None, reason=f"kernels on the CPU: {runtime.why_not()}")


@pytest.fixture(params=[*(pytest.param(name, marks=on_cpu) for name in runtime.SCHEDULES),
                        pytest.param("gpu", marks=pytest.mark.gpu)])
def launch(request):
    """Runs a kernel of one warp, here under a schedule or on a GPU; arrays and numbers are of NumPy, outputs too."""
    def run(kernel, *arguments):
        if request.param == "gpu":
            import cupy

            given = [cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in arguments]
            cupy.RawModule(code=text()).get_function(kernel)((1,), (32,), tuple(given))
            for here, there in zip(arguments, given, strict=True):
                if isinstance(here, np.ndarray):
                    here[...] = there.get()
        else:
            with runtime.scheduled(request.param):
                runtime.Module(text()).get_function(kernel)((1,), (32,), arguments)

    run.on_gpu = request.param == "gpu"
    return run


# ------------------------------------------------------------------------------------------------ the formats


def bf16_values(words):
    """The two values of each word, the low half first."""
    return (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def test_rounding(launch):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 1 << 32, 4096, dtype=np.uint32).view(np.float32)
    x = x[(np.abs(x) > 2.0**-100) & (np.abs(x) < 2.0**126)]
    halves = np.concatenate([(rng.integers(0, 1 << 16, 500, dtype=np.uint32) << 16 | 0x8000) % 0x7F000000,
                             (rng.integers(0, 1 << 19, 501, dtype=np.uint32) << 13 | 0x1000) % 0x7F000000])
    halves = halves[halves > 0x10000000].view(np.float32)  # between two neighbours of bf16, and of tf32
    x = np.concatenate([x, halves, -halves, [0, 1, -1, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan]]).astype(np.float32)
    x = x[len(x) % 2 :]
    pair, single, high, low = (np.zeros(size, np.uint32) for size in (len(x) // 2, len(x), len(x) // 2, len(x) // 2))
    launch("rounded", pair, single, high, low, x, np.int32(len(x) // 2))
    assert np.array_equal(bf16_values(pair), nearest(x, 8, ties_to_even=True), equal_nan=True)
    upper = (single & 0xFFFFE000).view(np.float32)  # all that mma_tf32 looks at
    assert np.array_equal(upper, nearest(x, 11, ties_to_even=False), equal_nan=True)
    assert np.array_equal(high, pair)
    finite = np.abs(x) < 3e38
    exact, high, low = (values[finite].astype(np.float64) for values in (x, bf16_values(high), bf16_values(low)))
    assert (np.abs(exact - high - low) <= 2.0**-17 * np.abs(exact)).all()
    assert (np.abs(exact - high - low) > 2.0**-18 * np.abs(exact)).any()  # and the bound is no idle one


# --------------------------------------------------------------------------- fragments, as the PTX ISA states them

LANE = np.arange(32)[:, None]
GROUP, THREAD = LANE // 4, LANE % 4  # groupID, threadID_in_group


def c_places(i):
    """Row and column of c_i and d_i, for all three."""
    return np.where(i < 2, GROUP, GROUP + 8), THREAD * 2 + (i & 1)


OF_16_BITS = (lambda i: (np.where((i < 2) | ((i >= 4) & (i < 6)), GROUP, GROUP + 8),
                         THREAD * 2 + (i & 1) + np.where(i < 4, 0, 8)),
              lambda i: (THREAD * 2 + (i & 1) + np.where(i < 2, 0, 8), GROUP + 0 * i))
INSTRUCTIONS = {  # kernel: K, type of a value, places of a_i, places of b_i; i counts values, not registers
    "bf16": (16, np.uint16, *OF_16_BITS),
    "f16": (16, np.float16, *OF_16_BITS),
    "tf32_": (8, np.float32,
              lambda i: (np.where((i == 0) | (i == 2), GROUP, GROUP + 8), np.where(i < 2, THREAD, THREAD + 4)),
              lambda i: (np.where(i == 0, THREAD, THREAD + 4), GROUP + 0 * i)),
    "s8": (32, np.int8,
           lambda i: (np.where((i < 4) | ((i >= 8) & (i < 12)), GROUP, GROUP + 8),
                      THREAD * 4 + (i & 3) + np.where(i < 8, 0, 16)),
           lambda i: (THREAD * 4 + (i & 3) + np.where(i < 4, 0, 16), GROUP + 0 * i)),
}


@pytest.mark.parametrize("kernel", INSTRUCTIONS)
def test_mma(launch, kernel):
    K, of_value, a_places, b_places = INSTRUCTIONS[kernel]
    rng = np.random.default_rng(K)
    a, b, c = (rng.integers(-100, 101, shape) for shape in ((16, K), (K, 8), (16, 8)))
    per_register = 4 // np.dtype(of_value).itemsize

    def registers(matrix, places, count):
        values = matrix[places(np.arange(count * per_register)[None, :])]
        if of_value is np.uint16:
            values = values.astype(np.float32).view(np.uint32) >> 16  # bf16 holds these numbers exactly
        return np.ascontiguousarray(values.astype(of_value)).view(np.uint32)

    i = np.arange(4)[None, :]
    d = c[c_places(i)].astype(np.int32 if kernel == "s8" else np.float32)
    launch(kernel, d, registers(a, a_places, 4), registers(b, b_places, 2))
    assert np.array_equal(d, (a @ b + c)[c_places(i)])


def test_float16(launch):
    """Rounding as NumPy's, from subnormal numbers to infinity; products of two are rounded once."""
    rng = np.random.default_rng(0)
    x = np.ldexp(rng.choice([-1, 1], 4000) * (1 + rng.random(4000)), rng.integers(-28, 17, 4000))
    ties = (rng.integers(1, 1 << 15, 500) * 2 + 1).astype(np.float64) * 2.0**-25  # between two neighbours
    x = np.concatenate([[0.3, 2.0**-9], x, ties, -ties, [0, 65504, 65519, 65520, np.inf, -np.inf]]).astype(np.float32)
    pair, back, product = np.zeros(len(x) // 2, np.uint32), np.zeros_like(x), np.zeros(len(x) // 2, np.uint32)
    launch("halves", pair, back, product, x, np.int32(len(x) // 2))
    with np.errstate(over="ignore"):
        halves = x.astype(np.float16)
        products = (halves.reshape(-1, 2) * halves[:2]).ravel()
    assert np.array_equal(pair.view(np.float16), halves)
    assert np.array_equal(back, halves.astype(np.float32))
    assert np.array_equal(product.view(np.float16), products)


def test_mma_of_float16_takes_subnormal_numbers(launch):
    a = np.full((32, 4), 0x00010001, np.uint32)  # 2^-24
    b = np.full((32, 2), 0x00030003, np.uint32)  # 3 2^-24
    d = np.zeros((32, 4), np.float32)
    launch("f16", d, a, b)
    assert (d == 16 * 3 * 2.0**-48).all()


def test_mma_of_tf32_ignores_the_lower_bits(launch):
    a = np.full((32, 4), 0x3F801FFF, np.uint32)  # 1 and the thirteen bits below tf32
    b = np.full((32, 2), 0x3F800000, np.uint32)
    d = np.zeros((32, 4), np.float32)
    launch("tf32_", d, a, b)
    assert (d == 8).all()


def test_mma_of_int8_wraps_round(launch):
    a, b = np.full((32, 4), 0x01010101, np.uint32), np.full((32, 2), 0x01010101, np.uint32)
    d = np.full((32, 4), 2**31 - 1, np.int32)
    launch("s8", d, a, b)
    assert (d == -(2**31) + 31).all()


def test_ldmatrix(launch):
    rng = np.random.default_rng(0)
    x, at = rng.integers(0, 1 << 16, (64, 8), dtype=np.uint16), rng.permutation(64)[:32].astype(np.int32)
    out = np.zeros((32, 12), np.uint32)
    launch("matrices", out, x, at)
    matrix = x[at].reshape(4, 8, 8)
    row, column = np.arange(32) // 4, np.arange(32) % 4 * 2
    pair = np.stack([matrix[:, row, column], matrix[:, row, column + 1]], -1)  # (matrix, lane, first and second)
    turned = np.stack([matrix[:, column, row], matrix[:, column + 1, row]], -1)
    expected = np.concatenate([pair, pair[:2], turned, turned[:2]]).transpose(1, 0, 2)
    assert np.array_equal(out.view(np.uint16), expected.reshape(32, 24))


def test_ldmatrix_gives_what_mma_takes(launch):
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-100, 101, shape).astype(np.float32) for shape in ((16, 16), (16, 8)))
    d, d_trans = np.zeros((16, 8), np.float32), np.zeros((16, 8), np.float32)
    launch("products", d, d_trans, a, b)
    assert np.array_equal(d, a @ b)
    assert np.array_equal(d_trans, a @ b)


# ------------------------------------------------------------------------------------------ asynchronous copies


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_read_so_many_bytes_and_fill_with_zeros(launch, size):
    rng = np.random.default_rng(size)
    x, bytes_ = rng.random((32, size // 4), np.float32), rng.integers(0, size // 4 + 1, 32).astype(np.int32) * 4
    out = np.full_like(x, np.nan)
    launch(f"copies_{size}", out, x, bytes_)
    assert np.array_equal(out, np.where(4 * np.arange(size // 4) < bytes_[:, None], x, 0))


def test_copies_arrive_with_their_group(launch):
    x, out = np.array([2, 3, 5], np.float32), np.zeros((3, 3), np.float32)
    launch("arrivals", out, x)
    certain = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0]], bool)  # after no wait, wait<1>, wait<0>
    assert np.array_equal(out[certain], np.broadcast_to(x, (3, 3))[certain])
    if not launch.on_gpu:  # there the others may have arrived
        assert np.isnan(out[~certain]).all()


@on_cpu
@pytest.mark.parametrize("schedule", runtime.SCHEDULES)
@pytest.mark.parametrize(("kernel", "message"), [
    ("divergent", r"lanes of a warp are at .*:\d+ and at .*:\d+|lanes of a warp disagree"),
    ("incomplete", r"an instruction for whole warps needs all 32 lanes"),
    ("odd_row", r"a row of a matrix must be at a multiple of 16 bytes"),
    ("odd_source", r"the source of a copy must be at a multiple of 16 bytes"),
])
def test_what_is_undefined_on_a_gpu_is_an_error(schedule, kernel, message):
    with runtime.scheduled(schedule), pytest.raises(runtime.KernelError, match=message):
        runtime.Module(text(FAULTY)).get_function(kernel)((1,), (32,), (np.zeros(64, np.float32),))


@pytest.mark.skipif(why_no_compiler() is not None, reason=f"kernels are not compiled: {why_no_compiler()}")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_instruction_compiles(architecture):
    assert len(compiled(text(), architecture)) == MMA.count("__global__")
