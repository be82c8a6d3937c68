// philox: a random number is a function of its address, and nothing has state.
//
//     u(seed, update, site, row, column) = (word >> 8) * 2^-24              in [0, 1), exact in float32
//     key     = (seed low, seed high)
//     counter = (index low, index high, update, site),  index = row * blocks + column / 4
//     word    = output[column % 4],                     blocks = ceil(columns / 4)
//
// One block of Philox4x32-10 serves four neighbouring columns: give them to one thread.
// Integer arithmetic alone: the same bits on every device, at any grid and block size.
//
// Source: Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
// Twin: draws.philox4x32, draws.uniforms
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ uint4 philox4x32(uint4 counter, uint2 key)
{
#pragma unroll
    for (int round = 0; round < 10; round++) {
        u32 high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
        u32 high1 = __umulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
        counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
        key.x += 0x9E3779B9u;
        key.y += 0xBB67AE85u;
    }
    return counter;
}

__device__ __forceinline__ float uniform(u32 word) { return (word >> 8) * 0x1p-24f; }

// The address of the entry [0, 0] of an array of draws; `row` and `column` of the other entries are added to it.
struct Address {
    u64 seed;
    u32 update, site;
    u64 row, column, blocks;  // blocks: Philox blocks in a row of the whole layer

    // `clock`: null, or a number of updates in device memory that is added to `update`, for launches that are repeated as they
    // are in a CUDA graph.
    __device__ __forceinline__ Address(u64 seed, u32 update, u32 site, u64 row, u64 column, u64 blocks, const u32* clock)
        : seed(seed), update(clock ? update + *clock : update), site(site), row(row), column(column), blocks(blocks)
    {
    }

    // How many columns of the first Philox block lie before the array: 0 where shards are cut at multiples of 4.
    __device__ __forceinline__ int shift() const { return (int)(column & 3); }

    // Of the Philox block that has row r and the columns [4 q - shift, 4 q - shift + 4) of the array.
    __device__ __forceinline__ u64 index(long long r, long long q) const
    {
        return (row + (u64)r) * blocks + (column / 4 + (u64)q);
    }

    __device__ __forceinline__ float4 draw(long long r, long long q) const { return draw(index(r, q)); }

    __device__ __forceinline__ float4 draw(u64 index) const
    {
        uint4 word = philox4x32(make_uint4((u32)index, (u32)(index >> 32), update, site),
                                make_uint2((u32)seed, (u32)(seed >> 32)));
        return make_float4(uniform(word.x), uniform(word.y), uniform(word.z), uniform(word.w));
    }

    // The draw of row r and column j of the array alone.
    __device__ __forceinline__ float draw_one(long long r, long long j) const
    {
        int at = (int)((j + shift()) % 4);
        float4 u = draw(r, (j + shift()) / 4);
        return at == 0 ? u.x : at == 1 ? u.y : at == 2 ? u.z : u.w;
    }
};
