// One or two planes of inputs against integer codes, row by row: the way that keeps up with memory.
//
// A vector has 16 lanes of 32 bits, and each lane takes `lane` neighbouring columns of a row: its next codes. Widths that
// divide 32 lie in the lanes as they are on disk (`lane` = 32 / bits): step j shifts and masks byte-wise, which leaves four
// codes a lane. Of other widths `vpermb` and `vpmultishiftqb` make one byte a code (`lane` = 4, one step; three bits also
// 8 columns in two). `vpdpbusd` then adds four products a lane to sums of 32 bits, and a lane's sum gets the lane's two
// scales in one FMA.
//
// Codes of tables (fp4, fp6, nf4) become integers by `vpermb`, of one byte or of two: then each pair of a plane of weights
// and a plane of inputs adds to the sum of its power of 256.
//
// The inputs are planes of integers, as strips.cpp says; here a power of two holds for 16 columns, or those of a lane. Rows
// are independent, so any number of threads gives the same result.
#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include "vbmi.h"

namespace {

// Rows that are done together: they share each load of the inputs, and as they lie far apart, memory serves them side by
// side (one stream a thread reaches four fifths of what several do).
constexpr int TOGETHER = 4, AHEAD = 4096;
constexpr int64_t MOST_PLANES = 2;

// How codes leave a vector: CUT and PAIRS by `vpmultishiftqb`, the others by shifts and masks, or they are bytes.
enum Kind { CUT, PAIRS, DENSE1, DENSE2, DENSE4, BYTES };

constexpr int steps_of(int kind) { return kind == DENSE1 ? 8 : kind == DENSE2 ? 4 : kind == DENSE4 || kind == PAIRS ? 2 : 1; }

Kind choose_kind(const Matrix& w, const Inputs& in) {
    const auto whole = [&](int lane) {
        return (w.groups == 1 || w.group % lane == 0) && (in.activation == PLAIN || in.group >= w.columns || in.group % lane == 0);
    };
    if (w.bits == 8) return BYTES;
    if (w.bits == 3) return whole(8) ? PAIRS : CUT;
    if (w.bits > 4 || !whole(32 / w.bits)) return CUT;
    return w.bits == 1 ? DENSE1 : w.bits == 2 ? DENSE2 : DENSE4;
}

// Which group each lane belongs to.
void place_lanes(const Matrix& w, RowsPlan* plan) {
    int32_t* group = scratch<int32_t>(0, plan->vectors * 17);
    int32_t* first = group + plan->vectors * 16;
    const int64_t lanes_a_group = w.groups == 1 ? plan->vectors * 16 : w.group / plan->lane;
    int32_t g = 0;
    for (int64_t i = 0, left = lanes_a_group; i < plan->vectors * 16; ++i, --left) {
        if (left == 0) g += g + 1 < w.groups, left = lanes_a_group;
        if (i % 16 == 0) first[i / 16] = g;
        group[i] = g - first[i / 16];
    }
    plan->first = first;
    plan->relative = group;
}

// --- the inputs ---------------------------------------------------------------------------------------------

// For each token and vector: codes [steps, P, 64], scale of each lane [16], and the sums of each plane over a lane's
// columns [P, 16] (times minus the midpoint as integers, or plain as floats).
INLINE uint8_t* codes_at(const RowsPlan& plan, int64_t token, int64_t vector) {
    return plan.codes + (token * plan.vectors + vector) * plan.vector_bytes;
}

// Codes of floats: 16 columns (or a lane) at a time under a power of two. Returns whether all inputs are finite.
TARGET bool fix_floats(const Inputs& in, const RowsPlan& plan, int64_t at, int64_t columns, int32_t* codes, float* scales) {
    constexpr int REACH = 13;  // the exponent of the largest code
    const int64_t step = plan.lane > 16 ? plan.lane : 16;
    __mmask16 bad = 0;
    for (int64_t k = 0; k < plan.vectors * plan.columns; k += step) {
        __m512 x[2], top = _mm512_setzero_ps();
        for (int i = 0; 16 * i < step; ++i) {
            x[i] = load_floats(in.x, at + k + 16 * i, in.type, first_lanes(columns - k - 16 * i));
            top = _mm512_max_ps(top, _mm512_abs_ps(x[i]));
            bad |= _mm512_fpclass_ps_mask(x[i], 0x99);  // infinities and NaN
        }
        float inverse;
        const float scale = fixed_point(_mm512_reduce_max_ps(top), REACH, &inverse);
        for (int i = 0; 16 * i < step; ++i)
            _mm512_storeu_si512(codes + k + 16 * i, _mm512_cvtps_epi32(_mm512_mul_ps(x[i], _mm512_set1_ps(inverse))));
        for (int64_t i = k / plan.lane; i < (k + step) / plan.lane; ++i) scales[i] = scale;
    }
    return bad == 0;
}

// Codes of int8 activations, minus their zero point.
TARGET void fix_codes(const Inputs& in, const RowsPlan& plan, int64_t at, int64_t columns, int32_t* codes, float* scales) {
    const int64_t lanes = plan.vectors * 16;
    for (int64_t start = 0, i = 0; start < columns; start += in.group) {
        const int64_t stop = start + in.group < columns ? start + in.group : columns;
        const float scale = quantize_group(in, at + start, stop - start, codes + start);
        for (; i * plan.lane < stop; ++i) scales[i] = scale;
    }
    for (int64_t k = columns; k < lanes * plan.lane; ++k) codes[k] = 0;
    for (int64_t i = (columns + plan.lane - 1) / plan.lane; i < lanes; ++i) scales[i] = 0;
}

// Bytes j, STEPS + j, 2 STEPS + j, ... of 64 STEPS bytes, for every j: those of place j go to to[j].
template <int STEPS>
INLINE void deinterleave(const __m512i* from, __m512i* to) {
    if constexpr (STEPS == 1) {
        to[0] = from[0];
    } else {
        alignas(64) uint8_t even[64];
        for (int i = 0; i < 64; ++i) even[i] = static_cast<uint8_t>(2 * i);
        const __m512i evens = _mm512_load_si512(even), odds = _mm512_or_si512(evens, _mm512_set1_epi8(1));
        for (int odd = 0; odd < 2; ++odd) {
            __m512i half[STEPS / 2], found[STEPS / 2];
            for (int i = 0; i < STEPS / 2; ++i)
                half[i] = _mm512_permutex2var_epi8(from[2 * i], odd ? odds : evens, from[2 * i + 1]);
            deinterleave<STEPS / 2>(half, found);
            for (int i = 0; i < STEPS / 2; ++i) to[2 * i + odd] = found[i];
        }
    }
}

// One token's inputs in P planes: the lowest eight bits, signed; then what is left, shifted down. Returns whether they are
// finite (int8 activations always pass: their scale says NaN).
template <int P, int STEPS>
TARGET bool fill_token(const Matrix& w, const Inputs& in, const RowsPlan& plan, int64_t token) {
    int32_t* codes = scratch<int32_t>(2, plan.vectors * plan.columns);
    float* scales = scratch<float>(3, plan.vectors * 16);
    bool finite = true;
    if (in.activation == PLAIN)
        finite = fix_floats(in, plan, token * w.columns, w.columns, codes, scales);
    else
        fix_codes(in, plan, token * w.columns, w.columns, codes, scales);
    const __m512i ones = _mm512_set1_epi8(1), minus = _mm512_set1_epi32(-middle_of(w));
    const __m512 unit = _mm512_set1_ps(w.table ? w.unit : 1.f);
    for (int64_t v = 0; v < plan.vectors; ++v) {
        uint8_t* to = codes_at(plan, token, v);
        float* lane_scales = reinterpret_cast<float*>(to + STEPS * P * 64);
        _mm512_storeu_ps(lane_scales, _mm512_mul_ps(_mm512_loadu_ps(scales + 16 * v), unit));
        alignas(64) int8_t planes[P][64 * STEPS];
        for (int64_t k = 0; k < 64 * STEPS; k += 16) {
            __m512i code = _mm512_loadu_si512(codes + v * plan.columns + k);
            for (int p = 0; p < P; ++p) {
                _mm_store_si128(reinterpret_cast<__m128i*>(planes[p] + k), _mm512_cvtepi32_epi8(code));
                code = _mm512_srai_epi32(_mm512_add_epi32(code, _mm512_set1_epi32(128)), 8);
            }
        }
        for (int p = 0; p < P; ++p) {
            __m512i sum = _mm512_setzero_si512(), from[STEPS], ordered[STEPS];
            for (int step = 0; step < STEPS; ++step) from[step] = _mm512_load_si512(planes[p] + 64 * step);
            deinterleave<STEPS>(from, ordered);
            for (int step = 0; step < STEPS; ++step) {
                _mm512_storeu_si512(to + (step * P + p) * 64, ordered[step]);
                sum = _mm512_dpbusd_epi32(sum, ones, ordered[step]);
            }
            _mm512_storeu_si512(lane_scales + 16 * (p + 1), plan.zeros ? _mm512_castps_si512(_mm512_cvtepi32_ps(sum))
                                                                       : _mm512_mullo_epi32(sum, minus));
        }
    }
    return finite;
}

// --- the products -------------------------------------------------------------------------------------------

// The codes of step j: all of them from the vector as it was read (DENSE), or from what `spread` made of it.
struct Unpacker {
    __m512i spread, shifts[2], mask;
};

INLINE Unpacker make_unpacker(int kind, int bits) {
    alignas(64) uint8_t spread[64], shifts[2][64];
    const int steps = kind == PAIRS ? 2 : 1, per_lane = bits * steps;  // bytes that 64-bit lanes take
    for (int i = 0; i < 64; ++i) {
        spread[i] = static_cast<uint8_t>(i % 8 < per_lane ? i / 8 * per_lane + i % 8 : 63);
        for (int j = 0; j < 2; ++j) shifts[j][i] = static_cast<uint8_t>((i % 8 * steps + j) * bits);
    }
    return {_mm512_load_si512(spread), {_mm512_load_si512(shifts[0]), _mm512_load_si512(shifts[1])},
            _mm512_set1_epi8(static_cast<char>((1 << bits) - 1))};
}

// The sums over the lanes of four vectors.
INLINE __m128 add_lanes(const __m512 v[TOGETHER]) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512 four = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

// TOGETHER rows against M inputs of P planes each: out [M, TOGETHER].
// ZEROS: a zero a group, taken off as a float (exact: products of it are below 2^24), else the whole midpoint, which
// the sums start from. W: planes of the book, or 0 where codes are integers.
template <int P, int M, int KIND, bool ZEROS, int W>
TARGET __attribute__((noinline)) void dot(const RowsPlan& plan, const uint8_t* const* rows, const float* const* scales,
                                          const float* const* zeros, int64_t first, float* out) {
    constexpr int R = TOGETHER, STEPS = steps_of(KIND), VECTOR = STEPS * P * 64 + 64 + P * 64;
    constexpr int BITS = KIND == DENSE1 ? 1 : KIND == DENSE2 ? 2 : 4;  // of the dense kinds
    constexpr bool CUTS = KIND == CUT || KIND == PAIRS;
    constexpr int FACTORS = W == 2 ? 2 : 1, SUMS = P + FACTORS - 1;  // planes of a weight; powers of 256
    const __m512i book[2] = {_mm512_load_si512(plan.book.bytes[0]), _mm512_load_si512(plan.book.bytes[1])};
    const int64_t bytes = CUTS ? plan.bytes : 64, vectors = plan.vectors;
    const Unpacker unpacker = make_unpacker(KIND, plan.bits);
    const uint8_t* inputs[M];
    for (int m = 0; m < M; ++m) inputs[m] = codes_at(plan, first + m, 0);
    __m512 total[R][M];
    for (auto& row : total)
        for (__m512& sum : row) sum = _mm512_setzero_ps();
    __mmask64 present = present_bytes(bytes, 0, static_cast<int>(bytes));
    for (int64_t v = 0; v < vectors; ++v) {
        if (v == vectors - 1) present = present_bytes(plan.row_bytes, v, static_cast<int>(bytes));
        __m512i packed[R], sum[R][M][SUMS];
        for (int r = 0; r < R; ++r) {
            _mm_prefetch(reinterpret_cast<const char*>(rows[r] + v * bytes + AHEAD), _MM_HINT_T0);
            packed[r] = _mm512_maskz_loadu_epi8(present, rows[r] + v * bytes);
            if (CUTS) packed[r] = _mm512_permutexvar_epi8(unpacker.spread, packed[r]);
        }
        for (int m = 0; m < M; ++m) {
            __m512i start[SUMS];
            for (__m512i& one : start) one = _mm512_setzero_si512();
            for (int p = 0; p < P && !ZEROS; ++p) {
                const __m512i plane = _mm512_loadu_si512(inputs[m] + v * VECTOR + (STEPS * P + 1 + p) * 64);
                for (int f = 0; f < FACTORS; ++f) start[p + f] = p + f ? _mm512_add_epi32(start[p + f], plane) : plane;
            }
            for (int r = 0; r < R; ++r)
                for (int s = 0; s < SUMS; ++s) sum[r][m][s] = start[s];
        }
#pragma GCC unroll 8
        for (int j = 0; j < STEPS; ++j) {
            __m512i codes[R][FACTORS];
            for (int r = 0; r < R; ++r) {
                __m512i found = packed[r];
                if (CUTS) found = _mm512_multishift_epi64_epi8(unpacker.shifts[j % 2], found);
                if (!CUTS && j) found = _mm512_srli_epi32(found, BITS * j);
                if (!W && KIND != BYTES) found = _mm512_and_si512(found, unpacker.mask);
                for (int f = 0; f < FACTORS; ++f) codes[r][f] = W ? _mm512_permutexvar_epi8(found, book[f]) : found;
            }
            for (int m = 0; m < M; ++m)
                for (int p = 0; p < P; ++p) {
                    const __m512i input = _mm512_loadu_si512(inputs[m] + v * VECTOR + (j * P + p) * 64);
                    for (int r = 0; r < R; ++r)
                        for (int f = 0; f < FACTORS; ++f)
                            sum[r][m][p + f] = _mm512_dpbusd_epi32(sum[r][m][p + f], codes[r][f], input);
                }
        }
        const __m512i lanes = _mm512_loadu_si512(plan.relative + 16 * v);
        const int64_t group = plan.first[v];
        __m512 scale[R], zero[R];
        for (int r = 0; r < R; ++r) {
            scale[r] = _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(scales[r] + group));
            if (ZEROS) zero[r] = _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(zeros[r] + group));
        }
        for (int m = 0; m < M; ++m) {
            const float* lane = reinterpret_cast<const float*>(inputs[m] + v * VECTOR + STEPS * P * 64);
            const __m512 input_scale = _mm512_loadu_ps(lane);
            for (int r = 0; r < R; ++r) {
                __m512 value;
                for (int s = SUMS - 1; s >= 0; --s) {
                    __m512 part = _mm512_cvtepi32_ps(sum[r][m][s]);
                    if (ZEROS) part = _mm512_fnmadd_ps(zero[r], _mm512_loadu_ps(lane + 16 * (s + 1)), part);
                    value = s == SUMS - 1 ? part : _mm512_fmadd_ps(value, _mm512_set1_ps(256.f), part);
                }
                total[r][m] = _mm512_fmadd_ps(_mm512_mul_ps(scale[r], input_scale), value, total[r][m]);
            }
        }
    }
    for (int m = 0; m < M; ++m) {
        __m512 sums[R];
        for (int r = 0; r < R; ++r) sums[r] = total[r][m];
        _mm_store_ps(out + m * R, add_lanes(sums));
    }
}

template <int P, int M, bool ZEROS>
RowsPlan::Dot choose_dot(Kind kind) {
    constexpr RowsPlan::Dot dots[] = {dot<P, M, CUT, ZEROS, 0>,    dot<P, M, PAIRS, ZEROS, 0>,
                                      dot<P, M, DENSE1, ZEROS, 0>, dot<P, M, DENSE2, ZEROS, 0>,
                                      dot<P, M, DENSE4, ZEROS, 0>, dot<P, M, BYTES, ZEROS, 0>};
    return dots[kind];
}

template <int P, int M>
RowsPlan::Dot choose_book_dot(Kind kind, int planes) {
    if (kind == DENSE4) return planes == 2 ? dot<P, M, DENSE4, false, 2> : dot<P, M, DENSE4, false, 1>;
    return planes == 2 ? dot<P, M, CUT, false, 2> : dot<P, M, CUT, false, 1>;
}

template <int P, int M>
void choose(Kind kind, RowsPlan* plan) {
    plan->dot = plan->book.planes ? choose_book_dot<P, M>(kind, plan->book.planes)
                : plan->zeros     ? choose_dot<P, M, true>(kind)
                                  : choose_dot<P, M, false>(kind);
    const int steps = plan->steps;
    plan->fill = steps == 1 ? fill_token<P, 1> : steps == 2 ? fill_token<P, 2> : steps == 4 ? fill_token<P, 4> : fill_token<P, 8>;
}

}  // namespace

bool fits_rows(const Matrix& w, const Inputs& in) { return plane_count(in) * in.count <= MOST_PLANES && fits_strips(w, in); }

RowsPlan plan_rows(const Matrix& w, const Inputs& in) {
    RowsPlan plan{};
    const Kind kind = choose_kind(w, in);
    const int planes = plane_count(in);
    plan.zeros = has_zeros(w);
    plan.book = make_book(w);
    plan.bits = w.bits;
    plan.steps = steps_of(kind);
    plan.lane = 4 * plan.steps;
    plan.columns = 16 * plan.lane;
    plan.bytes = plan.columns * w.bits / 8;
    plan.row_bytes = w.row_bytes;
    plan.vectors = (w.columns + plan.columns - 1) / plan.columns;
    place_lanes(w, &plan);
    plan.vector_bytes = 64 * ((plan.steps + 1) * planes + 1);
    plan.codes = scratch<uint8_t>(1, in.count * plan.vectors * plan.vector_bytes);
    planes == 2 ? choose<2, 1>(kind, &plan) : in.count == 2 ? choose<1, 2>(kind, &plan) : choose<1, 1>(kind, &plan);
    return plan;
}

TARGET void run_rows(const Matrix& w, const Inputs& in, const RowsPlan& plan) {
    constexpr int R = TOGETHER;
    const Cutter cutter = make_cutter(w.bits);
    const RowRange mine = share_rows(w.rows, 1);
    const int64_t step = (mine.last - mine.first + R - 1) / R;
    // At the end of a share some rows are done twice.
    const auto row_at = [&](int r, int64_t i) {
        const int64_t row = mine.first + r * step + i;
        return row < mine.last ? row : mine.last - 1;
    };
    // Scales are read one turn ahead: a load that straddles stores just made would wait for them.
    Groups groups[2][R];
    for (int i = 0; i < 2 * R; ++i) groups[i / R][i % R] = make_groups(w, i, 2 * R);
    for (int r = 0; r < R && step; ++r) read_groups(w, row_at(r, 0), cutter, groups[0][r].scale, groups[0][r].zero);
    alignas(16) float found[R * MOST_PLANES];
    for (int64_t i = 0; i < step; ++i) {
        const uint8_t* data[R];
        const float *scales[R], *zeros[R];
        for (int r = 0; r < R; ++r) {
            const Groups &now = groups[i & 1][r], &next = groups[~i & 1][r];
            data[r] = w.qdata + row_at(r, i) * w.row_bytes;
            scales[r] = now.scale;
            zeros[r] = now.zero;
            if (i + 1 < step) read_groups(w, row_at(r, i + 1), cutter, next.scale, next.zero);
        }
        plan.dot(plan, data, scales, zeros, 0, found);
        for (int r = 0; r < R; ++r) {
            const int64_t row = row_at(r, i);
            const float add = in.bias ? load_float(in.bias, row, in.bias_type) : 0.f;
            for (int64_t m = 0; m < in.count; ++m)
                store_float(in.out, m * w.rows + row, in.type, found[m * R + r] + add);
        }
    }
}

#endif
