// product_fp32: the product of product.cuh in float32, as every GPU can do it.
//
// A thread makes THREAD_ROWS x 4 sums in registers. The next TILE_DEPTH values of k are on their way while these are used. Both
// operands are read and kept in shared memory as they lie, in quads, and turned in registers.
//
// Numerics: float32 sums, SLICES partial sums of depth / SLICES terms.
//
// Bank conflicts: none in the inner loop. Along the depth, threads read quads of lines 4 apart, which would fall on the same
// banks; so quad q of line l is kept in place q ^ (l / 4 % 8).
#pragma once

constexpr int TILE_ROW_QUADS = TILE_ROWS / 4, TILE_COLUMN_QUADS = TILE_COLUMNS / 4;
constexpr int THREAD_ROW_QUADS = THREAD_ROWS / 4;
constexpr int THREAD_RANKS = TILE_ROWS / THREAD_ROWS;  // threads one above the other in a slice
constexpr int SLICE_DEPTH = TILE_DEPTH / SLICES;
constexpr int SHARED_FLOATS = (TILE_ROWS + TILE_COLUMNS) * TILE_DEPTH;

static_assert(THREADS == THREAD_RANKS * TILE_COLUMN_QUADS * SLICES, "THREADS must be the threads of all slices");
static_assert(TILE_DEPTH % 32 == 0 && SLICE_DEPTH % 4 == 0, "the swizzle needs 8 quads a line, a slice whole quads");
static_assert(SLICES == 1 || SLICES * TILE_ROWS * TILE_COLUMNS <= SHARED_FLOATS, "the slices' sums must fit");

// A piece of an operand, LINES x TILE_DEPTH: fetched to registers, put into shared memory, read as 4 x 4 values.
template <int LINES, Neighbours N> struct Piece {
    static constexpr int QUADS = LINES * TILE_DEPTH / 4 / THREADS;  // that each thread carries
    static_assert(QUADS * THREADS * 4 == LINES * TILE_DEPTH, "threads must share out a piece evenly");
    float4 held[QUADS];

    // The i-th quad this thread carries: its first line and first k.
    static __device__ __forceinline__ void place(int i, int& line, int& k)
    {
        int quad = i * THREADS + threadIdx.x;
        constexpr int QUADS_IN_ROW = (N == ALONG_DEPTH ? TILE_DEPTH : LINES) / 4;
        int row = quad / QUADS_IN_ROW, first = quad % QUADS_IN_ROW * 4;
        line = N == ALONG_DEPTH ? row : first;
        k = N == ALONG_DEPTH ? first : row;
    }

    static __device__ __forceinline__ int offset(int line, int k)
    {
        return N == ALONG_DEPTH ? line * TILE_DEPTH + ((k / 4) ^ (line / 4 % 8)) * 4 : k * LINES + line;
    }

    // `adjust(quad, line, k)` may change what was read.
    template <class Adjust>
    __device__ __forceinline__ void fetch(const Matrix<N>& matrix, int first_line, int first_k, Adjust adjust)
    {
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            int line, k;
            place(i, line, k);
            held[i] = matrix.quad(first_line + line, first_k + k);
            adjust(held[i], first_line + line, first_k + k);
        }
    }

    __device__ __forceinline__ void put(float* shared) const
    {
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            int line, k;
            place(i, line, k);
            *reinterpret_cast<float4*>(shared + offset(line, k)) = held[i];
        }
    }

    // out[i][j] = value of k + i and line + j, for k and line multiples of 4.
    static __device__ __forceinline__ void read(const float* shared, int line, int k, float (&out)[4][4])
    {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float4 q = *reinterpret_cast<const float4*>(shared + (N == ALONG_DEPTH ? offset(line + i, k) : offset(line, k + i)));
            float four[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
            for (int j = 0; j < 4; j++) (N == ALONG_DEPTH ? out[j][i] : out[i][j]) = four[j];
        }
    }
};

template <Neighbours NA, Neighbours NB, class AdjustA, class AdjustB, class Use>
__device__ __forceinline__ void product(const Matrix<NA>& a, const Matrix<NB>& b, int first_row, int first_column,
                                        AdjustA adjust_a, AdjustB adjust_b, Use use)
{
    __shared__ __align__(16) float shared[SHARED_FLOATS];
    float *shared_a = shared, *shared_b = shared + TILE_ROWS * TILE_DEPTH;

    constexpr int SLICE_THREADS = THREADS / SLICES;
    int slice = threadIdx.x / SLICE_THREADS, rank = threadIdx.x % SLICE_THREADS / TILE_COLUMN_QUADS;
    int column = threadIdx.x % TILE_COLUMN_QUADS * 4;
    auto row_of = [&](int i) { return (rank + i / 4 * THREAD_RANKS) * 4 + i % 4; };

    float sum[THREAD_ROWS][4] = {};
    Piece<TILE_ROWS, NA> piece_a;
    Piece<TILE_COLUMNS, NB> piece_b;
    piece_a.fetch(a, first_row, 0, adjust_a);
    piece_b.fetch(b, first_column, 0, adjust_b);

    for (int k0 = 0; k0 < a.depth(); k0 += TILE_DEPTH) {
        __syncthreads();  // all have used the pieces before
        piece_a.put(shared_a);
        piece_b.put(shared_b);
        __syncthreads();  // all pieces are there
        if (k0 + TILE_DEPTH < a.depth()) {
            piece_a.fetch(a, first_row, k0 + TILE_DEPTH, adjust_a);
            piece_b.fetch(b, first_column, k0 + TILE_DEPTH, adjust_b);
        }
#pragma unroll 1  // the body is long enough, and more of it spills registers
        for (int k = 0; k < SLICE_DEPTH; k += 4) {
            float b_values[4][4];
            Piece<TILE_COLUMNS, NB>::read(shared_b, column, slice * SLICE_DEPTH + k, b_values);
#pragma unroll
            for (int group = 0; group < THREAD_ROW_QUADS; group++) {
                float a_values[4][4];
                Piece<TILE_ROWS, NA>::read(shared_a, row_of(4 * group), slice * SLICE_DEPTH + k, a_values);
#pragma unroll
                for (int kk = 0; kk < 4; kk++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int j = 0; j < 4; j++) sum[4 * group + i][j] += a_values[kk][i] * b_values[kk][j];
            }
        }
    }

    if (SLICES == 1) {
#pragma unroll
        for (int i = 0; i < THREAD_ROWS; i++) use(row_of(i), column, make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
        return;
    }
    // Add up the slices: each puts its sums down, then the threads share out the quads of the tile.
    __syncthreads();  // all have used the last pieces
#pragma unroll
    for (int i = 0; i < THREAD_ROWS; i++)
        *reinterpret_cast<float4*>(shared + (slice * TILE_ROWS + row_of(i)) * TILE_COLUMNS + column)
            = make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
    __syncthreads();  // all sums are there
    use_sums(shared, use);
}
