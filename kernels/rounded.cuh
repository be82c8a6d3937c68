// rounded: + - * / of float32, each rounded once to the nearest number, ties to even: the bits that NumPy makes.
//
// They are spelt as instructions because of what a compiler may do to a * b + c: fuse it, which rounds once where NumPy rounds
// twice; and to results below 2^-126: with -ftz=true, which CuPy always sets, it would make them 0.
//
// Twins: NumPy's own operators. Without a GPU: g++ with -ffp-contract=off.
#pragma once

#ifdef CUDA_ON_CPU
inline float add(float a, float b) { return a + b; }
inline float subtract(float a, float b) { return a - b; }
inline float multiply(float a, float b) { return a * b; }
inline float divide(float a, float b) { return a / b; }
#else
__device__ __forceinline__ float add(float a, float b)
{
    float sum;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
    return sum;
}

__device__ __forceinline__ float subtract(float a, float b)
{
    float difference;
    asm("sub.rn.f32 %0, %1, %2;" : "=f"(difference) : "f"(a), "f"(b));
    return difference;
}

__device__ __forceinline__ float multiply(float a, float b)
{
    float product;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
    return product;
}

__device__ __forceinline__ float divide(float a, float b)
{
    float quotient;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(quotient) : "f"(a), "f"(b));
    return quotient;
}
#endif
