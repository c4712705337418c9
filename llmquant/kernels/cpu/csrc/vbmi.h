// Reading packed rows with AVX-512 VBMI: codes, scales, zeros and numbers, shared by the vector and the tile kernels.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <limits>

#include "floats.h"
#include "matrix.h"
#include "scratch.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,f16c,fma")))
#define INLINE TARGET static inline __attribute__((always_inline))

namespace {

constexpr int CHUNK = 64;  // codes that are cut at a time

// How to turn the bytes of one chunk into 64 codes.
struct Cutter {
    __m512i bytes, shifts, mask;
    int bits, chunk_bytes;
    bool sparse;
};

INLINE Cutter make_cutter(int bits) {
    alignas(64) uint8_t bytes[64], shifts[64];
    for (int lane = 0; lane < 8; ++lane)
        for (int i = 0; i < 8; ++i) {
            bytes[8 * lane + i] = static_cast<uint8_t>(i < bits ? lane * bits + i : 63);
            shifts[8 * lane + i] = static_cast<uint8_t>(i * bits);
        }
    return {_mm512_load_si512(bytes), _mm512_load_si512(shifts), _mm512_set1_epi8(static_cast<char>((1 << bits) - 1)),
            bits, 8 * bits, false};
}

// Of a matrix: where it is sparse, lanes take the five bytes of eight columns, and each column the places of its four.
INLINE Cutter make_cutter(const Matrix& w) {
    if (!w.sparse) return make_cutter(w.bits);
    Cutter cutter = make_cutter(5);
    cutter.shifts = _mm512_set1_epi64(0x0404040400000000);
    cutter.mask = _mm512_set1_epi8(15);
    cutter.sparse = true;
    return cutter;
}

// How many bytes of chunk `c` lie in the row, as a mask; those behind its end are never read.
INLINE __mmask64 present_bytes(int64_t row_bytes, int64_t c, int chunk_bytes) {
    const int64_t left = row_bytes - c * chunk_bytes;
    const int64_t count = left < chunk_bytes ? left : chunk_bytes;
    return count >= 64 ? ~0ull : (1ull << (count > 0 ? count : 0)) - 1;
}

INLINE __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count > 0 ? count : 0)) - 1);
}

// Which of the codes of a four goes to column c if its places are n, at 16 c + n: the first, the second or none (0x80).
struct Takers {
    alignas(64) uint8_t of[64];
    constexpr Takers() : of() {
        for (int i = 0; i < 64; ++i) of[i] = i / 16 == (i & 3) ? 0 : i / 16 == (i >> 2 & 3) ? 1 : 0x80;
    }
};
constexpr Takers TAKERS;

// 64 codes from lanes of [places, four codes], and the places of its four at each column.
INLINE __m512i place_codes(__m512i lanes, __m512i places) {
    const __m512i column = _mm512_set1_epi32(0x30201000);
    const __m512i taker = _mm512_permutexvar_epi8(_mm512_or_si512(places, column), _mm512_load_si512(TAKERS.of));
    const __m512i codes = _mm512_set4_epi32(0x0b0b0b0b, 0x09090909, 0x03030303, 0x01010101);  // the first of the four
    return _mm512_shuffle_epi8(lanes, _mm512_add_epi8(taker, codes));
}

// 64 codes, one a byte, from the packed bytes of a chunk.
INLINE __m512i cut_codes(__m512i packed, const Cutter& cut) {
    if (cut.bits == 8) return packed;
    const __m512i lanes = _mm512_permutexvar_epi8(cut.bytes, packed);
    const __m512i found = _mm512_and_si512(_mm512_multishift_epi64_epi8(cut.shifts, lanes), cut.mask);
    return cut.sparse ? place_codes(lanes, found) : found;
}

INLINE __m512i codes_of(const uint8_t* row, int64_t row_bytes, int64_t c, const Cutter& cut) {
    const __mmask64 present = present_bytes(row_bytes, c, cut.chunk_bytes);
    return cut_codes(_mm512_maskz_loadu_epi8(present, row + c * cut.chunk_bytes), cut);
}

// 16 floats of `type` from `data[i]` on; those that `present` leaves out are 0 and are not read.
INLINE __m512 load_floats(const void* data, int64_t i, int32_t type, __mmask16 present) {
    if (type == FLOAT_F32) return _mm512_maskz_loadu_ps(present, static_cast<const float*>(data) + i);
    const __m256i half = _mm256_maskz_loadu_epi16(present, static_cast<const uint16_t*>(data) + i);
    if (type == FLOAT_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// 16 floats as bfloat16, rounded to nearest even.
INLINE __m256i to_bfloat(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

INLINE void store_floats(void* data, int64_t i, int32_t type, __mmask16 present, __m512 value) {
    if (type == FLOAT_F32)
        _mm512_mask_storeu_ps(static_cast<float*>(data) + i, present, value);
    else
        _mm256_mask_storeu_epi16(
            static_cast<uint16_t*>(data) + i, present,
            type == FLOAT_F16 ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT) : to_bfloat(value));
}

// The 16 codes of quarter `q` of 64, as 32-bit integers.
INLINE __m512i quarter(__m512i codes, int q) {
    alignas(64) static const int32_t lanes[4][4] = {{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}, {12, 13, 14, 15}};
    const __m512i index = _mm512_castsi128_si512(_mm_load_si128(reinterpret_cast<const __m128i*>(lanes[q])));
    return _mm512_cvtepu8_epi32(_mm512_castsi512_si128(_mm512_permutexvar_epi32(index, codes)));
}

// 16 scales of one byte.
INLINE __m512 widen_scales(__m128i bytes, int32_t type) {
    if (type == SCALE_U8) return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    if (type == SCALE_I8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    const __m512 nan = _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN());
    if (type == SCALE_E8M0) {
        const __m512i code = _mm512_cvtepu8_epi32(bytes);
        const __m512i least = _mm512_set1_epi32(0x00400000);  // 2^-127 is subnormal
        const __m512i bits = _mm512_mask_mov_epi32(_mm512_slli_epi32(code, 23), _mm512_testn_epi32_mask(code, code), least);
        return _mm512_mask_mov_ps(_mm512_castsi512_ps(bits), _mm512_cmpeq_epi32_mask(code, _mm512_set1_epi32(0xff)), nan);
    }
    const __m256i code = _mm256_cvtepu8_epi16(bytes), magnitude = _mm256_and_si256(code, _mm256_set1_epi16(0x7f));
    const __m256i sign = _mm256_slli_epi16(_mm256_andnot_si256(_mm256_set1_epi16(0x7f), code), 8);
    const __m512 value = _mm512_cvtph_ps(_mm256_or_si256(sign, _mm256_slli_epi16(magnitude, 7)));
    const __mmask16 bad = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f));
    return _mm512_mask_mov_ps(_mm512_mul_ps(value, _mm512_set1_ps(256.f)), bad, nan);
}

template <int32_t TYPE>
INLINE __m512 load_some_scales(const void* data, int64_t i, __mmask16 present) {
    if (TYPE <= FLOAT_BF16) return load_floats(data, i, TYPE, present);
    return widen_scales(_mm_maskz_loadu_epi8(present, static_cast<const uint8_t*>(data) + i), TYPE);
}

// `count` scales, each times `outer`.
template <int32_t TYPE>
INLINE void read_scales(const void* data, int64_t at, int64_t count, float outer, float* scale) {
    constexpr bool SMALL = TYPE > FLOAT_BF16;  // others have nothing outside them
    const __m512 factor = _mm512_set1_ps(outer);
    for (int64_t g = 0; g < count; g += 16) {
        const __mmask16 present = count - g >= 16 ? 0xffff : first_lanes(count - g);
        const __m512 found = load_some_scales<TYPE>(data, at + g, present);
        _mm512_storeu_ps(scale + g, SMALL ? _mm512_mul_ps(found, factor) : found);
    }
}

// The scales of groups `first` to `last` - 1 in a row of scales.
INLINE void read_scale_row(const Matrix& w, int64_t row, int64_t first, int64_t last, float* scale) {
    const int64_t at = row * w.groups + first, count = last - first;
    const float outer = w.outer ? w.outer[row * w.outer_step] : 1.f;
    // One loop a type, so that it is not asked for every vector.
    switch (w.scale_type) {
        case FLOAT_F32: return read_scales<FLOAT_F32>(w.scale, at, count, outer, scale);
        case FLOAT_F16: return read_scales<FLOAT_F16>(w.scale, at, count, outer, scale);
        case FLOAT_BF16: return read_scales<FLOAT_BF16>(w.scale, at, count, outer, scale);
        case SCALE_E8M0: return read_scales<SCALE_E8M0>(w.scale, at, count, outer, scale);
        case SCALE_E4M3: return read_scales<SCALE_E4M3>(w.scale, at, count, outer, scale);
        case SCALE_I8: return read_scales<SCALE_I8>(w.scale, at, count, outer, scale);
        default: return read_scales<SCALE_U8>(w.scale, at, count, outer, scale);
    }
}

// 16 scales from group `g` of a row of scales on.
INLINE __m512 load_scales(const Matrix& w, int64_t row, int64_t g, __mmask16 present) {
    const int64_t i = row * w.groups + g;
    if (w.scale_type <= FLOAT_BF16) return load_floats(w.scale, i, w.scale_type, present);
    const __m512 found = widen_scales(_mm_maskz_loadu_epi8(present, static_cast<const uint8_t*>(w.scale) + i), w.scale_type);
    return w.outer ? _mm512_mul_ps(found, _mm512_set1_ps(w.outer[row * w.outer_step])) : found;
}

// The scales and zeros of a row's groups `first` to `last` - 1 as float32, each at its own place; both have room for 80
// entries more than there are groups.
INLINE void read_groups(const Matrix& w, int64_t row, const Cutter& cut, float* scale, float* zero, int64_t first,
                        int64_t last) {
    read_scale_row(w, w.shared == 1 ? row : row / w.shared, first, last, scale + first);
    if (!w.zero_point) return;
    for (int64_t c = first / CHUNK; c * CHUNK < last; ++c) {
        const __m512i codes = codes_of(w.zero_point + row / w.shared * zero_bytes(w), zero_bytes(w), c, cut);
        for (int q = 0; q < 4; ++q)
            _mm512_storeu_ps(zero + c * CHUNK + 16 * q, _mm512_cvtepi32_ps(quarter(codes, q)));
    }
}

INLINE void read_groups(const Matrix& w, int64_t row, const Cutter& cut, float* scale, float* zero) {
    read_groups(w, row, cut, scale, zero, 0, w.groups);
}

// Scales and zeros of the row at hand, in memory that the thread keeps: number `i` of `count` that it needs at a time.
struct Groups {
    float *scale, *zero;
};

INLINE Groups make_groups(const Matrix& w, int64_t i = 0, int64_t count = 1) {
    const int64_t room = w.groups + 80;
    float* data = scratch<float>(5, 2 * room * count) + 2 * room * i;
    for (int64_t g = 0; g < room; ++g) data[g] = 0.f, data[room + g] = w.midpoint;
    return {data, data + room};
}

// The integers nearest to quotients, as `rint(x / value)` has them, or 512 and -512 where they are larger: inputs may lie
// far outside of a scale that was chosen before. Dividing takes long, so the product with the inverse is taken, unless it
// lies so near to a half that its error might count.
struct Divisor {
    __m512 value, inverse;
};

constexpr float SURE = 0.5f - 0x1p-12f;  // how far from an integer a product up to 256, off by less than 2^-14, may be

INLINE Divisor make_divisor(float value) { return {_mm512_set1_ps(value), _mm512_set1_ps(1.f / value)}; }

INLINE __m512i nearest_quotients(__m512 x, const Divisor& by) {
    const __m512 quotient = _mm512_mul_ps(x, by.inverse);
    const __m512 off = _mm512_sub_ps(quotient, _mm512_roundscale_ps(quotient, _MM_FROUND_TO_NEAREST_INT));
    // What is larger, or NaN, is not below either bound.
    const __mmask16 sure = _mm512_cmp_ps_mask(_mm512_abs_ps(off), _mm512_set1_ps(SURE), _CMP_LT_OQ) &
                           _mm512_cmp_ps_mask(_mm512_abs_ps(quotient), _mm512_set1_ps(256.f), _CMP_LT_OQ);
    if (sure == 0xffff) return _mm512_cvtps_epi32(quotient);
    const __m512 near = _mm512_min_ps(_mm512_div_ps(x, by.value), _mm512_set1_ps(512.f));
    return _mm512_cvtps_epi32(_mm512_max_ps(near, _mm512_set1_ps(-512.f)));
}

// `quantize_inputs` of activations.h in vectors: codes minus zero point of `count` inputs from `at` on, and their scale.
INLINE float quantize_group(const Inputs& in, int64_t at, int64_t count, int32_t* codes) {
    const bool symmetric = in.activation == SYMMETRIC;
    __m512 low = _mm512_setzero_ps(), high = low;
    __mmask16 bad = 0;
    for (int64_t k = 0; k < count; k += 16) {
        const __m512 x = load_floats(in.x, at + k, in.type, first_lanes(count - k));
        low = _mm512_min_ps(low, x);
        high = _mm512_max_ps(high, symmetric ? _mm512_abs_ps(x) : x);
        bad |= _mm512_fpclass_ps_mask(x, 0x99);  // infinities and NaN
    }
    const float least = symmetric ? 0.f : _mm512_reduce_min_ps(low), most = _mm512_reduce_max_ps(high);
    const float scale = activation_scale(in, least, most);
    const Divisor divisor = make_divisor(scale > 0 ? scale : 1.f);
    const __m512i bottom = _mm512_set1_epi32(symmetric ? -127 : -128), top = _mm512_set1_epi32(127);
    __m512i zero = _mm512_setzero_si512();
    if (!symmetric) {
        zero = _mm512_cvtps_epi32(_mm512_sub_ps(_mm512_set1_ps(-128.f), _mm512_div_ps(_mm512_set1_ps(least), divisor.value)));
        zero = _mm512_max_epi32(_mm512_min_epi32(zero, top), bottom);
        if (in.fixed.zero_point) zero = _mm512_set1_epi32(*in.fixed.zero_point);
    }
    for (int64_t k = 0; k < count; k += 16) {
        const __mmask16 present = first_lanes(count - k);
        const __m512 x = load_floats(in.x, at + k, in.type, present);
        const __m512i code = _mm512_add_epi32(nearest_quotients(x, divisor), zero);
        const __m512i kept = _mm512_sub_epi32(_mm512_max_epi32(_mm512_min_epi32(code, top), bottom), zero);
        _mm512_mask_storeu_epi32(codes + k, present, kept);
    }
    return bad || !(scale <= std::numeric_limits<float>::max()) ? std::numeric_limits<float>::quiet_NaN() : scale;
}

// Tables of 256 numbers that bfloat16 holds exactly and whose upper half is the lower one with the sign turned: every
// float8 format. `high` and `low` are the bytes of the first 128.
struct ByteTable {
    __m512i high[2], low[2];
};

INLINE bool make_byte_table(const float* table, ByteTable* found) {
    alignas(64) uint8_t high[128], low[128];
    for (int i = 0; i < 128; ++i) {
        const uint32_t bits = bits_of(table[i]), negative = bits_of(table[i + 128]);
        const bool nan = table[i] != table[i] && table[i + 128] != table[i + 128];
        if (!nan && ((bits & 0xffff) || bits >> 31 || (bits ^ negative) != 0x80000000)) return false;
        high[i] = nan ? 0x7f : static_cast<uint8_t>(bits >> 24);
        low[i] = nan ? 0xc0 : static_cast<uint8_t>(bits >> 16);
    }
    *found = {{_mm512_load_si512(high), _mm512_load_si512(high + 64)}, {_mm512_load_si512(low), _mm512_load_si512(low + 64)}};
    return true;
}

// The numbers of 64 codes as bfloat16: `first` holds columns 16 i + 0..7, `second` columns 16 i + 8..15 (i = 0..3).
INLINE void look_up_bytes(__m512i codes, const ByteTable& table, __m512i* first, __m512i* second) {
    const __m512i sign = _mm512_and_si512(codes, _mm512_set1_epi8(-128));
    const __m512i high = _mm512_or_si512(sign, _mm512_permutex2var_epi8(table.high[0], codes, table.high[1]));
    const __m512i low = _mm512_permutex2var_epi8(table.low[0], codes, table.low[1]);
    *first = _mm512_unpacklo_epi8(low, high);
    *second = _mm512_unpackhi_epi8(low, high);
}

}  // namespace
