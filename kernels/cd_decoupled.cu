// cd_decoupled: the gradient of contrastive divergence, applied by the rules whose decay stands apart from it.
//
//     the gradient of gradient.cuh, and the steps of decoupled.cuh                                         cd_sgd, cd_adagrad
//
// parameters, squares  (n m + n + m,)  in and out
// fade                 what is taken from the sums of W as a share of W: a decay that is in the gradient
// rates                (3,)            in, or null: scale, rate, shrink
// others               see gradient.cuh, also for launch, numerics and source
//
// Twins: reference.cd_sgd, reference.cd_adagrad
#include "decoupled.cuh"
#include "gradient.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_PROCESSOR)
cd_sgd(float* parameters, float* moved, const float* __restrict__ v, const float* __restrict__ h,
       const float* __restrict__ ones, int n, int m, int K, int rows, float model_weight,
       float scale, float rate, float shrink, const float* rates)
{
    Decoupled rule(scale, rate, shrink, rates);
    cd_step(parameters, nullptr, moved, v, h, ones, n, m, K, rows, model_weight,
            [&](float& p, float&, float sum, bool decays) { rule.sgd(p, sum, decays); });
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_PROCESSOR)
cd_adagrad(float* parameters, float* squares, float* moved, const float* __restrict__ v, const float* __restrict__ h,
           const float* __restrict__ ones, int n, int m, int K, int rows, float model_weight,
           float eps, float fade, float scale, float rate, float shrink, const float* rates)
{
    Decoupled rule(scale, rate, shrink, rates);
    cd_step(parameters, squares, moved, v, h, ones, n, m, K, rows, model_weight,
            [&](float& p, float& q, float sum, bool decays) { rule.adagrad(p, q, decays ? sum - fade * p : sum, eps, decays); });
}
