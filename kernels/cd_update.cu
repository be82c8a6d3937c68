// cd_update: the gradient of contrastive divergence, kept as sums or applied at once.
//
//     dW, db, dc <- the sums of gradient.cuh                                                                       cd_sums
//     velocity <- momentum velocity + rate_scale gradient - rate_decay W;  parameters <- parameters + velocity   cd_update
//
// dW, db, dc            (n, m), (n,), (m,)  out
// parameters, velocity  (n m + n + m,)      in and out
// rates                 (3,)                in, or null: rate_scale, momentum, rate_decay
// others                see gradient.cuh, also for launch, numerics and source; and momentum.cuh
//
// Twins: reference.cd_sums, reference.cd_update
#include "gradient.cuh"
#include "momentum.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_PROCESSOR)
cd_sums(float* dW, float* db, float* dc, float* moved, const float* __restrict__ v, const float* __restrict__ h,
        const float* __restrict__ ones, int n, int m, int K, int rows, float model_weight)
{
    bool aligned = quads_aligned(dW, m);
    cd_tile(v, h, ones, moved, n, m, K, rows, model_weight,
            [&](int i, int j, float4 sum) { store_quad(dW + (long long)i * m, j, m, aligned, sum); },
            [&](bool visible, int i, float sum) { (visible ? db : dc)[i] = sum; });
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_PROCESSOR)
cd_update(float* parameters, float* velocity, float* moved, const float* __restrict__ v, const float* __restrict__ h,
          const float* __restrict__ ones, int n, int m, int K, int rows, float model_weight,
          float rate_scale, float momentum, float rate_decay, const float* rates)
{
    Rates r(rate_scale, momentum, rate_decay, rates);
    cd_step(parameters, velocity, moved, v, h, ones, n, m, K, rows, model_weight,
            [&](float& p, float& u, float sum, bool decays) { step(p, u, sum, r, decays); });
}
