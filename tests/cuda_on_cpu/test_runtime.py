"""The stand-in for a GPU does what a GPU does, and reports what would hang one."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda_on_cpu import runtime

pytestmark = pytest.mark.skipif(runtime.why_not() is not None, reason=f"kernels on the CPU: {runtime.why_not()}")

KERNELS = r"""
#include <cooperative_groups.h>

extern "C" __global__ void sum(float* out, const float* x, int size)       // shuffles, shared memory, an atomic
{
    __shared__ float sums[32];
    float s = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) s += x[i];
    for (int by = 16; by > 0; by /= 2) s += __shfl_down_sync(0xFFFFFFFFu, s, by);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = s;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    s = threadIdx.x < blockDim.x / 32 ? sums[threadIdx.x] : 0.0f;
    for (int by = 16; by > 0; by /= 2) s += __shfl_xor_sync(0xFFFFFFFFu, s, by);
    if (threadIdx.x == 0) atomicAdd(out, s);
}

extern "C" __global__ void bits(unsigned* out, const float* x, int size)   // votes
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned word = __ballot_sync(0xFFFFFFFFu, i < size && x[i] != 0.0f);
    if (threadIdx.x % 32 == 0 && i < size) out[i / 32] = word;
}

extern "C" __global__ void counts(int* out, const float* x)                // a vote of the block
{
    out[threadIdx.x] = __syncthreads_count(x[threadIdx.x] > 0.0f);
}

extern "C" __global__ void positions(int* out)                             // three dimensions
{
    int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    int position = block * blockDim.x * blockDim.y * blockDim.z + thread;
    out[position] = block * 1000 + threadIdx.z * 100 + threadIdx.y * 10 + threadIdx.x;
}

extern "C" __global__ void __launch_bounds__(64) turn(float* x)            // dynamic shared memory
{
    extern __shared__ unsigned char dynamic_shared[];
    float* shared = reinterpret_cast<float*>(dynamic_shared);
    float before = shared[threadIdx.x];
    __syncthreads();
    shared[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = before == before ? 0.0f : shared[blockDim.x - 1 - threadIdx.x];  // `before` was not a number
}

extern "C" __global__ void diffuse(float* x, float* y, int size, int times) // grid barriers
{
    auto grid = cooperative_groups::this_grid();
    for (int t = 0; t < times; t++) {
        for (int i = grid.thread_rank(); i < size; i += grid.size()) y[i] = x[i] + x[(i + 1) % size];
        grid.sync();
        for (int i = grid.thread_rank(); i < size; i += grid.size()) x[i] = 0.5f * y[i];
        grid.sync();
    }
}

extern "C" __global__ void no_barrier(float* x)
{
    __shared__ float shared[64];
    shared[threadIdx.x] = x[threadIdx.x];
    x[threadIdx.x] = shared[63 - threadIdx.x];
}

extern "C" __global__ void two_barriers(float* x)
{
    if (threadIdx.x < 16) __syncthreads();
    else {
        x[threadIdx.x] = 1;
        __syncthreads();
    }
}

extern "C" __global__ void lone_lane(float* x)
{
    if (threadIdx.x != 5) x[threadIdx.x] = __shfl_sync(0xFFFFFFFFu, x[threadIdx.x], 0);
    else __syncthreads();
}

extern "C" __global__ void two_masks(float* x)
{
    x[threadIdx.x] = __shfl_sync(threadIdx.x == 3 ? 0xFFu : 0xFFFFFFFFu, x[threadIdx.x], 0);
}

extern "C" __global__ void block_leaves()
{
    if (blockIdx.x > 0) cooperative_groups::this_grid().sync();
}
"""


@pytest.fixture(scope="module")
def module():
    return runtime.Module(KERNELS)


@pytest.fixture(scope="module")
def cooperative():
    return runtime.Module(KERNELS, enable_cooperative_groups=True)


@pytest.fixture(params=runtime.SCHEDULES)
def schedule(request):
    with runtime.scheduled(request.param):
        yield request.param


@pytest.mark.usefixtures("schedule")
def test_shuffles_and_atomics(module):
    x, out = np.random.default_rng(0).random(10007, np.float32), np.zeros(1, np.float32)
    module.get_function("sum")((7,), (256,), (out, x, np.int32(x.size)))
    assert abs(out[0] / x.sum(dtype=float) - 1) < 1e-6


@pytest.mark.usefixtures("schedule")
def test_votes(module):
    x = (np.random.default_rng(0).random(1000) < 0.5).astype(np.float32)
    out = np.zeros(32, np.uint32)
    module.get_function("bits")((4,), (256,), (out, x, np.int32(x.size)))
    assert np.array_equal(np.unpackbits(out.view(np.uint8), bitorder="little")[:1000], x)
    counts = np.zeros(70, np.int32)
    module.get_function("counts")((1,), (70,), (counts, x))
    assert (counts == x[:70].sum()).all()


def test_positions(module):
    out = np.zeros(2 * 3 * 2 * 30, np.int32)
    module.get_function("positions")((2, 3, 2), (5, 3, 2), (out,))
    block, z, y, x = np.indices((12, 2, 3, 5))
    assert np.array_equal(out, (block * 1000 + z * 100 + y * 10 + x).ravel())


@pytest.mark.usefixtures("schedule")
def test_dynamic_shared_memory_begins_as_not_a_number(module):
    x = np.arange(64, dtype=np.float32)
    module.get_function("turn")((1,), (64,), (x,), shared_mem=256)
    assert np.array_equal(x, np.arange(64)[::-1])


@pytest.mark.usefixtures("schedule")
def test_grid_barriers(cooperative):
    x = np.random.default_rng(0).random(1000, np.float32)
    expected = x.copy()
    cooperative.get_function("diffuse")((8,), (64,), (x, np.empty_like(x), np.int32(x.size), np.int32(20)))
    for _ in range(20):
        expected = np.float32(0.5) * (expected + np.roll(expected, -1))
    assert np.array_equal(x, expected)


def test_a_missing_barrier_shows_in_one_of_the_schedules(module):
    right = []
    for name in runtime.SCHEDULES:
        with runtime.scheduled(name):
            x = np.arange(64, dtype=np.float32)
            module.get_function("no_barrier")((1,), (64,), (x,))
            right.append(np.array_equal(x, np.arange(64)[::-1]))
    assert not all(right)


@pytest.mark.parametrize(("name", "message"), [
    ("two_barriers", r"block \(0, 0, 0\): thread \d+ is at the barrier of .*:\d+ while others are at .*:\d+"),
    ("lone_lane", r"deadlock: 32 threads wait for others that will not come; thread 0 at .*:\d+"),
    ("two_masks", r"lanes of a warp disagree on the mask|not in its own mask"),
])
@pytest.mark.usefixtures("schedule")
def test_what_would_hang_a_gpu_is_an_error(module, name, message):
    with pytest.raises(runtime.KernelError, match=message):
        module.get_function(name)((1,), (32,), (np.zeros(32, np.float32),))


def test_grid_barriers_that_would_hang_a_gpu_are_errors(module, cooperative):
    with pytest.raises(runtime.KernelError, match="a grid barrier needs a cooperative launch"):
        module.get_function("block_leaves")((3,), (32,), ())
    with pytest.raises(runtime.KernelError, match=r"waits at the grid barrier .* and other blocks have ended"):
        cooperative.get_function("block_leaves")((3,), (32,), ())


def test_arguments_are_held_to_the_parameters(module):
    bits, x, out = module.get_function("bits"), np.zeros(32, np.float32), np.zeros(1, np.uint32)
    for arguments, message in [
        ((out, x), "takes 3 arguments; got 2"),
        ((out, x, 32), "argument 2 must be an array or a NumPy scalar; got 32"),
        ((out, x, np.int64(32)), "argument 2 is i4; got int64"),
        ((out, x.astype(np.float64), np.int32(32)), r"argument 1 is \*f4; got an array of float64"),
    ]:
        with pytest.raises(TypeError, match=message):
            bits((1,), (32,), arguments)


def test_modules_do_not_share_variables():
    """One name, two sizes, as when a file is compiled with two tiles."""
    code = """
    inline float* shared_floats() { __shared__ float floats[SIZE]; return floats; }
    extern "C" __global__ void last(float* x)
    {
        shared_floats()[SIZE - 1] = x[0];
        x[0] = shared_floats()[SIZE - 1] + SIZE;
    }
    """
    for size in (8, 50000):
        x = np.ones(1, np.float32)
        runtime.Module(f"#define SIZE {size}\n" + code).get_function("last")((1,), (1,), (x,))
        assert x[0] == 1 + size


def test_what_does_not_compile_says_so():
    with pytest.raises(runtime.KernelError, match=r"does not compile.*nonsense"):
        runtime.Module("nonsense")
