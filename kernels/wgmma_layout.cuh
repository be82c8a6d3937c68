// wgmma_layout: where things lie in a product by wgmma: in shared memory, in registers, among the blocks and in time.
//
//     Operand      a tile of bf16 in shared memory, as the copy engine puts it there and as wgmma is told to read it
//     fragment_row, quad_*   which sums a thread of a warpgroup holds, and which once neighbours have exchanged some
//     Ring         the stage of shared memory that comes next, and how often each was used
//     tile_at      the order of the tiles
//
// Arithmetic only, no instructions. Constants: TILE_ROWS, TILE_COLUMNS, TILE_DEPTH, STAGES, ROW_GROUP.
//
// Shared memory. The copy engine fills boxes of lines of 128 bytes, SPAN = 64 values. In a line, pieces of 16 bytes lie at
// their place exclusive-or the number of the line modulo 8 (128-byte swizzle): bits 4-6 of an address are changed by its bits
// 7-9. Boxes begin at multiples of 1024 bytes, where the pattern repeats. Which way the lines run depends on the matrix:
//
//     ALONG_DEPTH   neighbours in memory are terms of one sum: one box, a line of the tile to each of its lines   (K-major)
//     ALONG_LINES   neighbours in memory belong to different sums: a box for every SPAN lines of the tile, and      (MN-major)
//                   within it a term to each of its lines
//
// Source: PTX ISA 9.0, "Asynchronous Warpgroup Level Matrix Shared Memory Layout" (strides and descriptor), "Tensor swizzling
// modes", "Register Fragments and Shared Memory Matrix Layouts" of wgmma.mma_async.
// Test: tests/cuda/test_wgmma.py
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

enum Neighbours { ALONG_DEPTH, ALONG_LINES };

constexpr int SPAN = 64;                // values of bf16 in a line of a box: 128 bytes
constexpr int SWIZZLE_BYTES = 8 * 128;  // after which the pattern repeats
constexpr int WGMMA_DEPTH = 16;         // terms that one wgmma adds
constexpr int WGMMA_ROWS = 64;          // rows of one wgmma, for the four warps of a warpgroup

static_assert(TILE_DEPTH == SPAN, "a box is as deep as wide");
static_assert(TILE_ROWS % WGMMA_ROWS == 0 && TILE_COLUMNS == 256, "a warpgroup has 64 rows and all columns");

// The descriptor of a matrix in shared memory with 128-byte swizzle, in bits (addresses and strides in units of 16 bytes):
//     0-13 first address   16-29 leading stride   32-45 stride   49-51 where in the pattern it begins: 0   62-63 swizzle: 1
__device__ __forceinline__ u64 descriptor_of(u32 address, u32 leading_stride, u32 stride)
{
    return (u64)((address & 0x3FFFF) >> 4) | (u64)(leading_stride >> 4) << 16 | (u64)(stride >> 4) << 32 | 1ull << 62;
}

// LINES lines of TILE_DEPTH terms each: rows of the first matrix of a product or columns of the second.
template <int LINES, Neighbours N> struct Operand {
    static constexpr int BYTES = LINES * TILE_DEPTH * 2;
    static constexpr int BOXES = N == ALONG_DEPTH ? 1 : LINES / SPAN;
    static constexpr int BOX_BYTES = BYTES / BOXES;
    static constexpr int BOX_LINES = N == ALONG_DEPTH ? LINES : TILE_DEPTH;  // of 128 bytes each
    static_assert(BOX_BYTES % SWIZZLE_BYTES == 0 && BOX_LINES <= 256, "boxes lie on the pattern, and the engine can copy them");

    // What wgmma reads: the terms k to k + 15 of the lines from `line`, a multiple of 64, on; the tile begins at `tile`.
    // The strides lead from 8 lines of 128 bytes to the next 8 and, ALONG_LINES, from a box to the next (the leading one;
    // ALONG_DEPTH it is not used: 16 terms never leave their line).
    static __device__ __forceinline__ u64 descriptor(u32 tile, int line, int k)
    {
        return N == ALONG_DEPTH ? descriptor_of(tile + line * 128 + k * 2, 16, SWIZZLE_BYTES)
                                : descriptor_of(tile + line / SPAN * BOX_BYTES + k * 128, BOX_BYTES, SWIZZLE_BYTES);
    }
};

// Sum i, 0 to 127, of a thread of a warpgroup is in this row of its 64, and in column 8 (i / 4) + 2 (thread % 4) + i % 2.
__device__ __forceinline__ int fragment_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }

// A thread holds two neighbours in each of two rows. It gives one pair to the thread beside it and gets one, so that it has
// four neighbours in one row: a Philox block, and 16 bytes of float32. Quad q of a thread begins here.
constexpr int QUADS = 32, QUAD_STEP = 8;  // of a thread, and the columns from one to the next
__device__ __forceinline__ int quad_row(int thread) { return thread / 32 * 16 + thread % 32 / 4 + thread % 2 * 8; }
__device__ __forceinline__ int quad_column(int thread, int q) { return q * QUAD_STEP + thread % 4 / 2 * 4; }

__device__ __forceinline__ float4 quad_of(const float (&sums)[128], int q, int thread)
{
    bool odd = thread % 2;
    float x = sums[4 * q], y = sums[4 * q + 1], below_x = sums[4 * q + 2], below_y = sums[4 * q + 3];
    float got_x = __shfl_xor_sync(0xFFFFFFFFu, odd ? x : below_x, 1);
    float got_y = __shfl_xor_sync(0xFFFFFFFFu, odd ? y : below_y, 1);
    return odd ? make_float4(got_x, got_y, below_x, below_y) : make_float4(x, y, got_x, got_y);
}

// The stages of shared memory are filled and emptied in turn. A barrier changes the parity of its phase each time it is
// passed: who fills waits for the parity before, so that at first, when nothing has been emptied yet, it does not wait.
struct Ring {
    u32 turn = 0;

    __device__ __forceinline__ u32 stage() const { return turn % STAGES; }
    __device__ __forceinline__ u32 stage_before() const { return (turn - 1) % STAGES; }
    __device__ __forceinline__ u32 parity() const { return turn / STAGES % 2; }
    __device__ __forceinline__ u32 parity_before() const { return parity() ^ 1; }
};

// Tile `number` of a matrix cut into rows x columns tiles. Tiles that run at a time share rows and columns: ROW_GROUP rows of
// tiles are gone through column by column.
struct TilePosition {
    int row, column;
};

__device__ __forceinline__ TilePosition tile_at(int number, int rows, int columns)
{
    int group = number / (ROW_GROUP * columns), within = number - group * (ROW_GROUP * columns);
    int first_row = group * ROW_GROUP, rows_in_group = min(ROW_GROUP, rows - first_row);
    return {first_row + within % rows_in_group, within / rows_in_group};
}
