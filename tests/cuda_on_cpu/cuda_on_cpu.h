// cuda_on_cpu.h: runs CUDA C++ on a CPU, so that a kernel can be tested where there is no GPU.
//
// It is put before the unmodified text of a .cu file, which g++ then compiles as C++20. What runs as what:
//
//     grid           a handful of OS threads, which take the blocks in turn; in a cooperative launch one for each block
//     block          one OS thread at a time; __shared__ variables are thread_local, so each block has its own
//     CUDA thread    a fiber: own stack, own registers, switched by hand and only inside barriers and warp operations
//
// Barriers, shuffles, votes, atomics, grid barriers and dynamic shared memory do what they do on a GPU; so do the tensor
// cores' instructions and asynchronous copies of mma.cuh and wgmma.cuh, by their stand-ins in mma.h and wgmma.h. Between two
// barriers the order of the threads is the launch's schedule: forward, reverse or random. A kernel whose result depends on
// it lacks a barrier. Reported as errors: deadlock, __syncthreads reached at two places at once, lanes that disagree on a
// mask, a grid barrier in an ordinary launch or after some blocks have ended.
//
// Not modelled: weakly ordered memory, bank conflicts, speed, rounding of fast intrinsics, reads of shared memory that was
// never written (static __shared__ begins as 0 or as the last block left it; dynamic shared memory begins as NaN).
//
// Contents: 1 language  2 fibers  3 a block and its barriers  4 warp operations  5 the grid  6 launching  7 intrinsics
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <condition_variable>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

// =================================================================================================== 1 language

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ thread_local  // in a function thread_local implies static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

#define CUDA_ON_CPU_VECTORS(type, name)                                                         \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
    struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };                              \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(float, float)
CUDA_ON_CPU_VECTORS(int, int)
CUDA_ON_CPU_VECTORS(unsigned, uint)

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// Kernels declare it as `extern __shared__ unsigned char dynamic_shared[];`, under this name.
constexpr std::size_t DYNAMIC_SHARED_BYTES = 227 << 10;  // the most that sm_90 gives a block
alignas(1024) inline thread_local unsigned char dynamic_shared[DYNAMIC_SHARED_BYTES];

namespace cuda_on_cpu {

// ===================================================================================================== 2 fibers

// Context: where a suspended fiber goes on. switch_context saves the present one in `from` and goes on at `to`.
#ifdef __x86_64__  // a few instructions; swapcontext makes two system calls
using Context = void*;  // the stack pointer; the registers that calls preserve lie on the stack
// noipa: g++ must not conclude from these lines which registers and memory stay as they were.
__attribute__((naked, noipa)) static void switch_context(Context* /*from*/, Context* /*to*/)
{
    asm volatile("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
                 "movq %rsp, (%rdi)\n movq (%rsi), %rsp\n"
                 "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
inline void make_context(Context* context, char* stack, std::size_t size, void (*entry)())
{
    void** top = reinterpret_cast<void**>(stack + size) - 2;  // leaves the stack as a call would: 8 off a multiple of 16
    *top = reinterpret_cast<void*>(entry);
    top -= 6;
    std::memset(top, 0, 6 * sizeof(void*));
    *context = top;
}
#else
using Context = ucontext_t;
inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }
inline void make_context(Context* context, char* stack, std::size_t size, void (*entry)())
{
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = size;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
}
#endif

struct Place {  // of a call in the source, for messages and to tell barriers apart
    const char* file;
    int line;
    bool operator==(const Place& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
};
#define CUDA_ON_CPU_HERE cuda_on_cpu::Place{__FILE__, __LINE__}

enum class State { ready, at_block_barrier, at_warp_barrier, at_phase, done };
enum class Schedule { forward, reverse, random };

struct Copy {  // a cp.async on its way
    void* to;
    const void* from;
    int bytes, size;  // read, written
    unsigned group;
};

struct Multiplication {  // a wgmma on its way
    float* sums;
    int columns;
    uint64_t a, b;
    bool a_lines, b_lines;
    unsigned group;
    Place place;
};

struct Fiber {
    Context context;
    uint3 index;
    State state;
    Place place;  // of the barrier it waits at
    std::vector<Copy> copies;
    unsigned groups;  // of copies, that were committed
    std::vector<Multiplication> multiplications;
    unsigned multiplication_groups;  // that were committed
    bool fenced;                     // multiplications may begin
    const void* awaited;             // the barrier whose phase it waits for
};

constexpr std::size_t STACK_BYTES = (64 << 10) + 320;  // the odd end keeps stack tops out of one another's cache sets

// ================================================================================ 3 a block and its barriers

struct Launch {  // what all blocks of a launch share
    dim3 grid, block;
    bool cooperative;
    Schedule schedule;
    unsigned seed;
    std::size_t shared_bytes;
    void (*run_thread)(void**);
    void** arguments;

    std::mutex mutex;
    std::condition_variable changed;
    std::atomic<bool> failed{false};
    std::string message;  // of the first failure
    unsigned waiting = 0, ended = 0, generation = 0;  // of the grid barrier: blocks waiting, blocks that ran to their end

    unsigned blocks() const { return grid.x * grid.y * grid.z; }
    unsigned threads() const { return block.x * block.y * block.z; }
};

struct Warp {
    uint32_t alive, arrived, mask;
    uint64_t exchange[3 * 32];  // what each lane shows to the others
};

struct Block {  // one for each OS thread, set up anew for each block it runs
    Launch* launch;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Context home, nowhere;  // the OS thread's own context; a place to save a context that is never resumed
    char* stacks;
    uint32_t random;  // state of the random schedule
    unsigned current, alive, arrived, votes, last_votes;
    Place barrier;  // the one that threads wait at, if arrived > 0
    std::vector<std::function<void()>> background;  // what the chip will do without a thread

    unsigned lane() const { return current % 32; }
    Warp& warp() { return warps[current / 32]; }
    Fiber& fiber() { return fibers[current]; }
};

inline thread_local Block* block = nullptr;

// Ends the block for good: its fibers are abandoned where they are.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...)
{
    char text[512];
    int used = std::snprintf(text, sizeof text, "block (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z);
    va_list values;
    va_start(values, format);
    std::vsnprintf(text + used, sizeof text - used, format, values);
    va_end(values);
    Launch& launch = *block->launch;
    {
        std::lock_guard lock(launch.mutex);
        if (!launch.failed) launch.message = text;
        launch.failed = true;
    }
    launch.changed.notify_all();
    switch_context(&block->nowhere, &block->home);
    __builtin_unreachable();
}

[[noreturn]] inline void fail_deadlock()
{
    std::string waiting;
    int named = 0;
    for (unsigned i = 0; i < block->fibers.size() && named < 4; i++) {
        Fiber& f = block->fibers[i];
        if (f.state == State::done) continue;
        waiting += (named++ ? ", thread " : "thread ") + std::to_string(i) + " at " + f.place.file + ":" + std::to_string(f.place.line);
    }
    fail("deadlock: %u threads wait for others that will not come; %s", block->alive, waiting.c_str());
}

inline unsigned next_random() { return (block->random = block->random * 1664525u + 1013904223u) / 256; }

// Work that no thread does: done at once, or when no thread can go on without it.
inline void in_background(std::function<void()> work)
{
    Schedule schedule = block->launch->schedule;
    if (schedule == Schedule::forward || (schedule == Schedule::random && next_random() % 2)) work();
    else block->background.push_back(std::move(work));
}

// The next fiber to run under the schedule, or none (-1). Forward and reverse stay in a warp as long as it can go on, so that
// warps run as far ahead of one another as barriers let them.
inline int next_of_ready()
{
    unsigned n = block->fibers.size(), start = block->current;
    Schedule schedule = block->launch->schedule;
    if (schedule == Schedule::random) start = next_random() % n;
    auto find = [&](unsigned first, unsigned count) {  // among so many fibers, from the one after `start` on
        for (unsigned k = 1; k <= count; k++) {
            unsigned i = first + (start - first + (schedule == Schedule::reverse ? count - k : k)) % count;
            if (block->fibers[i].state == State::ready) return int(i);
        }
        return -1;
    };
    unsigned warp = start / 32 * 32;
    int next = schedule == Schedule::random ? -1 : find(warp, std::min(32u, n - warp));
    return next < 0 ? find(0, n) : next;
}

inline int next_ready()
{
    int next = next_of_ready();
    while (next < 0 && !block->background.empty()) {
        auto work = std::move(block->background.back());
        block->background.pop_back();
        work();
        next = next_of_ready();
    }
    return next;
}

inline void resume(Context* from, unsigned i)
{
    block->current = i;
    threadIdx = block->fibers[i].index;
    switch_context(from, &block->fibers[i].context);
}

// Lets others run until this fiber is ready again and its turn has come.
inline void yield()
{
    unsigned me = block->current;
    int next = next_ready();
    if (next < 0) fail_deadlock();
    if (unsigned(next) != me) resume(&block->fibers[me].context, next);
}

inline void release_block_barrier()
{
    for (Fiber& f : block->fibers)
        if (f.state == State::at_block_barrier) f.state = State::ready;
    block->arrived = 0;
    block->last_votes = block->votes;
    block->votes = 0;
}

inline void release_warp(unsigned warp)
{
    unsigned end = std::min<unsigned>(block->fibers.size(), warp * 32 + 32);
    for (unsigned i = warp * 32; i < end; i++)
        if (block->fibers[i].state == State::at_warp_barrier) block->fibers[i].state = State::ready;
    block->warps[warp].arrived = 0;
}

inline bool warp_complete(const Warp& w) { return ((w.mask & w.alive) & ~w.arrived) == 0; }

// Waits for all threads of the block that have not ended. The last one to come does `alone` first.
template <class Alone> void block_barrier(Place place, int vote, Alone alone)
{
    Block& b = *block;
    if (b.arrived > 0 && !(b.barrier == place))
        fail("thread %u is at the barrier of %s:%d while others are at %s:%d",
             b.current, place.file, place.line, b.barrier.file, b.barrier.line);
    b.barrier = place;
    b.votes += vote;
    b.fiber().place = place;
    b.fiber().state = State::at_block_barrier;
    if (++b.arrived == b.alive) {
        alone();
        release_block_barrier();
        if (b.launch->schedule == Schedule::forward) return;  // go on at once; the others follow in their order
    }
    yield();
}

inline void syncthreads(Place place, int vote = 0) { block_barrier(place, vote, [] {}); }

// A thread has come to the end of the kernel.
[[noreturn]] inline void retire()
{
    Block& b = *block;
    b.fiber().state = State::done;
    b.alive--;
    Warp& w = b.warp();
    w.alive &= ~(1u << b.lane());
    if (b.alive == 0 && !b.background.empty()) fail("%zu copies are on their way at the end of the block", b.background.size());
    if (b.alive == 0) switch_context(&b.nowhere, &b.home);
    if (b.arrived > 0 && b.arrived == b.alive) release_block_barrier();
    if (w.arrived != 0 && warp_complete(w)) release_warp(b.current / 32);
    int next = next_ready();
    if (next < 0) fail_deadlock();
    resume(&b.nowhere, next);
    __builtin_unreachable();
}

// =========================================================================================== 4 warp operations

inline void syncwarp(uint32_t mask, Place place)
{
    Block& b = *block;
    Warp& w = b.warp();
    if (!(mask >> b.lane() & 1)) fail("thread %u is not in its own mask %08x at %s:%d", b.current, mask, place.file, place.line);
    if (w.arrived != 0 && w.mask != mask)
        fail("lanes of a warp disagree on the mask, %08x and %08x, at %s:%d", w.mask, mask, place.file, place.line);
    w.mask = mask;
    w.arrived |= 1u << b.lane();
    b.fiber().place = place;
    b.fiber().state = State::at_warp_barrier;
    if (warp_complete(w)) {
        release_warp(b.current / 32);
        if (b.launch->schedule == Schedule::forward) return;
    }
    yield();
}

// Every lane shows a value; `source` tells from which lane it takes one. From outside the mask comes its own.
template <class T, class Source> T shuffle(uint32_t mask, T value, Source source, Place place)
{
    static_assert(sizeof(T) <= sizeof(uint64_t));
    Warp& w = block->warp();
    std::memcpy(&w.exchange[block->lane()], &value, sizeof value);
    syncwarp(mask, place);
    int from = source(int(block->lane()));
    T result = value;
    if (0 <= from && from < 32 && (mask >> from & 1)) std::memcpy(&result, &w.exchange[from], sizeof result);
    syncwarp(mask, place);  // all have read
    return result;
}

inline unsigned ballot(uint32_t mask, bool vote, Place place)
{
    Warp& w = block->warp();
    w.exchange[block->lane()] = vote;
    syncwarp(mask, place);
    unsigned result = 0;
    for (unsigned lane = 0; lane < 32; lane++)
        if ((mask & w.alive) >> lane & 1) result |= unsigned(w.exchange[lane]) << lane;
    syncwarp(mask, place);
    return result;
}

// ================================================================================================== 5 the grid

inline void grid_barrier(Place place)
{
    if (!block->launch->cooperative) fail("a grid barrier needs a cooperative launch, at %s:%d", place.file, place.line);
    block_barrier(place, 0, [place] {
        Launch& launch = *block->launch;
        std::unique_lock lock(launch.mutex);
        unsigned generation = launch.generation;
        if (++launch.waiting == launch.blocks()) {
            launch.waiting = 0;
            launch.generation++;
            launch.changed.notify_all();
            return;
        }
        launch.changed.wait(lock, [&] {
            return launch.failed || launch.generation != generation || launch.waiting + launch.ended == launch.blocks();
        });
        if (launch.generation != generation) return;
        lock.unlock();
        fail("deadlock: it waits at the grid barrier of %s:%d and other blocks have ended", place.file, place.line);
    });
}

// ================================================================================================= 6 launching

inline void fiber_entry()
{
    block->launch->run_thread(block->launch->arguments);
    retire();
}

// Runs the blocks first, first + step, ... on this OS thread.
inline void run_blocks(Launch& launch, unsigned first, unsigned step)
{
    unsigned threads = launch.threads(), warps = (threads + 31) / 32;
    Block b;
    block = &b;
    b.launch = &launch;
    b.fibers.resize(threads);
    b.warps.resize(warps);
    void* stacks = mmap(nullptr, STACK_BYTES * threads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    gridDim = launch.grid;
    blockDim = launch.block;
    for (unsigned q = first; q < launch.blocks() && !launch.failed; q += step) {
        blockIdx = {q % launch.grid.x, q / launch.grid.x % launch.grid.y, q / (launch.grid.x * launch.grid.y)};
        if (stacks == MAP_FAILED) {
            std::lock_guard lock(launch.mutex);
            launch.message = "no memory for the stacks of " + std::to_string(threads) + " threads";
            launch.failed = true;
            break;
        }
        b.stacks = static_cast<char*>(stacks);
        b.alive = threads;
        b.arrived = b.votes = b.last_votes = 0;
        b.random = launch.seed + q;
        b.background.clear();
        std::memset(dynamic_shared, 0xFF, launch.shared_bytes);
        for (unsigned w = 0; w < warps; w++) {
            unsigned lanes = std::min(32u, threads - 32 * w);
            b.warps[w] = Warp{lanes == 32 ? ~0u : (1u << lanes) - 1, 0, 0, {}};
        }
        for (unsigned i = 0; i < threads; i++) {
            Fiber& f = b.fibers[i];
            f.index = {i % launch.block.x, i / launch.block.x % launch.block.y, i / (launch.block.x * launch.block.y)};
            f.state = State::ready;
            f.place = {"its start", 0};
            f.copies.clear();
            f.groups = 0;
            f.multiplications.clear();
            f.multiplication_groups = 0;
            f.fenced = false;
            make_context(&f.context, b.stacks + STACK_BYTES * i, STACK_BYTES, fiber_entry);
        }
        b.current = 0;
        resume(&b.home, next_ready());
        std::lock_guard lock(launch.mutex);
        launch.ended++;
        launch.changed.notify_all();
    }
    if (stacks != MAP_FAILED) munmap(stacks, STACK_BYTES * threads);
    block = nullptr;
}

template <class... P, std::size_t... I> void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>)
{
    kernel(*static_cast<std::remove_cv_t<P>*>(arguments[I])...);
}

// `kernel` as a constant of the template, so that a plain function pointer calls it with its own types.
template <auto kernel> struct Kernel;
template <class... P, void (*kernel)(P...)> struct Kernel<kernel> {
    static void run_thread(void** arguments) { call(kernel, arguments, std::index_sequence_for<P...>()); }

    // The types of the parameters, for instance "*f4 *f4 i4 u8": the caller's NumPy types are held to them.
    static const char* parameters()
    {
        static const std::string text = ((code<P>() + " ") + ... + "");
        return text.c_str();
    }

    template <class T> static std::string code()
    {
        if constexpr (std::is_pointer_v<T>)
            return "*" + code<std::remove_cv_t<std::remove_pointer_t<T>>>();
        else
            return (std::is_class_v<T> ? "V" : std::is_floating_point_v<T> ? "f" : std::is_signed_v<T> ? "i" : std::is_unsigned_v<T> ? "u" : "?")
                   + std::to_string(sizeof(T));
    }
};

// Runs a whole grid. Returns 0, or 1 with a message.
inline int launch(void (*run_thread)(void**), const unsigned* grid, const unsigned* threads, int cooperative, int schedule,
                  unsigned seed, std::size_t shared_bytes, void** arguments, char* message, std::size_t message_bytes)
{
    Launch l;
    l.grid = {grid[0], grid[1], grid[2]};
    l.block = {threads[0], threads[1], threads[2]};
    l.cooperative = cooperative != 0;
    l.schedule = Schedule(schedule);
    l.seed = seed;
    l.shared_bytes = shared_bytes;
    l.run_thread = run_thread;
    l.arguments = arguments;
    unsigned workers = cooperative ? l.blocks() : std::min(l.blocks(), std::max(1u, std::thread::hardware_concurrency()));
    std::vector<std::thread> pool;
    for (unsigned i = 0; i < workers; i++) pool.emplace_back([&l, i, workers] { run_blocks(l, i, workers); });
    for (std::thread& t : pool) t.join();
    std::snprintf(message, message_bytes, "%s", l.message.c_str());
    return l.failed;
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_VISIBLE extern "C" __attribute__((visibility("default")))

// runtime.py appends this once for every kernel of a source.
#define CUDA_ON_CPU_EXPORT(kernel)                                                                                        \
    CUDA_ON_CPU_VISIBLE const char* kernel##_parameters() { return cuda_on_cpu::Kernel<&kernel>::parameters(); }                    \
    CUDA_ON_CPU_VISIBLE int kernel##_launch(const unsigned* grid, const unsigned* threads, int cooperative, int schedule,           \
                                   unsigned seed, std::size_t shared_bytes, void** arguments, char* message,               \
                                   std::size_t message_bytes)                                                              \
    {                                                                                                                      \
        return cuda_on_cpu::launch(cuda_on_cpu::Kernel<&kernel>::run_thread, grid, threads, cooperative, schedule, seed,   \
                                   shared_bytes, arguments, message, message_bytes);                                       \
    }

// ================================================================================================ 7 intrinsics

#define __syncthreads() cuda_on_cpu::syncthreads(CUDA_ON_CPU_HERE)
#define __syncthreads_count(vote) (cuda_on_cpu::syncthreads(CUDA_ON_CPU_HERE, (vote) != 0), int(cuda_on_cpu::block->last_votes))
#define __syncthreads_or(vote) (cuda_on_cpu::syncthreads(CUDA_ON_CPU_HERE, (vote) != 0), int(cuda_on_cpu::block->last_votes != 0))
#define __syncwarp(...) cuda_on_cpu::syncwarp(0xFFFFFFFFu, CUDA_ON_CPU_HERE)
#define __shfl_sync(mask, value, lane) cuda_on_cpu::shuffle(mask, value, [&](int) { return int(lane) & 31; }, CUDA_ON_CPU_HERE)
#define __shfl_up_sync(mask, value, by) cuda_on_cpu::shuffle(mask, value, [&](int l) { return l - int(by); }, CUDA_ON_CPU_HERE)
#define __shfl_down_sync(mask, value, by) cuda_on_cpu::shuffle(mask, value, [&](int l) { return l + int(by); }, CUDA_ON_CPU_HERE)
#define __shfl_xor_sync(mask, value, by) cuda_on_cpu::shuffle(mask, value, [&](int l) { return l ^ int(by); }, CUDA_ON_CPU_HERE)
#define __ballot_sync(mask, vote) cuda_on_cpu::ballot(mask, (vote) != 0, CUDA_ON_CPU_HERE)
#define __any_sync(mask, vote) (__ballot_sync(mask, vote) != 0)

template <class T> T atomicAdd(T* at, std::type_identity_t<T> value) { return std::atomic_ref<T>(*at).fetch_add(value); }
template <class T> T atomicExch(T* at, std::type_identity_t<T> value) { return std::atomic_ref<T>(*at).exchange(value); }
template <class T> T atomicOr(T* at, std::type_identity_t<T> value) { return std::atomic_ref<T>(*at).fetch_or(value); }
template <class T> T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value)
{
    std::atomic_ref<T>(*at).compare_exchange_strong(expected, value);
    return expected;
}
template <class T> T atomicMax(T* at, std::type_identity_t<T> value)
{
    T old = *at;
    while (old < value && !std::atomic_ref<T>(*at).compare_exchange_weak(old, value)) {}
    return old;
}
template <class T> T atomicMin(T* at, std::type_identity_t<T> value)
{
    T old = *at;
    while (value < old && !std::atomic_ref<T>(*at).compare_exchange_weak(old, value)) {}
    return old;
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { cuda_on_cpu::fail("the kernel has stopped itself"); }

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector)
{
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= unsigned((uint64_t(y) << 32 | x) >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return result;
}
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline float __ll2float_rn(long long x) { return float(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline void sincospif(float x, float* sine, float* cosine)
{
    double r = M_PI * std::remainder(double(x), 2.0);
    *sine = float(std::sin(r));
    *cosine = float(std::cos(r));
}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
template <class T> T __ldg(const T* at) { return *at; }
template <class T> T min(T a, std::type_identity_t<T> b) { return b < a ? b : a; }
template <class T> T max(T a, std::type_identity_t<T> b) { return a < b ? b : a; }

#include "mma.h"
#include "wgmma.h"
