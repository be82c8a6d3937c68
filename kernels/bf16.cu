// bf16: matrices of float32 rounded to bf16, as the products of large layers take them, and back.
//
//     to_bf16   high[r, j] <- bf16(x[r, j]);  low[r, j] <- bf16(x[r, j] - high[r, j])
//     to_float  x[r, j] <- high[r, j]
//
// x          (rows, m)  float32
// high, low  (rows, m)  bf16, rows `pitch` values apart; low may be null: not wanted
//
// Rows of high and low begin at multiples of 16 bytes; what pads them is read and written, with no meaning.
//
// Launch: one thread four columns, 1-D, any number of blocks of any size; tail guarded.
// Numerics: to nearest, ties to even; back is exact.
// Twins: reference.to_bf16, reference.to_float
#include "mma.cuh"
#include "quads.cuh"

template <class Visit>
__device__ __forceinline__ void every_quad(int rows, int m, Visit visit)
{
    int quads = (m + 3) / 4;
    long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < (long long)rows * quads; i += step)
        visit(i / quads, (int)(i % quads) * 4);
}

extern "C" __global__ void to_bf16(unsigned short* high, unsigned short* low, const float* __restrict__ x,
                                   int rows, int m, int pitch)
{
    bool aligned = quads_aligned(x, m);
    every_quad(rows, m, [&](long long r, int j) {
        float4 value = load_quad(x + r * m, j, m, aligned);
        uint2 first, rest;
        split_pair(value.x, value.y, first.x, rest.x);
        split_pair(value.z, value.w, first.y, rest.y);
        *reinterpret_cast<uint2*>(high + r * pitch + j) = first;
        if (low) *reinterpret_cast<uint2*>(low + r * pitch + j) = rest;
    });
}

extern "C" __global__ void to_float(float* x, const unsigned short* __restrict__ high, int rows, int m, int pitch)
{
    bool aligned = quads_aligned(x, m);
    every_quad(rows, m, [&](long long r, int j) {
        uint2 pairs = *reinterpret_cast<const uint2*>(high + r * pitch + j);
        store_quad(x + r * m, j, m, aligned, make_float4(bf16_first(pairs.x), bf16_second(pairs.x),
                                                         bf16_first(pairs.y), bf16_second(pairs.y)));
    });
}
