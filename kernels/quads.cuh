// quads: four neighbouring floats of a row, read and written at once where they lie right.
//
// A quad may hang over either end of its row (`first` below 0, or above size - 4): what lies outside is read as 0 and
// not written. `aligned` says that all quads of all rows lie on multiples of 16 bytes; see `quads_aligned`.
#pragma once

// Whether rows of `size` floats at `data` are made of aligned quads, when the first quad begins at -shift.
__device__ __forceinline__ bool quads_aligned(const float* data, int size, int shift = 0)
{
    return shift == 0 && size % 4 == 0 && (size_t)data % 16 == 0;
}

__device__ __forceinline__ float4 load_quad(const float* row, int first, int size, bool aligned)
{
    if (aligned && first + 4 <= size) return *reinterpret_cast<const float4*>(row + first);
    auto at = [&](int i) { return 0 <= i && i < size ? row[i] : 0.0f; };
    return make_float4(at(first), at(first + 1), at(first + 2), at(first + 3));
}

__device__ __forceinline__ void store_quad(float* row, int first, int size, bool aligned, float4 value)
{
    if (aligned && first + 4 <= size) {
        *reinterpret_cast<float4*>(row + first) = value;
        return;
    }
    auto put = [&](int i, float x) { if (0 <= i && i < size) row[i] = x; };
    put(first, value.x);
    put(first + 1, value.y);
    put(first + 2, value.z);
    put(first + 3, value.w);
}
