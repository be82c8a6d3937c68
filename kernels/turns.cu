// turns: what a run of updates keeps on the device, so that the host neither copies nor waits between them.
//
//     advance          counters[0] += updates,  counters[1] += rows
//     note_not_finite  flag <- min(flag, phase 2^32 + update + clock)  if an entry of x is NaN or infinite
//
// counters  (2,)     in and out: how far a CUDA graph has come, for its next launch
// flag      (1,)     in and out; all ones: everything was finite
// x         (size,)  in
// clock     (1,)     in, or null: a number of updates in device memory that is added to `update`
//
// Launch: advance: one thread. note_not_finite: one thread an entry, 1-D, any number of blocks of any size; tail guarded.
// Numerics: integers; whether an entry is finite is read off its exponent, which no flushing of subnormals changes.
// Twins: reference.advance, reference.note_not_finite
typedef unsigned int u32;
typedef unsigned long long u64;

extern "C" __global__ void advance(u32* counters, u32 updates, u32 rows)
{
    counters[0] += updates;
    counters[1] += rows;
}

extern "C" __global__ void note_not_finite(u64* flag, const float* x, long long size, u32 phase, u32 update, const u32* clock)
{
    bool finite = true;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += (long long)gridDim.x * blockDim.x)
        finite = finite && (__float_as_uint(x[i]) & 0x7f800000u) != 0x7f800000u;
    if (!finite) atomicMin(flag, (u64)phase << 32 | (update + (clock ? *clock : 0u)));
}
