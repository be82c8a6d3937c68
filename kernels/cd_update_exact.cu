// cd_update_exact: the gradient of contrastive divergence, and the step, whose bits are the same on every GPU and in NumPy.
//
//     dW = v0^T h0 - w vk^T hk,  db = sum v0 - w sum vk,  dc = sum h0 - w sum hk            cd_sums_exact
//     the same, and a step of parameters and velocity (momentum.cuh)                        cd_update_exact
//
// Arguments and launch as in cd_update.cu; rows and K - rows at most 2^16 each.
//
// Each of the two products is a sum of integers (limbs.cuh); the second begins where the first has ended, in the same registers.
// Numerics: v and h are read as multiples of 2^-14. Each product is rounded to float32, multiplied by 2^-28 and, the second, by
// w, and they are subtracted: operations that round once each. Where v or h are samples, no sum exceeds 1024 and w is 1, they
// round nothing: then sums over parts of a batch add to those over the whole, to the bit.
// Twins: reference.cd_sums and reference.cd_update with precision="exact"
#include "limbs.cuh"
#include "momentum.cuh"

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

// Calls use_weights(i, j, sums) for each quad of dW, and bias(whether visible, unit, sum) for each sum of db and dc.
template <class UseWeights, class UseBias>
__device__ __forceinline__ void cd_tile(const float* v, const float* h, int n, int m, int K, int rows, float model_weight,
                                        UseWeights use_weights, UseBias use_bias)
{
    int first_row = blockIdx.y * TILE_ROWS, first_column = blockIdx.x * TILE_COLUMNS;
    float data[QUADS][4];
    auto value = [](long long total) { return multiply(__ll2float_rn(total), 1 / (UnitLimbs::STEPS * UnitLimbs::STEPS)); };
    auto sums_of = [&](int begin, int end, auto use) {
        Matrix<ALONG_LINES> a(v + (long long)begin * n, n, end - begin), b(h + (long long)begin * m, m, end - begin);
        integer_product<UnitLimbs, UnitLimbs>(
            a, b, first_row, first_column,
            [&](float4& quad, int line, int k) { if (k < a.depth()) set_one(quad, n - line); },
            [&](float4& quad, int line, int k) { if (k < b.depth()) set_one(quad, m - line); }, use);
    };
    sums_of(0, rows, [&](int q, int, int, const long long (&totals)[4]) {
#pragma unroll
        for (int s = 0; s < 4; s++) data[q][s] = value(totals[s]);
    });
    sums_of(rows, K, [&](int q, int tile_row, int tile_column, const long long (&totals)[4]) {
        int i = first_row + tile_row, j = first_column + tile_column;
        if (i > n || j > m) return;
        float sums[4];
#pragma unroll
        for (int s = 0; s < 4; s++) sums[s] = subtract(data[q][s], multiply(model_weight, value(totals[s])));
        if (i < n && j < m) use_weights(i, j, make_float4(sums[0], sums[1], sums[2], sums[3]));
#pragma unroll
        for (int s = 0; s < 4; s++) {
            if (i < n && j + s == m) use_bias(true, i, sums[s]);
            if (i == n && j + s < m) use_bias(false, j + s, sums[s]);
        }
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
cd_sums_exact(float* dW, float* db, float* dc, const float* __restrict__ v, const float* __restrict__ h,
              int n, int m, int K, int rows, float model_weight)
{
    bool aligned = quads_aligned(dW, m);
    cd_tile(v, h, n, m, K, rows, model_weight,
            [&](int i, int j, float4 sum) { store_quad(dW + (long long)i * m, j, m, aligned, sum); },
            [&](bool visible, int i, float sum) { (visible ? db : dc)[i] = sum; });
}

extern "C" __global__ void __launch_bounds__(THREADS)
cd_update_exact(float* parameters, float* velocity, const float* __restrict__ v, const float* __restrict__ h,
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
