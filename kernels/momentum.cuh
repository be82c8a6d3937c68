// momentum: one step of one parameter.
//
//     velocity  <- momentum velocity + rate_scale gradient - rate_decay parameter
//     parameter <- parameter + velocity
//
// rate_scale is rate * scale and rate_decay is rate * decay (biases do not decay), each rounded once to float32 by the caller.
// Numerics: operations that round once each, in the order of the twin: its bits. They cost nothing beside reading and writing.
// Source: Hinton, "A practical guide to training restricted Boltzmann machines" (2012), sections 9 and 10.
// Twin: reference.momentum_step
#pragma once
#include "rounded.cuh"

// Arguments of a kernel; or, where `rates` is not null, what is in device memory, for launches that are repeated as they are in
// a CUDA graph.
struct Rates {
    float rate_scale, momentum, rate_decay;

    __device__ __forceinline__ Rates(float rate_scale, float momentum, float rate_decay, const float* rates)
        : rate_scale(rates ? rates[0] : rate_scale), momentum(rates ? rates[1] : momentum), rate_decay(rates ? rates[2] : rate_decay)
    {
    }
};

__device__ __forceinline__ void step(float& parameter, float& velocity, float gradient, const Rates& r, bool decays)
{
    float next = add(multiply(r.momentum, velocity), multiply(r.rate_scale, gradient));
    if (decays && r.rate_decay != 0.0f) next = subtract(next, multiply(r.rate_decay, parameter));
    velocity = next;
    parameter = add(parameter, next);
}
