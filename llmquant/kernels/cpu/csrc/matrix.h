// What the kernels are given. Mirrors `_Matrix` and `_Inputs` in ../library.py.
#pragma once
#include <cstdint>

enum FloatType : int32_t { FLOAT_F32 = 0, FLOAT_F16 = 1, FLOAT_BF16 = 2 };

// What scales may be beside floats: one byte, a power of two, a float8 (e4m3fn) or an integer.
enum ScaleType : int32_t { SCALE_E8M0 = 3, SCALE_E4M3 = 4, SCALE_U8 = 5, SCALE_I8 = 6 };

// A packed matrix in the neutral layout. The number of a code is table[code] where there is a table, else
// code - zero point; times the scale of its group (of one byte, without a table it is SCALE_I8).
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
    float unit;      // of `integers`
    const int16_t* integers;  // [2^bits] the table in multiples of `unit`, or null where 16 bits hold no such numbers
    const float* outer;       // what all scales are multiplied by, of the matrix or of each row of scales, or null
    int64_t outer_step;       // 0 or 1
    int32_t exact;            // whether integers x unit is the table, else the nearest 16 bits to it
    int32_t sparse;           // whether codes of bytes are 2:4 sparse: eight columns are their places and four codes
};

inline int64_t scale_bytes(const Matrix& w) { return w.scale_type == FLOAT_F32 ? 4 : w.scale_type <= FLOAT_BF16 ? 2 : 1; }

// Bytes of a row before a column that begins a byte: of sparse codes every eighth one does.
inline int64_t bytes_before(const Matrix& w, int64_t column) { return w.sparse ? column / 8 * 5 : column * w.bits / 8; }

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

// How activations become numbers of a small float times a scale: float8, MX by the rule that finds a block's scale, NVFP4.
enum RoundingRule : int32_t { ROUND_FLOAT8 = 0, ROUND_FLOOR, ROUND_CEIL, ROUND_EVEN, ROUND_RCEIL, ROUND_NVFP4 };

struct Rounding {
    const void* x;  // [tokens, columns] of `type`
    void* out;      // the same
    int64_t tokens, columns;
    int64_t group;  // columns that share a scale
    int32_t type, rule;
    int32_t together;  // whether all tokens share a scale: that of float8, the outer one of NVFP4
    int32_t mantissa_bits, largest_exponent;  // of the element
    float largest;                            // its largest number
    float least_normal;
    float anchor;  // 1.5 x 2^(23 - mantissa bits): what numbers are added to, so that just their own bits are left
    const float* fixed;  // the scale of float8 where calibration chose it, or null
};

// One set of kernels. Every function may use all of torch's threads; no result depends on their number.
struct Kernels {
    const char* name;
    bool (*present)();  // whether this processor has what they need
    void (*linear)(const Matrix&, const Inputs&);
    // Rows of the matrix as floats of `type`: row `indices[i]`, or row i where `indices` is null.
    void (*rows)(const Matrix&, const int64_t* indices, int64_t count, int32_t type, void* out);
    // Of the plain sets only; see rounding.h.
    void (*round)(const Rounding&) = nullptr;
};
