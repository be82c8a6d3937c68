// momentum: one step of one parameter.
//
//     velocity  <- momentum velocity + rate_scale gradient - rate_decay parameter
//     parameter <- parameter + velocity
//
// rate_scale is rate * scale and rate_decay is rate * decay (0 for biases), each rounded once to float32 by the caller.
// Source: Hinton, "A practical guide to training restricted Boltzmann machines" (2012), sections 9 and 10.
// Twin: reference.momentum_step
#pragma once

__device__ __forceinline__ void step(float& parameter, float& velocity, float gradient,
                                     float rate_scale, float momentum, float rate_decay)
{
    float next = momentum * velocity + rate_scale * gradient;
    if (rate_decay != 0.0f) next -= rate_decay * parameter;
    velocity = next;
    parameter += next;
}
