// sigmoid: 1 / (1 + exp(-x)), without overflow: exp(-x) may become infinite, and then the result is 0.
//
// sigmoid_of         expf and a rounded division, no fast intrinsics; relative error below 4e-7 for x > -87, absolute below 1.5e-7.
// exact_sigmoid_of   only operations that round once, in the order of its twin, whose bits it has: absolute error below 1e-7.
//                    exp(-x) = 2^y is 2^n 2^f, where y = -x log2 e, n is y rounded to a whole number, f = y - n, and 2^f is a
//                    polynomial. For |x| > 80 it is that of 80.
//
// Twins: reference.sigmoid, exact.sigmoid
#pragma once
#include "rounded.cuh"

__device__ __forceinline__ float sigmoid_of(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float exact_sigmoid_of(float x)
{
    const float to_whole = 0x1.8p23f;  // a sum with it is rounded to a whole number, which is in its lowest bits
    x = x > 80.0f ? 80.0f : x < -80.0f ? -80.0f : x;
    float y = multiply(x, -1.44269504f), whole = add(y, to_whole), f = subtract(y, subtract(whole, to_whole));
    float power = multiply(0.00132647f, f);
    power = multiply(add(power, 0.00967151f), f);
    power = multiply(add(power, 0.05550734f), f);
    power = multiply(add(power, 0.24022242f), f);
    power = multiply(add(power, 0.69314698f), f);
    power = add(power, 1.0f);
    power = __uint_as_float(__float_as_uint(power) + (__float_as_uint(whole) << 23));  // times 2^n
    return divide(1.0f, add(power, 1.0f));
}
