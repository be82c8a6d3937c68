// gather: the rows of a minibatch, in the order of the epoch, from data that are on the device.
//
//     out[r, j] = scale data[order[first + offset + r], j]
//
// out     (B, n)    out
// data    (N, n)    in: float, half (as its bits) or bytes
// order   (count,)  in, or null: the rows as they stand, count = N
// offset  (1,)      in, or null: a position in device memory that is added to `first`, for launches that are repeated as they
//                   are in a CUDA graph
//
// A row that is not there (a position beyond `count`, an entry of `order` beyond N) becomes NaN: nothing else is read, and
// the parameters that are learned from it are seen to be not finite.
//
// Launch: one thread a quad of columns, 1-D, any number of blocks of any size; tail guarded.
// Numerics: one rounding, of the product; none where scale is 1.
// Twin: reference.gather
#include "quads.cuh"

typedef unsigned short half_bits;

__device__ __forceinline__ float value_of(float x) { return x; }
__device__ __forceinline__ float value_of(unsigned char x) { return x; }

// Of a half in [0, 1]. By hand, since subnormal floats, which a shift alone would make, are flushed to zero.
__device__ __forceinline__ float value_of(half_bits x)
{
    unsigned bits = x & 0x7fffu;
    return bits < 0x400u ? bits * 0x1p-24f : __uint_as_float((bits << 13) + (112u << 23));
}

template <class T>
__device__ __forceinline__ void gather_rows(float* out, const T* data, const long long* order, long long N, long long count,
                                            int B, int n, long long first, const unsigned* offset, float scale)
{
    long long start = first + (offset ? *offset : 0u), quads = ((long long)n + 3) / 4;
    bool aligned = quads_aligned(out, n);
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < B * quads; i += (long long)gridDim.x * blockDim.x) {
        long long r = i / quads, position = start + r;
        long long row = position >= count ? -1 : order ? order[position] : position;
        bool there = 0 <= row && row < N;
        int column = (int)(4 * (i - r * quads));
        auto at = [&](int j) {
            return !there ? __uint_as_float(0x7fc00000u) : j < n ? value_of(data[row * n + j]) * scale : 0.0f;
        };
        store_quad(out + r * n, column, n, aligned, make_float4(at(column), at(column + 1), at(column + 2), at(column + 3)));
    }
}

extern "C" __global__ void gather_floats(float* out, const float* data, const long long* order, long long N, long long count,
                                         int B, int n, long long first, const unsigned* offset, float scale)
{
    gather_rows(out, data, order, N, count, B, n, first, offset, scale);
}

extern "C" __global__ void gather_halves(float* out, const half_bits* data, const long long* order, long long N,
                                         long long count, int B, int n, long long first, const unsigned* offset, float scale)
{
    gather_rows(out, data, order, N, count, B, n, first, offset, scale);
}

extern "C" __global__ void gather_bytes(float* out, const unsigned char* data, const long long* order, long long N,
                                        long long count, int B, int n, long long first, const unsigned* offset, float scale)
{
    gather_rows(out, data, order, N, count, B, n, first, offset, scale);
}
