// half_step: half a Gibbs step in one launch: product, bias, sigmoid, draw.
//
//     mean[r, j]   = sigmoid(bias[j] + sum_i x[r, i] W[i, j])               half_step
//     mean[r, j]   = sigmoid(bias[j] + sum_i x[r, i] W[j, i])               half_step_transposed
//     sample[r, j] = 1 if u(seed, update, site, row + r, column + j) < mean[r, j] else 0
//
// sample  (B, m)  out, or null: not wanted, nothing is drawn
// mean    (B, m)  out, or null: not wanted
// x       (B, n)  in
// W       (n, m)  in; (m, n) for half_step_transposed
// bias    (m,)    in
//
// Launch: one block of THREADS threads a tile; x: tiles of rows, y: tiles of columns, so that blocks that run together share
// columns of W. Where `column` is no multiple of 4 the tiles begin at -(column % 4), so that four columns of a thread are
// always one Philox block: the grid must cover m + column % 4 columns. Tails guarded.
// Numerics: products as in product_fp32.cuh or product_mma.cuh; the rest as in sigmoid.cuh and philox.cuh.
// Source: Hinton, "A practical guide to training restricted Boltzmann machines" (2012), section 3.
// Twin: reference.half_step
#include "philox.cuh"
#include "product.cuh"
#include "sigmoid.cuh"

template <Neighbours W_NEIGHBOURS>
__device__ __forceinline__ void half_step_tile(float* sample, float* mean, const float* x, const float* W, const float* bias,
                                               int B, int n, int m, const Address& address)
{
    int shift = address.shift();
    int first_row = blockIdx.x * TILE_ROWS, first_column = blockIdx.y * TILE_COLUMNS - shift;

    Matrix<ALONG_DEPTH> a(x, B, n);
    Matrix<W_NEIGHBOURS> b(W, m, n, W_NEIGHBOURS == ALONG_LINES ? shift : 0);
    product(a, b, first_row, first_column, AsItIs(), AsItIs(), [&](int tile_row, int tile_column, float4 sum) {
        int r = first_row + tile_row, j = first_column + tile_column;
        if (r >= B || j >= m) return;
        float4 c = load_quad(bias, j, m, false);
        float4 p = make_float4(sigmoid_of(sum.x + c.x), sigmoid_of(sum.y + c.y),
                               sigmoid_of(sum.z + c.z), sigmoid_of(sum.w + c.w));
        if (mean) store_quad(mean + (long long)r * m, j, m, quads_aligned(mean, m, shift), p);
        if (!sample) return;
        float4 u = address.draw(r, (j + shift) / 4);
        store_quad(sample + (long long)r * m, j, m, quads_aligned(sample, m, shift),
                   make_float4(u.x < p.x, u.y < p.y, u.z < p.z, u.w < p.w));
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_PROCESSOR)
half_step(float* sample, float* mean, const float* __restrict__ x, const float* __restrict__ W,
          const float* __restrict__ bias, int B, int n, int m,
          u64 seed, u32 update, u32 site, u64 row, u64 column, u64 blocks, const u32* clock)
{
    half_step_tile<ALONG_LINES>(sample, mean, x, W, bias, B, n, m, {seed, update, site, row, column, blocks, clock});
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_PROCESSOR)
half_step_transposed(float* sample, float* mean, const float* __restrict__ x, const float* __restrict__ W,
                     const float* __restrict__ bias, int B, int n, int m,
                     u64 seed, u32 update, u32 site, u64 row, u64 column, u64 blocks, const u32* clock)
{
    half_step_tile<ALONG_DEPTH>(sample, mean, x, W, bias, B, n, m, {seed, update, site, row, column, blocks, clock});
}
