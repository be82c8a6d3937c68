// draws: arrays of uniforms and normals, and what is drawn entry by entry with their help.
//
//     uniforms    out[r, j]    = u(seed, update, site, row + r, column + j)
//     bernoulli   sample[r, j] = 1 if u(...) < mean[r, j] else 0
//     activate    mean[r, j]   = sigmoid(x[r, j] + bias[j]), sample as above
//     dropout     x[r, j]     <- x[r, j] / keep if u(...) < keep else 0
//     normals     out[r, j]    = z(...): from neighbours u, u' of even and odd column z, z' = s cos(2 pi u'), s sin(2 pi u'),
//                                s = sqrt(-2 log(1 - u))
//     gaussian    sample[r, j] = mean[r, j] + sd[j] z(...)
//
// out, sample  (B, m)  out
// mean         (B, m)  in, may be the same array as sample; for activate out, and it or sample may be null
// x, bias      (B, m), (m,)  in; x may be the same array as sample or mean; for dropout in and out
// sd           (m,)    in
// column       even for normals and gaussian, so that no two neighbours are parted
//
// Launch: one thread a quad of columns (one Philox block), 1-D, any number of blocks of any size; tail guarded.
// Numerics: the uniforms are exact; u has 24 bits, so a mean below 2^-24 fires too often by at most 2^-24. 1 - u and 2 u are
// exact too, so a normal errs by the rounding of five functions: relative 4e-7, wherever it lies.
// Source of the normals: Box & Muller, "A note on the generation of random normal deviates" (1958).
// Twins: reference.uniforms, reference.bernoulli, reference.activate, reference.dropout, reference.normals, reference.gaussian
#include "philox.cuh"
#include "quads.cuh"
#include "sigmoid.cuh"

// Calls visit(r, q, first): quad q of row r, whose first column is `first` (below 0 where the array starts in mid-block).
template <class Visit>
__device__ __forceinline__ void every_quad(int B, int m, int shift, Visit visit)
{
    long long quads = ((long long)m + shift + 3) / 4, step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < B * quads; i += step) {
        long long r = i / quads, q = i - r * quads;
        visit(r, q, (int)(4 * q - shift));
    }
}

extern "C" __global__ void uniforms(float* out, int B, int m,
                                    u64 seed, u32 update, u32 site, u64 row, u64 column, u64 blocks, const u32* clock)
{
    Address address = {seed, update, site, row, column, blocks, clock};
    bool aligned = quads_aligned(out, m, address.shift());
    every_quad(B, m, address.shift(), [&](long long r, long long q, int first) {
        store_quad(out + r * m, first, m, aligned, address.draw(r, q));
    });
}

extern "C" __global__ void bernoulli(float* sample, const float* mean, int B, int m,
                                     u64 seed, u32 update, u32 site, u64 row, u64 column, u64 blocks, const u32* clock)
{
    Address address = {seed, update, site, row, column, blocks, clock};
    int shift = address.shift();
    bool read_aligned = quads_aligned(mean, m, shift), write_aligned = quads_aligned(sample, m, shift);
    every_quad(B, m, shift, [&](long long r, long long q, int first) {
        float4 u = address.draw(r, q), p = load_quad(mean + r * m, first, m, read_aligned);
        store_quad(sample + r * m, first, m, write_aligned,
                   make_float4(u.x < p.x, u.y < p.y, u.z < p.z, u.w < p.w));
    });
}

extern "C" __global__ void activate(float* sample, float* mean, const float* x, const float* bias, int B, int m,
                                    u64 seed, u32 update, u32 site, u64 row, u64 column, u64 blocks, const u32* clock)
{
    Address address = {seed, update, site, row, column, blocks, clock};
    int shift = address.shift();
    bool x_aligned = quads_aligned(x, m, shift);
    bool mean_aligned = quads_aligned(mean, m, shift), sample_aligned = quads_aligned(sample, m, shift);
    every_quad(B, m, shift, [&](long long r, long long q, int first) {
        float4 a = load_quad(x + r * m, first, m, x_aligned), c = load_quad(bias, first, m, false);
        float4 p = make_float4(sigmoid_of(a.x + c.x), sigmoid_of(a.y + c.y), sigmoid_of(a.z + c.z), sigmoid_of(a.w + c.w));
        if (mean) store_quad(mean + r * m, first, m, mean_aligned, p);
        if (!sample) return;
        float4 u = address.draw(r, q);
        store_quad(sample + r * m, first, m, sample_aligned,
                   make_float4(u.x < p.x, u.y < p.y, u.z < p.z, u.w < p.w));
    });
}

extern "C" __global__ void dropout(float* x, int B, int m, u64 seed, u32 update, u32 site, u64 row, u64 column, u64 blocks,
                                   const u32* clock, float keep, float one_over_keep)
{
    Address address = {seed, update, site, row, column, blocks, clock};
    int shift = address.shift();
    bool aligned = quads_aligned(x, m, shift);
    every_quad(B, m, shift, [&](long long r, long long q, int first) {
        float4 u = address.draw(r, q), a = load_quad(x + r * m, first, m, aligned);
        auto left = [&](float value, float draw) { return draw < keep ? value * one_over_keep : 0.0f; };
        store_quad(x + r * m, first, m, aligned,
                   make_float4(left(a.x, u.x), left(a.y, u.y), left(a.z, u.z), left(a.w, u.w)));
    });
}

__device__ __forceinline__ float4 normal_quad(float4 u)
{
    float s0 = sqrtf(-2.0f * logf(1.0f - u.x)), s1 = sqrtf(-2.0f * logf(1.0f - u.z)), sin0, cos0, sin1, cos1;
    sincospif(2.0f * u.y, &sin0, &cos0);
    sincospif(2.0f * u.w, &sin1, &cos1);
    return make_float4(s0 * cos0, s0 * sin0, s1 * cos1, s1 * sin1);
}

extern "C" __global__ void normals(float* out, int B, int m,
                                   u64 seed, u32 update, u32 site, u64 row, u64 column, u64 blocks, const u32* clock)
{
    Address address = {seed, update, site, row, column, blocks, clock};
    bool aligned = quads_aligned(out, m, address.shift());
    every_quad(B, m, address.shift(), [&](long long r, long long q, int first) {
        store_quad(out + r * m, first, m, aligned, normal_quad(address.draw(r, q)));
    });
}

extern "C" __global__ void gaussian(float* sample, const float* mean, const float* sd, int B, int m,
                                    u64 seed, u32 update, u32 site, u64 row, u64 column, u64 blocks, const u32* clock)
{
    Address address = {seed, update, site, row, column, blocks, clock};
    int shift = address.shift();
    bool read_aligned = quads_aligned(mean, m, shift), write_aligned = quads_aligned(sample, m, shift);
    bool sd_aligned = quads_aligned(sd, m, shift);
    every_quad(B, m, shift, [&](long long r, long long q, int first) {
        float4 z = normal_quad(address.draw(r, q)), s = load_quad(sd, first, m, sd_aligned);
        float4 a = load_quad(mean + r * m, first, m, read_aligned);
        store_quad(sample + r * m, first, m, write_aligned,
                   make_float4(a.x + s.x * z.x, a.y + s.y * z.y, a.z + s.z * z.z, a.w + s.w * z.w));
    });
}
