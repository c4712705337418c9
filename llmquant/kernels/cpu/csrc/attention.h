// Attention of one query, with the bits of ATen's flash attention (FlashAttentionKernel.cpp, vectors of AVX-512) over
// MKL's products of a matrix and a vector. MKL's orders of summation were read off its results on numbers that cancel;
// whether they hold where this runs is asked by `attention_like_torch` in ../chain.py.
#pragma once
#include <cmath>
#include <cstring>

#include "vbmi.h"

#define BFLOAT_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16,f16c,fma")))
#define BFLOAT_INLINE BFLOAT_TARGET static inline __attribute__((always_inline))

namespace {

constexpr int64_t KEY_BLOCK = 512;  // keys that share a softmax, the next block corrects it
constexpr int64_t WIDEST_HEAD = 256;

// A query [width] and the keys and values [count, width] of its head, all of one half type; width is a multiple of 32.
struct Query {
    const uint16_t *q, *keys, *values;
    int64_t count, width;
    float scale;
    int32_t type;
};

INLINE float sum_of_lanes(__m512 v) {
    v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0x4e));
    v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xb1));
    v = _mm512_add_ps(v, _mm512_shuffle_ps(v, v, 0x4e));
    return _mm512_cvtss_f32(_mm512_add_ps(v, _mm512_shuffle_ps(v, v, 0xb1)));
}

// A product that no compiler fuses with the sum behind it: torch rounds in between.
INLINE __m512 times(__m512 a, __m512 b) { return _mm512_mul_round_ps(a, b, _MM_FROUND_CUR_DIRECTION); }

// --- bfloat16: pairs of products -----------------------------------------------------------------------

BFLOAT_INLINE __m512 add_pairs(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

BFLOAT_INLINE __m512 products_of_row(const uint16_t* key, const uint16_t* q, int64_t width) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < width; k += 32)
        sum = add_pairs(sum, _mm512_loadu_si512(key + k), _mm512_loadu_si512(q + k));
    return sum;
}

// The lanes of a row are summed in a tree: lane i and i + 8, then neighbours, twice, then the rest. Here for many rows.
INLINE __m512 add_halves(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}
INLINE __m512 add_neighbours(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}
INLINE __m512 add_quarters(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

BFLOAT_TARGET void bfloat_scores(const Query& of, int64_t first, int64_t count, float* out) {
    for (int64_t row = 0; row < count; row += 16) {
        __m512 rows[16], sums[8];
        for (int i = 0; i < 16; ++i) {
            const int64_t key = first + (row + i < count ? row + i : count - 1);
            rows[i] = products_of_row(of.keys + key * of.width, of.q, of.width);
        }
        for (int i = 0; i < 8; ++i) sums[i] = add_halves(rows[i + i / 4 * 4], rows[i + i / 4 * 4 + 4]);
        for (int i = 0; i < 4; ++i) sums[i] = add_neighbours(sums[2 * i], sums[2 * i + 1]);
        for (int i = 0; i < 2; ++i) sums[i] = add_neighbours(sums[2 * i], sums[2 * i + 1]);
        _mm512_mask_storeu_ps(out + row, first_lanes(count - row), add_quarters(sums[0], sums[1]));
    }
}

// out [width] (+)= weights [count] @ values [count, width]: the sums of eight rows at a time.
BFLOAT_TARGET void bfloat_values(const Query& of, int64_t first, int64_t count, const uint16_t* weights, float* out) {
    for (int64_t k = 0; k < of.width; k += 32) {
        // Two rows are interleaved in every quarter of a vector, so sums are kept in that order.
        __m512 low = _mm512_setzero_ps(), high = low;
        if (first) {
            const __m512 a = _mm512_loadu_ps(out + k), b = _mm512_loadu_ps(out + k + 16);
            low = _mm512_shuffle_f32x4(a, b, 0x88), high = _mm512_shuffle_f32x4(a, b, 0xdd);
        }
        for (int64_t start = 0; start < count; start += 8) {
            __m512 low_part = _mm512_setzero_ps(), high_part = low_part;
            for (int64_t row = start; row < start + 8 && row < count; row += 2) {
                const bool pair = row + 1 < count;
                const uint16_t* from = of.values + (first + row) * of.width + k;
                const __m512i a = _mm512_loadu_si512(from);
                const __m512i b = pair ? _mm512_loadu_si512(from + of.width) : _mm512_setzero_si512();
                const __m512i two = _mm512_set1_epi32(weights[row] | (pair ? weights[row + 1] : 0) << 16);
                low_part = add_pairs(low_part, _mm512_unpacklo_epi16(a, b), two);
                high_part = add_pairs(high_part, _mm512_unpackhi_epi16(a, b), two);
            }
            const bool only = first + start == 0;
            low = only ? low_part : _mm512_add_ps(low, low_part);
            high = only ? high_part : _mm512_add_ps(high, high_part);
        }
        const __m512 a = _mm512_shuffle_f32x4(low, high, 0x44), b = _mm512_shuffle_f32x4(low, high, 0xee);
        _mm512_storeu_ps(out + k, _mm512_shuffle_f32x4(a, a, 0xd8));
        _mm512_storeu_ps(out + k + 16, _mm512_shuffle_f32x4(b, b, 0xd8));
    }
}

// --- float16: one product after the other in float32 ---------------------------------------------------

// A row's products in two interleaved vectors, summed at the end.
INLINE float half_score(const uint16_t* key, const uint16_t* q, int64_t width) {
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t k = 0; k < width; k += 16) {
        const __m512 a = load_floats(key, k, FLOAT_F16, 0xffff), b = load_floats(q, k, FLOAT_F16, 0xffff);
        sums[k / 16 % 2] = _mm512_fmadd_ps(a, b, sums[k / 16 % 2]);
    }
    return sum_of_lanes(_mm512_add_ps(sums[0], sums[1]));
}

INLINE __m512 low_halves(__m512i pairs) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs)); }

// Sixteen rows side by side, each in the order of its columns; a product of fewer than four rows takes another way.
TARGET void half_scores(const Query& of, int64_t first, int64_t count, float* out) {
    const uint16_t* keys = of.keys + first * of.width;
    if (count < 4) {
        for (int64_t row = 0; row < count; ++row) out[row] = half_score(keys + row * of.width, of.q, of.width);
        return;
    }
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(of.width)));
    for (int64_t row = 0; row < count; row += 16) {
        const __mmask16 present = first_lanes(count - row);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < of.width; k += 2) {
            const __m512i pairs = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), present, places,
                                                              keys + row * of.width + k, 2);
            sum = _mm512_fmadd_ps(low_halves(pairs), _mm512_set1_ps(half_to_float(of.q[k])), sum);
            const __m512 next = low_halves(_mm512_srli_epi32(pairs, 16));
            sum = _mm512_fmadd_ps(next, _mm512_set1_ps(half_to_float(of.q[k + 1])), sum);
        }
        _mm512_mask_storeu_ps(out + row, present, sum);
    }
}

// Rows `first` to `last` - 1 of the values, which are a sum of their own.
TARGET void half_part(const Query& of, int64_t first, int64_t last, const uint16_t* weights, float* out) {
    for (int64_t k = 0; k < of.width; k += 32) {
        __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t row = first; row < last; ++row) {
            const __m512 weight = _mm512_set1_ps(half_to_float(weights[row - first]));
            for (int i = 0; i < 2; ++i) {
                const __m512 value = load_floats(of.values, row * of.width + k + 16 * i, FLOAT_F16, 0xffff);
                sums[i] = _mm512_fmadd_ps(value, weight, sums[i]);
            }
        }
        for (int i = 0; i < 2; ++i) {
            float* to = out + k + 16 * i;
            _mm512_storeu_ps(to, first ? _mm512_add_ps(_mm512_loadu_ps(to), sums[i]) : sums[i]);
        }
    }
}

// More than 384 rows are two sums.
void half_values(const Query& of, int64_t first, int64_t count, const uint16_t* weights, float* out) {
    const int64_t half = count > 384 ? (count + 1) / 2 : count;
    half_part(of, first, first + half, weights, out);
    if (half < count) half_part(of, first + half, first + count, weights + half, out);
}

// --- the softmax ---------------------------------------------------------------------------------------

// scores *= scale; the greatest, or NaN where a full vector has one (the rest is left to the exponentials).
INLINE float scale_scores(float* scores, int64_t count, float scale) {
    float most = -INFINITY;
    __mmask16 nan = 0;
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 present = first_lanes(count - i);
        const __m512 scaled = times(_mm512_maskz_loadu_ps(present, scores + i), _mm512_set1_ps(scale));
        _mm512_mask_storeu_ps(scores + i, present, scaled);
        const float best = _mm512_mask_reduce_max_ps(present, scaled);
        most = best > most ? best : most;
        if (present == 0xffff) nan |= _mm512_cmp_ps_mask(scaled, scaled, _CMP_UNORD_Q);
    }
    return nan ? NAN : most;
}

// exp(x) to about 20 units in the last place, as ATen's `fexp_u20` has it: 2^y by its exponent and a cubic.
INLINE __m512 fast_exp(__m512 x) {
    const __m512 y = times(x, _mm512_castsi512_ps(_mm512_set1_epi32(0x3fb8aa3b)));  // log2(e)
    const __m512 rest = _mm512_sub_ps(y, _mm512_floor_ps(y));
    __m512 cubic = _mm512_fmadd_ps(rest, _mm512_set1_ps(-0.079204240219773236f), _mm512_set1_ps(-0.22433836478672356f));
    cubic = _mm512_fmadd_ps(rest, cubic, _mm512_set1_ps(0.30354260500649682f));
    cubic = _mm512_fmadd_ps(rest, cubic, _mm512_set1_ps(0.00010703434948458272f));
    const __m512 bits =
        _mm512_fmadd_ps(_mm512_set1_ps(0x1p23f), _mm512_sub_ps(y, cubic), _mm512_set1_ps(0x1p23f * 127.f));
    const __mmask16 zero = _mm512_cmp_ps_mask(x, _mm512_castsi512_ps(_mm512_set1_epi32(0xc2aeac50)), _CMP_LT_OS);
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(_mm512_cvttps_epi32(bits), zero, _mm512_setzero_si512()));
}

// weights = exp(scores - most), rounded; their sum before that. ATen takes two vectors at a time, then one, then numbers.
INLINE float exponentials(const float* scores, int64_t count, float most, int32_t type, uint16_t* weights) {
    __m512 sums[3] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __m512& sum = sums[i < count / 32 * 32 ? i / 16 % 2 : 2];
        const __m512 weight = fast_exp(_mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(most)));
        sum = _mm512_add_ps(sum, weight);
        store_floats(weights, i, type, 0xffff, weight);
    }
    float total = sum_of_lanes(_mm512_add_ps(_mm512_add_ps(sums[0], sums[2]), sums[1]));
    for (; i < count; ++i) {
        const float weight = static_cast<float>(std::exp(static_cast<double>(scores[i] - most)));
        total += weight;
        store_float(weights, i, type, weight);
    }
    return total;
}

// --- all of it -----------------------------------------------------------------------------------------

TARGET void attend(const Query& of, uint16_t* out) {
    const bool half = of.type == FLOAT_F16;
    alignas(64) float scores[KEY_BLOCK], sums[WIDEST_HEAD];
    alignas(64) uint16_t weights[KEY_BLOCK];
    float most = -INFINITY, total = 0;
    for (int64_t first = 0; first < of.count; first += KEY_BLOCK) {
        const int64_t count = of.count - first < KEY_BLOCK ? of.count - first : KEY_BLOCK;
        (half ? half_scores : bfloat_scores)(of, first, count, scores);
        const float found = scale_scores(scores, count, of.scale), top = most > found ? most : found;
        if (top == -INFINITY) {
            std::memset(weights, 0, sizeof weights);
        } else {
            const float part = exponentials(scores, count, top, of.type, weights), kept = std::exp(most - top);
            total = std::fma(kept, total, part);
            most = top;
            for (int64_t k = 0; first && k < of.width; k += 16)
                _mm512_storeu_ps(sums + k, times(_mm512_loadu_ps(sums + k), _mm512_set1_ps(kept)));
        }
        (half ? half_values : bfloat_values)(of, first, count, weights, sums);
    }
    const __m512 inverse = _mm512_set1_ps(1 / (total == 0 ? 1 : total));
    for (int64_t k = 0; k < of.width; k += 16)
        store_floats(out, k, of.type, 0xffff, times(_mm512_loadu_ps(sums + k), inverse));
}

}  // namespace
