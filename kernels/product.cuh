// product: one tile of a matrix product, for the kernels that have products.
//
//     sum[r, c] = sum over k of a(r, k) b(k, c)          r, c in one tile; k from 0 to depth
//
// Operands are as matrix.cuh has them. A block of THREADS threads makes TILE_ROWS x TILE_COLUMNS sums; TILE_DEPTH values of k
// are in shared memory at a time. SLICES groups of threads share out those k among themselves and add up at the end: so a
// small product, which has few tiles, still has enough threads to hide the way to memory. The order of a float32 sum is fixed
// by these constants, which are the caller's, from gpudbn/cuda/layers.py.
//
//     product(a, b, first_row, first_column, adjust_a, adjust_b, use)
//
// adjusts what it reads by adjust(quad, line, k), a quad of neighbours from there on, and calls use(row, column, sums) once for
// each quad of columns of the tile whose first sum is (first_row, first_column); row and column count from there on. `column` is
// a multiple of 4. Every thread of the block must call. There are two ways to it, of which TENSOR_CORES chooses one.
#pragma once
#include "matrix.cuh"

// Adds up the sums that each slice has put down, row by row, and uses them. All threads must have put theirs down.
template <class Use> __device__ __forceinline__ void use_sums(const float* sums, Use use)
{
    constexpr int QUADS_IN_ROW = TILE_COLUMNS / 4;
    for (int quad = threadIdx.x; quad < TILE_ROWS * QUADS_IN_ROW; quad += THREADS) {
        float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int s = 0; s < SLICES; s++) {
            float4 part = *reinterpret_cast<const float4*>(sums + s * TILE_ROWS * TILE_COLUMNS + quad * 4);
            total.x += part.x;
            total.y += part.y;
            total.z += part.z;
            total.w += part.w;
        }
        use(quad / QUADS_IN_ROW, quad % QUADS_IN_ROW * 4, total);
    }
}

#if TENSOR_CORES
#include "product_mma.cuh"
#else
#include "product_fp32.cuh"
#endif
