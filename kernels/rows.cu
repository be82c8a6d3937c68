// rows: one number for each row.
//
//     free_energy     out[r] = -sum_i b[i] v[r, i] - sum_j log(1 + exp(x[r, j] + c[j]))
//     squared_errors  out[r] = sum_i (v[r, i] - w[r, i])^2
//
// out   (B,)            out
// x, c  (B, m), (m,)    in; x = v W
// v, b  (B, n), (n,)    in; for free_energy null where another shard of the layer has the visible biases
// w     (B, n)          in
//
// Launch: one warp a row, 1-D, any number of blocks of whole warps; tail guarded.
// Numerics: terms in float32, sums in double, rounded once. log(1 + exp(t)) = max(t, 0) + log1p(exp(-|t|)): never overflows.
// Twins: reference.free_energy, reference.squared_errors
#include "warps.cuh"

// The sum of term(j) over j below size, on every lane.
template <class Term>
__device__ __forceinline__ double row_sum(int size, int lane, Term term)
{
    double sum = 0;
    for (int j = lane; j < size; j += 32) sum += term(j);
    return warp_sum(sum);
}

extern "C" __global__ void free_energy(float* out, const float* x, const float* c, const float* v, const float* b,
                                       int B, int m, int n)
{
    every_warp(B, [&](long long r, int lane) {
        double sum = row_sum(m, lane, [&](int j) {
            float t = x[r * m + j] + c[j];
            return fmaxf(t, 0.0f) + log1pf(expf(-fabsf(t)));
        });
        if (v) sum += row_sum(n, lane, [&](int i) { return b[i] * v[r * n + i]; });
        if (lane == 0) out[r] = (float)-sum;
    });
}

extern "C" __global__ void squared_errors(float* out, const float* v, const float* w, int B, int n)
{
    every_warp(B, [&](long long r, int lane) {
        double sum = row_sum(n, lane, [&](int i) {
            float difference = v[r * n + i] - w[r * n + i];
            return difference * difference;
        });
        if (lane == 0) out[r] = (float)sum;
    });
}
