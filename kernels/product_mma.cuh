// product_mma: the product of product.cuh on tensor cores: operands rounded, products exact, sums in float32.
//
//     PARTS 1            a and b rounded to bf16
//     PARTS 2            a and b each the sum of two bf16:      a b = high high + high low + low high
//     PARTS 1, TF32 1    a and b rounded to tf32
//
// The third product of PARTS 2 is left out where no a has a low part, for instance where all are 0 and 1: it would add zeros.
//
// Numerics: a tensor core adds eight products to a sum at a time, in no order that is specified, and may cut off what is below
// 2^-23 of the largest of them. SLICES partial sums. Operands: gpudbn/precision.py.
//
// Pipeline: STAGES pieces of TILE_DEPTH values of k, of which all but one are on their way (cp.async); one barrier a piece. They
// are kept in float32 as they lie, with zeros for what is outside, and are rounded on the way to registers. To round them on the
// way to shared memory instead would halve what is read there, but takes another pass over it, or registers that large tiles
// do not have; and W and x come in float32 from the L2 cache, which is then the narrower of the two ways (estimated, not
// measured). So all precisions share one pipeline. Rows that are not made of aligned quads are copied float by float.
//
// Warps: each makes WARP_ROWS x WARP_COLUMNS sums, in spans of 32 x 32, and takes 16 values of k at a time. Lane 4 g + t reads
// quads: lines 4 g .. 4 g + 3 of a span of either operand, k from 4 t on: 4 x 4 values. So the eight lines of an mma are those
// of one remainder modulo 4, and its k are in another order, the same in both operands; a lane's sums are quads of columns.
//
// Bank conflicts: none in these reads. Eight lanes read at a time, two g with four t: along the depth the t are four quads of a
// line, and every other four lines these halves are exchanged; along the lines the g are two quads of a row, in four rows four
// apart, which are moved apart by two quads each. See offset().
#pragma once
#include "mma.cuh"

constexpr int SPAN = 32, CHUNK = 16;  // lines, and values of k, that a warp takes at a time
constexpr int ROW_SPANS = WARP_ROWS / SPAN, COLUMN_SPANS = WARP_COLUMNS / SPAN;
constexpr int WARPS_IN_ROW = TILE_COLUMNS / WARP_COLUMNS, WARPS_IN_SLICE = TILE_ROWS / WARP_ROWS * WARPS_IN_ROW;
constexpr int SLICE_DEPTH = TILE_DEPTH / SLICES;
constexpr int STAGE_FLOATS = (TILE_ROWS + TILE_COLUMNS) * TILE_DEPTH;
constexpr int REGISTERS = TF32 ? 4 : 2;  // for four values of k

static_assert(THREADS == 32 * WARPS_IN_SLICE * SLICES, "THREADS must be the threads of all slices");
static_assert(TILE_ROWS % WARP_ROWS == 0 && TILE_COLUMNS % WARP_COLUMNS == 0, "warps must share out a tile evenly");
static_assert(WARP_ROWS % SPAN == 0 && WARP_COLUMNS % SPAN == 0, "a warp must have whole spans");
static_assert(TILE_DEPTH % 32 == 0 && SLICE_DEPTH % CHUNK == 0, "offset() needs 8 quads a line, a slice whole chunks");
static_assert(SLICES * TILE_ROWS * TILE_COLUMNS <= STAGES * STAGE_FLOATS, "the sums must fit");
static_assert(PARTS == 1 || PARTS == 2 && !TF32, "the precisions there are");

__device__ __forceinline__ float* dynamic_floats()
{
    extern __shared__ __align__(16) unsigned char dynamic_shared[];
    return reinterpret_cast<float*>(dynamic_shared);
}

// A piece of an operand, LINES x TILE_DEPTH, in shared memory.
template <int LINES, Neighbours N> struct Piece {
    static constexpr int QUADS_IN_ROW = (N == ALONG_DEPTH ? TILE_DEPTH : LINES) / 4;

    // Of the quad of neighbours from (line, k) on.
    static __device__ __forceinline__ int offset(int line, int k)
    {
        return N == ALONG_DEPTH ? line * TILE_DEPTH + ((k / 4) ^ (line / 4 % 2 * 4)) * 4
                                : k * LINES + ((line / 4) ^ (k / 4 % 4 * 2)) * 4;
    }

    // Starts the copies of this thread: one quad of every STEP-th row. Zeros for what is outside, which is not read.
    static __device__ __forceinline__ void copy(float* shared, const Matrix<N>& matrix, int first_line, int first_k)
    {
        constexpr int STEP = THREADS / QUADS_IN_ROW, ROWS = LINES * TILE_DEPTH / 4 / QUADS_IN_ROW;
        static_assert(STEP * QUADS_IN_ROW == THREADS && ROWS % STEP == 0, "threads must share out a piece evenly");
        int in_row = threadIdx.x % QUADS_IN_ROW * 4, first = (N == ALONG_DEPTH ? first_k : first_line) + in_row;
        int first_row = N == ALONG_DEPTH ? first_line : first_k;
#pragma unroll 2  // more takes more registers than there are
        for (int row = threadIdx.x / QUADS_IN_ROW; row < ROWS; row += STEP) {
            float* to = shared + (N == ALONG_DEPTH ? offset(row, in_row) : offset(in_row, row));
            bool inside = 0 <= first_row + row && first_row + row < matrix.rows;
            const float* from = matrix.data + (long long)(first_row + row) * matrix.size + first;
            if (matrix.aligned)
                cp_async<16>(to, from, inside && first < matrix.size ? 16 : 0);
            else
#pragma unroll
                for (int j = 0; j < 4; j++)
                    cp_async<4>(to + j, from + j, inside && 0 <= first + j && first + j < matrix.size ? 4 : 0);
        }
    }

    // out[i][j] = value of line + i and k + j, for line and k multiples of 4, adjusted.
    template <class Adjust>
    static __device__ __forceinline__ void read(const float* shared, int line, int k, Adjust adjust, float (&out)[4][4])
    {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int at_line = N == ALONG_DEPTH ? line + i : line, at_k = N == ALONG_DEPTH ? k : k + i;
            float4 q = *reinterpret_cast<const float4*>(shared + offset(at_line, at_k));
            adjust(q, at_line, at_k);
            float four[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
            for (int j = 0; j < 4; j++) (N == ALONG_DEPTH ? out[i][j] : out[j][i]) = four[j];
        }
    }
};

// What a lane has of a span and a chunk, rounded: of each part and each of its four lines, four values of k.
struct Fragment {
    unsigned part[PARTS][4][REGISTERS];

    __device__ __forceinline__ void round(const float (&x)[4][4])
    {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int s = 0; s < REGISTERS; s++) {
                if constexpr (TF32)
                    part[0][i][s] = tf32(x[i][s]);
                else if constexpr (PARTS == 1)
                    part[0][i][s] = bf16_pair(x[i][2 * s], x[i][2 * s + 1]);
                else
                    split_pair(x[i][2 * s], x[i][2 * s + 1], part[0][i][s], part[1][i][s]);
            }
    }

    // Not 0 where a low part is not 0.
    __device__ __forceinline__ unsigned low() const
    {
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int s = 0; s < REGISTERS; s++) bits |= part[PARTS - 1][i][s];
        return bits;
    }
};

// The sums of a span of rows and one of columns: [m16 tile][n8 tile][register], see sum_at.
using Sums = float[2][4][4];

__device__ __forceinline__ void multiply(Sums& sum, const unsigned (&a)[4][REGISTERS], const unsigned (&b)[4][REGISTERS])
{
#pragma unroll
    for (int s = 0; s < REGISTERS; s += 2)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                unsigned rows[4] = {a[2 * i][s], a[2 * i + 1][s], a[2 * i][s + 1], a[2 * i + 1][s + 1]};
                unsigned columns[2] = {b[j][s], b[j][s + 1]};
                if constexpr (TF32)
                    mma_tf32(sum[i][j], rows, columns);
                else
                    mma_bf16(sum[i][j], rows, columns);
            }
}

// The sums of row 4 g + r and columns 4 (2 t + c) .. + 3 of the span, in lane 4 g + t.
__device__ __forceinline__ float4 sum_at(const Sums& sum, int r, int c)
{
    int reg = r % 2 * 2 + c;
    return make_float4(sum[r / 2][0][reg], sum[r / 2][1][reg], sum[r / 2][2][reg], sum[r / 2][3][reg]);
}

template <Neighbours NA, Neighbours NB, class AdjustA, class AdjustB, class Use>
__device__ __forceinline__ void product(const Matrix<NA>& a, const Matrix<NB>& b, int first_row, int first_column,
                                        AdjustA adjust_a, AdjustB adjust_b, Use use)
{
    using PieceA = Piece<TILE_ROWS, NA>;
    using PieceB = Piece<TILE_COLUMNS, NB>;
    float* shared = dynamic_floats();

    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
    int slice = warp / WARPS_IN_SLICE, in_slice = warp % WARPS_IN_SLICE;
    int warp_row = in_slice / WARPS_IN_ROW * WARP_ROWS, warp_column = in_slice % WARPS_IN_ROW * WARP_COLUMNS;
    int pieces = (a.depth() + TILE_DEPTH - 1) / TILE_DEPTH;

    auto start = [&](int piece) {
        if (piece < pieces) {
            float* stage = shared + piece % STAGES * STAGE_FLOATS;
            PieceA::copy(stage, a, first_row, piece * TILE_DEPTH);
            PieceB::copy(stage + TILE_ROWS * TILE_DEPTH, b, first_column, piece * TILE_DEPTH);
        }
        cp_async_commit();  // a group for every piece, so that their number tells which have come
    };
    for (int piece = 0; piece < STAGES - 1; piece++) start(piece);

    Sums sum[ROW_SPANS][COLUMN_SPANS] = {};
    for (int piece = 0; piece < pieces; piece++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // this piece has come, for all, and all have used the one before
        start(piece + STAGES - 1);
        const float* shared_a = shared + piece % STAGES * STAGE_FLOATS;
        const float* shared_b = shared_a + TILE_ROWS * TILE_DEPTH;
        auto adjust_row = [&](float4& quad, int line, int k) { adjust_a(quad, first_row + line, piece * TILE_DEPTH + k); };
        auto adjust_column = [&](float4& quad, int line, int k) { adjust_b(quad, first_column + line, piece * TILE_DEPTH + k); };
#pragma unroll 1  // its body is long enough
        for (int chunk = 0; chunk < SLICE_DEPTH; chunk += CHUNK) {
            int k = slice * SLICE_DEPTH + chunk + 4 * t;
            float values[4][4];
            Fragment rows[ROW_SPANS], columns;
            unsigned low = 0;  // whether any a has a low part
#pragma unroll
            for (int i = 0; i < ROW_SPANS; i++) {
                PieceA::read(shared_a, warp_row + SPAN * i + 4 * g, k, adjust_row, values);
                rows[i].round(values);
                low |= rows[i].low();
            }
            bool low_products = PARTS == 2 && __any_sync(0xFFFFFFFFu, low);
#pragma unroll
            for (int j = 0; j < COLUMN_SPANS; j++) {
                PieceB::read(shared_b, warp_column + SPAN * j + 4 * g, k, adjust_column, values);
                columns.round(values);
#pragma unroll
                for (int i = 0; i < ROW_SPANS; i++) {
                    multiply(sum[i][j], rows[i].part[0], columns.part[0]);
                    if (PARTS == 2) multiply(sum[i][j], rows[i].part[0], columns.part[PARTS - 1]);
                    if (low_products) multiply(sum[i][j], rows[i].part[PARTS - 1], columns.part[0]);
                }
            }
        }
    }

    __syncthreads();  // no piece is needed any more
#pragma unroll
    for (int i = 0; i < ROW_SPANS; i++)
#pragma unroll
        for (int j = 0; j < COLUMN_SPANS; j++)
#pragma unroll
            for (int r = 0; r < 4; r++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    int row = warp_row + SPAN * i + 4 * g + r, column = warp_column + SPAN * j + 4 * (2 * t + c);
                    *reinterpret_cast<float4*>(shared + (slice * TILE_ROWS + row) * TILE_COLUMNS + column)
                        = sum_at(sum[i][j], r, c);
                }
    __syncthreads();  // all warps have put down their sums
    use_sums(shared, use);
}
