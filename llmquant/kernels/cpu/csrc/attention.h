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

// Queries [heads, width] and the keys and values [count, width] that they share, all of one half type; at most
// `TOGETHER` heads, and a width that is a multiple of 32.
struct Queries {
    const uint16_t *q, *keys, *values;
    int64_t heads, count, width;
    float scale;
    int32_t type;
};

constexpr int64_t TOGETHER = 4;  // heads for which keys and values are read once

struct Scores {
    float scores[TOGETHER][KEY_BLOCK];
    uint16_t weights[TOGETHER][KEY_BLOCK];
    float out[TOGETHER][WIDEST_HEAD];
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

BFLOAT_TARGET void bfloat_scores(const Queries& of, int64_t first, int64_t count, Scores& to) {
    for (int64_t row = 0; row < count; row += 16)
        for (int64_t head = 0; head < of.heads; ++head) {
            __m512 rows[16], sums[8];
            for (int i = 0; i < 16; ++i) {
                const int64_t key = first + (row + i < count ? row + i : count - 1);
                rows[i] = products_of_row(of.keys + key * of.width, of.q + head * of.width, of.width);
            }
            for (int i = 0; i < 8; ++i) sums[i] = add_halves(rows[i + i / 4 * 4], rows[i + i / 4 * 4 + 4]);
            for (int i = 0; i < 4; ++i) sums[i] = add_neighbours(sums[2 * i], sums[2 * i + 1]);
            for (int i = 0; i < 2; ++i) sums[i] = add_neighbours(sums[2 * i], sums[2 * i + 1]);
            _mm512_mask_storeu_ps(to.scores[head] + row, first_lanes(count - row), add_quarters(sums[0], sums[1]));
        }
}

// Up to eight rows of 32 values times the weights from `start` on: a sum of their own that joins `sums` or begins them.
// Two rows are interleaved in every quarter of a vector, so sums are kept in that order: `sums` are the even and the
// odd quads of columns.
BFLOAT_INLINE void add_eight_rows(const Queries& of, const uint16_t* from, int64_t rows, const Scores& with,
                                  int64_t start, bool begin, __m512 (*sums)[2]) {
    __m512i even[4], odd[4];
    for (int i = 0; 2 * i < rows; ++i) {
        const __m512i a = _mm512_loadu_si512(from + 2 * i * of.width);
        const bool pair = 2 * i + 1 < rows;
        const __m512i b = pair ? _mm512_loadu_si512(from + (2 * i + 1) * of.width) : _mm512_setzero_si512();
        even[i] = _mm512_unpacklo_epi16(a, b), odd[i] = _mm512_unpackhi_epi16(a, b);
    }
    for (int64_t head = 0; head < of.heads; ++head) {
        __m512 part[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int i = 0; 2 * i < rows; ++i) {
            int32_t two;
            std::memcpy(&two, with.weights[head] + start + 2 * i, 4);
            part[0] = add_pairs(part[0], even[i], _mm512_set1_epi32(two));
            part[1] = add_pairs(part[1], odd[i], _mm512_set1_epi32(two));
        }
        for (int i = 0; i < 2; ++i) sums[head][i] = begin ? part[i] : _mm512_add_ps(sums[head][i], part[i]);
    }
}

// out [heads, width] (+)= weights [heads, count] @ values [count, width]: the sums of eight rows at a time.
BFLOAT_TARGET void bfloat_values(const Queries& of, int64_t first, int64_t count, Scores& with) {
    __m512 sums[TOGETHER][2];
    for (int64_t head = 0; count % 2 && head < of.heads; ++head) with.weights[head][count] = 0;
    for (int64_t k = 0; k < of.width; k += 32) {
        for (int64_t head = 0; first && head < of.heads; ++head) {
            const __m512 a = _mm512_loadu_ps(with.out[head] + k), b = _mm512_loadu_ps(with.out[head] + k + 16);
            sums[head][0] = _mm512_shuffle_f32x4(a, b, 0x88), sums[head][1] = _mm512_shuffle_f32x4(a, b, 0xdd);
        }
        const uint16_t* from = of.values + first * of.width + k;
        int64_t row = 0;
        for (; row + 8 <= count; row += 8)
            add_eight_rows(of, from + row * of.width, 8, with, row, first + row == 0, sums);
        if (row < count) add_eight_rows(of, from + row * of.width, count - row, with, row, first + row == 0, sums);
        for (int64_t head = 0; head < of.heads; ++head) {
            const __m512 a = _mm512_shuffle_f32x4(sums[head][0], sums[head][1], 0x44);
            const __m512 b = _mm512_shuffle_f32x4(sums[head][0], sums[head][1], 0xee);
            _mm512_storeu_ps(with.out[head] + k, _mm512_shuffle_f32x4(a, a, 0xd8));
            _mm512_storeu_ps(with.out[head] + k + 16, _mm512_shuffle_f32x4(b, b, 0xd8));
        }
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
TARGET void half_scores(const uint16_t* q, const uint16_t* keys, int64_t count, int64_t width, float* out) {
    if (count < 4) {
        for (int64_t row = 0; row < count; ++row) out[row] = half_score(keys + row * width, q, width);
        return;
    }
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(width)));
    for (int64_t row = 0; row < count; row += 16) {
        const __mmask16 present = first_lanes(count - row);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < width; k += 2) {
            const __m512i pairs = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), present, places,
                                                              keys + row * width + k, 2);
            sum = _mm512_fmadd_ps(low_halves(pairs), _mm512_set1_ps(half_to_float(q[k])), sum);
            const __m512 next = low_halves(_mm512_srli_epi32(pairs, 16));
            sum = _mm512_fmadd_ps(next, _mm512_set1_ps(half_to_float(q[k + 1])), sum);
        }
        _mm512_mask_storeu_ps(out + row, present, sum);
    }
}

// out (+)= weights @ values [count, width], a sum of its own that begins or joins what is there.
TARGET void half_part(const uint16_t* values, int64_t count, int64_t width, const uint16_t* weights, bool begin,
                      float* out) {
    for (int64_t k = 0; k < width; k += 32) {
        __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t row = 0; row < count; ++row) {
            const __m512 weight = _mm512_set1_ps(half_to_float(weights[row]));
            for (int i = 0; i < 2; ++i) {
                const __m512 value = load_floats(values, row * width + k + 16 * i, FLOAT_F16, 0xffff);
                sums[i] = _mm512_fmadd_ps(value, weight, sums[i]);
            }
        }
        for (int i = 0; i < 2; ++i) {
            float* to = out + k + 16 * i;
            _mm512_storeu_ps(to, begin ? sums[i] : _mm512_add_ps(_mm512_loadu_ps(to), sums[i]));
        }
    }
}

// More than 384 rows are two sums.
void half_values(const uint16_t* values, int64_t count, int64_t width, const uint16_t* weights, bool begin,
                 float* out) {
    const int64_t part = count > 384 ? (count + 1) / 2 : count;
    half_part(values, part, width, weights, begin, out);
    if (part < count) half_part(values + part * width, count - part, width, weights + part, false, out);
}

// --- the softmax ---------------------------------------------------------------------------------------

// scores *= scale; the greatest. As in ATen, a NaN makes it NaN in a full vector and is passed over behind the last
// one, where it meets the exponentials.
INLINE float scale_scores(float* scores, int64_t count, float scale) {
    __m512 best = _mm512_set1_ps(-INFINITY);
    __mmask16 nan = 0;
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const __m512 scaled = times(_mm512_loadu_ps(scores + i), _mm512_set1_ps(scale));
        _mm512_storeu_ps(scores + i, scaled);
        best = _mm512_max_ps(best, scaled);
        nan |= _mm512_cmp_ps_mask(scaled, scaled, _CMP_UNORD_Q);
    }
    float most = _mm512_reduce_max_ps(best);
    for (; i < count; ++i) {
        scores[i] *= scale;
        most = scores[i] > most ? scores[i] : most;
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

// weights = exp(scores - most), rounded; their sum before that. ATen takes two vectors at a time, then one, then single
// numbers, whose exponentials are those of double.
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

void score(const Queries& of, int64_t first, int64_t count, Scores& to) {
    if (of.type != FLOAT_F16) return bfloat_scores(of, first, count, to);
    for (int64_t head = 0; head < of.heads; ++head)
        half_scores(of.q + head * of.width, of.keys + first * of.width, count, of.width, to.scores[head]);
}

void add_values(const Queries& of, int64_t first, int64_t count, Scores& with) {
    if (of.type != FLOAT_F16) return bfloat_values(of, first, count, with);
    for (int64_t head = 0; head < of.heads; ++head)
        half_values(of.values + first * of.width, count, of.width, with.weights[head], first == 0, with.out[head]);
}

// The greatest score so far and the sum of exponentials under it.
struct Softmax {
    float most = -INFINITY, total = 0;
};

// scores -> weights; what was summed before shrinks to the new greatest score.
TARGET void soften(const Queries& of, int64_t head, int64_t count, Scores& with, Softmax& so_far) {
    float* scores = with.scores[head];
    const float found = scale_scores(scores, count, of.scale), most = so_far.most > found ? so_far.most : found;
    if (most == -INFINITY) {
        std::memset(with.weights[head], 0, sizeof with.weights[head]);
        return;
    }
    const float part = exponentials(scores, count, most, of.type, with.weights[head]);
    const float kept = std::exp(so_far.most - most);
    so_far = {most, std::fma(kept, so_far.total, part)};
    for (int64_t k = 0; k < of.width; k += 16)
        _mm512_storeu_ps(with.out[head] + k, times(_mm512_loadu_ps(with.out[head] + k), _mm512_set1_ps(kept)));
}

// -> out [heads, width] and, where asked for, the logarithms of the sums of exponentials, [heads].
TARGET void attend(const Queries& of, uint16_t* out, float* logsumexp) {
    alignas(64) Scores with;
    Softmax softmax[TOGETHER];
    std::memset(with.out, 0, sizeof with.out);
    for (int64_t first = 0; first < of.count; first += KEY_BLOCK) {
        const int64_t count = of.count - first < KEY_BLOCK ? of.count - first : KEY_BLOCK;
        score(of, first, count, with);
        for (int64_t head = 0; head < of.heads; ++head) soften(of, head, count, with, softmax[head]);
        add_values(of, first, count, with);
    }
    for (int64_t head = 0; head < of.heads; ++head) {
        const float most = softmax[head].most == -INFINITY ? 0 : softmax[head].most;
        const float total = softmax[head].total == 0 ? 1 : softmax[head].total;
        if (logsumexp) logsumexp[head] = most + std::log(total);
        const __m512 inverse = _mm512_set1_ps(1 / total);
        for (int64_t k = 0; k < of.width; k += 16)
            store_floats(out, head * of.width + k, of.type, 0xffff,
                         times(_mm512_loadu_ps(with.out[head] + k), inverse));
    }
}

}  // namespace
