// cd_update: the gradient of contrastive divergence, kept as sums or applied at once.
//
//     dW = v0^T h0 - w vk^T hk,  db = sum v0 - w sum vk,  dc = sum h0 - w sum hk                cd_sums
//     velocity <- momentum velocity + rate_scale gradient - rate_decay W;  parameters <- parameters + velocity   cd_update
//
// dW, db, dc            (n, m), (n,), (m,)  out
// parameters, velocity  (n m + n + m,)      in and out: W, b, c end to end; no gradient is written
// v, h                  (K, n), (K, m)      in; the first `rows` rows are v0, h0, the others vk, hk
// rates                 (3,)                in, or null: rate_scale, momentum, rate_decay
//
// Both products are one, over all K rows, with the sign in h. The biases are weights to a unit that is always 1: the product
// is (n + 1, m + 1), its last column is db, its last row dc, its corner is not used.
//
// Launch: one block of THREADS threads a tile of (n + 1, m + 1); x: tiles of columns, y: tiles of rows. Tails guarded.
// Numerics: float32 sums, SLICES partial sums of K / SLICES terms; exact for samples of 0 and 1 up to 2^24 rows.
// Source: Hinton, "Training products of experts by minimizing contrastive divergence" (2002); momentum.cuh.
// Twins: reference.cd_sums, reference.cd_update
#include "momentum.cuh"
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

__device__ __forceinline__ void set_one(float4& quad, int i)
{
    if (i == 0) quad.x = 1.0f;
    if (i == 1) quad.y = 1.0f;
    if (i == 2) quad.z = 1.0f;
    if (i == 3) quad.w = 1.0f;
}

// Calls weights(i, j, sums) for each quad of dW and bias(layer entry, sum) through `entry` for each sum of db and dc.
template <class UseWeights, class UseBias>
__device__ __forceinline__ void cd_tile(const float* v, const float* h, int n, int m, int K, int rows, float model_weight,
                                        UseWeights use_weights, UseBias use_bias)
{
    int first_row = blockIdx.y * TILE_ROWS, first_column = blockIdx.x * TILE_COLUMNS;
    auto with_one = [&](float4& quad, int line, int k) {
        if (k < K) set_one(quad, n - line);
    };
    auto with_one_and_sign = [&](float4& quad, int line, int k) {
        if (k < K) set_one(quad, m - line);
        float sign = k < rows ? 1.0f : -model_weight;
        quad = make_float4(quad.x * sign, quad.y * sign, quad.z * sign, quad.w * sign);
    };
    Matrix<ALONG_LINES> a(v, n, K), b(h, m, K);
    product(a, b, first_row, first_column, with_one, with_one_and_sign, [&](int tile_row, int tile_column, float4 sum) {
        int i = first_row + tile_row, j = first_column + tile_column;
        if (i > n || j > m) return;
        float sums[4] = {sum.x, sum.y, sum.z, sum.w};
        if (i < n && j < m) use_weights(i, j, sum);
#pragma unroll
        for (int s = 0; s < 4; s++) {
            if (i < n && j + s == m) use_bias(true, i, sums[s]);
            if (i == n && j + s < m) use_bias(false, j + s, sums[s]);
        }
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
cd_sums(float* dW, float* db, float* dc, const float* __restrict__ v, const float* __restrict__ h,
        int n, int m, int K, int rows, float model_weight)
{
    bool aligned = quads_aligned(dW, m);
    cd_tile(v, h, n, m, K, rows, model_weight,
            [&](int i, int j, float4 sum) { store_quad(dW + (long long)i * m, j, m, aligned, sum); },
            [&](bool visible, int i, float sum) { (visible ? db : dc)[i] = sum; });
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
cd_update(float* parameters, float* velocity, const float* __restrict__ v, const float* __restrict__ h,
          int n, int m, int K, int rows, float model_weight, float rate_scale, float momentum, float rate_decay,
          const float* rates)
{
    Rates r(rate_scale, momentum, rate_decay, rates);
    Layer p = layer_in(parameters, n, m), u = layer_in(velocity, n, m);
    bool p_aligned = quads_aligned(p.W, m), u_aligned = quads_aligned(u.W, m);
    cd_tile(v, h, n, m, K, rows, model_weight,
            [&](int i, int j, float4 sum) {
                float *p_row = p.W + (long long)i * m, *u_row = u.W + (long long)i * m;
                float4 weight = load_quad(p_row, j, m, p_aligned), speed = load_quad(u_row, j, m, u_aligned);
                step(weight.x, speed.x, sum.x, r, true);
                step(weight.y, speed.y, sum.y, r, true);
                step(weight.z, speed.z, sum.z, r, true);
                step(weight.w, speed.w, sum.w, r, true);
                store_quad(p_row, j, m, p_aligned, weight);
                store_quad(u_row, j, m, u_aligned, speed);
            },
            [&](bool visible, int i, float sum) {
                step((visible ? p.b : p.c)[i], (visible ? u.b : u.c)[i], sum, r, false);
            });
}
