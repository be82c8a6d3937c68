// wgmma.h: the functions of kernels/wgmma.cuh over cuda_on_cpu.h.
//
// Written from the PTX ISA, not from the kernels: barriers count arrivals and bytes; the copy engine puts 16-byte pieces where
// 128-byte swizzle puts them and zeros where the matrix ends; wgmma reads what its descriptors name, as the instruction's
// canonical layouts say. What may come late comes late: under the forward schedule a copy is done at once, under the reverse one
// when no thread can go on without it, the last first, and under the random one either way; until then its destination is all
// ones, which is not a number. A product is made when it is waited for. So a missing wait, or a stage given back too early, shows.
//
// Reported as errors: addresses and descriptors that are wrong, more arrivals or bytes than a phase has, products on sums
// without a fence, copies still on their way at the end.
//
// Not modelled: the order and rounding of a tensor core's float32 sums, fences for other engines, numbers of registers.
#pragma once

#define CUDA_ON_CPU  // wgmma.cuh leaves these functions to this file

namespace cuda_on_cpu {

constexpr unsigned SHARED_BEGINS = 144;  // where dynamic_shared lies in the shared window: at no multiple of 1024

struct alignas(8) Barrier {
    int bytes;  // announced and not yet arrived
    uint16_t arrivals;
    uint16_t pending : 15, parity : 1;  // of the present phase
};
static_assert(sizeof(Barrier) == 8);

inline unsigned char* shared_at(unsigned address, unsigned bytes, unsigned multiple, Place place)
{
    if (address % multiple || address < SHARED_BEGINS || address + bytes > SHARED_BEGINS + block->launch->shared_bytes)
        fail("%u bytes at %u must be at a multiple of %u within shared memory, at %s:%d", bytes, address, multiple,
             place.file, place.line);
    return dynamic_shared + (address - SHARED_BEGINS);
}

inline Barrier& barrier_at(unsigned address, Place place) { return *reinterpret_cast<Barrier*>(shared_at(address, 8, 8, place)); }

inline void end_phase_if_complete(Barrier& barrier)
{
    if (barrier.pending > 0 || barrier.bytes > 0) return;
    barrier.parity ^= 1;
    barrier.pending = barrier.arrivals;
    for (Fiber& f : block->fibers)
        if (f.state == State::at_phase && f.awaited == &barrier) f.state = State::ready;
}

inline void arrive(unsigned address, unsigned bytes, Place place)
{
    Barrier& barrier = barrier_at(address, place);
    if (barrier.pending == 0) fail("one arrival too many at the barrier of %s:%d", place.file, place.line);
    barrier.bytes += bytes;
    barrier.pending--;
    end_phase_if_complete(barrier);
}

inline unsigned swizzled(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

inline float bf16_at(unsigned address, Place place)
{
    uint16_t bits;
    std::memcpy(&bits, shared_at(swizzled(address), 2, 2, place), 2);
    return std::bit_cast<float>(uint32_t(bits) << 16);
}

// A matrix in shared memory: PTX ISA 9.0, "Strides" and "Matrix Descriptor Format".
struct Matrix {
    unsigned start, leading_stride, stride;
    bool lines;

    Matrix(uint64_t descriptor, bool lines, Place place)
        : start((descriptor & 0x3FFF) << 4), leading_stride((descriptor >> 16 & 0x3FFF) << 4),
          stride((descriptor >> 32 & 0x3FFF) << 4), lines(lines)
    {
        if (descriptor >> 62 != 1 || descriptor >> 46 & 0xFFFF)
            fail("a descriptor must say 128-byte swizzle from its start, at %s:%d", place.file, place.line);
    }

    unsigned address(unsigned line, unsigned k) const
    {
        return lines ? start + line / 64 * leading_stride + k / 8 * stride + k % 8 * 128 + line % 64 * 2
                     : start + line / 8 * stride + line % 8 * 128 + k * 2;
    }
};

inline void multiply(const Multiplication& p)
{
    Matrix a(p.a, p.a_lines, p.place), b(p.b, p.b_lines, p.place);
    unsigned warp = block->current / 32 % 4, g = block->lane() / 4, t = block->lane() % 4;
    for (unsigned k = 0; k < 16; k++) {
        float rows[2] = {bf16_at(a.address(16 * warp + g, k), p.place), bf16_at(a.address(16 * warp + g + 8, k), p.place)};
        for (int i = 0; i < p.columns / 2; i += 4)
            for (int j = 0; j < 2; j++) {
                float column = bf16_at(b.address(2 * i + 2 * t + j, k), p.place);
                p.sums[i + j] += rows[0] * column;
                p.sums[i + j + 2] += rows[1] * column;
            }
    }
}

inline void start_multiplication(float* sums, int columns, uint64_t a, uint64_t b, bool a_lines, bool b_lines, Place place)
{
    Fiber& f = block->fiber();
    if (!f.fenced) fail("products need a fence before the first, at %s:%d", place.file, place.line);
    f.multiplications.push_back({sums, columns, a, b, a_lines, b_lines, f.multiplication_groups, place});
}

// All groups of this thread but the last `but`; the warp waits together.
inline void finish_multiplications(unsigned but, Place place)
{
    Fiber& f = block->fiber();
    auto end = f.multiplications.begin();
    for (; end != f.multiplications.end() && end->group + but < f.multiplication_groups; ++end) multiply(*end);
    f.multiplications.erase(f.multiplications.begin(), end);
    syncwarp(~0u, place);
}

}  // namespace cuda_on_cpu

struct TensorMap {  // tests/cuda_on_cpu/runtime.py makes it
    uint64_t address, columns, rows, pitch, box_columns, box_rows, rest[10];
};

#define WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline unsigned shared_address(const void* shared)
{
    return static_cast<const unsigned char*>(shared) - dynamic_shared + cuda_on_cpu::SHARED_BEGINS;
}

inline bool elected(WHERE)
{
    cuda_on_cpu::syncwarp(~0u, {file, line});
    return cuda_on_cpu::block->lane() == 0;
}

inline void barrier_init(unsigned barrier, unsigned arrivals, WHERE)
{
    cuda_on_cpu::barrier_at(barrier, {file, line}) = {0, uint16_t(arrivals), uint16_t(arrivals), 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(unsigned barrier, WHERE) { cuda_on_cpu::arrive(barrier, 0, {file, line}); }
inline void barrier_arrive_announcing(unsigned barrier, unsigned bytes, WHERE) { cuda_on_cpu::arrive(barrier, bytes, {file, line}); }

inline void barrier_wait(unsigned address, unsigned parity, WHERE)
{
    cuda_on_cpu::Barrier& barrier = cuda_on_cpu::barrier_at(address, {file, line});
    while (barrier.parity == parity) {
        cuda_on_cpu::Fiber& f = cuda_on_cpu::block->fiber();
        f.state = cuda_on_cpu::State::at_phase;
        f.awaited = &barrier;
        f.place = {file, line};
        cuda_on_cpu::yield();
    }
}

inline void copy_box(unsigned to, const TensorMap& map, int x, int y, unsigned barrier, WHERE)
{
    using namespace cuda_on_cpu;
    unsigned bytes = map.box_columns * map.box_rows * 2;
    if (map.box_columns != 64)
        fail("a box with 128-byte swizzle must be 64 values wide; this is %d", int(map.box_columns));
    std::memset(shared_at(to, bytes, 1024, {file, line}), 0xFF, bytes);  // where the pattern begins
    Place place{file, line};
    in_background([=] {
        for (unsigned r = 0; r < map.box_rows; r++)
            for (unsigned c = 0; c < 64; c++) {
                long long row = (long long)y + r, column = (long long)x + c;
                uint16_t value = 0;
                if (0 <= row && row < (long long)map.rows && 0 <= column && column < (long long)map.columns)
                    std::memcpy(&value, reinterpret_cast<const char*>(map.address) + row * map.pitch + column * 2, 2);
                std::memcpy(shared_at(swizzled(to + r * 128 + c * 2), 2, 2, place), &value, 2);
            }
        Barrier& arrived = barrier_at(barrier, place);
        if (arrived.bytes < int(bytes))
            fail("more bytes than were announced arrive at the barrier of %s:%d", place.file, place.line);
        arrived.bytes -= bytes;
        end_phase_if_complete(arrived);
    });
}

inline void fetch_to_L2(const void* global, unsigned bytes, WHERE)
{
    if (reinterpret_cast<std::uintptr_t>(global) % 16 || bytes % 16 || bytes == 0)
        cuda_on_cpu::fail("%u bytes to be fetched must be, and lie at, multiples of 16, at %s:%d", bytes, file, line);
}

inline void fence_for_engines() {}

inline void wgmma_fence() { cuda_on_cpu::block->fiber().fenced = true; }

template <bool A_LINES, bool B_LINES> void wgmma_64x256(float (&d)[128], uint64_t a, uint64_t b, WHERE)
{
    cuda_on_cpu::start_multiplication(d, 256, a, b, A_LINES, B_LINES, {file, line});
}
template <bool A_LINES> void wgmma_64x8(float (&d)[4], uint64_t a, uint64_t b, WHERE)
{
    cuda_on_cpu::start_multiplication(d, 8, a, b, A_LINES, false, {file, line});
}
inline void wgmma_commit() { cuda_on_cpu::block->fiber().multiplication_groups++; }
inline void wgmma_wait_for_all_but_one(WHERE) { cuda_on_cpu::finish_multiplications(1, {file, line}); }
inline void wgmma_wait(float (&)[128], WHERE)
{
    cuda_on_cpu::finish_multiplications(0, {file, line});
    cuda_on_cpu::block->fiber().fenced = false;
}
inline void wgmma_waited(float (&)[4]) {}

template <int COUNT> void registers_give_back() {}
template <int COUNT> void registers_ask_for() {}

#undef WHERE
