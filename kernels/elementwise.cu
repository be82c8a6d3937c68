// elementwise: passes over flat arrays.
//
//     sigmoid        x <- 1 / (1 + exp(-x))
//     momentum_step  velocity <- momentum velocity + rate_scale gradient - rate_decay W;  parameters <- parameters + velocity
//
// x                     (size,)  in and out
// parameters, velocity  (size,)  in and out; the first `weights` entries decay, the biases behind them do not
// gradient              (size,)  in
// rates                 (3,)     in, or null: rate_scale, momentum, rate_decay
//
// Launch: one thread an entry, 1-D, any number of blocks of any size; tail guarded.
// Twins: reference.sigmoid, reference.momentum_step
#include "momentum.cuh"
#include "sigmoid.cuh"

template <class Visit>
__device__ __forceinline__ void every_entry(long long size, Visit visit)
{
    long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step) visit(i);
}

extern "C" __global__ void sigmoid(float* x, long long size)
{
    every_entry(size, [&](long long i) { x[i] = sigmoid_of(x[i]); });
}

extern "C" __global__ void momentum_step(float* parameters, float* velocity, const float* gradient,
                                         long long size, long long weights,
                                         float rate_scale, float momentum, float rate_decay, const float* rates)
{
    Rates r(rate_scale, momentum, rate_decay, rates);
    every_entry(size, [&](long long i) {
        step(parameters[i], velocity[i], gradient[i], r, i < weights);
    });
}
