// Inputs as tiles of bfloat16, for amx.cpp: as they are, in parts, or decoded from int8 codes.
#pragma once
#include "panel.h"

namespace {

constexpr float TINY = 0x1p-64f;  // parts of a token with no larger input may come to nothing

// Where 16 even ones and 16 odd ones stand when they take turns.
alignas(64) constexpr uint16_t IN_TURN[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

int input_parts(const Inputs& in) { return in.type == FLOAT_F32 ? 3 : in.type == FLOAT_F16 ? 2 : 1; }

// 32 inputs of a token as bfloat16, zero behind its end.
INLINE __m512i load_bfloats(const uint16_t* x, int64_t left) {
    const __mmask32 present = left >= 32 ? ~0u : (1u << (left > 0 ? left : 0)) - 1;
    return _mm512_maskz_loadu_epi16(present, x);
}

// The largest of 32 magnitudes, as bits of bfloat16.
TARGET inline uint32_t largest_magnitude(__m512i magnitudes) {
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(magnitudes), _mm512_extracti64x4_epi64(magnitudes, 1));
    const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi32(-1)));
    return static_cast<uint16_t>(~_mm_cvtsi128_si32(least));
}

// Symmetric codes of two vectors: quotients rounded as `nearest_quotients` has them, at most 127.
TILES inline void round_quotients(__m512 x[2], const Divisor& by) {
    const __m512 middle = _mm512_set1_ps(0x1.8p23f);  // a sum with it has no bits below 1
    const __m512 q[2] = {_mm512_mul_ps(x[0], by.inverse), _mm512_mul_ps(x[1], by.inverse)};
    __m512 near[2], off[2];
    for (int i = 0; i < 2; ++i) {
        near[i] = _mm512_sub_ps(_mm512_add_ps(q[i], middle), middle);
        off[i] = _mm512_abs_ps(_mm512_sub_ps(q[i], near[i]));
    }
    const bool sure =
        _mm512_cmp_ps_mask(_mm512_max_ps(off[0], off[1]), _mm512_set1_ps(SURE), _CMP_LT_OQ) == 0xffff;
    const __m512 top = _mm512_set1_ps(127.f), bottom = _mm512_set1_ps(-127.f);
    for (int i = 0; i < 2; ++i) {
        if (!sure) near[i] = _mm512_roundscale_ps(_mm512_div_ps(x[i], by.value), _MM_FROUND_TO_NEAREST_INT);
        x[i] = _mm512_max_ps(_mm512_min_ps(near[i], top), bottom);
    }
}

// `quantize_group` of symmetric bfloat16 inputs, decoded again and rounded to bfloat16.
TILES void decode_symmetric(const Inputs& in, int64_t at, int64_t count, uint16_t* out) {
    const uint16_t* x = static_cast<const uint16_t*>(in.x) + at;
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const __m512i in_turn = _mm512_load_si512(IN_TURN);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t k = 0; k < count; k += WIDTH) {
        _mm_prefetch(x + k + 512, _MM_HINT_T0);
        largest = _mm512_max_epu16(largest, _mm512_and_si512(load_bfloats(x + k, count - k), magnitude));
    }
    const uint32_t top = largest_magnitude(largest);
    const bool finite = top < 0x7f80;
    const float scale = finite ? activation_scale(in, 0.f, float_of(top << 16)) : std::numeric_limits<float>::quiet_NaN();
    const Divisor divisor = make_divisor(scale > 0 ? scale : 1.f);
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t k = 0; k < count; k += WIDTH) {
        const __m512i both = load_bfloats(x + k, count - k);
        __m512 codes[2] = {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
                           _mm512_castsi512_ps(_mm512_and_si512(both, upper))};
        round_quotients(codes, divisor);
        const __m512i values = reinterpret_cast<__m512i>(
            _mm512_cvtne2ps_pbh(_mm512_mul_ps(codes[1], factor), _mm512_mul_ps(codes[0], factor)));
        const __mmask32 present = count - k >= WIDTH ? ~0u : (1u << (count - k)) - 1;
        _mm512_mask_storeu_epi16(out + k, present, _mm512_permutexvar_epi16(in_turn, values));
    }
}

// The token's int8 activations, decoded again and rounded to bfloat16.
TILES void decode_activations(const Inputs& in, int64_t token, int64_t columns, uint16_t* out) {
    int32_t* codes = scratch<int32_t>(3, in.group + 16);
    for (int64_t start = 0; start < columns; start += in.group) {
        const int64_t at = token * columns + start, count = start + in.group < columns ? in.group : columns - start;
        if (in.activation == SYMMETRIC) {
            decode_symmetric(in, at, count, out + start);
            continue;
        }
        const __m512 scale = _mm512_set1_ps(quantize_group(in, at, count, codes));
        for (int64_t k = 0; k < count; k += 16)
            store_floats(out, start + k, FLOAT_BF16, first_lanes(count - k),
                         _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(codes + k)), scale));
    }
}

// Where inputs lie as tiles: [pieces of columns, tiles of tokens, chunks of a piece, IN], so that a piece of all tokens
// is read from one end to the other.
struct Packed {
    uint8_t* data;
    int64_t tokens, chunks, depth, parts;  // tiles of tokens, chunks of the columns and of a piece, IN

    int64_t chunks_from(int64_t piece) const { return chunks - piece < depth ? chunks - piece : depth; }
    uint8_t* at(int64_t token_tile, int64_t chunk) const {
        const int64_t piece = chunk / depth * depth;
        return data + (piece * tokens + token_tile * chunks_from(piece) + chunk - piece) * parts * TILE_BYTES;
    }
};

// Tokens `first` .. `first` + 15 of bfloat16 inputs as tiles of 16 column pairs x 16 tokens.
TILES void pack_bfloats(const Matrix& w, const Inputs& in, int64_t first, const Packed& packed) {
    const uint16_t* rows[TILE];
    uint16_t* decoded = in.activation == PLAIN ? nullptr : scratch<uint16_t>(4, TILE * w.columns);
    const int64_t count = in.count - first < TILE ? in.count - first : TILE;
    for (int64_t i = 0; i < count; ++i) {
        rows[i] = static_cast<const uint16_t*>(in.x) + (first + i) * w.columns;
        if (!decoded) continue;
        decode_activations(in, first + i, w.columns, decoded + i * w.columns);
        rows[i] = decoded + i * w.columns;
    }
    for (int64_t k = 0; k < w.columns; k += WIDTH) {
        __m512i v[TILE];
        for (int64_t i = 0; i < TILE; ++i)
            v[i] = i < count ? load_bfloats(rows[i] + k, w.columns - k) : _mm512_setzero_si512();
        transpose(v);
        uint8_t* out = packed.at(first / TILE, k / WIDTH);
        for (int64_t i = 0; i < TILE; ++i) _mm512_store_si512(out + 64 * i, v[i]);
    }
}

// The same of wider inputs, in IN parts. `plain[token]` becomes whether the plain kernel should take a token.
template <int IN>
TILES void pack_parts(const Matrix& w, const Inputs& in, int64_t first, const Packed& packed, uint8_t* plain) {
    const int64_t count = in.count - first < TILE ? in.count - first : TILE;
    __m512 largest[TILE] = {};
    for (int64_t k = 0; k < w.columns; k += WIDTH) {
        const __mmask16 low = first_lanes(w.columns - k), high = first_lanes(w.columns - k - 16);
        Numbers x[TILE] = {};
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = (first + i) * w.columns + k;
            x[i].low = load_floats(in.x, at, in.type, low);
            if (high) x[i].high = load_floats(in.x, at + 16, in.type, high);
            largest[i] = _mm512_max_ps(largest[i], _mm512_max_ps(_mm512_abs_ps(x[i].low), _mm512_abs_ps(x[i].high)));
        }
        uint8_t* out = packed.at(first / TILE, k / WIDTH);
        for (int part = 0; part < IN; ++part, out += TILE_BYTES) {
            __m512i v[TILE];
            for (int64_t i = 0; i < TILE; ++i) v[i] = x[i].take_part(part, IN);
            transpose(v);
            for (int64_t i = 0; i < TILE; ++i) _mm512_store_si512(out + 64 * i, v[i]);
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        const float top = _mm512_reduce_max_ps(largest[i]);
        plain[first + i] = top > 0 && top <= TINY;
    }
}

}  // namespace
