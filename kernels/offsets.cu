// offsets: what is subtracted from units before their products: for centring, and for sparsity.
//
//     centre        v <- v - mu,  h <- h - lambda_k;  ones[k] = 1 - h_k.lambda,  ones[K + k] = 1 - v_k.mu
//     offsets_step  mean <- keep mean + (1 - keep) (scale moved + offset in the data phase)
//                   mu, lambda <- mean rounded to multiples of 1/256, or 0;  lambda0 <- lambda + cost (mean - target)
//
// v, h     (K, n), (K, m)  in and out; the first `rows` rows are the data phase
// ones     (2 K,)          out
// means    (n + m,)        in and out
// offsets  (n + 2 m,)      in; out of offsets_step: mu; lambda0, of the data phase; lambda, of the model phase
// moved    (n + m,)        in: sums over the data rows of v - mu and h - lambda0
//
// Launch: centre: one block of THREADS threads a row. offsets_step: one thread a unit, 1-D, any number of blocks of any size.
// Numerics: float32; the products in `ones` are THREADS partial sums and a tree.
// Source: Melchior, Fischer & Wiskott, "How to center deep Boltzmann machines" (2016), section 3; Hinton, "A practical guide to
// training restricted Boltzmann machines" (2012), section 11.
// Twins: reference.centre, reference.offsets_step

// x <- x - offset; 1 - x.weight, in thread 0. Every thread of the block must call.
__device__ __forceinline__ float centre_row(float* x, const float* offset, const float* weight, int size)
{
    __shared__ float sums[THREADS];
    float sum = 0.0f;
    for (int i = threadIdx.x; i < size; i += THREADS) {
        float centred = x[i] - offset[i];
        x[i] = centred;
        sum += centred * weight[i];
    }
    sums[threadIdx.x] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();  // the sums of twice as many are there
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    return 1.0f - sums[0];
}

extern "C" __global__ void __launch_bounds__(THREADS)
centre(float* v, float* h, float* ones, const float* __restrict__ offsets, int n, int m, int K, int rows)
{
    int k = blockIdx.x;
    const float *data = offsets + n, *model = data + m;
    float of_b = centre_row(h + (long long)k * m, k < rows ? data : model, model, m);
    if (threadIdx.x == 0) ones[k] = of_b;
    __syncthreads();  // the sums have been used
    float of_c = centre_row(v + (long long)k * n, offsets, offsets, n);
    if (threadIdx.x == 0) ones[K + k] = of_c;
}

extern "C" __global__ void offsets_step(float* means, float* offsets, const float* moved, int n, int m,
                                        float scale, float change, int centring, float target, float cost)
{
    int stride = gridDim.x * blockDim.x;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n + m; i += stride) {
        float now = scale * moved[i] + offsets[i], mean = means[i] + change * (now - means[i]);
        float offset = centring ? rintf(256.0f * mean) / 256.0f : 0.0f;
        means[i] = mean;
        offsets[i] = i < n ? offset : offset + cost * (mean - target);
        if (i >= n) offsets[m + i] = offset;
    }
}
