// Packed rows, scales and floats in vectors of 256 bits, for any processor with AVX2.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "floats.h"
#include "matrix.h"

#define TARGET2 __attribute__((target("avx2,fma,f16c")))
#define INLINE2 TARGET2 static inline __attribute__((always_inline))

namespace {

INLINE2 __m256i load32(const void* data) { return _mm256_loadu_si256(static_cast<const __m256i*>(data)); }
INLINE2 void store32(void* data, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(data), v); }

// 16 bytes of which `left` may be read; the others are 0.
INLINE2 __m128i load_bytes(const uint8_t* data, int64_t left) {
    if (left >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
    alignas(16) uint8_t bytes[16] = {};
    if (left > 0) std::memcpy(bytes, data, static_cast<size_t>(left));
    return _mm_load_si128(reinterpret_cast<const __m128i*>(bytes));
}

// 8 floats of `type` from `data[i]` on; those from `count` on are 0 and are not read.
INLINE2 __m256 load_eight(const void* data, int64_t i, int32_t type, int64_t count) {
    alignas(32) uint8_t bytes[32] = {};
    const int64_t size = type == FLOAT_F32 ? 4 : 2;
    const void* from = static_cast<const uint8_t*>(data) + i * size;
    if (count < 8) {
        if (count > 0) std::memcpy(bytes, from, static_cast<size_t>(count * size));
        from = bytes;
    }
    if (type == FLOAT_F32) return _mm256_loadu_ps(static_cast<const float*>(from));
    const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(from));
    if (type == FLOAT_F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// 8 floats as bfloat16, rounded to nearest even.
INLINE2 __m128i to_bfloats(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i half = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08));
}

// The first `count` of 8 floats.
INLINE2 void store_eight(void* data, int64_t i, int32_t type, int64_t count, __m256 value) {
    const int64_t size = type == FLOAT_F32 ? 4 : 2;
    alignas(32) uint8_t bytes[32];
    if (type == FLOAT_F32)
        store32(bytes, _mm256_castps_si256(value));
    else
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes),
                        type == FLOAT_F16 ? _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT) : to_bfloats(value));
    const int64_t kept = count < 0 ? 0 : count < 8 ? count : 8;
    std::memcpy(static_cast<uint8_t*>(data) + i * size, bytes, static_cast<size_t>(kept * size));
}

// 8 x 8 lanes turned over. Vector i holds, of rows i and 4 + i, the same half: lanes 0..3 in v[i], 4..7 in v[4 + i].
INLINE2 void turn_halves(__m256i v[8]) {
    for (int h = 0; h < 8; h += 4) {
        const __m256i a = _mm256_unpacklo_epi32(v[h], v[h + 1]), b = _mm256_unpackhi_epi32(v[h], v[h + 1]);
        const __m256i c = _mm256_unpacklo_epi32(v[h + 2], v[h + 3]), d = _mm256_unpackhi_epi32(v[h + 2], v[h + 3]);
        v[h] = _mm256_unpacklo_epi64(a, c);
        v[h + 1] = _mm256_unpackhi_epi64(a, c);
        v[h + 2] = _mm256_unpacklo_epi64(b, d);
        v[h + 3] = _mm256_unpackhi_epi64(b, d);
    }
}

// The same where vector i holds row i.
INLINE2 void turn_rows(__m256 row[8]) {
    __m256i v[8];
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_castps_si256(_mm256_permute2f128_ps(row[i], row[4 + i], 0x20));
        v[4 + i] = _mm256_castps_si256(_mm256_permute2f128_ps(row[i], row[4 + i], 0x31));
    }
    turn_halves(v);
    for (int i = 0; i < 8; ++i) row[i] = _mm256_castsi256_ps(v[i]);
}

INLINE2 int32_t add_across(__m256i v) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

INLINE2 float max_across(__m256 v) {
    __m128 top = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
}

INLINE2 float min_across(__m256 v) {
    const __m256 sign = _mm256_set1_ps(-0.f);
    return -max_across(_mm256_xor_ps(v, sign));
}

// All ones where a number is infinite or NaN.
INLINE2 __m256i not_finite(__m256 x) {
    const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    return _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7f7fffff));
}

// How to cut codes of up to 7 bits out of packed bytes: 16 codes a half of a vector, 8 of them at a time. A shuffle
// brings the two bytes that a code touches to 16 bits of its own, one product moves it to their top, another down.
struct Cutter2 {
    __m256i low, high, up, down;
};

INLINE2 Cutter2 make_cutter2(int bits) {
    alignas(32) uint8_t low[32], high[32];
    alignas(32) uint16_t up[16];
    for (int i = 0; i < 16; ++i) {
        const int bit = i % 8 * bits;
        for (int b = 0; b < 2; ++b) {
            low[2 * i + b] = static_cast<uint8_t>(bit / 8 + b);
            high[2 * i + b] = static_cast<uint8_t>(bits + bit / 8 + b);
        }
        up[i] = static_cast<uint16_t>(1 << (16 - bits - bit % 8));
    }
    return {load32(low), load32(high), load32(up), _mm256_set1_epi16(static_cast<int16_t>(1 << bits))};
}

INLINE2 __m256i cut_eight(__m256i packed, __m256i bytes, const Cutter2& cut) {
    return _mm256_mulhi_epu16(_mm256_mullo_epi16(_mm256_shuffle_epi8(packed, bytes), cut.up), cut.down);
}

// 16 codes a half, one a byte, from the first bytes of each half.
INLINE2 __m256i cut_halves(__m256i packed, const Cutter2& cut) {
    return _mm256_packus_epi16(cut_eight(packed, cut.low, cut), cut_eight(packed, cut.high, cut));
}

// 8 codes from number `first` on, a multiple of 8, of a packed row.
INLINE2 __m256i load_codes(const uint8_t* row, int64_t row_bytes, int64_t first, int bits, const Cutter2& cut) {
    const int64_t at = first / 8 * bits;
    const __m128i packed = load_bytes(row + at, row_bytes - at);
    if (bits == 8) return _mm256_cvtepu8_epi32(packed);
    const __m256i codes = cut_halves(_mm256_castsi128_si256(packed), cut);
    return _mm256_cvtepu8_epi32(_mm256_castsi256_si128(codes));
}

}  // namespace
