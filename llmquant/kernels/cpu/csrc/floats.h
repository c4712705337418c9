// Scalar conversions between float32 and the two half formats, on any machine. Rounding is to nearest even.
#pragma once
#include <cstdint>
#include <cstring>

#include "matrix.h"

namespace {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float bfloat_to_float(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

inline uint16_t float_to_bfloat(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // The exponent is off by 2^112, which one product puts right, subnormals included.
    return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

inline uint16_t float_to_half(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    if (rest < 0x38800000) {  // subnormal: adding 0.5 rounds at the last bit that float16 keeps
        return static_cast<uint16_t>(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | ((rest + 0xfff + ((rest >> 13) & 1) - 0x38000000) >> 13));
}

inline float load_float(const void* data, int64_t i, int32_t type) {
    if (type == FLOAT_F32) return static_cast<const float*>(data)[i];
    const uint16_t h = static_cast<const uint16_t*>(data)[i];
    return type == FLOAT_F16 ? half_to_float(h) : bfloat_to_float(h);
}

inline float e8m0_to_float(uint8_t code) {
    return float_of(code == 0xff ? 0x7fc00000u : code ? static_cast<uint32_t>(code) << 23 : 0x00400000u);
}

inline float e4m3_to_float(uint8_t code) {
    if ((code & 0x7f) == 0x7f) return float_of(0x7fc00000u);
    const uint16_t half = static_cast<uint16_t>((code & 0x80) << 8 | (code & 0x7f) << 7);
    return half_to_float(half) * 256.f;  // the exponent of float16 is off by 8
}

// The scale of group `g` in a row of scales.
inline float load_scale(const Matrix& w, int64_t scale_row, int64_t g) {
    const int64_t i = scale_row * w.groups + g;
    const uint8_t* bytes = static_cast<const uint8_t*>(w.scale);
    const float scale = w.scale_type == SCALE_E8M0   ? e8m0_to_float(bytes[i])
                        : w.scale_type == SCALE_E4M3 ? e4m3_to_float(bytes[i])
                        : w.scale_type == SCALE_U8   ? static_cast<float>(bytes[i])
                        : w.scale_type == SCALE_I8   ? static_cast<float>(static_cast<int8_t>(bytes[i]))
                                                     : load_float(w.scale, i, w.scale_type);
    return w.outer ? scale * w.outer[scale_row * w.outer_step] : scale;
}

inline void store_float(void* data, int64_t i, int32_t type, float value) {
    if (type == FLOAT_F32)
        static_cast<float*>(data)[i] = value;
    else
        static_cast<uint16_t*>(data)[i] = type == FLOAT_F16 ? float_to_half(value) : float_to_bfloat(value);
}

}  // namespace
