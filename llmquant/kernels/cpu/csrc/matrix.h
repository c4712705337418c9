// A packed matrix in the neutral layout, as the kernels see it. Mirrors `_Matrix` in ../__init__.py.
#pragma once
#include <cstdint>

enum ScaleType : int32_t { SCALE_F32 = 0, SCALE_F16 = 1, SCALE_BF16 = 2 };
enum FloatType : int32_t { FLOAT_F32 = 0, FLOAT_F16 = 1, FLOAT_BF16 = 2 };

struct Matrix {
    const uint8_t* qdata;       // [rows, row_bytes], codes as a little-endian bit stream
    const void* scale;          // [rows, groups] (one row of scales a row of codes)
    const uint8_t* zero_point;  // [rows, zero_bytes], packed like codes, or null
    int64_t rows, columns;
    int64_t row_bytes, zero_bytes;
    int64_t groups, group;      // columns that share a scale
    int32_t bits;
    int32_t scale_type;
    float midpoint;             // the code that means zero where there are no zero points
};
