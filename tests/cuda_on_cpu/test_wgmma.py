"""The stand-ins of wgmma.cuh report what would be wrong or would hang on a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn.cuda.door import kernels_folder
from gpudbn.cuda.wgmma import TensorMap, padded
from tests.cuda_on_cpu import runtime

pytestmark = pytest.mark.skipif(runtime.why_not() is not None, reason=f"kernels on the CPU: {runtime.why_not()}")

HEADERS = "".join((kernels_folder() / name).read_text() for name in ("mma.cuh", "wgmma.cuh"))
KERNELS = HEADERS.replace('#include "mma.cuh"', "") + r"""
// Copies a box to shared memory and out again, as it lies there.
extern "C" __global__ void box(unsigned short* out, const __grid_constant__ TensorMap map, int x, int y, int announced,
                               int waits)
{
    extern __shared__ unsigned char dynamic_shared[];
    u32 start = (shared_address(dynamic_shared) + 1023) / 1024 * 1024, barrier = start + 64 * 128;
    unsigned short* here = reinterpret_cast<unsigned short*>(dynamic_shared + (start - shared_address(dynamic_shared)));
    if (threadIdx.x == 0) barrier_init(barrier, 1);
    barrier_init_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        barrier_arrive_announcing(barrier, announced);
        copy_box(start, map, x, y, barrier);
    }
    if (waits) barrier_wait(barrier, 0);
    for (int i = threadIdx.x; i < 64 * 64; i += blockDim.x) out[i] = here[i];
    barrier_wait(barrier, 0);
}

extern "C" __global__ void arrivals(int arrivals)
{
    extern __shared__ unsigned char dynamic_shared[];
    u32 barrier = shared_address(dynamic_shared);
    if (threadIdx.x == 0) barrier_init(barrier, 31);
    __syncthreads();
    if (threadIdx.x < arrivals) barrier_arrive(barrier);
    barrier_wait(barrier, 0);
    barrier_wait(barrier, 0);  // as often as one likes, until the next phase has ended
}

extern "C" __global__ void product(float* out, u64 descriptor, int fenced)
{
    float sums[4] = {}, more[128];
    if (fenced) wgmma_fence();
    wgmma_64x8<false>(sums, descriptor, descriptor);
    wgmma_commit();
    wgmma_wait(more);
    out[threadIdx.x] = sums[0];
}

extern "C" __global__ void misplaced(const __grid_constant__ TensorMap map)
{
    extern __shared__ unsigned char dynamic_shared[];
    copy_box(shared_address(dynamic_shared), map, 0, 0, shared_address(dynamic_shared) + 2048);
}
"""


@pytest.fixture(scope="module")
def module():
    return runtime.Module(KERNELS)


@pytest.fixture(params=runtime.SCHEDULES)
def schedule(request):
    with runtime.scheduled(request.param):
        yield request.param


def numbers(rows, columns):
    """A padded matrix of different numbers, its padding too."""
    matrix = padded(np, rows, columns)
    matrix.base[:] = np.arange(1, matrix.base.size + 1).reshape(matrix.base.shape)
    return matrix


def map_of(matrix, box_rows=64):
    return runtime.encode(TensorMap(matrix.ctypes.data, *matrix.shape, matrix.strides[0], box_rows))


def copied(module, matrix, x, y, announced=64 * 128, waits=1):
    out = np.zeros((64, 64), np.uint16)
    module.get_function("box")((1,), (32,), (out, map_of(matrix), *map(np.int32, (x, y, announced, waits))),
                               shared_mem=9 << 10)
    return out


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize(("x", "y"), [(0, 0), (64, 64), (40, 3), (-5, -7), (1000, 2)])
def test_a_box_is_swizzled_and_zero_outside(module, x, y):
    matrix = numbers(100, 75)
    whole = np.zeros((64, 64), np.uint16)
    for r in range(64):
        for c in range(64):
            if 0 <= y + r < 100 and 0 <= x + c < 75:
                whole[r, c] = matrix[y + r, x + c]
    out = copied(module, matrix, x, y).reshape(64, 8, 8)  # row, 16 bytes, value
    for r in range(64):
        pieces = [out[r, piece ^ r % 8] for piece in range(8)]
        assert np.array_equal(np.concatenate(pieces), whole[r])


def test_who_does_not_wait_reads_what_is_not_a_number(module):
    found = []
    for name in runtime.SCHEDULES:
        with runtime.scheduled(name):
            found.append((copied(module, numbers(64, 64), 0, 0, waits=0) == 0xFFFF).any())
    assert any(found)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("bytes_announced", [64 * 128 - 128, 64 * 128 + 128])
def test_bytes_must_be_those_announced(module, bytes_announced):
    """More are waited for in vain; fewer end a phase that is not the last."""
    if bytes_announced > 64 * 128:
        with pytest.raises(runtime.KernelError, match=r"deadlock: 32 threads wait"):
            copied(module, numbers(64, 64), 0, 0, announced=bytes_announced)
    else:
        with pytest.raises(runtime.KernelError, match=r"more bytes than were announced"):
            copied(module, numbers(64, 64), 0, 0, announced=bytes_announced)


@pytest.mark.usefixtures("schedule")
def test_arrivals_are_counted(module):
    arrivals = module.get_function("arrivals")
    arrivals((2,), (40,), (np.int32(31),), shared_mem=64)
    with pytest.raises(runtime.KernelError, match=r"deadlock: 40 threads wait for others that will not come"):
        arrivals((1,), (40,), (np.int32(30),), shared_mem=64)


@pytest.mark.parametrize(("descriptor", "fenced", "message"), [
    (1 << 62 | 9, 0, "products need a fence before the first"),
    (2 << 62 | 9, 1, "a descriptor must say 128-byte swizzle from its start"),
    (1 << 62 | 1 << 49 | 9, 1, "a descriptor must say 128-byte swizzle from its start"),
    (1 << 62 | 3000, 1, r"2 bytes at \d+ must be at a multiple of 2 within shared memory"),
])
def test_wrong_products_are_errors(module, descriptor, fenced, message):
    with pytest.raises(runtime.KernelError, match=message):
        module.get_function("product")((1,), (128,), (np.zeros(128, np.float32), np.uint64(descriptor),
                                                      np.int32(fenced)), shared_mem=4096)


def test_a_copy_off_the_pattern_is_an_error(module):
    message = r"8192 bytes at \d+ must be at a multiple of 1024 within shared memory"
    with pytest.raises(runtime.KernelError, match=message):
        module.get_function("misplaced")((1,), (32,), (map_of(numbers(64, 64)),), shared_mem=9 << 10)
