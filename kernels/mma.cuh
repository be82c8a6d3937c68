// mma: the instructions that feed and use tensor cores, one function each, as inline PTX.
//
//     mma_bf16, mma_f16, mma_tf32, mma_s8  d (16, 8) += a (16, K) b (K, 8)        K = 16, 16, 8, 32; see below
//     ldmatrix, ldmatrix_trans           2 or 4 matrices of 8 x 8 16-bit values, from shared memory to fragments
//     cp_async, .._commit, .._wait       from global to shared memory, past the registers and in the background
//     bf16_pair, f16_pair, tf32          float32, rounded
//     split_pair                         float32 = high + low, both bf16
//     f16_product                        two float16 times two float16
//
// Fragments: a matrix lies in the registers of the 32 lanes of a warp. A 32-bit register holds E neighbours in k (bf16, f16:
// 2, the first in its low half; tf32: 1; s8: 4), so that K = 8 E. In lane 4 g + t:
//
//     a[i]    row g + 8 (i % 2),  k from E (t + 4 (i / 2)) on          i = 0..3
//     b[i]    column g,           k from E (t + 4 i) on                i = 0, 1
//     d[i]    row g + 8 (i / 2),  column 2 t + i % 2                   i = 0..3
//
// All 32 lanes must call mma and ldmatrix together. sm_80 and up.
// Source: PTX ISA 9.0, "Warp-level matrix instructions" and "Asynchronous copy".
// Stand-in without a GPU: tests/cuda_on_cpu/mma.h; tests of both: tests/cuda_on_cpu/test_mma.py
#pragma once

#ifndef CUDA_ON_CPU

// bf16 in; float32 sums, in no order that is specified.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// float16 in, subnormal numbers too; float32 sums, in no order that is specified.
__device__ __forceinline__ void mma_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// tf32 in, the upper 19 bits of a float32: the others are ignored, so round with tf32() first; float32 sums.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// int8 in; int32 sums, which wrap round.
__device__ __forceinline__ void mma_s8(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ unsigned shared_address(const void* shared) { return (unsigned)__cvta_generic_to_shared(shared); }

// Lane l points to row l % 8 of matrix l / 8: 16 bytes in shared memory, at a multiple of 16. r[i], in lane 4 g + t: of matrix
// i, row g, columns 2 t and 2 t + 1. Of two matrices only the lanes below 16 point.
__device__ __forceinline__ void ldmatrix(unsigned (&r)[4], const void* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

__device__ __forceinline__ void ldmatrix(unsigned (&r)[2], const void* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}

// The same of the transposed matrices: r[i] is rows 2 t and 2 t + 1, column g.
__device__ __forceinline__ void ldmatrix_trans(unsigned (&r)[4], const void* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

__device__ __forceinline__ void ldmatrix_trans(unsigned (&r)[2], const void* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}

// Starts a copy of BYTES bytes, of which all but the first `bytes` become 0 and are not read. Both addresses must be multiples
// of BYTES. Neither source nor destination may be touched before cp_async_wait, by other threads not before a barrier behind it.
template <int BYTES> __device__ __forceinline__ void cp_async(void* shared, const void* global, int bytes = BYTES)
{
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "the copies there are");
    if constexpr (BYTES == 16)  // past the L1 cache, for which the others have no choice
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :: "r"(shared_address(shared)), "l"(global), "n"(BYTES), "r"(bytes) : "memory");
}

// Ends a group of this thread's copies, which may be empty.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of this thread but the last N.
template <int N> __device__ __forceinline__ void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

// Both rounded to nearest, ties to even; the first in the low half.
__device__ __forceinline__ unsigned bf16_pair(float first, float second)
{
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

// Both rounded to nearest, ties to even, subnormal numbers too; beyond 65504 infinite. The first in the low half.
__device__ __forceinline__ unsigned f16_pair(float first, float second)
{
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

// The values of an f16_pair.
__device__ __forceinline__ float f16_first(unsigned pair)
{
    float x;
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(x) : "r"(pair));
    return x;
}
__device__ __forceinline__ float f16_second(unsigned pair)
{
    float x;
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(x) : "r"(pair));
    return x;
}

// The products of two pairs, rounded to nearest, ties to even.
__device__ __forceinline__ unsigned f16_product(unsigned x, unsigned y)
{
    unsigned pair;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(x), "r"(y));
    return pair;
}

// Rounded to 10 bits behind the point, to nearest, ties away from zero.
__device__ __forceinline__ unsigned tf32(float x)
{
    unsigned rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
    return rounded;
}

#endif

// The values of a bf16_pair.
__device__ __forceinline__ float bf16_first(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_second(unsigned pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// high + low: |x - high - low| <= 2^-17 |x|, where |x| > 2^-100. An infinity becomes inf + NaN.
__device__ __forceinline__ void split_pair(float first, float second, unsigned& high, unsigned& low)
{
    high = bf16_pair(first, second);
    low = bf16_pair(first - bf16_first(high), second - bf16_second(high));
}
