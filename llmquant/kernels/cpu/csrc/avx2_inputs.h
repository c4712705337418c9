// The inputs of products in strips of 8 rows, as planes of codes; strips.cpp says which.
#pragma once
#include "avx2.h"
#include "pieces.h"

namespace {

// `quantize_inputs` of activations.h in vectors. `codes` has room for 8 more.
INLINE2 float quantize_group(const Inputs& in, int64_t at, int64_t count, int32_t* codes) {
    const bool symmetric = in.activation == SYMMETRIC;
    __m256 low = _mm256_setzero_ps(), high = low;
    __m256i bad = _mm256_setzero_si256();
    for (int64_t k = 0; k < count; k += 8) {
        const __m256 x = load_eight(in.x, at + k, in.type, count - k);
        low = _mm256_min_ps(low, x);
        high = _mm256_max_ps(high, x);
        bad = _mm256_or_si256(bad, not_finite(x));
    }
    const float least = min_across(low), most = max_across(high);
    const float scale = activation_scale(in, least, most);
    const __m256 safe = _mm256_set1_ps(scale > 0 ? scale : 1.f);
    const __m256i bottom = _mm256_set1_epi32(symmetric ? -127 : -128), top = _mm256_set1_epi32(127);
    __m256i zero = _mm256_setzero_si256();
    if (!symmetric) {
        zero = _mm256_cvtps_epi32(_mm256_sub_ps(_mm256_set1_ps(-128.f), _mm256_div_ps(_mm256_set1_ps(least), safe)));
        zero = _mm256_max_epi32(_mm256_min_epi32(zero, top), bottom);
        if (in.fixed.zero_point) zero = _mm256_set1_epi32(*in.fixed.zero_point);
    }
    const __m256 far = _mm256_set1_ps(512.f);  // inputs may lie far outside of a scale that was chosen before
    for (int64_t k = 0; k < count; k += 8) {
        const __m256 x = load_eight(in.x, at + k, in.type, count - k);
        const __m256 near = _mm256_max_ps(_mm256_min_ps(_mm256_div_ps(x, safe), far), _mm256_sub_ps(_mm256_setzero_ps(), far));
        const __m256i code = _mm256_add_epi32(_mm256_cvtps_epi32(near), zero);
        store32(codes + k, _mm256_sub_epi32(_mm256_max_epi32(_mm256_min_epi32(code, top), bottom), zero));
    }
    const bool finite = _mm256_testz_si256(bad, bad) && scale <= std::numeric_limits<float>::max();
    return finite ? scale : std::numeric_limits<float>::quiet_NaN();
}

// 32 floats of a piece as codes under a power of two; see `fix_floats` of strips.cpp.
INLINE2 float fix_floats(const Inputs& in, int64_t at, int64_t count, int reach, __m256i code[4], __m256i* bad) {
    __m256 x[4], top = _mm256_setzero_ps();
    for (int i = 0; i < 4; ++i) {
        x[i] = load_eight(in.x, at + 8 * i, in.type, count - 8 * i);
        top = _mm256_max_ps(top, _mm256_andnot_ps(_mm256_set1_ps(-0.f), x[i]));
        *bad = _mm256_or_si256(*bad, not_finite(x[i]));
    }
    float inverse;
    const float scale = fixed_point(max_across(top), reach, &inverse);
    for (int i = 0; i < 4; ++i) code[i] = _mm256_cvtps_epi32(_mm256_mul_ps(x[i], _mm256_set1_ps(inverse)));
    return scale;
}

// Bytes of a vector in another order. `here` and `there`: places in the same and in the other half, or 128.
struct Order {
    __m256i here, there;
};

INLINE2 Order make_order(int lane) {
    uint8_t order[PIECE], here[PIECE], there[PIECE];
    order_columns(lane, order);
    for (int i = 0; i < PIECE; ++i) {
        const bool same = order[i] / 16 == i / 16;
        here[i] = same ? order[i] % 16 : 128;
        there[i] = same ? 128 : order[i] % 16;
    }
    return {load32(here), load32(there)};
}

INLINE2 __m256i put_in_order(__m256i v, const Order& order) {
    const __m256i swapped = _mm256_permute4x64_epi64(v, 0x4e);
    return _mm256_or_si256(_mm256_shuffle_epi8(v, order.here), _mm256_shuffle_epi8(swapped, order.there));
}

// Splits 32 codes into planes: the lowest eight bits, signed; what is left is shifted down.
template <int P>
INLINE2 void write_codes(const Matrix& w, __m256i code[4], float scale, const Order& order, bool whole_midpoint,
                         Codes<P>* to) {
    to->scale = scale;
    for (int p = 0; p < P; ++p) {
        __m256i low[4], sum = _mm256_setzero_si256();
        for (int i = 0; i < 4; ++i) {
            low[i] = _mm256_srai_epi32(_mm256_slli_epi32(code[i], 24), 24);
            sum = _mm256_add_epi32(sum, low[i]);
            code[i] = _mm256_srai_epi32(_mm256_sub_epi32(code[i], low[i]), 8);
        }
        const __m256i words[2] = {_mm256_packs_epi32(low[0], low[1]), _mm256_packs_epi32(low[2], low[3])};
        const __m256i plane = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words[0], words[1]),
                                                          _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        store32(to->codes[p], put_in_order(plane, order));
        const int32_t all = add_across(sum);
        to->sums[p] = whole_midpoint ? -static_cast<int32_t>(w.midpoint) * all
                                     : static_cast<int32_t>(bits_of(static_cast<float>(all)));
    }
}

// One token's inputs. Returns whether they are finite (int8 activations always pass: their scale says NaN).
template <int P>
TARGET2 bool fill_token(const Matrix& w, const Inputs& in, const StripPlan& plan, int64_t token) {
    Codes<P>* to = static_cast<Codes<P>*>(plan.codes) + token;
    const Order order = make_order(plan.lane);
    const int64_t at = token * w.columns;
    const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i code[4], bad = _mm256_setzero_si256();
    int32_t* codes = in.activation == PLAIN ? nullptr : scratch<int32_t>(2, w.columns + PIECE);
    float scale = 0;
    for (int64_t i = 0, end = 0; i < plan.count; ++i, to += in.count) {
        const auto [start, count, group] = plan.pieces[i];
        if (in.activation == PLAIN) {
            scale = fix_floats(in, at + start, count, P == 2 ? 13 : 21, code, &bad);
        } else {
            if (start == end) {
                end = start + in.group < w.columns ? start + in.group : w.columns;
                scale = quantize_group(in, at + start, end - start, codes + start);
            }
            for (int q = 0; q < 4; ++q) {
                const __m256i present = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count) - 8 * q), places);
                code[q] = _mm256_and_si256(load32(codes + start + 8 * q), present);
            }
        }
        write_codes<P>(w, code, scale, order, !plan.zeros, to);
    }
    return _mm256_testz_si256(bad, bad);
}

}  // namespace
