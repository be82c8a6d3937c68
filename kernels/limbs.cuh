// limbs: one tile of a product of integers on the tensor cores. Its sums are exact, so their order means nothing.
//
//     total[r, c] = sum over k of a(r, k) b(k, c)          r, c in one tile; k from 0 to depth; a, b integers
//
// The operands are float32 in memory. On their way they become integers, x / step to nearest, ties to even, and these are cut
// into limbs, which are signed bytes:
//
//     UnitLimbs     step 2^-14, |x| up to 1     2 limbs     samples (0 and 1 exactly) and probabilities
//     WeightLimbs   step 2^-18, |x| up to 31    3 limbs     what is larger counts as 31
//
// Products of limb i and limb j add up, in int32, to sum number i + j; at the end total = sum_p 256^p sum_p, in int64. No sum
// number wraps round up to a depth of 2^16. The step is fixed, not fitted to the largest weight: W, its transpose and its shards
// are read alike, and nothing must be found out before. The lower limbs of samples are 0: where that is so of a whole piece, its products
// are left out.
//
// The caller's constants, from gpudbn/cuda/exact.py: a block of THREADS threads makes TILE_ROWS x TILE_COLUMNS sums, a warp
// 16 x 32. TILE_DEPTH values of k are in shared memory at a time, and the next ones on their way; SLICES groups of warps share
// out those k. In shared memory four neighbours in k are one word, as mma wants them, and a line has LINE_WORDS words, 4 off a
// multiple of 8, so that the lanes of a warp read from different banks.
//
// Source: the limbs of long arithmetic, Knuth, "The Art of Computer Programming" 2, section 4.3; fragments as in mma.cuh.
// Twin: exact.integers and a float64 product
#pragma once
#include "matrix.cuh"
#include "mma.cuh"

struct UnitLimbs {
    static constexpr int LIMBS = 2;
    static constexpr float LARGEST = 1, STEPS = 0x1p14f;  // steps: in 1
};

struct WeightLimbs {
    static constexpr int LIMBS = 3;
    static constexpr float LARGEST = 31, STEPS = 0x1p18f;
};

constexpr int LINE_WORDS = TILE_DEPTH / 4 + 4;
constexpr int ROW_WARPS = TILE_ROWS / 16, COLUMN_WARPS = TILE_COLUMNS / 32;
constexpr int SLICE_WORDS = TILE_DEPTH / 4 / SLICES;
constexpr int QUADS = TILE_ROWS * TILE_COLUMNS / 4 / THREADS;  // of totals that a thread has in the end

static_assert(THREADS == 32 * ROW_WARPS * COLUMN_WARPS * SLICES, "THREADS must be the warps of all slices");
static_assert(TILE_DEPTH % 32 == 0 && SLICE_WORDS % 8 == 0, "a slice must be whole products of 32 terms");
static_assert(QUADS * THREADS * 4 == TILE_ROWS * TILE_COLUMNS, "threads must share out a tile evenly");

// The limbs of x, one a byte, the lowest first.
template <class Kind> __device__ __forceinline__ unsigned limbs_of(float x)
{
    constexpr unsigned half = Kind::LIMBS == 2 ? 0x8080u : 0x808080u;  // added, it makes every limb at least 0
    int q = __float2int_rn(fminf(fmaxf(x, -Kind::LARGEST), Kind::LARGEST) * Kind::STEPS);
    return ((unsigned)q + half) ^ half;
}

// Byte `limb` of four words, in one.
__device__ __forceinline__ unsigned bytes_of(const unsigned (&words)[4], int limb)
{
    unsigned selector = limb | (limb + 4) << 4;
    return __byte_perm(__byte_perm(words[0], words[1], selector), __byte_perm(words[2], words[3], selector), 0x5410);
}

// A piece of an operand, LINES x TILE_DEPTH: fetched to registers as floats, put into shared memory as limbs, in blocks of 4 x 4.
template <class Kind, int LINES, Neighbours N> struct LimbPiece {
    static constexpr int BLOCKS = LINES * TILE_DEPTH / 16 / THREADS;  // that each thread carries
    static_assert(BLOCKS * THREADS * 16 == LINES * TILE_DEPTH, "threads must share out a piece evenly");
    static constexpr int WORDS = Kind::LIMBS * LINES * LINE_WORDS;
    float4 held[BLOCKS][4];

    static __device__ __forceinline__ void place(int i, int& line, int& k)
    {
        int block = i * THREADS + threadIdx.x;
        constexpr int BLOCKS_IN_ROW = (N == ALONG_DEPTH ? TILE_DEPTH : LINES) / 4;
        int row = block / BLOCKS_IN_ROW * 4, first = block % BLOCKS_IN_ROW * 4;
        line = N == ALONG_DEPTH ? row : first;
        k = N == ALONG_DEPTH ? first : row;
    }

    // `adjust(quad, line, k)` may change what was read.
    template <class Adjust>
    __device__ __forceinline__ void fetch(const Matrix<N>& matrix, int first_line, int first_k, Adjust adjust)
    {
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            int line, k;
            place(i, line, k);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int line_j = first_line + line + (N == ALONG_DEPTH ? j : 0), k_j = first_k + k + (N == ALONG_DEPTH ? 0 : j);
                held[i][j] = matrix.quad(line_j, k_j);
                adjust(held[i][j], line_j, k_j);
            }
        }
    }

    // Returns whether any lowest limb is not 0.
    __device__ __forceinline__ bool put(unsigned* shared) const
    {
        unsigned lowest = 0;
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            int line, k;
            place(i, line, k);
            unsigned limbs[4][4];  // of line + first index, k + second index
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float four[4] = {held[i][j].x, held[i][j].y, held[i][j].z, held[i][j].w};
#pragma unroll
                for (int l = 0; l < 4; l++) (N == ALONG_DEPTH ? limbs[j][l] : limbs[l][j]) = limbs_of<Kind>(four[l]);
            }
#pragma unroll
            for (int limb = 0; limb < Kind::LIMBS; limb++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    unsigned word = bytes_of(limbs[j], limb);
                    shared[(limb * LINES + line + j) * LINE_WORDS + k / 4] = word;
                    if (limb == 0) lowest |= word;
                }
        }
        return lowest != 0;
    }
};

// What a block shares: first the limbs of both operands, then the totals of each slice.
template <int WORDS> union Shared {
    unsigned limbs[WORDS];
    long long totals[SLICES][TILE_ROWS * TILE_COLUMNS];
};

template <int WORDS> __device__ __forceinline__ Shared<WORDS>& shared_memory()  // the same in every product of a kernel
{
    __shared__ __align__(16) Shared<WORDS> shared;
    return shared;
}

// Calls use(i, row, column, totals) for the quads of the tile whose first sum is (first_row, first_column): the thread's i-th of
// QUADS, four columns from (row, column) on, counted from there. A thread gets the same quads in every call of this function.
// Every thread of the block must call.
template <class KindA, class KindB, Neighbours NA, Neighbours NB, class AdjustA, class AdjustB, class Use>
__device__ __forceinline__ void integer_product(const Matrix<NA>& a, const Matrix<NB>& b, int first_row, int first_column,
                                                AdjustA adjust_a, AdjustB adjust_b, Use use)
{
    using PieceA = LimbPiece<KindA, TILE_ROWS, NA>;
    using PieceB = LimbPiece<KindB, TILE_COLUMNS, NB>;
    constexpr int SUMS = KindA::LIMBS + KindB::LIMBS - 1;
    auto& shared = shared_memory<PieceA::WORDS + PieceB::WORDS>();
    unsigned *shared_a = shared.limbs, *shared_b = shared.limbs + PieceA::WORDS;

    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
    int slice = warp / (ROW_WARPS * COLUMN_WARPS);
    int warp_row = warp / COLUMN_WARPS % ROW_WARPS * 16, warp_column = warp % COLUMN_WARPS * 32;

    int sums[4][SUMS][4] = {};  // of four times 16 x 8
    PieceA piece_a;
    PieceB piece_b;
    piece_a.fetch(a, first_row, 0, adjust_a);
    piece_b.fetch(b, first_column, 0, adjust_b);

    for (int k0 = 0; k0 < a.depth(); k0 += TILE_DEPTH) {
        __syncthreads();  // all have used the pieces before
        bool lowest_a = piece_a.put(shared_a), lowest_b = piece_b.put(shared_b);
        lowest_a = __syncthreads_or(lowest_a);  // all pieces are there
        lowest_b = __syncthreads_or(lowest_b);
        if (k0 + TILE_DEPTH < a.depth()) {
            piece_a.fetch(a, first_row, k0 + TILE_DEPTH, adjust_a);
            piece_b.fetch(b, first_column, k0 + TILE_DEPTH, adjust_b);
        }
#pragma unroll 1
        for (int word = slice * SLICE_WORDS + t; word < (slice + 1) * SLICE_WORDS; word += 8) {
            unsigned fragment_a[KindA::LIMBS][4];
#pragma unroll
            for (int i = 0; i < KindA::LIMBS; i++)
#pragma unroll
                for (int q = 0; q < 4; q++)
                    fragment_a[i][q] = shared_a[(i * TILE_ROWS + warp_row + g + q % 2 * 8) * LINE_WORDS + word + q / 2 * 4];
#pragma unroll
            for (int part = 0; part < 4; part++)
#pragma unroll
                for (int j = 0; j < KindB::LIMBS; j++) {
                    if (j == 0 && !lowest_b) continue;
                    const unsigned* at = shared_b + (j * TILE_COLUMNS + warp_column + part * 8 + g) * LINE_WORDS + word;
                    unsigned fragment_b[2] = {at[0], at[4]};
#pragma unroll
                    for (int i = 0; i < KindA::LIMBS; i++)
                        if (i > 0 || lowest_a) mma_s8(sums[part][i + j], fragment_a[i], fragment_b);
                }
        }
    }

    __syncthreads();  // all have used the last pieces
#pragma unroll
    for (int part = 0; part < 4; part++)
#pragma unroll
        for (int q = 0; q < 4; q++) {
            long long total = sums[part][SUMS - 1][q];
#pragma unroll
            for (int p = SUMS - 2; p >= 0; p--) total = total * 256 + sums[part][p][q];
            shared.totals[slice][(warp_row + g + q / 2 * 8) * TILE_COLUMNS + warp_column + part * 8 + 2 * t + q % 2] = total;
        }
    __syncthreads();  // all totals are there
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        int first = (i * THREADS + threadIdx.x) * 4;
        long long totals[4] = {};
#pragma unroll
        for (int s = 0; s < SLICES; s++)
#pragma unroll
            for (int c = 0; c < 4; c++) totals[c] += shared.totals[s][first + c];
        use(i, first / TILE_COLUMNS, first % TILE_COLUMNS, totals);
    }
}
