// persistent: many minibatches of CD-k or PCD-k in one launch, with the parameters on the chip.
//
//     for each minibatch of `batch` rows of v:
//         h0 ~ P(h | v0);  k times: vk ~ P(v | hk), hk ~ P(h | vk), from hk = h0 (CD) or from the chains (PCD)
//         velocity <- momentum velocity + rate ((v0^T h0 - w vk^T hk) / rows - decay W);  parameters <- parameters + velocity
//
// parameters, velocity  (n m + n + m,)   in and out: W, b, c end to end
// chains                (model_rows, m)  in and out, samples of 0 and 1; null for CD
// work                  room for the states of units: see Work
// v                     (rows, n)        in: minibatch after minibatch; the last one may be short
// levels                v is rounded to multiples of 1 / levels, at most 255; 0: as `as_half` does
// last_mean             the last hk are probabilities in the gradient; otherwise samples
//
// W is held twice: each block has some columns of W (all inputs of some hidden units) and some rows (all inputs of some
// visible units) in shared memory, and computes these units in half-steps. It updates its columns and writes them to
// `parameters`, from where the rows are fetched again: 4 n m bytes written and read in a minibatch, by way of the L2 cache,
// whatever its size. Besides, only samples go from block to block, 128 bits for a unit. There are 2 k barriers of the grid in a
// minibatch, between half-steps.
//
// The biases are weights from one more input that is always 1: input n of a hidden unit, m of a visible one.
//
// Launch: cooperative, one block of THREADS threads a multiprocessor; dynamic shared memory as gpudbn/cuda/persistent.py says.
// batch and model_rows up to ROWS. Tails guarded.
// Numerics: half-steps are products of float16 with float32 sums; weights are float16 + float16 with an error of at most
// 2^-22 |w| + 2^-25, and are infinite beyond 65504. Gradients are exact, in any order: products of samples with samples, or with
// multiples of 2^-16 (`as_half`), or with integers up to 255, need no more than the 24 bits of a float32. The step is float32.
// Source: Hinton (2002); Tieleman, "Training RBMs using approximations to the likelihood gradient" (2008); weights that stay on the
// chip: Diamos et al., "Persistent RNNs" (2016).
// Twin: reference.cd_run
#include <cooperative_groups.h>
#include "mma.cuh"
#include "momentum.cuh"
#include "philox.cuh"
#include "sigmoid.cuh"

typedef unsigned short u16;

constexpr int WARPS = THREADS / 32;
constexpr int WORDS = ROWS / 32;        // a unit's bits
constexpr int ROW_GROUPS = ROWS / 64;   // of a half-step: a warp makes 64 rows
constexpr int SHARES = WARPS / ROW_GROUPS, SLOTS = SHARES / 2;  // of the inputs among warps; places for their sums
constexpr int TILE = 8;                 // units of a half-step at a time
constexpr u32 PAIR = 0x00010001;        // the lowest bit of two float16: as numbers 2^-24
constexpr u32 ALL = 0xFFFFFFFFu;

static_assert(THREADS % 32 == 0 && ROWS % 64 == 0 && WARPS % (2 * ROW_GROUPS) == 0, "warps must share out the work evenly");
static_assert(WORDS == 4, "a unit's bits are read as one uint4; and sums of 256 multiples of 2^-16 up to 1 are exact, not more");

// The states of a layer's units in one minibatch, ROWS of each unit together, in global memory: bits, row r in bit r % 32 of
// word r / 32; or bytes or float16 that times `scale` are numbers, where a byte b counts as b 2^-24, the float16 of these bits. A
// row that is not there is 0.
struct Units {
    u32* states;
    int width;  // bits of a state: 1, 8 or 16
    float scale;

    __device__ __forceinline__ bool bits() const { return width == 1; }
    __device__ __forceinline__ u32* words(int unit) const { return states + (long long)unit * (WORDS * width); }
    __device__ __forceinline__ u16* numbers(int unit) const { return reinterpret_cast<u16*>(words(unit)); }
    __device__ __forceinline__ unsigned char* bytes(int unit) const { return reinterpret_cast<unsigned char*>(words(unit)); }
    __device__ __forceinline__ void load(u32 (&of)[WORDS], int unit) const
    {
        uint4 four = *reinterpret_cast<const uint4*>(words(unit));
        of[0] = four.x, of[1] = four.y, of[2] = four.z, of[3] = four.w;
    }
    // Rows from a multiple of 8 on, in pairs.
    __device__ __forceinline__ uint4 eight(int unit, int row) const
    {
        if (width == 16) return *reinterpret_cast<const uint4*>(numbers(unit) + row);
        uint2 b = *reinterpret_cast<const uint2*>(bytes(unit) + row);
        return make_uint4(__byte_perm(b.x, 0, 0x4140), __byte_perm(b.x, 0, 0x4342), __byte_perm(b.y, 0, 0x4140),
                          __byte_perm(b.y, 0, 0x4342));
    }
    __device__ __forceinline__ u32 one() const { return bits() ? ALL : f16_pair(1.0f / scale, 1.0f / scale); }
};

// What a probability becomes in a product: float16, which has three bits more than bf16, and a multiple of 2^-16.
__device__ __forceinline__ u16 as_half(float p) { return (u16)f16_pair(rintf(p * 0x1p16f) * 0x1p-16f, 0.0f); }

// Where in `work` things are.
struct Work {
    u32* words;
    int n, m, levels;
    bool mean;  // the last hk are float16

    __device__ __forceinline__ Units h0() const { return {words, 1, 1.0f}; }
    __device__ __forceinline__ Units hk() const { return {words + m * WORDS, 1, 1.0f}; }
    __device__ __forceinline__ Units vk() const { return {words + 2 * m * WORDS, 1, 1.0f}; }
    __device__ __forceinline__ Units hk_means() const { return {words + (2 * m + n) * WORDS, 16, 1.0f}; }
    __device__ __forceinline__ Units v0(int minibatch) const
    {
        int width = levels == 1 ? 1 : levels ? 8 : 16;
        u32* at = words + (2LL * m + n) * WORDS + (mean ? (long long)m * (16 * WORDS) : 0);
        return {at + (long long)minibatch * n * (width * WORDS), width, width == 8 ? 0x1p24f / levels : 1.0f};
    }
};

// ------------------------------------------------------------------------------------------ a block's share of W

// Dynamic shared memory: the sums of half-steps, then the two sides.
__device__ __forceinline__ float* shared_floats()
{
    extern __shared__ unsigned char dynamic_shared[];
    return reinterpret_cast<float*>(dynamic_shared);
}

// Some units of one layer with all their inputs from the other: columns of W and their c, or rows of W and their b.
struct Side {
    int at, speeds;  // in shared memory: weight i of unit u is entry at + u * stride + i, the bias is weight `inputs`; velocities
    int first, units, inputs, stride;
    long long unit_step, input_step, biases;  // where they are in the flat parameters

    __device__ __forceinline__ float* W() const { return shared_floats() + at; }
    __device__ __forceinline__ float* velocity() const { return shared_floats() + speeds; }

    __device__ __forceinline__ long long flat(int unit, int input) const
    {
        return input < inputs ? (first + unit) * unit_step + input * input_step : biases + first + unit;
    }

    // Weights 2t, 2t + 1, 2t + 8, 2t + 9 from `input` on, as one operand of two products.
    __device__ __forceinline__ void weights(int unit, int input, u32 (&high)[2], u32 (&low)[2]) const
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float2 w = make_float2(0.0f, 0.0f);
            if (unit < units) w = *reinterpret_cast<const float2*>(W() + unit * stride + input + 8 * i);
            high[i] = f16_pair(w.x, w.y);
            low[i] = f16_pair(w.x - f16_first(high[i]), w.y - f16_second(high[i]));
        }
    }

    // Starts copying what is in flat order, with weights that are not there as 0.
    __device__ void take(float* slab, const float* from) const
    {
        for (int e = threadIdx.x; e < units * stride; e += THREADS) {
            int unit = e / stride, input = e % stride;
            cp_async<4>(slab + e, input <= inputs ? from + flat(unit, input) : from, input <= inputs ? 4 : 0);
        }
    }

    // The weights anew, not the biases; for rows of W, where inputs are neighbours.
    __device__ __forceinline__ void fetch(const float* parameters) const
    {
        for (int unit = 0; unit < units; unit++)
            for (int input = threadIdx.x; input < inputs; input += THREADS)
                cp_async<4>(W() + unit * stride + input, parameters + (first + unit) * unit_step + input);
        cp_async_commit();
        cp_async_wait<0>();
    }

    // For columns of W, where units are neighbours.
    __device__ void put_velocity(float* to) const
    {
        for (int e = threadIdx.x; e < units * (inputs + 1); e += THREADS) {
            int unit = e % units, input = e / units;
            to[flat(unit, input)] = velocity()[unit * stride + input];
        }
    }
};

// This block's side of a layer of `size` units, in shared memory from `at` on.
__device__ __forceinline__ Side side(int at, int size, int inputs, long long unit_step, long long input_step, long long biases)
{
    int first = (int)((long long)size * blockIdx.x / gridDim.x), end = (int)((long long)size * (blockIdx.x + 1) / gridDim.x);
    int stride = inputs / 16 * 16 + 24;  // whole steps of 16 inputs; 8 more than a multiple of 16, against bank conflicts
    return {at, at + (size + (int)gridDim.x - 1) / (int)gridDim.x * stride, first, end - first, inputs, stride, unit_step, input_step, biases};
}

// ----------------------------------------------------------------------------------------------------- half-step

struct Draws {
    u64 seed;
    u32 update;
    u64 blocks;
};

// A warp makes the sums of 64 rows and TILE units over one share of the inputs, as mma d fragments: sum[j][2 h + e] is, in
// lane 4 g + t, row 8 g + 2 j + h, unit 2 t + e. So a lane owns eight neighbouring rows, one byte of a unit's bits; bit b of it
// stays where it is, and is the float16 2^(b - 24), which the end makes good.
__device__ __forceinline__ void multiply_bits(float (&sum)[4][4], const Side& side, int first, const Units& x, int group, int share)
{
    constexpr int AHEAD = 9;  // steps of 16 inputs whose bits are fetched at once
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, steps = side.inputs / 16 + 1;
    const u32* mine = x.states + 2 * group + g / 4;
    u32 selector = 0x0400 + 0x1111 * (g % 4);  // byte g % 4 of two words, 16 bits apart
    for (int from = share; from < steps; from += AHEAD * SHARES) {
        u32 words[AHEAD][4];
#pragma unroll
        for (int s = 0; s < AHEAD; s++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int input = 16 * (from + s * SHARES) + 2 * t + i / 2 * 8 + i % 2;
                words[s][i] = input < side.inputs ? mine[input * WORDS] : input == side.inputs ? ALL : 0;
            }
#pragma unroll
        for (int s = 0; s < AHEAD; s++) {
            int step = from + s * SHARES;
            if (step >= steps) break;
            u32 bytes[2], high[2], low[2];
            for (int i = 0; i < 2; i++) bytes[i] = __byte_perm(words[s][2 * i], words[s][2 * i + 1], selector);
            side.weights(first + g, 16 * step + 2 * t, high, low);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 a[4];
                for (int i = 0; i < 4; i++) a[i] = bytes[i / 2] & PAIR << (2 * j + i % 2);
                mma_f16(sum[j], a, high);
                mma_f16(sum[j], a, low);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[j][i] *= (float)(1 << (24 - 2 * j - i / 2));
}

// The same for numbers, of which there are `count` rows.
__device__ __forceinline__ void multiply_halves(float (&sum)[4][4], const Side& side, int first, const Units& x, int count, int group, int share)
{
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, steps = side.inputs / 16 + 1;
    constexpr int AHEAD = 3;
    u32 one = x.one();
    for (int from = share; from < steps; from += AHEAD * SHARES) {
        uint4 rows[AHEAD][4];  // of four inputs
#pragma unroll
        for (int s = 0; s < AHEAD; s++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int input = 16 * (from + s * SHARES) + 2 * t + i / 2 * 8 + i % 2;
                u32 otherwise = input == side.inputs ? one : 0;
                rows[s][i] = make_uint4(otherwise, otherwise, otherwise, otherwise);
                if (input < side.inputs && 64 * group + 8 * g < count) rows[s][i] = x.eight(input, 64 * group + 8 * g);
            }
#pragma unroll
        for (int s = 0; s < AHEAD; s++) {
            int step = from + s * SHARES;
            if (step >= steps) break;
            u32 high[2], low[2];
            side.weights(first + g, 16 * step + 2 * t, high, low);
            auto use = [&](float (&d)[4], u32 x0, u32 x1, u32 x2, u32 x3) {  // a pair of rows of each input
                u32 a[4] = {__byte_perm(x0, x1, 0x5410), __byte_perm(x0, x1, 0x7632),
                            __byte_perm(x2, x3, 0x5410), __byte_perm(x2, x3, 0x7632)};
                mma_f16(d, a, high);
                mma_f16(d, a, low);
            };
            use(sum[0], rows[s][0].x, rows[s][1].x, rows[s][2].x, rows[s][3].x);
            use(sum[1], rows[s][0].y, rows[s][1].y, rows[s][2].y, rows[s][3].y);
            use(sum[2], rows[s][0].z, rows[s][1].z, rows[s][2].z, rows[s][3].z);
            use(sum[3], rows[s][0].w, rows[s][1].w, rows[s][2].w, rows[s][3].w);
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[j][i] *= x.scale;
}

// Where in a slot the sums of rows 4 q to 4 q + 3 of a unit are: no bank conflicts, neither by d fragments nor row by row.
__device__ __forceinline__ int place(int unit, int q) { return unit * ROWS + (q ^ (unit / 2 & 1) ^ (unit / 4 << 2)) * 4; }

// This side's units given the other layer's: sample ~ Bernoulli(mean). Either may be absent.
__device__ __noinline__ void half_step(const Side& side, const Units& sample, const Units& mean, const Units& x,
                                          int rows, Address address)
{
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp % ROW_GROUPS, share = warp / ROW_GROUPS;
    float* slots = shared_floats();
    for (int first = 0; first < side.units; first += TILE) {
        __syncthreads();  // the weights are there, the slots have been read
        float sum[4][4] = {};
        if (64 * group < rows) {
            if (x.bits())
                multiply_bits(sum, side, first, x, group, share);
            else
                multiply_halves(sum, side, first, x, rows, group, share);
        }
        auto every_four = [&](auto use) {  // rows of a unit: use(where they are, the sums)
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int j = 0; j < 4; j += 2)
                    use(reinterpret_cast<float4*>(slots + share % SLOTS * TILE * ROWS
                                                  + place(lane % 4 * 2 + e, 16 * group + lane / 4 * 2 + j / 2)),
                        make_float4(sum[j][e], sum[j][2 + e], sum[j + 1][e], sum[j + 1][2 + e]));
        };
        if (share < SLOTS) every_four([](float4* at, float4 s) { *at = s; });
        __syncthreads();  // one half of the shares are in their slots
        if (share >= SLOTS)
            every_four([](float4* at, float4 s) {
                float4 o = *at;
                *at = make_float4(o.x + s.x, o.y + s.y, o.z + s.z, o.w + s.w);
            });
        __syncthreads();  // so are the others
        int from = side.first + first, end = side.first + min(first + TILE, side.units);
        for (int item = warp; item < ((end - 1) / 4 - from / 4 + 1) * WORDS; item += WARPS) {
            int quad = from / 4 + item / WORDS, word = item % WORDS, row = 32 * word + lane;
            if (32 * word >= rows) continue;
            float u[4] = {};
            if (sample.states) {
                float4 drawn = address.draw(row, quad);
                u[0] = drawn.x, u[1] = drawn.y, u[2] = drawn.z, u[3] = drawn.w;
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int unit = 4 * quad + i;
                if (unit < from || unit >= end) continue;
                float total = 0.0f;
#pragma unroll
                for (int s = 0; s < SLOTS; s++) total += slots[s * TILE * ROWS + place(unit - from, row / 4) + row % 4];
                float p = sigmoid_of(total);
                u32 bits = __ballot_sync(ALL, row < rows && u[i] < p);
                if (sample.states && lane == 0) sample.words(unit)[word] = bits;
                if (mean.states) mean.numbers(unit)[row] = row < rows ? as_half(p) : 0;
            }
        }
    }
}

// ------------------------------------------------------------------------------------------- gradient and step

// Eight neighbouring rows of a unit, byte `byte` of a word of its bits, so that PAIR << 2 p is rows 2 p and 2 p + 1.
__device__ __forceinline__ u32 spread(u32 word, int byte) { return __byte_perm(word, 0, 0x4440 + byte) * 0x8001u; }

// The states of 16 units as mma a fragments over the rows of a minibatch: of step s of word w, rows 32 w + 8 t + 4 s + 0..3.
// The values of rows 2 p, 2 p + 1 of eight are divided by 4^p where the other operand, bits that stay where they are, has them 4^p
// times too large.
struct Rows16 {
    u32 a[WORDS][2][4];

    __device__ __forceinline__ void load(const Side& side, const Units& y, int first, int rows, bool divide)
    {
        int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int unit = first + g + 8 * i;
            bool there = unit < side.units;
            u32 words[WORDS] = {};
            if (there && y.bits()) y.load(words, side.first + unit);
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                u32 bits = spread(words[w], t), eight[4];
#pragma unroll
                for (int p = 0; p < 4; p++) eight[p] = (bits >> 2 * p & PAIR) * 0x3C00u;  // 1.0
                if (there && !y.bits() && 32 * w < rows) {
                    uint4 numbers = y.eight(side.first + unit, 32 * w + 8 * t);
                    eight[0] = numbers.x, eight[1] = numbers.y, eight[2] = numbers.z, eight[3] = numbers.w;
                }
#pragma unroll
                for (int p = 0; p < 4; p++)
                    a[w][p / 2][i + p % 2 * 2] = f16_product(eight[p], (divide ? (15 - 2 * p) << 10 : 0x3C00u) * PAIR);
            }
        }
    }
};

// sum += y^T x over all rows, for 16 units y and the inputs x of a tile, of which `input` is this lane's; as mma d fragment: unit
// g + 8 (i / 2), input 2 t + i % 2.
struct Inputs8 {
    u32 words[WORDS];

    __device__ __forceinline__ void fetch(const Side& side, const Units& x, int input)
    {
        words[0] = words[1] = words[2] = words[3] = input == side.inputs ? x.one() : 0;
        if (input < side.inputs && x.bits()) x.load(words, input);
    }

    __device__ __forceinline__ void multiply(float (&sum)[4], const Rows16& y, const Side& side, const Units& x, int input, int rows) const
    {
        int t = threadIdx.x % 4;
        if (x.bits()) {
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                if (32 * w >= rows) break;
                u32 bits = spread(words[w], t);
#pragma unroll
                for (int s = 0; s < 2; s++) {
                    u32 b[2] = {bits & PAIR << 4 * s, bits & PAIR << (4 * s + 2)};
                    mma_f16(sum, y.a[w][s], b);
                }
            }
        } else {
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                if (32 * w >= rows) break;
                uint4 eight = make_uint4(words[w], words[w], words[w], words[w]);
                if (input < side.inputs && 32 * w + 8 * t < rows)
                    eight = x.eight(input, 32 * w + 8 * t);
                u32 b[2][2] = {{eight.x, eight.y}, {eight.z, eight.w}};
#pragma unroll
                for (int s = 0; s < 2; s++) mma_f16(sum, y.a[w][s], b[s]);
            }
        }
    }
};

struct Phase {  // of the gradient: data or model
    Units x, y;  // of the inputs and of this side's units
    int rows;
    float weight;

    // What makes good the scales of both, and that bits of x stay where they are.
    __device__ __forceinline__ float factor() const { return weight * ((x.bits() ? 0x1p24f : x.scale) * y.scale); }
};

// One step of this side's weights and biases, which go to `parameters` too. Velocities are kept in shared memory, or not at all
// where there is no momentum; then they go to `speeds` unless it is null.
__device__ __noinline__ void update(const Side& side, const Phase& data, const Phase& model, const Rates& rates, float* parameters,
                                    bool kept, float* speeds)
{
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float of_data = data.factor(), of_model = model.factor();
    __syncthreads();  // this block's states are all written, its weights all read
    for (int first = 0; first < side.units; first += 16) {
        Rows16 y_data, y_model;
        y_data.load(side, data.y, first, data.rows, data.x.bits());
        y_model.load(side, model.y, first, model.rows, model.x.bits());
        Inputs8 next_data, next_model;
        next_data.fetch(side, data.x, 8 * warp + g);
        next_model.fetch(side, model.x, 8 * warp + g);
        for (int tile = warp; 8 * tile <= side.inputs; tile += WARPS) {
            Inputs8 x_data = next_data, x_model = next_model;
            next_data.fetch(side, data.x, 8 * (tile + WARPS) + g);
            next_model.fetch(side, model.x, 8 * (tile + WARPS) + g);
            float plus[4] = {}, minus[4] = {};
            x_data.multiply(plus, y_data, side, data.x, 8 * tile + g, data.rows);
            x_model.multiply(minus, y_model, side, model.x, 8 * tile + g, model.rows);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int unit = first + g + 8 * h, input = 8 * tile + 2 * t, e = unit * side.stride + input;
                if (unit >= side.units) continue;
                float2 weight = *reinterpret_cast<float2*>(side.W() + e), speed = make_float2(0.0f, 0.0f);
                if (kept) speed = *reinterpret_cast<float2*>(side.velocity() + e);
                auto gradient = [&](int i) { return of_data * plus[i] - of_model * minus[i]; };
                step(weight.x, speed.x, gradient(2 * h), rates, input < side.inputs);
                step(weight.y, speed.y, gradient(2 * h + 1), rates, input + 1 < side.inputs);
                *reinterpret_cast<float2*>(side.W() + e) = weight;
                if (kept) *reinterpret_cast<float2*>(side.velocity() + e) = speed;
                auto put = [&](int input, float weight, float speed) {
                    if (input > side.inputs) return;
                    parameters[side.flat(unit, input)] = weight;
                    if (speeds) speeds[side.flat(unit, input)] = speed;
                };
                put(input, weight.x, speed.x);
                put(input + 1, weight.y, speed.y);
            }
        }
    }
}

// The sum of a unit's states over all rows, in every lane of a warp.
__device__ __forceinline__ float total(const Units& y, int unit, int rows)
{
    int lane = threadIdx.x % 32;
    float sum = 0.0f;
    if (y.bits()) {
        if (32 * lane < rows) sum = (float)__popc(y.words(unit)[lane]);
    } else {
        for (int row = lane; row < rows; row += 32)
            sum += y.scale * f16_first(y.width == 8 ? y.bytes(unit)[row] : y.numbers(unit)[row]);
    }
#pragma unroll
    for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(ALL, sum, by);
    return sum;
}

// One step of this side's biases alone, whose velocities are neighbours in shared memory. A warp for each unit.
__device__ __noinline__ void update_biases(const Side& side, const Units& v0, int rows, const Units& vk, int model_rows, float weight,
                                              const Rates& rates, float* parameters, float* speeds)
{
    for (int unit = threadIdx.x / 32; unit < side.units; unit += WARPS) {
        float gradient = total(v0, side.first + unit, rows) - weight * total(vk, side.first + unit, model_rows);
        if (threadIdx.x % 32 == 0) {
            float& bias = side.W()[unit * side.stride + side.inputs];
            step(bias, side.velocity()[unit], gradient, rates, false);
            parameters[side.biases + side.first + unit] = bias;
            if (speeds) speeds[side.biases + side.first + unit] = side.velocity()[unit];
        }
    }
}

// ------------------------------------------------------------------------------------------------- in and out

// x (rows, size), float32, into the units of each minibatch: a thread makes 32 rows of a unit, neighbours read neighbouring units.
template <class UnitsOf>
__device__ __noinline__ void pack(UnitsOf units_of, const float* x, int rows, int batch, int size, int levels)
{
    int count = (rows + batch - 1) / batch;
    long long step = (long long)gridDim.x * THREADS;
    for (long long e = (long long)blockIdx.x * THREADS + threadIdx.x; e < (long long)count * WORDS * size; e += step) {
        int minibatch = (int)(e / size / WORDS), word = (int)(e / size % WORDS), unit = (int)(e % size);
        Units out = units_of(minibatch);
        int there = min(batch, rows - minibatch * batch) - 32 * word;
        const float* from = x + ((long long)minibatch * batch + 32 * word) * size + unit;
        u32 bits = 0;
#pragma unroll 16
        for (int r = 0; r < 32; r++) {
            float value = r < there ? from[(long long)r * size] : 0.0f;
            if (out.bits())
                bits |= (u32)(value > 0.5f) << r;
            else if (out.width == 8)
                out.bytes(unit)[32 * word + r] = (unsigned char)rintf(value * levels);
            else
                out.numbers(unit)[32 * word + r] = as_half(value);
        }
        if (out.bits()) out.words(unit)[word] = bits;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
cd_run(float* parameters, float* velocity, float* chains, u32* work, const float* v, int n, int m, int blocks, int rows, int batch,
       int model_rows, int k, int levels, int last_mean, u64 seed, u32 first_update, u32 data_site, u32 model_site, u64 row,
       u64 chain_row, float rate_scale, float last_rate_scale, float momentum, float rate_decay)
{
    if (gridDim.x != blocks) __trap();  // shared memory was asked for so many
    cooperative_groups::grid_group grid = cooperative_groups::this_grid();

    bool keep_velocity = momentum != 0.0f;
    __shared__ Side hidden, visible;
    if (threadIdx.x == 0) {
        long long weights = (long long)n * m;
        hidden = side(SLOTS * TILE * ROWS, m, n, 1, m, weights + n);
        int slab = hidden.speeds - hidden.at;
        visible = side(hidden.at + (keep_velocity ? 2 * slab : slab), n, m, m, 1, weights);
    }
    __syncthreads();  // this block's part is known
    hidden.take(hidden.W(), parameters);
    if (keep_velocity) hidden.take(hidden.velocity(), velocity);
    visible.take(visible.W(), parameters);
    for (int unit = threadIdx.x; unit < visible.units; unit += THREADS)
        visible.velocity()[unit] = velocity[visible.biases + visible.first + unit];
    cp_async_commit();
    cp_async_wait<0>();  // and the other threads' copies are there after the grid's barrier

    Work states = {work, n, m, levels, last_mean != 0};
    Units none = {nullptr, 1, 1.0f}, hk = states.hk(), vk = states.vk();
    int count = (rows + batch - 1) / batch;
    auto address = [&](int minibatch, u32 site, u64 first_row, int size) {
        return Address(seed, first_update + minibatch, site, first_row, 0, (size + 3) / 4, nullptr);
    };

    pack([&](int minibatch) { return states.v0(minibatch); }, v, rows, batch, n, levels);
    if (chains) pack([&](int) { return hk; }, chains, model_rows, model_rows, m, 1);
    grid.sync();  // all states of the data are there
    for (int t = 0; t < count; t++) {
        int data_rows = min(batch, rows - t * batch), moving = chains ? model_rows : data_rows;
        half_step(hidden, states.h0(), none, states.v0(t), data_rows, address(t, data_site, row, m));
        grid.sync();  // h0 is there, and so are the weights of the minibatch before
        if (t > 0) visible.fetch(parameters);
        for (int step = 0; step < k; step++) {
            bool means = step == k - 1 && last_mean;
            half_step(visible, vk, none, step || chains ? hk : states.h0(), moving,
                      address(t, model_site + 2 * step + 1, chains ? chain_row : row, n));
            grid.sync();  // vk is there
            half_step(hidden, means && !chains ? none : hk, means ? states.hk_means() : none, vk, moving,
                      address(t, model_site + 2 * step + 2, chains ? chain_row : row, m));
            if (step < k - 1) grid.sync();  // hk is there
        }
        float weight = chains ? (float)data_rows / model_rows : 1.0f;
        Rates rates(data_rows == batch ? rate_scale : last_rate_scale, momentum, rate_decay, nullptr);
        float* speeds = t == count - 1 ? velocity : nullptr;
        Phase data = {states.v0(t), states.h0(), data_rows, 1.0f};
        Phase model = {vk, last_mean ? states.hk_means() : hk, moving, weight};
        update(hidden, data, model, rates, parameters, keep_velocity, keep_velocity ? nullptr : speeds);
        update_biases(visible, states.v0(t), data_rows, vk, moving, weight, rates, parameters, speeds);
    }
    __syncthreads();  // all velocities have been changed
    if (keep_velocity) hidden.put_velocity(velocity);
    if (chains)
        for (int e = threadIdx.x; e < hidden.units * model_rows; e += THREADS) {
            int r = e / hidden.units, unit = hidden.first + e % hidden.units;
            chains[(long long)r * m + unit] = (float)(hk.words(unit)[r / 32] >> r % 32 & 1);
        }
}
