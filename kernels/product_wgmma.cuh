// product_wgmma: a matrix product by wgmma, the part that half_step_wgmma and cd_update_wgmma share.
//
//     sums[r, c] = between(sum over k of a0(r, k) b0(k, c)) + sum over k of a1(r, k) b1(k, c)         bf16 in, float32 sums
//
// Blocks stay for the whole launch and take tiles of TILE_ROWS x TILE_COLUMNS in turn. Of a block's THREADS, the last
// warpgroup copies: one of its threads tells the copy engine to fill the next of STAGES stages of shared memory, as soon as
// that is empty. The other warpgroups multiply, each WGMMA_ROWS rows of the tile, and leave a stage when the tensor cores
// have read it. The copies run ahead of the products by up to STAGES stages, across the ends of tiles too, so that they go on
// while the sums of a tile are put to use.
//
//     full[s]    passed when both operands of stage s have arrived: 1 arrival, which announces the bytes
//     empty[s]   passed when all multiplying warps have left stage s: MULTIPLYING_WARPS arrivals
//
// What lies outside the matrices comes as 0: the depth need not be a multiple of anything. Each warp leaves a stage for
// itself, after its own wait: the wait of one warp says nothing about the others.
//
// Sums over lines: with LINE_SUMS, blocks also make the sum over k of a(r, k) for every r, and of b(k, c) for every c, as
// products with a matrix of ones: along the left and the upper edge of the tiles, where each line is met once.
//
// Launch: any number of blocks, best one a multiprocessor; THREADS threads; SHARED_BYTES bytes of dynamic shared memory.
#pragma once
#include "wgmma.cuh"
#include "wgmma_layout.cuh"

constexpr int WARPGROUPS = TILE_ROWS / WGMMA_ROWS;  // that multiply
constexpr int MULTIPLYING_WARPS = 4 * WARPGROUPS;
static_assert(THREADS == 128 * (WARPGROUPS + 1), "THREADS must be the multiplying warpgroups and the one that copies");

// Registers a thread, where a block begins with 65536 / THREADS, rounded down to a multiple of 8.
constexpr int REGISTERS_TO_COPY = 24, REGISTERS_TO_MULTIPLY = 240;
static_assert(128 * (REGISTERS_TO_COPY + WARPGROUPS * REGISTERS_TO_MULTIPLY) <= 65536 / THREADS / 8 * 8 * THREADS,
              "as many as there are");

// A part of the depth: its operands, and how often TILE_DEPTH goes into it, rounded up.
struct Part {
    const TensorMap *a, *b;
    int steps;
};

__device__ __forceinline__ int steps_of(int depth) { return (depth + TILE_DEPTH - 1) / TILE_DEPTH; }

// What a multiplying thread has summed.
struct Sums {
    float products[128];
    float rows[4];        // of its warpgroup's rows; [0] and [2] are fragment_row(thread, 0) and (thread, 2)
    float columns[2][4];  // the same of the columns 128 x warpgroup + 0 to 63, and + 64 to 127
};

__device__ __forceinline__ void clear(Sums& sums)
{
#pragma unroll
    for (float& x : sums.products) x = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) sums.rows[i] = sums.columns[0][i] = sums.columns[1][i] = 0.0f;
}

__device__ __forceinline__ void scale(Sums& sums, float factor)
{
#pragma unroll
    for (float& x : sums.products) x *= factor;
#pragma unroll
    for (int i = 0; i < 4; i++) sums.rows[i] *= factor, sums.columns[0][i] *= factor, sums.columns[1][i] *= factor;
}

template <Neighbours A, Neighbours B> struct Product {
    using TileA = Operand<TILE_ROWS, A>;
    using TileB = Operand<TILE_COLUMNS, B>;
    static constexpr bool A_LINES = A == ALONG_LINES, B_LINES = B == ALONG_LINES;
    static constexpr int STAGE_BYTES = TileA::BYTES + TileB::BYTES;
    static constexpr int BARRIERS_AT = STAGES * STAGE_BYTES + SWIZZLE_BYTES;  // behind the stages and the ones
    static_assert(SHARED_BYTES >= SWIZZLE_BYTES + BARRIERS_AT + 2 * STAGES * 8, "and the way to a multiple of SWIZZLE_BYTES");

    u32 shared;  // where the stages begin
    Ring ring;

    __device__ __forceinline__ u32 a(u32 stage) const { return shared + stage * STAGE_BYTES; }
    __device__ __forceinline__ u32 b(u32 stage) const { return a(stage) + TileA::BYTES; }
    __device__ __forceinline__ u32 ones() const { return shared + STAGES * STAGE_BYTES; }
    __device__ __forceinline__ u32 full(u32 stage) const { return shared + BARRIERS_AT + stage * 8; }
    __device__ __forceinline__ u32 empty(u32 stage) const { return full(stage) + STAGES * 8; }

    __device__ __forceinline__ explicit Product(unsigned char* dynamic_shared)
    {
        u32 start = shared_address(dynamic_shared);
        shared = (start + SWIZZLE_BYTES - 1) / SWIZZLE_BYTES * SWIZZLE_BYTES;
        u32* ones_here = reinterpret_cast<u32*>(dynamic_shared + (ones() - start));
        for (int i = threadIdx.x; i < SWIZZLE_BYTES / 4; i += THREADS) ones_here[i] = 0x3F803F80u;  // two ones in bf16
        fence_for_engines();
        if (threadIdx.x == 0) {
            for (u32 stage = 0; stage < STAGES; stage++) {
                barrier_init(full(stage), 1);
                barrier_init(empty(stage), MULTIPLYING_WARPS);
            }
            barrier_init_fence();
        }
        __syncthreads();  // barriers and ones are there
    }

    // One thread: copies the steps of a part for the tile whose first line of a and of b are these. Calls ahead(a_line, b_line,
    // step + first_step) with each.
    template <class Ahead>
    __device__ __forceinline__ void copy(const Part& part, int a_line, int b_line, int first_step, Ahead ahead)
    {
        for (int step = 0; step < part.steps; step++, ring.turn++) {
            u32 stage = ring.stage(), arrived = full(stage);
            barrier_wait(empty(stage), ring.parity_before());
            barrier_arrive_announcing(arrived, STAGE_BYTES);
            copy_operand<TileA, A>(a(stage), *part.a, a_line, step * TILE_DEPTH, arrived);
            copy_operand<TileB, B>(b(stage), *part.b, b_line, step * TILE_DEPTH, arrived);
            ahead(a_line, b_line, first_step + step);
        }
    }

    template <class Tile, Neighbours N>
    __device__ __forceinline__ void copy_operand(u32 to, const TensorMap& from, int line, int k, u32 arrived)
    {
#pragma unroll
        for (int box = 0; box < Tile::BOXES; box++) {
            u32 there = to + box * Tile::BOX_BYTES;
            if (N == ALONG_DEPTH) copy_box(there, from, k, line, arrived);
            else copy_box(there, from, line + box * SPAN, k, arrived);
        }
    }

    // A warpgroup: adds the products of a part to its sums.
    template <bool LINE_SUMS>
    __device__ __forceinline__ void multiply(Sums& sums, int steps, int warpgroup, bool row_sums, bool column_sums)
    {
        bool leads_warp = threadIdx.x % 32 == 0;
        u64 all_ones = Operand<8, ALONG_DEPTH>::descriptor(ones(), 0, 0);
        for (int step = 0; step < steps; step++, ring.turn++) {
            u32 stage = ring.stage();
            auto rows = [&](int k) { return TileA::descriptor(a(stage), WGMMA_ROWS * warpgroup, k); };
            barrier_wait(full(stage), ring.parity());
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < TILE_DEPTH; k += WGMMA_DEPTH)
                wgmma_64x256<A_LINES, B_LINES>(sums.products, rows(k), TileB::descriptor(b(stage), 0, k));
            wgmma_commit();
            if (LINE_SUMS && row_sums) {
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < TILE_DEPTH; k += WGMMA_DEPTH) wgmma_64x8<A_LINES>(sums.rows, rows(k), all_ones);
                wgmma_commit();
            }
            if (LINE_SUMS && column_sums) {
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < TILE_DEPTH; k += WGMMA_DEPTH)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        u64 columns = TileB::descriptor(b(stage), 128 * warpgroup + 64 * i, k);
                        wgmma_64x8<B_LINES>(sums.columns[i], columns, all_ones);
                    }
                wgmma_commit();
            }
            wgmma_wait_for_all_but_one();  // so that all of the step before are done
            if (step > 0 && leads_warp) barrier_arrive(empty(ring.stage_before()));
        }
        wgmma_wait(sums.products);
        if (LINE_SUMS) wgmma_waited(sums.rows), wgmma_waited(sums.columns[0]), wgmma_waited(sums.columns[1]);
        if (steps > 0 && leads_warp) barrier_arrive(empty(ring.stage_before()));
    }
};

// Calls between(sums) after the first part of a tile, where there is one, and use(sums, thread, row, column) at its end: by
// the threads 0 to 127 of a warpgroup, of which row and column are the first. The thread that copies calls ahead(row, column,
// step) with each step of a tile, of which row and column are the first.
template <Neighbours A, Neighbours B, bool LINE_SUMS, class Ahead, class Between, class Use>
__device__ __forceinline__ void product_wgmma(unsigned char* dynamic_shared, const Part (&parts)[2], int rows, int columns,
                                              Ahead ahead, Between between, Use use)
{
    Product<A, B> product(dynamic_shared);
    int tile_rows = (rows + TILE_ROWS - 1) / TILE_ROWS, tile_columns = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
    int tiles = tile_rows * tile_columns, warpgroup = threadIdx.x / 128;

    if (warpgroup == WARPGROUPS) {
        registers_give_back<REGISTERS_TO_COPY>();
        if (threadIdx.x / 32 == MULTIPLYING_WARPS && elected())
            for (int number = blockIdx.x; number < tiles; number += gridDim.x) {
                TilePosition tile = tile_at(number, tile_rows, tile_columns);
                int row = tile.row * TILE_ROWS, column = tile.column * TILE_COLUMNS;
                product.copy(parts[0], row, column, 0, ahead);
                product.copy(parts[1], row, column, parts[0].steps, ahead);
            }
    } else {
        registers_ask_for<REGISTERS_TO_MULTIPLY>();
        for (int number = blockIdx.x; number < tiles; number += gridDim.x) {
            TilePosition tile = tile_at(number, tile_rows, tile_columns);
            Sums sums;
            clear(sums);
            for (int part = 0; part < 2; part++) {
                int steps = part == 0 ? parts[0].steps : parts[1].steps;
                product.template multiply<LINE_SUMS>(sums, steps, warpgroup, tile.column == 0, tile.row == 0);
                if (part == 0 && steps > 0) between(sums);
            }
            use(sums, (int)threadIdx.x % 128, tile.row * TILE_ROWS + warpgroup * WGMMA_ROWS, tile.column * TILE_COLUMNS);
        }
    }
}
