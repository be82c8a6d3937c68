// elementwise: passes over flat arrays.
//
//     sigmoid           x <- 1 / (1 + exp(-x)); sigmoid_exact: the same with NumPy's bits
//     sigmoid_backward  delta <- delta a (1 - keep a)
//     momentum_step     velocity <- momentum velocity + rate_scale gradient - rate_decay W;  parameters <- parameters + velocity
//     sgd_step, adagrad_step, adam_step                                                            see decoupled.cuh
//
// x, delta                                     (size,)  in and out
// a                                            (size,)  in
// parameters, velocity, squares, mean, square  (size,)  in and out; the first `weights` parameters decay, the biases behind them
//                                                       do not
// gradient                                     (size,)  in
// rates                                        (3,)     in, or null: the three numbers before it
//
// Launch: one thread an entry, 1-D, any number of blocks of any size; tail guarded.
// Numerics: float32, division and root rounded correctly; momentum_step has the bits of its twin.
// Twins: reference.sigmoid, exact.sigmoid, reference.sigmoid_backward, reference.momentum_step, ...
#include "decoupled.cuh"
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

extern "C" __global__ void sigmoid_exact(float* x, long long size)
{
    every_entry(size, [&](long long i) { x[i] = exact_sigmoid_of(x[i]); });
}

extern "C" __global__ void sigmoid_backward(float* delta, const float* a, long long size, float keep)
{
    every_entry(size, [&](long long i) { delta[i] = delta[i] * a[i] * (1.0f - keep * a[i]); });
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

extern "C" __global__ void sgd_step(float* parameters, const float* gradient, long long size, long long weights,
                                    float scale, float rate, float shrink, const float* rates)
{
    Decoupled rule(scale, rate, shrink, rates);
    every_entry(size, [&](long long i) { rule.sgd(parameters[i], gradient[i], i < weights); });
}

extern "C" __global__ void adagrad_step(float* parameters, float* squares, const float* gradient,
                                        long long size, long long weights, float eps,
                                        float scale, float rate, float shrink, const float* rates)
{
    Decoupled rule(scale, rate, shrink, rates);
    every_entry(size, [&](long long i) { rule.adagrad(parameters[i], squares[i], gradient[i], eps, i < weights); });
}

extern "C" __global__ void adam_step(float* parameters, float* mean, float* square, const float* gradient,
                                     long long size, long long weights, float rest1, float rest2, float eps,
                                     float scale, float rate, float shrink, const float* rates)
{
    Decoupled rule(scale, rate, shrink, rates);
    every_entry(size, [&](long long i) {
        rule.adam(parameters[i], mean[i], square[i], gradient[i], rest1, rest2, eps, i < weights);
    });
}
