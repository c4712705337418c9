// What the kernels are given. Mirrors `_Matrix` and `_Inputs` in ../library.py.
#pragma once
#include <cstdint>

enum FloatType : int32_t { FLOAT_F32 = 0, FLOAT_F16 = 1, FLOAT_BF16 = 2 };

// A packed matrix in the neutral layout. The number of a code is table[code] where there is a table, else
// code - zero point; times the scale of its group.
struct Matrix {
    const uint8_t* qdata;       // [rows, row_bytes], codes as a little-endian bit stream
    const void* scale;          // [rows / shared, groups]
    const uint8_t* zero_point;  // [rows / shared, bytes of groups], packed like codes, or null
    const float* table;         // [2^bits] values of the codes under scale 1, or null
    int64_t rows, columns;
    int64_t row_bytes;
    int64_t groups, group;  // a row's scales, and the columns that share one
    int64_t shared;         // rows that share their scales and zero points
    int32_t bits;
    int32_t scale_type;
    float midpoint;  // the code that means zero where there are neither zero points nor a table
};

// Bytes of one row of zero points.
inline int64_t zero_bytes(const Matrix& w) { return (w.groups * w.bits + 7) / 8; }

// How activations meet the weights: as they are, or as int8 codes with a scale a group of columns.
enum Activation : int32_t { PLAIN = 0, SYMMETRIC = 1, ASYMMETRIC = 2 };

// What calibration chose for all inputs of a weight; null where codes are scaled anew for every group.
struct StaticScale {
    const float* scale;
    const int8_t* zero_point;  // of asymmetric codes
};

struct Inputs {
    const void* x;     // [count, columns] of `type`
    const void* bias;  // [rows] of `bias_type`, or null
    void* out;         // [count, rows] of `type`
    int64_t count;
    int64_t group;  // columns that share an activation scale (all of them: `columns`)
    int32_t type, bias_type;
    int32_t activation;
    StaticScale fixed;
};

// The scale of codes for inputs from `low` (at most 0) to `high` (at least 0), unless calibration chose it.
inline float activation_scale(const Inputs& in, float low, float high) {
    if (in.fixed.scale) return *in.fixed.scale;
    return in.activation == SYMMETRIC ? (high > -low ? high : -low) / 127.f : (high - low) / 255.f;
}

// One set of kernels. Every function may use all of torch's threads; no result depends on their number.
struct Kernels {
    const char* name;
    bool (*present)();  // whether this processor has what they need
    void (*linear)(const Matrix&, const Inputs&);
    // Rows of the matrix as floats of `type`: row `indices[i]`, or row i where `indices` is null.
    void (*rows)(const Matrix&, const int64_t* indices, int64_t count, int32_t type, void* out);
};
