// mma.h: the functions of kernels/mma.cuh over cuda_on_cpu.h, lane by lane.
//
// A fragment holds what the header of mma.cuh says. Reported as errors: lanes that are not all at one instruction, addresses
// that are no multiples of what they must be. A copy arrives as late as it may, when its thread waits for it; until then its
// destination is all ones, which is not a number: so a missing wait, or a copy over what is still read, shows.
//
// Not modelled: the order and rounding of a tensor core's float32 sums (here: one by one), overlap, bank conflicts.
#pragma once

#define CUDA_ON_CPU  // mma.cuh leaves these functions to this file

namespace cuda_on_cpu {

// Every lane of the warp shows a value; `use` makes a result of all 32. All lanes must be at this place.
template <class T, class Use> auto together(const T& value, Use use, Place place)
{
    static_assert(sizeof(T) <= sizeof(Warp::exchange) / 32);
    Block& b = *block;
    Warp& w = b.warp();
    if (w.alive != ~0u) fail("an instruction for whole warps needs all 32 lanes, at %s:%d", place.file, place.line);
    T* all = reinterpret_cast<T*>(w.exchange);
    all[b.lane()] = value;
    syncwarp(~0u, place);
    if (b.lane() == 0)
        for (unsigned lane = 1; lane < 32; lane++)
            if (const Place& other = b.fibers[b.current + lane].place; !(other == place))
                fail("lanes of a warp are at %s:%d and at %s:%d", place.file, place.line, other.file, other.line);
    auto result = use(static_cast<const T*>(all));
    syncwarp(~0u, place);  // all have read
    return result;
}

// d += a b. T is the type of the values, E of them in a register; `widen` makes one a number to be multiplied.
template <class T, class Sum, class Widen>
void mma(Sum (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Widen widen, Place place)
{
    constexpr int E = 4 / sizeof(T), K = 8 * E;
    struct Fragments { unsigned a[4], b[2]; };
    struct Sums { Sum d[4]; };
    Fragments mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    Sums sums = together(mine, [&](const Fragments* all) {
        auto value = [&](unsigned reg, int k) { return widen(std::bit_cast<std::array<T, E>>(reg)[k % E]); };
        auto a_at = [&](int row, int k) { return value(all[row % 8 * 4 + k / E % 4].a[row / 8 + k / (4 * E) * 2], k); };
        auto b_at = [&](int k, int column) { return value(all[column * 4 + k / E % 4].b[k / (4 * E)], k); };
        int g = block->lane() / 4, t = block->lane() % 4;
        Sums sums;
        for (int i = 0; i < 4; i++) {
            sums.d[i] = d[i];
            for (int k = 0; k < K; k++) sums.d[i] += a_at(g + i / 2 * 8, k) * b_at(k, 2 * t + i % 2);
        }
        return sums;
    }, place);
    for (int i = 0; i < 4; i++) d[i] = sums.d[i];
}

inline void hold_to(const char* what, const void* address, int bytes, Place place)
{
    if (reinterpret_cast<std::uintptr_t>(address) % bytes)
        fail("%s must be at a multiple of %d bytes, at %s:%d", what, bytes, place.file, place.line);
}

template <int MATRICES> void load_matrices(unsigned (&r)[MATRICES], const void* row, bool transposed, Place place)
{
    if (int(block->lane()) < 8 * MATRICES) hold_to("a row of a matrix", row, 16, place);
    using Row = const uint16_t*;
    auto loaded = together(static_cast<Row>(row), [&](const Row* rows) {
        std::array<unsigned, MATRICES> loaded;
        int g = block->lane() / 4, t = block->lane() % 4;
        for (int i = 0; i < MATRICES; i++) {
            auto at = [&](int row, int column) -> unsigned { return rows[8 * i + row][column]; };
            loaded[i] = transposed ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
        }
        return loaded;
    }, place);
    std::copy(loaded.begin(), loaded.end(), r);
}

}  // namespace cuda_on_cpu

// `WHERE` makes the place of a call that of the caller.
#define WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], WHERE)
{
    cuda_on_cpu::mma<uint16_t>(d, a, b, [](uint16_t x) { return std::bit_cast<float>(uint32_t(x) << 16); }, {file, line});
}

inline void mma_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], WHERE)
{
    cuda_on_cpu::mma<uint16_t>(d, a, b, [](uint16_t x) { return float(std::bit_cast<_Float16>(x)); }, {file, line});
}

inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], WHERE)
{
    cuda_on_cpu::mma<uint32_t>(d, a, b, [](uint32_t x) { return std::bit_cast<float>(x & 0xFFFFE000u); }, {file, line});
}

inline void mma_s8(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], WHERE)
{
    unsigned sums[4];  // unsigned numbers wrap round
    std::copy(d, d + 4, sums);
    cuda_on_cpu::mma<int8_t>(sums, a, b, [](int8_t x) { return unsigned(int(x)); }, {file, line});
    std::copy(sums, sums + 4, d);
}

inline void ldmatrix(unsigned (&r)[4], const void* row, WHERE) { cuda_on_cpu::load_matrices(r, row, false, {file, line}); }
inline void ldmatrix(unsigned (&r)[2], const void* row, WHERE) { cuda_on_cpu::load_matrices(r, row, false, {file, line}); }
inline void ldmatrix_trans(unsigned (&r)[4], const void* row, WHERE) { cuda_on_cpu::load_matrices(r, row, true, {file, line}); }
inline void ldmatrix_trans(unsigned (&r)[2], const void* row, WHERE) { cuda_on_cpu::load_matrices(r, row, true, {file, line}); }

template <int BYTES> void cp_async(void* shared, const void* global, int bytes = BYTES, WHERE)
{
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
    cuda_on_cpu::hold_to("the destination of a copy", shared, BYTES, {file, line});
    cuda_on_cpu::hold_to("the source of a copy", global, BYTES, {file, line});
    if (bytes < 0 || bytes > BYTES) cuda_on_cpu::fail("a copy of %d bytes reads %d, at %s:%d", BYTES, bytes, file, line);
    cuda_on_cpu::Fiber& f = cuda_on_cpu::block->fiber();
    std::memset(shared, 0xFF, BYTES);
    f.copies.push_back({shared, global, bytes, BYTES, f.groups});
}

inline void cp_async_commit() { cuda_on_cpu::block->fiber().groups++; }

template <int N> void cp_async_wait()
{
    cuda_on_cpu::Fiber& f = cuda_on_cpu::block->fiber();
    auto end = f.copies.begin();
    for (; end != f.copies.end() && end->group + N < f.groups; ++end) {
        std::memset(end->to, 0, end->size);
        std::memcpy(end->to, end->from, end->bytes);
    }
    f.copies.erase(f.copies.begin(), end);
}

inline unsigned bf16_pair(float first, float second)
{
    auto rounded = [](float x) -> unsigned {
        unsigned bits = std::bit_cast<unsigned>(x);
        return x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    };
    return rounded(first) | rounded(second) << 16;
}

inline unsigned f16_pair(float first, float second)
{
    auto rounded = [](float x) -> unsigned { return std::bit_cast<uint16_t>(_Float16(x)); };
    return rounded(first) | rounded(second) << 16;
}
inline float f16_first(unsigned pair) { return float(std::bit_cast<_Float16>(uint16_t(pair))); }
inline float f16_second(unsigned pair) { return float(std::bit_cast<_Float16>(uint16_t(pair >> 16))); }
inline unsigned f16_product(unsigned x, unsigned y)
{
    return f16_pair(f16_first(x) * f16_first(y), f16_second(x) * f16_second(y));
}

inline unsigned tf32(float x) { return x != x ? 0x7FFFE000 : (std::bit_cast<unsigned>(x) + 0x1000) & 0xFFFFE000u; }

#undef WHERE
