// half_step_wgmma: half a Gibbs step of a large layer, on Hopper's tensor cores.
//
//     mean[r, j]   = sigmoid(bias[j] + sum_i x[r, i] W[i, j])               half_step_wgmma
//     mean[r, j]   = sigmoid(bias[j] + sum_i x[r, i] W[j, i])               half_step_wgmma_transposed
//     sample[r, j] = 1 if u(seed, update, site, row + r, column + j) < mean[r, j] else 0
//
// sample, mean              (B, m)  out: bf16, or null: not wanted
// sample_float, mean_float  (B, m)  out: the same in float32, or null
// x                         (B, n)  in: bf16
// W, W_low                  (n, m)  in: bf16, (m, n) for the transposed. W alone or, where W_low_wanted is 1, W + W_low
// bias                      (m,)    in: float32
//
// Rows of x, W and all outputs begin at multiples of 16 bytes. They are padded for that, and the padding of outputs is
// written, with no meaning: a thread stores four columns at once. `column` is a multiple of 4, see philox.cuh.
//
// Launch: see product_wgmma.cuh.
// Numerics: products of bf16 are exact, sums float32. e = exp(-x) by the fast exponential: the mean errs by less than 1e-6.
// A sample is 1 if u (1 + e) < 1, which needs no division and is u < mean but for that rounding.
// Source: Hinton, "A practical guide to training restricted Boltzmann machines" (2012), section 3.
// Twin: reference.half_step_wgmma
#include "philox.cuh"
#include "product_wgmma.cuh"
#include "quads.cuh"

struct Outputs {
    unsigned short *sample, *mean;
    float *sample_float, *mean_float;
    int pitch;  // of bf16, from row to row
    int float_pitch;
};

__device__ __forceinline__ float4 exp_of_minus(float4 x, float4 y)
{
    return make_float4(__expf(-x.x - y.x), __expf(-x.y - y.y), __expf(-x.z - y.z), __expf(-x.w - y.w));
}

// 1 where u < 1 / (1 + e).
__device__ __forceinline__ float4 fires(float4 u, float4 e)
{
    return make_float4(fmaf(u.x, e.x, u.x) < 1, fmaf(u.y, e.y, u.y) < 1, fmaf(u.z, e.z, u.z) < 1, fmaf(u.w, e.w, u.w) < 1);
}

__device__ __forceinline__ float4 mean_of(float4 e)
{
    return make_float4(__fdividef(1, 1 + e.x), __fdividef(1, 1 + e.y), __fdividef(1, 1 + e.z), __fdividef(1, 1 + e.w));
}

template <Neighbours W_NEIGHBOURS>
__device__ __forceinline__ void half_step(unsigned char* dynamic_shared, const Outputs& out, const TensorMap& x,
                                          const TensorMap& W, const TensorMap& W_low, const float* bias,
                                          int B, int n, int m, int W_low_wanted, const Address& address)
{
    bool aligned = quads_aligned(bias, 0), sample_alone = out.sample && !out.mean && !out.sample_float && !out.mean_float;
    Part parts[2] = {{&x, &W, steps_of(n)}, {&x, &W_low, W_low_wanted ? steps_of(n) : 0}};

    auto use = [&](const Sums& sums, int thread, int row, int column) {
        int r = row + quad_row(thread), first = column + quad_column(thread, 0);
        long long at = (long long)r * out.pitch + first, float_at = (long long)r * out.float_pitch + first;
        u64 index = address.index(r, first / 4);
        if (sample_alone && aligned && row + WGMMA_ROWS <= B && column + TILE_COLUMNS <= m) {  // no branches: quads overlap
#pragma unroll
            for (int q = 0; q < QUADS; q++) {
                float4 c = *reinterpret_cast<const float4*>(bias + first + q * QUAD_STEP);
                float4 e = exp_of_minus(quad_of(sums.products, q, thread), c);
                store_bf16(out.sample + at + q * QUAD_STEP, fires(address.draw(index + q * (QUAD_STEP / 4)), e));
            }
            return;
        }
        int inside = r < B ? m - first : 0;
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            float4 sum = quad_of(sums.products, q, thread);
            int step = q * QUAD_STEP;
            if (step >= inside) continue;
            float4 e = exp_of_minus(sum, load_quad(bias, first + step, m, aligned));
            if (out.mean || out.mean_float) {
                float4 p = mean_of(e);
                if (out.mean) store_bf16(out.mean + at + step, p);
                if (out.mean_float) *reinterpret_cast<float4*>(out.mean_float + float_at + step) = p;
            }
            if (out.sample || out.sample_float) {
                float4 s = fires(address.draw(index + step / 4), e);
                if (out.sample) store_bf16(out.sample + at + step, s);
                if (out.sample_float) *reinterpret_cast<float4*>(out.sample_float + float_at + step) = s;
            }
        }
    };
    product_wgmma<ALONG_DEPTH, W_NEIGHBOURS, false>(dynamic_shared, parts, B, m, [](int, int, int) {}, [](Sums&) {}, use);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
half_step_wgmma(unsigned short* sample, unsigned short* mean, float* sample_float, float* mean_float,
                const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap W,
                const __grid_constant__ TensorMap W_low, const float* __restrict__ bias,
                int B, int n, int m, int pitch, int float_pitch, int W_low_wanted,
                u64 seed, u32 update, u32 site, u64 row, u64 column, u64 blocks, const u32* clock)
{
    extern __shared__ unsigned char dynamic_shared[];
    half_step<ALONG_LINES>(dynamic_shared, {sample, mean, sample_float, mean_float, pitch, float_pitch}, x, W, W_low, bias,
                           B, n, m, W_low_wanted, {seed, update, site, row, column, blocks, clock});
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
half_step_wgmma_transposed(unsigned short* sample, unsigned short* mean, float* sample_float, float* mean_float,
                           const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap W,
                           const __grid_constant__ TensorMap W_low, const float* __restrict__ bias,
                           int B, int n, int m, int pitch, int float_pitch, int W_low_wanted,
                           u64 seed, u32 update, u32 site, u64 row, u64 column, u64 blocks, const u32* clock)
{
    extern __shared__ unsigned char dynamic_shared[];
    half_step<ALONG_DEPTH>(dynamic_shared, {sample, mean, sample_float, mean_float, pitch, float_pitch}, x, W, W_low, bias,
                           B, n, m, W_low_wanted, {seed, update, site, row, column, blocks, clock});
}
