// matrix: where an operand of a product lies in memory, for products of floats and of integers.
//
// An operand is `lines` (rows of a, or columns of b) by `depth`. Its neighbours in memory lie either along the lines or along
// the depth.
#pragma once
#include "quads.cuh"

enum Neighbours { ALONG_LINES, ALONG_DEPTH };

// `rows` rows of `size` neighbours. `shift` columns are missing before its first line (only for ALONG_LINES).
template <Neighbours N> struct Matrix {
    const float* data;
    int rows, size;
    bool aligned;

    __device__ Matrix(const float* data, int lines, int depth, int shift = 0)
        : data(data), rows(N == ALONG_DEPTH ? lines : depth), size(N == ALONG_DEPTH ? depth : lines),
          aligned(quads_aligned(data, size, shift)) {}

    __device__ __forceinline__ int depth() const { return N == ALONG_DEPTH ? size : rows; }

    // Four neighbours from (line, k) on; 0 outside.
    __device__ __forceinline__ float4 quad(int line, int k) const
    {
        int row = N == ALONG_DEPTH ? line : k, first = N == ALONG_DEPTH ? k : line;
        if (row < 0 || row >= rows) return make_float4(0, 0, 0, 0);
        return load_quad(data + (long long)row * size, first, size, aligned);
    }
};

// An adjustment of what is read that changes nothing.
struct AsItIs {
    __device__ __forceinline__ void operator()(float4&, int, int) const {}
};
