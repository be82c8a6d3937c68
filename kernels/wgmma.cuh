// wgmma: the instructions that Hopper's tensor cores are fed and used with, one function each, as inline PTX.
//
//     elected                 one lane of a warp
//     barrier_*               mbarriers in shared memory: they count arrivals of threads and bytes that were copied
//     copy_box, fetch_to_L2   a box of a matrix from global to shared memory, by the copy engine (TMA); bytes to the cache
//     wgmma_*                 products by a warpgroup, four warps from a multiple of four on; both operands in shared memory
//     registers_*             registers given back and asked for, when warpgroups have different work
//     fence_for_engines       what threads wrote to shared memory, seen by the copy engine and the tensor cores
//
// Addresses in shared memory are the 32-bit ones of the shared window. sm_90a only.
// Source: PTX ISA 9.0, "elect.sync", "mbarrier", "cp.async.bulk.tensor", "Asynchronous Warpgroup Level Matrix Instructions",
// "setmaxnreg".
// Stand-in without a GPU: tests/cuda_on_cpu/wgmma.h
#pragma once
#include "mma.cuh"

typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef CUDA_ON_CPU

// How a matrix lies in global memory, made by cuTensorMapEncodeTiled; a kernel takes it as a `const __grid_constant__`.
struct __align__(64) TensorMap {
    u64 opaque[16];
};

// True in one lane of the warp, all of which must call it: the compiler knows that what follows is one thread's.
__device__ __forceinline__ bool elected()
{
    u32 mine;
    asm volatile("{\n.reg .pred mine;\nelect.sync _|mine, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, mine;\n}" : "=r"(mine));
    return mine;
}

// ------------------------------------------------------------------------------------------------ barriers

// A phase of the barrier ends when `arrivals` have come and as many bytes as were announced.
__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine. A barrier of the block must follow.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(u32 barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

// Arrives, and announces bytes to be copied in this phase.
__device__ __forceinline__ void barrier_arrive_announcing(u32 barrier, u32 bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity has ended: 0 for the first, third ... phase, 1 for the second, fourth ... and for the
// one before the first, which counts as ended.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity)
{
    u32 ended;
    do {  // each try sleeps for a while
        asm volatile("{\n.reg .pred ended;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\nselp.u32 %0, 1, 0, ended;\n}"
                     : "=r"(ended) : "r"(barrier), "r"(parity) : "memory");
    } while (!ended);
}

// ------------------------------------------------------------------------------------------------ copies

// Copies the box whose first value is column x of row y, either of which may be outside: there it is 0. All bytes of the box
// count for the barrier. By one thread.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& from, int x, int y, u32 barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 :: "r"(to), "l"(&from), "r"(barrier), "r"(x), "r"(y) : "memory");
}

// A hint: bytes, both multiples of 16, that will be read soon.
__device__ __forceinline__ void fetch_to_L2(const void* global, u32 bytes)
{
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(global), "r"(bytes) : "memory");
}

__device__ __forceinline__ void fence_for_engines() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ------------------------------------------------------------------------------------------------ products

#define ALL_OF_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ALL_OF_16(d, i) ALL_OF_4(d, i), ALL_OF_4(d, i + 4), ALL_OF_4(d, i + 8), ALL_OF_4(d, i + 12)
#define ALL_OF_128(d) ALL_OF_16(d, 0), ALL_OF_16(d, 16), ALL_OF_16(d, 32), ALL_OF_16(d, 48), \
                      ALL_OF_16(d, 64), ALL_OF_16(d, 80), ALL_OF_16(d, 96), ALL_OF_16(d, 112)

// Before the first product on sums that threads have touched.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Starts d (64, 256) += a (64, 16) b (16, 256), bf16 in and float32 sums. Until it is waited for, no register of d and nothing
// that the descriptors name may be touched, but by further products on the same d. A_LINES, B_LINES: neighbours in memory
// belong to different rows of a, columns of b, rather than to different terms.
template <bool A_LINES, bool B_LINES>
__device__ __forceinline__ void wgmma_64x256(float (&d)[128], u64 a, u64 b)
{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
        "}, %128, %129, 1, 1, 1, %130, %131;"  // added to d; a and b as they are; how they lie
        : ALL_OF_128(d) : "l"(a), "l"(b), "n"((int)A_LINES), "n"((int)B_LINES) : "memory");
}

// Starts d (64, 8) += a (64, 16) b (16, 8), of which b lies along the depth.
template <bool A_LINES> __device__ __forceinline__ void wgmma_64x8(float (&d)[4], u64 a, u64 b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, %6, 0;"
                 : ALL_OF_4(d, 0) : "l"(a), "l"(b), "n"((int)A_LINES) : "memory");
}

// Ends a group of products.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all groups but the last: what those before have read is free, for this warp's part.
__device__ __forceinline__ void wgmma_wait_for_all_but_one() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }

// Waits for all groups. The sums are operands, so that the compiler reads no register of them before.
__device__ __forceinline__ void wgmma_wait(float (&d)[128])
{
    asm volatile("wgmma.wait_group.sync.aligned 0;" : ALL_OF_128(d) :: "memory");
}

// After wgmma_wait, for further sums of the same groups.
__device__ __forceinline__ void wgmma_waited(float (&d)[4]) { asm volatile("" : ALL_OF_4(d, 0) :: "memory"); }

#undef ALL_OF_4
#undef ALL_OF_16
#undef ALL_OF_128

// ------------------------------------------------------------------------------------------------ registers

// By all warps of a warpgroup: so many registers a thread from here on, a multiple of 8.
template <int COUNT> __device__ __forceinline__ void registers_give_back()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT));
}

template <int COUNT> __device__ __forceinline__ void registers_ask_for()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT));
}

#endif

// Four neighbours, rounded; at a multiple of 8 bytes.
__device__ __forceinline__ void store_bf16(unsigned short* at, float4 x)
{
    *reinterpret_cast<uint2*>(at) = make_uint2(bf16_pair(x.x, x.y), bf16_pair(x.z, x.w));
}
