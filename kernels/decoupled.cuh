// decoupled: one step of one parameter, for the rules whose decay stands apart from the gradient.
//
//     parameter <- shrink parameter + rate direction                     shrink = 1 - rate decay; biases do not decay
//
//     sgd        direction = g                                           g = scale gradient
//     adagrad    squares <- squares + g^2;                  direction = g / (sqrt(squares) + eps)
//     adam       mean <- mean + (1 - b1) (g - mean), square <- square + (1 - b2) (g^2 - square);
//                                                           direction = mean / (sqrt(square) + eps)
//
// For adam, `rate` is rate sqrt(1 - b2^t) / (1 - b1^t). Each number is made in double and rounded once by the caller.
// Sources: Duchi, Hazan & Singer, "Adaptive subgradient methods" (2011); Kingma & Ba, "Adam" (2015).
// Twins: reference.sgd_step, reference.adagrad_step, reference.adam_step
#pragma once

// Arguments of a kernel; or, where `rates` is not null, what is in device memory: see momentum.cuh.
struct Decoupled {
    float scale, rate, shrink;

    __device__ __forceinline__ Decoupled(float scale, float rate, float shrink, const float* rates)
        : scale(rates ? rates[0] : scale), rate(rates ? rates[1] : rate), shrink(rates ? rates[2] : shrink)
    {
    }

    __device__ __forceinline__ void move(float& parameter, float direction, bool decays) const
    {
        parameter = (decays ? shrink * parameter : parameter) + rate * direction;
    }

    __device__ __forceinline__ void sgd(float& parameter, float gradient, bool decays) const
    {
        move(parameter, scale * gradient, decays);
    }

    __device__ __forceinline__ void adagrad(float& parameter, float& squares, float gradient, float eps, bool decays) const
    {
        float g = scale * gradient;
        squares += g * g;
        move(parameter, g / (sqrtf(squares) + eps), decays);
    }

    // rest1, rest2: 1 - b1, 1 - b2
    __device__ __forceinline__ void adam(float& parameter, float& mean, float& square, float gradient,
                                         float rest1, float rest2, float eps, bool decays) const
    {
        float g = scale * gradient;
        mean += rest1 * (g - mean);
        square += rest2 * (g * g - square);
        move(parameter, mean / (sqrtf(square) + eps), decays);
    }
};
