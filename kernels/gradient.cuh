// gradient: one tile of the gradient of contrastive divergence, and what is done with it.
//
//     dW = v0^T h0 - w vk^T hk,  db = sum v0 - w sum vk,  dc = sum h0 - w sum hk
//
// parameters, state  (n m + n + m,)  in and out: W, b, c end to end; no gradient is written
// v, h               (K, n), (K, m)  in; the first `rows` rows are v0, h0, the others vk, hk
// ones               (2 K,)          in, or null: with centred units, what b and c are weights to; null for 1
// moved              (n + m,)        out, or null; with `ones` only: sum v0, sum h0
//
// Both products are one, over all K rows, with the sign in h. The biases are weights to a unit that is always 1: the product
// is (n + 1, m + 1), its column m is db, its row n dc. `ones` stand in the place of 1. For `moved` it is (n + 2, m + 2): a
// further unit is 1 in the data phase alone. Where two such units meet is not used.
//
// Launch: one block of THREADS threads a tile of the product; x: tiles of columns, y: tiles of rows. Tails guarded.
// Numerics: float32 sums, SLICES partial sums of K / SLICES terms; exact for samples of 0 and 1 up to 2^24 rows. On tensor cores
// v, sign h and `ones` are rounded as product_mma.cuh says: 0 and 1 lose nothing, nor does a model_weight of 1. Steps are taken
// in float32 on float32 parameters.
// Source: Hinton, "Training products of experts by minimizing contrastive divergence" (2002).
#pragma once
#include "product.cuh"

// The three arrays of one layer: parameters, velocities or sums.
struct Layer {
    float *W, *b, *c;
};

__device__ __forceinline__ Layer layer_in(float* flat, int n, int m)
{
    float* biases = flat + (long long)n * m;
    return {flat, biases, biases + n};
}

// Puts the two units behind the last one, number `size`, into the quad of a row from unit `first` on.
__device__ __forceinline__ void set_ones(float4& quad, int first, int size, const float* ones, int one, bool data)
{
    if (first + 3 < size) return;
    float bias = ones ? ones[one] : 1.0f;
    auto unit = [&](int i, float x) { return i == size ? bias : i == size + 1 ? float(data) : x; };
    quad = make_float4(unit(first, quad.x), unit(first + 1, quad.y), unit(first + 2, quad.z), unit(first + 3, quad.w));
}

// Calls use_weights(i, j, sums) for each quad of dW, use_bias(true, i, sum) for each sum of db, use_bias(false, j, sum) of dc.
template <class UseWeights, class UseBias>
__device__ __forceinline__ void cd_tile(const float* v, const float* h, const float* ones, float* moved,
                                        int n, int m, int K, int rows, float model_weight,
                                        UseWeights use_weights, UseBias use_bias)
{
    int first_row = blockIdx.y * TILE_ROWS, first_column = blockIdx.x * TILE_COLUMNS;
    auto with_ones = [&](float4& quad, int line, int k) {
        if (k < K) set_ones(quad, line, n, ones, K + k, k < rows);
    };
    auto with_ones_and_sign = [&](float4& quad, int line, int k) {
        if (k < K) set_ones(quad, line, m, ones, k, k < rows);
        float sign = k < rows ? 1.0f : -model_weight;
        quad = make_float4(quad.x * sign, quad.y * sign, quad.z * sign, quad.w * sign);
    };
    Matrix<ALONG_LINES> a(v, n, K), b(h, m, K);
    product(a, b, first_row, first_column, with_ones, with_ones_and_sign, [&](int tile_row, int tile_column, float4 sum) {
        int i = first_row + tile_row, j = first_column + tile_column;
        if (i > n + 1 || j > m + 1) return;
        float sums[4] = {sum.x, sum.y, sum.z, sum.w};
        if (i < n && j < m) use_weights(i, j, sum);
#pragma unroll
        for (int s = 0; s < 4; s++) {
            if (i < n && j + s == m) use_bias(true, i, sums[s]);
            if (i == n && j + s < m) use_bias(false, j + s, sums[s]);
            if (moved && i < n && j + s == m + 1) moved[i] = sums[s];
            if (moved && i == n + 1 && j + s < m) moved[n + j + s] = sums[s];
        }
    });
}

// Calls step(parameter, its state, sum, decays) for each entry of the gradient. `state` is null for a rule that keeps nothing.
template <class Step>
__device__ __forceinline__ void cd_step(float* parameters, float* state, float* moved, const float* v, const float* h,
                                        const float* ones, int n, int m, int K, int rows, float model_weight, Step step)
{
    Layer p = layer_in(parameters, n, m), u = state ? layer_in(state, n, m) : Layer{};
    bool aligned = quads_aligned(p.W, m) && quads_aligned(u.W, m);
    cd_tile(v, h, ones, moved, n, m, K, rows, model_weight,
            [&](int i, int j, float4 sum) {
                float *p_row = p.W + (long long)i * m, *u_row = u.W + (long long)i * m;
                float4 weight = load_quad(p_row, j, m, aligned), kept = {};
                if (state) kept = load_quad(u_row, j, m, aligned);
                step(weight.x, kept.x, sum.x, true);
                step(weight.y, kept.y, sum.y, true);
                step(weight.z, kept.z, sum.z, true);
                step(weight.w, kept.w, sum.w, true);
                store_quad(p_row, j, m, aligned, weight);
                if (state) store_quad(u_row, j, m, aligned, kept);
            },
            [&](bool visible, int i, float sum) {
                float none = 0.0f, &kept = state ? (visible ? u.b : u.c)[i] : none;
                step((visible ? p.b : p.c)[i], kept, sum, false);
            });
}
