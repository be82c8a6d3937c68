// half_step_exact: half a Gibbs step whose bits are the same on every GPU and in NumPy.
//
//     mean[r, j]   = sigmoid(bias[j] + sum_i x[r, i] W[i, j])               half_step_exact
//     mean[r, j]   = sigmoid(bias[j] + sum_i x[r, i] W[j, i])               half_step_exact_transposed
//     sample[r, j] = 1 if u(seed, update, site, row + r, column + j) < mean[r, j] else 0
//
// Arguments and launch as in half_step.cu; n at most 2^16.
//
// Numerics: x and W are read as integers (limbs.cuh) and their products summed without rounding. The sum is rounded to float32,
// multiplied by 2^-32, the bias added, the sigmoid taken: operations that round once each. Against float64 with W as it is, the
// argument of the sigmoid errs by the rounding of W, at most 2^-19 for each unit that is on: 1.4e-5 rms at 150 of them.
// Twin: reference.half_step with precision="exact"
#include "limbs.cuh"
#include "philox.cuh"
#include "sigmoid.cuh"

template <Neighbours W_NEIGHBOURS>
__device__ __forceinline__ void half_step_tile(float* sample, float* mean, const float* x, const float* W, const float* bias,
                                               int B, int n, int m, const Address& address)
{
    int shift = address.shift();
    int first_row = blockIdx.x * TILE_ROWS, first_column = blockIdx.y * TILE_COLUMNS - shift;
    auto probability = [](long long total, float bias) {
        return exact_sigmoid_of(add(multiply(__ll2float_rn(total), 1 / (UnitLimbs::STEPS * WeightLimbs::STEPS)), bias));
    };
    Matrix<ALONG_DEPTH> a(x, B, n);
    Matrix<W_NEIGHBOURS> b(W, m, n, W_NEIGHBOURS == ALONG_LINES ? shift : 0);
    integer_product<UnitLimbs, WeightLimbs>(a, b, first_row, first_column, AsItIs(), AsItIs(),
                                    [&](int, int tile_row, int tile_column, const long long (&totals)[4]) {
        int r = first_row + tile_row, j = first_column + tile_column;
        if (r >= B || j >= m) return;
        float4 c = load_quad(bias, j, m, false);
        float4 p = make_float4(probability(totals[0], c.x), probability(totals[1], c.y),
                               probability(totals[2], c.z), probability(totals[3], c.w));
        if (mean) store_quad(mean + (long long)r * m, j, m, quads_aligned(mean, m, shift), p);
        if (!sample) return;
        float4 u = address.draw(r, (j + shift) / 4);
        store_quad(sample + (long long)r * m, j, m, quads_aligned(sample, m, shift),
                   make_float4(u.x < p.x, u.y < p.y, u.z < p.z, u.w < p.w));
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
half_step_exact(float* sample, float* mean, const float* __restrict__ x, const float* __restrict__ W,
                const float* __restrict__ bias, int B, int n, int m,
                u64 seed, u32 update, u32 site, u64 row, u64 column, u64 blocks, const u32* clock)
{
    half_step_tile<ALONG_LINES>(sample, mean, x, W, bias, B, n, m, {seed, update, site, row, column, blocks, clock});
}

extern "C" __global__ void __launch_bounds__(THREADS)
half_step_exact_transposed(float* sample, float* mean, const float* __restrict__ x, const float* __restrict__ W,
                           const float* __restrict__ bias, int B, int n, int m,
                           u64 seed, u32 update, u32 site, u64 row, u64 column, u64 blocks, const u32* clock)
{
    half_step_tile<ALONG_DEPTH>(sample, mean, x, W, bias, B, n, m, {seed, update, site, row, column, blocks, clock});
}
