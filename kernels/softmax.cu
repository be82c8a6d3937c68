// softmax: units of which one in each group of K is on: its probabilities and samples, and what a classifier learns from.
//
//     p[r, g, k]     = exp(x[r, g, k] + bias[g, k]) / sum over the group
//     categorical    mean = p;  sample[r, g, k] = 1 for the first k with u < p[r, g, 0] + ... + p[r, g, k], else 0
//                    u = u(seed, update, site, row + r, column + g): one draw a group
//     cross_entropy  delta[r, k] = (k == label[r]) - p[r, k],  loss[r] = -log p[r, label[r]],
//                    wrong[r] = 0 if label[r] is the first of the largest p[r, k], else 1                         G = 1
//
// sample, mean  (B, G K)  out, or null: not wanted
// delta         (B, K)    out, or null
// loss, wrong   (B,)      out, or null
// x, bias       (B, G K), (G K,)  in; sample, mean or delta may be x itself
// labels        (B,)      in; outside of [0, K): no unit is right, the loss is NaN
//
// Launch: one warp a group, 1-D, any number of blocks of whole warps; tail guarded.
// Numerics: the largest of a group is taken off first, so that nothing overflows and -infinity is a probability of 0; exp in
// float32, its sums in double. A group that holds NaN or +infinity gets NaNs, and no sample.
// Sources: Welling, Rosen-Zvi & Hinton, "Exponential family harmoniums" (2005); Bengio et al. (2007), section 2.3.
// Twins: reference.categorical, reference.cross_entropy
#include "philox.cuh"
#include "warps.cuh"

// The units of one group: their exponents, and the sum of those.
struct Group {
    const float *x, *bias;
    int K;
    float largest;
    double total;

    __device__ __forceinline__ Group(const float* x, const float* bias, int K, int lane) : x(x), bias(bias), K(K)
    {
        largest = __uint_as_float(0xFF800000u);  // -infinity
        for (int k = lane; k < K; k += 32) largest = fmaxf(largest, x[k] + bias[k]);
        largest = over_lanes(largest, [](float a, float b) { return fmaxf(a, b); });
        double sum = 0;
        for (int k = lane; k < K; k += 32) sum += exponential(k);
        total = warp_sum(sum);
    }

    __device__ __forceinline__ float logit(int k) const { return x[k] + bias[k] - largest; }
    __device__ __forceinline__ float exponential(int k) const { return expf(logit(k)); }
};

extern "C" __global__ void categorical(float* sample, float* mean, const float* x, const float* bias, int B, int G, int K,
                                       u64 seed, u32 update, u32 site, u64 row, u64 column, u64 blocks, const u32* clock)
{
    Address address = {seed, update, site, row, column, blocks, clock};
    every_warp((long long)B * G, [&](long long i, int lane) {
        long long r = i / G;
        int g = (int)(i - r * G);
        Group group(x + i * K, bias + (long long)g * K, K, lane);
        double threshold = 0, before = 0;
        if (sample) threshold = address.draw_one(r, g) * group.total;
        bool found = false;
        for (int first = 0; first < K; first += 32) {
            int k = first + lane;
            float e = k < K ? group.exponential(k) : 0.0f;
            if (mean && k < K) mean[i * K + k] = e / (float)group.total;
            if (!sample) continue;
            double up_to = before + warp_sum_so_far((double)e, lane);
            u32 above = __ballot_sync(EVERY_LANE, threshold < up_to);
            if (k < K) sample[i * K + k] = !found && lane == __ffs(above) - 1;
            found = found || above;
            before = __shfl_sync(EVERY_LANE, up_to, 31);
        }
    });
}

extern "C" __global__ void cross_entropy(float* delta, float* loss, float* wrong, const float* x, const float* bias,
                                         const int* labels, int B, int K)
{
    every_warp(B, [&](long long r, int lane) {
        Group group(x + r * K, bias, K, lane);
        int label = labels[r], best = K;
        float own = 0.0f;
        for (int k = lane; k < K; k += 32) {
            float z = group.logit(k), e = group.exponential(k);
            if (z == 0.0f && best == K) best = k;
            if (k == label) own = z;
            if (delta) delta[r * K + k] = (k == label ? 1.0f : 0.0f) - e / (float)group.total;
        }
        own = warp_sum(own);
        best = over_lanes(best, [](int a, int b) { return a < b ? a : b; });
        if (lane != 0) return;
        bool possible = 0 <= label && label < K;
        if (loss) loss[r] = possible ? logf((float)group.total) - own : __uint_as_float(0x7FC00000u);  // NaN
        if (wrong) wrong[r] = best != label;
    });
}
