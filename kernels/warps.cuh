// warps: work that is shared out among whole warps, and what the 32 lanes of one find together.
#pragma once

constexpr unsigned EVERY_LANE = 0xFFFFFFFFu;

// Calls visit(i, lane) for i from 0 to count, one warp each. A block must have whole warps.
template <class Visit>
__device__ __forceinline__ void every_warp(long long count, Visit visit)
{
    int lane = threadIdx.x % 32;
    long long step = (long long)gridDim.x * blockDim.x / 32;
    for (long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / 32; i < count; i += step) visit(i, lane);
}

// Every lane gets the combination of all 32, in the same order of sums.
template <class T, class Combine>
__device__ __forceinline__ T over_lanes(T value, Combine combine)
{
#pragma unroll
    for (int by = 16; by > 0; by /= 2) value = combine(value, __shfl_xor_sync(EVERY_LANE, value, by));
    return value;
}

template <class T> __device__ __forceinline__ T warp_sum(T value)
{
    return over_lanes(value, [](T a, T b) { return a + b; });
}

// A lane gets the sum of its own value and those of the lanes before it.
template <class T> __device__ __forceinline__ T warp_sum_so_far(T value, int lane)
{
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        T before = __shfl_up_sync(EVERY_LANE, value, by);
        if (lane >= by) value += before;
    }
    return value;
}
