// cd_update_wgmma: the gradient of contrastive divergence of a large layer and the step, on Hopper's tensor cores.
//
//     dW = v0^T h0 - w vk^T hk,  db = sum v0 - w sum vk,  dc = sum h0 - w sum hk
//     velocity <- momentum velocity + rate_scale gradient - rate_decay W;  parameters <- parameters + velocity
//     W_high <- bf16(W);  W_low <- bf16(W - W_high)
//
// parameters, velocity  (n m + n + m,)    in and out: float32; W, b, c end to end; no gradient is written
// W_high, W_low         (n, m)            out: bf16, what the next half-steps multiply by; W_low may be null: not wanted
// v0, h0                (rows, n), (rows, m)  in: bf16
// vk, hk                (C, n), (C, m)    in: bf16
// rates                 (3,)              in, or null: rate_scale, momentum, rate_decay
//
// The model's sums come first, are multiplied by -w where they are, and the data's are added: so h needs no sign and w no
// rounding. The biases are weights to a unit that is always 1: the tensor cores make their sums too, see product_wgmma.cuh.
// Rows of W_high and W_low begin at multiples of 16 bytes, and their padding is written, with no meaning.
//
// Launch: see product_wgmma.cuh.
// Numerics: products of bf16 are exact, sums float32: exact for samples of 0 and 1 and w = 1 up to 2^24 rows. A last mean of
// the hidden units is rounded to bf16 by whoever wrote it.
// Source: Hinton, "Training products of experts by minimizing contrastive divergence" (2002); momentum.cuh.
// Twin: reference.cd_update_wgmma
#include "momentum.cuh"
#include "product_wgmma.cuh"
#include "quads.cuh"

constexpr int BATCH = 8;       // quads of weights and of velocities that a thread reads at once
constexpr int ROWS_AHEAD = 4;  // of a tile, for each step of its products: all of them within 2048 rows of v and h

extern "C" __global__ void __launch_bounds__(THREADS, 1)
cd_update_wgmma(float* parameters, float* velocity, unsigned short* W_high, unsigned short* W_low,
                const __grid_constant__ TensorMap v0, const __grid_constant__ TensorMap h0,
                const __grid_constant__ TensorMap vk, const __grid_constant__ TensorMap hk,
                int n, int m, int rows, int C, int pitch, float model_weight, float rate_scale, float momentum, float rate_decay,
                const float* rates)
{
    extern __shared__ unsigned char dynamic_shared[];
    Rates r(rate_scale, momentum, rate_decay, rates);
    bool aligned = quads_aligned(parameters, m) && quads_aligned(velocity, m);
    long long b = (long long)n * m, c = b + n;  // where the biases begin
    Part parts[2] = {{&vk, &hk, steps_of(C)}, {&v0, &h0, steps_of(rows)}};

    auto step_of_bias = [&](long long at, float sum) {
        step(parameters[at], velocity[at], sum, r, false);
    };

    auto step_of_quad = [&](float4& weight, float4& speed, float4 sum) {
        step(weight.x, speed.x, sum.x, r, true);
        step(weight.y, speed.y, sum.y, r, true);
        step(weight.z, speed.z, sum.z, r, true);
        step(weight.w, speed.w, sum.w, r, true);
    };
    auto store_halves = [&](long long at, float4 weight) {
        uint2 high, low;
        split_pair(weight.x, weight.y, high.x, low.x);
        split_pair(weight.z, weight.w, high.y, low.y);
        *reinterpret_cast<uint2*>(W_high + at) = high;
        if (W_low) *reinterpret_cast<uint2*>(W_low + at) = low;
    };

    // What a tile will need of the weights and velocities, brought to the L2 cache while its products are made: a few of its
    // rows with each step.
    auto ahead = [&](int row_of_tile, int column, int step) {
        if (!aligned) return;
#pragma unroll 1
        for (int i = row_of_tile + step * ROWS_AHEAD; i < min(row_of_tile + min((step + 1) * ROWS_AHEAD, TILE_ROWS), n); i++) {
            long long at = (long long)i * m + column;
            u32 bytes = 4 * min(TILE_COLUMNS, m - column);
            fetch_to_L2(parameters + at, bytes);
            fetch_to_L2(velocity + at, bytes);
        }
    };

    auto use = [&](const Sums& sums, int thread, int row, int column) {
        int i = row + quad_row(thread), first = column + quad_column(thread, 0);
        float *weights = parameters + (long long)i * m, *speeds = velocity + (long long)i * m;
        long long at = (long long)i * pitch + first;
        if (aligned && row + WGMMA_ROWS <= n && column + TILE_COLUMNS <= m) {
#pragma unroll
            for (int batch = 0; batch < QUADS; batch += BATCH) {  // many reads on their way at once, before anything is written
                float4 weight[BATCH], speed[BATCH];
#pragma unroll
                for (int q = 0; q < BATCH; q++) {
                    weight[q] = *reinterpret_cast<float4*>(weights + first + (batch + q) * QUAD_STEP);
                    speed[q] = *reinterpret_cast<float4*>(speeds + first + (batch + q) * QUAD_STEP);
                }
#pragma unroll
                for (int q = 0; q < BATCH; q++) {
                    int column_step = (batch + q) * QUAD_STEP;
                    step_of_quad(weight[q], speed[q], quad_of(sums.products, batch + q, thread));
                    *reinterpret_cast<float4*>(weights + first + column_step) = weight[q];
                    *reinterpret_cast<float4*>(speeds + first + column_step) = speed[q];
                    store_halves(at + column_step, weight[q]);
                }
            }
        } else {
            int inside = i < n ? m - first : 0;
#pragma unroll
            for (int q = 0; q < QUADS; q++) {
                float4 sum = quad_of(sums.products, q, thread);
                int j = first + q * QUAD_STEP;
                if (q * QUAD_STEP >= inside) continue;
                float4 weight = load_quad(weights, j, m, aligned), speed = load_quad(speeds, j, m, aligned);
                step_of_quad(weight, speed, sum);
                store_quad(weights, j, m, aligned, weight);
                store_quad(speeds, j, m, aligned, speed);
                store_halves(at + q * QUAD_STEP, weight);
            }
        }
        if (thread % 4 > 0) return;  // the eight columns of a sum over lines are equal
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int line = fragment_row(thread, 2 * half);
            if (column == 0 && row + line < n) step_of_bias(b + row + line, sums.rows[2 * half]);
            if (row >= TILE_ROWS) continue;
            int first = column + 128 * (row / WGMMA_ROWS);
#pragma unroll
            for (int block = 0; block < 2; block++)
                if (first + 64 * block + line < m) step_of_bias(c + first + 64 * block + line, sums.columns[block][2 * half]);
        }
    };
    auto between = [&](Sums& sums) { scale(sums, -model_weight); };
    product_wgmma<ALONG_LINES, ALONG_LINES, true>(dynamic_shared, parts, n, m, ahead, between, use);
}
