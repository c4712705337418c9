// Few inputs, for AVX-512 with VBMI and VNNI: integer products on the neutral layout.
//
// A vector has 16 lanes of 32 bits, and each lane takes L neighbouring columns of a row: its next L codes. Widths that
// divide 32 lie in the lanes as they are on disk (L = 32 / bits): step j shifts and masks byte-wise, which leaves four
// codes a lane. Of other widths `vpermb` and `vpmultishiftqb` make one byte a code (L = 4, one step). `vpdpbusd` then
// adds four products a lane to sums of 32 bits.
//
// The inputs are integers too, written in P planes of 8 signed bits: x = scale * (p0 + 256 p1 + 65536 p2).
//   int8 activations are one plane (symmetric) or two (asymmetric: code - zero point has nine bits), exactly;
//   float16 and bfloat16 are two planes, float32 three, under a power of two for every 16 columns (32 where a lane
//   spans them): 15 and 23 bits below the largest of them. The difference to float32 products is below the rounding of
//   the result.
// So one kernel serves weight-only and dynamic activations; a lane's sum gets the lane's two scales in one FMA. Rows
// are independent, so any number of threads gives the same result.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <omp.h>

#include "decode.h"

namespace {

// How a row is cut: `lane` columns a lane, in `steps` of four; and which group each lane belongs to.
struct Cut {
    int lane, steps;
    int64_t columns, bytes, vectors;
    const int32_t *first;     // [vectors]: the group of a vector's first column
    const int32_t *relative;  // [vectors, 16]: each lane's group, counted from there
};

bool is_dense(const Matrix& w) {
    return w.bits <= 4 && w.bits != 3 && (w.groups == 1 || w.group % (32 / w.bits) == 0);
}

int make_lane(const Matrix& w) { return is_dense(w) ? 32 / w.bits : 4; }

TARGET Cut make_cut(const Matrix& w, int slot) {
    Cut cut;
    cut.lane = make_lane(w);
    cut.steps = cut.lane / 4;
    cut.columns = 16 * cut.lane;
    cut.bytes = cut.columns * w.bits / 8;
    cut.vectors = (w.columns + cut.columns - 1) / cut.columns;
    int32_t* group = scratch<int32_t>(slot, cut.vectors * 17);
    int32_t* first = group + cut.vectors * 16;
    const int64_t lanes_a_group = w.groups == 1 ? cut.vectors * 16 : w.group / cut.lane;
    int32_t g = 0;
    for (int64_t i = 0, left = lanes_a_group; i < cut.vectors * 16; ++i, --left) {
        if (left == 0) g += g + 1 < w.groups, left = lanes_a_group;
        if (i % 16 == 0) first[i / 16] = g;
        group[i] = g - first[i / 16];
    }
    cut.first = first;
    cut.relative = group;
    return cut;
}

// Inputs in the kernel's order, for each token [vectors] of: codes [steps, P, 64], scale of each lane [16], and the sums
// of each plane over a lane's columns [P, 16] (times minus the midpoint as integers, or plain as floats).
struct Planes {
    int count;  // P
    int64_t token_bytes, vector_bytes;
    uint8_t* data;
    uint8_t* at(int64_t token, int64_t vector) const { return data + token * token_bytes + vector * vector_bytes; }
};

int plane_count(const Inputs& in) {
    if (in.activation != PLAIN) return in.activation == SYMMETRIC ? 1 : 2;
    return in.type == FLOAT_F32 ? 3 : 2;
}

// Codes of floats: 16 columns at a time under a power of two. `reach`: the exponent of the largest code. Returns whether
// all inputs are finite.
TARGET bool fix_floats(const Inputs& in, int64_t token, int64_t columns, int64_t padded, int lane, int reach,
                       int32_t* codes, float* scales) {
    const int64_t step = lane > 16 ? lane : 16;
    __mmask16 bad = 0;
    for (int64_t k = 0; k < padded; k += step) {
        __m512 x[2], top = _mm512_setzero_ps();
        for (int i = 0; 16 * i < step; ++i) {
            x[i] = load_floats(in.x, token * columns + k + 16 * i, in.type, first_lanes(columns - k - 16 * i));
            top = _mm512_max_ps(top, _mm512_abs_ps(x[i]));
            bad |= _mm512_fpclass_ps_mask(x[i], 0x99);  // infinities and NaN
        }
        const float largest = _mm512_reduce_max_ps(top);
        int exponent = static_cast<int>(bits_of(largest) >> 23) - 127 - reach;
        exponent = exponent < -126 ? -126 : exponent;
        // Zeros get the scale 0: products with the least exponent would be subnormal, which takes a detour.
        const float scale = largest > 0 ? float_of(static_cast<uint32_t>(exponent + 127) << 23) : 0.f;
        const __m512 inverse = _mm512_set1_ps(float_of(static_cast<uint32_t>(127 - exponent) << 23));
        for (int i = 0; 16 * i < step; ++i)
            _mm512_storeu_si512(codes + k + 16 * i, _mm512_cvtps_epi32(_mm512_mul_ps(x[i], inverse)));
        for (int64_t i = k / lane; i < (k + step) / lane; ++i) scales[i] = scale;
    }
    return bad == 0;
}

// Codes of int8 activations, minus their zero point.
TARGET void fix_codes(const Inputs& in, int64_t token, int64_t columns, int64_t padded, int lane, int32_t* codes,
                      float* scales) {
    for (int64_t start = 0, i = 0; start < columns; start += in.group) {
        const int64_t stop = start + in.group < columns ? start + in.group : columns;
        const float scale = quantize_group(in, token * columns + start, stop - start, codes + start);
        for (; i * lane < stop; ++i) scales[i] = scale;
    }
    for (int64_t k = columns; k < padded; ++k) codes[k] = 0;
    for (int64_t i = (columns + lane - 1) / lane; i < padded / lane; ++i) scales[i] = 0;
}

// One plane of 64 codes: the lowest eight bits, signed; what is left is shifted down.
INLINE void split_planes(__m512i code, int planes, int8_t* to, int64_t stride) {
    for (int p = 0; p < planes; ++p) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + p * stride), _mm512_cvtepi32_epi8(code));
        if (p + 1 < planes) code = _mm512_srai_epi32(_mm512_add_epi32(code, _mm512_set1_epi32(128)), 8);
    }
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

// One token's inputs. Returns whether they are finite (int8 activations always pass: their scale says NaN).
template <int STEPS>
TARGET bool fill_token(const Matrix& w, const Inputs& in, const Cut& cut, const Planes& planes, int64_t token,
                       bool whole_midpoint) {
    const int64_t padded = cut.vectors * cut.columns;
    const int P = planes.count;
    int32_t* codes = scratch<int32_t>(2, padded);
    float* scales = scratch<float>(3, cut.vectors * 16);
    int8_t* natural = scratch<int8_t>(4, P * cut.columns);
    bool finite = true;
    if (in.activation == PLAIN)
        finite = fix_floats(in, token, w.columns, padded, cut.lane, P == 2 ? 13 : 21, codes, scales);
    else
        fix_codes(in, token, w.columns, padded, cut.lane, codes, scales);
    const __m512i ones = _mm512_set1_epi8(1), minus = _mm512_set1_epi32(-static_cast<int32_t>(w.midpoint));
    for (int64_t v = 0; v < cut.vectors; ++v) {
        for (int64_t k = 0; k < cut.columns; k += 16)
            split_planes(_mm512_loadu_si512(codes + v * cut.columns + k), P, natural + k, cut.columns);
        int8_t* to = reinterpret_cast<int8_t*>(planes.at(token, v));
        float* lane_scales = reinterpret_cast<float*>(to + STEPS * P * 64);
        _mm512_storeu_ps(lane_scales, _mm512_loadu_ps(scales + 16 * v));
        for (int p = 0; p < P; ++p) {
            __m512i sum = _mm512_setzero_si512(), from[STEPS], ordered[STEPS];
            for (int step = 0; step < STEPS; ++step) from[step] = _mm512_loadu_si512(natural + p * cut.columns + 64 * step);
            deinterleave<STEPS>(from, ordered);
            for (int step = 0; step < STEPS; ++step) {
                _mm512_storeu_si512(to + (step * P + p) * 64, ordered[step]);
                sum = _mm512_dpbusd_epi32(sum, ones, ordered[step]);
            }
            const __m512i kept = whole_midpoint ? _mm512_mullo_epi32(sum, minus)
                                                : _mm512_castps_si512(_mm512_cvtepi32_ps(sum));
            _mm512_storeu_si512(lane_scales + 16 * (p + 1), kept);
        }
    }
    return finite;
}

// R rows against M inputs: they share each load of the inputs, and as they lie far apart, memory serves them side by
// side (one stream a thread reaches four fifths of what several do).
constexpr int MOST_ROWS = 4, MOST = 4, AHEAD = 4096;

struct Rows {
    const uint8_t* data[MOST_ROWS];
    const float *scale[MOST_ROWS], *zero[MOST_ROWS];
};

enum Kind { DENSE1 = 1, DENSE2 = 2, DENSE4 = 4, BYTES = 8, CUT = 0 };

// ZEROS: a zero a group, taken off as a float (exact: products of it are below 2^24), else the whole midpoint, which
// the sums start from.
template <int P, int M, int R, int KIND, bool ZEROS>
TARGET __attribute__((noinline)) void dot(const Rows& rows, int64_t row_bytes, const Cut& cut, const Cutter& cutter,
                                          const Planes& planes, int64_t from, float out[MOST_ROWS][MOST]) {
    constexpr int STEPS = KIND == DENSE1 ? 8 : KIND == DENSE2 ? 4 : KIND == DENSE4 ? 2 : 1;
    constexpr int VECTOR = STEPS * P * 64 + 64 + P * 64;
    const int bytes = KIND == CUT ? cutter.chunk_bytes : 64;
    const Cutter local = cutter;
    const __m512i mask = _mm512_set1_epi8((1 << (KIND ? KIND : 1)) - 1);
    const uint8_t* inputs[M];
    for (int m = 0; m < M; ++m) inputs[m] = planes.at(from + m, 0);
    const int64_t vectors = cut.vectors;
    __m512 total[R][M];
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_ps();
    __mmask64 present = present_bytes(bytes, 0, bytes);
    for (int64_t v = 0; v < vectors; ++v) {
        if (v == vectors - 1) present = present_bytes(row_bytes, v, bytes);
        __m512i packed[R], sum[R][M][P];
        for (int r = 0; r < R; ++r) {
            _mm_prefetch(reinterpret_cast<const char*>(rows.data[r] + v * bytes + AHEAD), _MM_HINT_T0);
            packed[r] = _mm512_maskz_loadu_epi8(present, rows.data[r] + v * bytes);
            if (KIND == CUT) packed[r] = cut_codes(packed[r], local);
        }
        for (int m = 0; m < M; ++m)
            for (int p = 0; p < P; ++p) {
                const __m512i start = _mm512_loadu_si512(inputs[m] + v * VECTOR + (STEPS * P + 1 + p) * 64);
                for (int r = 0; r < R; ++r) sum[r][m][p] = ZEROS ? _mm512_setzero_si512() : start;
            }
#pragma GCC unroll 8
        for (int j = 0; j < STEPS; ++j) {
            __m512i codes[R];
            for (int r = 0; r < R; ++r) {
                codes[r] = packed[r];
                if (STEPS > 1 && j) codes[r] = _mm512_srli_epi32(codes[r], KIND * j);
                if (STEPS > 1) codes[r] = _mm512_and_si512(codes[r], mask);
            }
            for (int m = 0; m < M; ++m)
                for (int p = 0; p < P; ++p) {
                    const __m512i input = _mm512_loadu_si512(inputs[m] + v * VECTOR + (j * P + p) * 64);
                    for (int r = 0; r < R; ++r) sum[r][m][p] = _mm512_dpbusd_epi32(sum[r][m][p], codes[r], input);
                }
        }
        const __m512i lanes = _mm512_loadu_si512(cut.relative + 16 * v);
        const int64_t first = cut.first[v];
        __m512 scale[R], zero[R];
        for (int r = 0; r < R; ++r) {
            scale[r] = _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(rows.scale[r] + first));
            if (ZEROS) zero[r] = _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(rows.zero[r] + first));
        }
        for (int m = 0; m < M; ++m) {
            const float* lane = reinterpret_cast<const float*>(inputs[m] + v * VECTOR + STEPS * P * 64);
            const __m512 input_scale = _mm512_loadu_ps(lane);
            for (int r = 0; r < R; ++r) {
                __m512 value;
                for (int p = P - 1; p >= 0; --p) {
                    __m512 part = _mm512_cvtepi32_ps(sum[r][m][p]);
                    if (ZEROS) part = _mm512_fnmadd_ps(zero[r], _mm512_loadu_ps(lane + 16 * (p + 1)), part);
                    value = p == P - 1 ? part : _mm512_fmadd_ps(value, _mm512_set1_ps(256.f), part);
                }
                total[r][m] = _mm512_fmadd_ps(_mm512_mul_ps(scale[r], input_scale), value, total[r][m]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) out[r][m] = _mm512_reduce_add_ps(total[r][m]);
}

using Dot = void (*)(const Rows&, int64_t, const Cut&, const Cutter&, const Planes&, int64_t, float[MOST_ROWS][MOST]);

// As many rows as leave registers for their sums.
constexpr int row_count(int planes, int64_t inputs) { return planes * inputs <= 2 ? 4 : 2; }

template <int P, int M, int R, bool ZEROS>
Dot choose_dot(int bits, bool dense) {
    if (!dense) return bits == 8 ? dot<P, M, R, BYTES, ZEROS> : dot<P, M, R, CUT, ZEROS>;
    return bits == 1   ? dot<P, M, R, DENSE1, ZEROS>
           : bits == 2 ? dot<P, M, R, DENSE2, ZEROS>
                       : dot<P, M, R, DENSE4, ZEROS>;
}

template <int P, int M, int R>
Dot choose_dot(int bits, bool dense, bool zeros) {
    return zeros ? choose_dot<P, M, R, true>(bits, dense) : choose_dot<P, M, R, false>(bits, dense);
}

template <int M, int R>
Dot choose_dot(int planes, int bits, bool dense, bool zeros) {
    return planes == 1   ? choose_dot<1, M, R>(bits, dense, zeros)
           : planes == 2 ? choose_dot<2, M, R>(bits, dense, zeros)
                         : choose_dot<3, M, R>(bits, dense, zeros);
}

// The part of every product that is alike: a thread's rows, R of them at a time, the inputs `most` at a time.
template <typename Product>
INLINE void for_rows(const Matrix& w, const Inputs& in, int R, int64_t most, const Product& product) {
    const Cutter cutter = make_cutter(w.bits);
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t begin = w.rows * me / threads, end = w.rows * (me + 1) / threads, step = (end - begin + R - 1) / R;
    const auto row_at = [&](int r, int64_t i) { return begin + r * step + i < end ? begin + r * step + i : end - 1; };
    // Scales are read one turn ahead: a load that straddles stores just made would wait for them.
    Groups groups[2][MOST_ROWS];
    for (int i = 0; i < 2 * R; ++i) groups[i / R][i % R] = make_groups(w, i, 2 * R);
    for (int r = 0; r < R && step; ++r) read_groups(w, row_at(r, 0), cutter, groups[0][r].scale, groups[0][r].zero);
    float found[MOST_ROWS][MOST];
    Rows rows;
    for (int64_t i = 0; i < step; ++i) {
        int64_t at[MOST_ROWS];  // at the end of a share some rows are done twice
        for (int r = 0; r < R; ++r) {
            const Groups &now = groups[i & 1][r], &next = groups[~i & 1][r];
            at[r] = row_at(r, i);
            rows.data[r] = w.qdata + at[r] * w.row_bytes;
            rows.scale[r] = now.scale;
            rows.zero[r] = now.zero;
            if (i + 1 < step) read_groups(w, row_at(r, i + 1), cutter, next.scale, next.zero);
        }
        for (int64_t k = 0; k < in.count; k += most) {
            const int64_t count = in.count - k < most ? in.count - k : most;
            product(rows, k, count, found);
            for (int r = 0; r < R; ++r) {
                const float add = in.bias ? load_float(in.bias, at[r], in.bias_type) : 0.f;
                for (int m = 0; m < count; ++m) store_float(in.out, (k + m) * w.rows + at[r], in.type, found[r][m] + add);
            }
        }
    }
}

// What a product of integers needs beside the weight: how rows are cut, where the inputs' planes lie, which loops run.
struct IntegerPlan {
    bool zeros, dense;
    Cut cut;
    Planes planes;
    int most, R;
    Dot dots[MOST + 1];
    bool (*fill)(const Matrix&, const Inputs&, const Cut&, const Planes&, int64_t, bool);
};

TARGET IntegerPlan make_plan(const Matrix& w, const Inputs& in) {
    IntegerPlan plan;
    plan.zeros = w.zero_point || w.midpoint != static_cast<int32_t>(w.midpoint);
    plan.dense = is_dense(w);
    plan.cut = make_cut(w, 0);
    const int P = plan.planes.count = plane_count(in), steps = plan.cut.steps, bits = w.bits;
    plan.planes.vector_bytes = 64 * ((steps + 1) * P + 1);
    plan.planes.token_bytes = plan.planes.vector_bytes * plan.cut.vectors;
    plan.planes.data = scratch<uint8_t>(1, in.count * plan.planes.token_bytes);
    plan.most = P == 3 ? 2 : MOST;
    plan.R = row_count(P, in.count);
    const bool dense = plan.dense, zeros = plan.zeros;
    plan.dots[1] = plan.R == 4 ? choose_dot<1, 4>(P, bits, dense, zeros) : choose_dot<1, 2>(P, bits, dense, zeros);
    plan.dots[2] = plan.R == 4 ? choose_dot<2, 4>(P, bits, dense, zeros) : choose_dot<2, 2>(P, bits, dense, zeros);
    plan.dots[3] = choose_dot<3, 2>(P, bits, dense, zeros);
    plan.dots[4] = choose_dot<4, 2>(P, bits, dense, zeros);
    plan.fill = steps == 1 ? fill_token<1> : steps == 2 ? fill_token<2> : steps == 4 ? fill_token<4> : fill_token<8>;
    return plan;
}

// A thread's share of the rows, once the inputs are filled in.
TARGET void run_plan(const Matrix& w, const Inputs& in, const IntegerPlan& plan) {
    const Cutter cutter = make_cutter(w.bits);
    for_rows(w, in, plan.R, plan.most, [&](const Rows& rows, int64_t i, int64_t count, float found[MOST_ROWS][MOST]) {
        plan.dots[count](rows, w.row_bytes, plan.cut, cutter, plan.planes, i, found);
    });
}

TARGET void integer_linear(const Matrix& w, const Inputs& in) {
    const IntegerPlan plan = make_plan(w, in);
    bool finite = true;
#pragma omp parallel reduction(&& : finite)
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < in.count; ++token)
            finite = plan.fill(w, in, plan.cut, plan.planes, token, !plan.zeros) && finite;
        run_plan(w, in, plan);
    }
    // Infinities and NaN have no fixed point: the plain kernel takes such inputs, at its own pace.
    if (!finite) AVX512.linear(w, in);
}

// --- float8 weights -----------------------------------------------------------------------------------------

// Inputs as float32 in the order in which `look_up_bytes` leaves the numbers: [vectors, 4, 16].
TARGET void order_floats(const Inputs& in, int64_t token, int64_t columns, int64_t vectors, float* to) {
    for (int64_t v = 0; v < vectors; ++v)
        for (int part = 0; part < 4; ++part)
            for (int i = 0; i < 16; ++i) {
                const int64_t k = v * CHUNK + 16 * (i / 4) + 2 * (i % 4) + (part & 1) + 8 * (part >> 1);
                to[v * CHUNK + 16 * part + i] = k < columns ? load_float(in.x, token * columns + k, in.type) : 0.f;
            }
}

template <int M, int R>
TARGET __attribute__((noinline)) void dot_bytes(const Matrix& w, const Rows& rows, const ByteTable& bytes,
                                                const Cut& cut, const float* x, float out[MOST_ROWS][MOST]) {
    const ByteTable table = bytes;
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const int64_t vectors = cut.vectors, step = vectors * CHUNK;
    __m512 total[R][M];
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_ps();
    for (int64_t v = 0; v < vectors; ++v) {
        const __mmask64 present = present_bytes(w.row_bytes, v, CHUNK);
        const __m512i lanes = _mm512_loadu_si512(cut.relative + 16 * v);
        __m512 number[R][4], scale[R];
        for (int r = 0; r < R; ++r) {
            _mm_prefetch(reinterpret_cast<const char*>(rows.data[r] + v * CHUNK + AHEAD), _MM_HINT_T0);
            __m512i first, second;
            look_up_bytes(_mm512_maskz_loadu_epi8(present, rows.data[r] + v * CHUNK), table, &first, &second);
            number[r][0] = _mm512_castsi512_ps(_mm512_slli_epi32(first, 16));
            number[r][1] = _mm512_castsi512_ps(_mm512_and_si512(first, upper));
            number[r][2] = _mm512_castsi512_ps(_mm512_slli_epi32(second, 16));
            number[r][3] = _mm512_castsi512_ps(_mm512_and_si512(second, upper));
            scale[r] = _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(rows.scale[r] + cut.first[v]));
        }
        for (int m = 0; m < M; ++m)
            for (int r = 0; r < R; ++r) {
                __m512 sum = _mm512_mul_ps(number[r][0], _mm512_loadu_ps(x + m * step + v * CHUNK));
                for (int part = 1; part < 4; ++part)
                    sum = _mm512_fmadd_ps(number[r][part], _mm512_loadu_ps(x + m * step + v * CHUNK + 16 * part), sum);
                total[r][m] = _mm512_fmadd_ps(scale[r], sum, total[r][m]);
            }
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) out[r][m] = _mm512_reduce_add_ps(total[r][m]);
}

TARGET void byte_linear(const Matrix& w, const Inputs& in, const ByteTable& table) {
    using DotBytes = void (*)(const Matrix&, const Rows&, const ByteTable&, const Cut&, const float*, float[MOST_ROWS][MOST]);
    const DotBytes dots[] = {nullptr, in.count == 1 ? dot_bytes<1, 4> : dot_bytes<1, 2>, dot_bytes<2, 2>, dot_bytes<3, 2>, dot_bytes<4, 2>};
    const Cut cut = make_cut(w, 0);
    const int64_t step = cut.vectors * CHUNK;
    float* x = scratch<float>(1, in.count * step);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < in.count; ++token)
            order_floats(in, token, w.columns, cut.vectors, x + token * step);
        for_rows(w, in, in.count == 1 ? 4 : 2, MOST, [&](const Rows& rows, int64_t i, int64_t count, float found[MOST_ROWS][MOST]) {
            dots[count](w, rows, table, cut, x + i * step, found);
        });
    }
}

TARGET void linear(const Matrix& w, const Inputs& in) {
    ByteTable table;
    const bool lanes = w.groups == 1 || w.group % 4 == 0;
    if (!w.table && lanes && (in.activation == PLAIN || in.group >= w.columns || in.group % make_lane(w) == 0))
        integer_linear(w, in);
    else if (w.table && w.bits == 8 && (w.groups == 1 || w.group % 16 == 0) && make_byte_table(w.table, &table))
        byte_linear(w, in, table);
    else
        AVX512.linear(w, in);
}

// --- rows ---------------------------------------------------------------------------------------------------

TARGET void rows(const Matrix& w, const int64_t* indices, int64_t count, int32_t type, void* out) {
#pragma omp parallel if (count * w.columns > 4096)
    {
        const Groups groups = make_groups(w);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = indices ? indices[i] : i;
            const Decoder decoder(w, groups, row);
            read_groups(w, row, decoder.cutter, groups.scale, groups.zero);
            for (int64_t c = 0; c * CHUNK < w.columns; ++c) {
                const __m512i codes = decoder.codes(c);
                for (int q = 0; q < 4 && c * CHUNK + 16 * q < w.columns; ++q)
                    store_floats(out, i * w.columns + c * CHUNK + 16 * q, type,
                                 first_lanes(w.columns - c * CHUNK - 16 * q), decoder.floats(codes, c, q));
            }
        }
    }
}

bool present() {
    return AVX512.present() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace

// Inside a parallel region: every thread prepares the inputs for itself, which for few of them is cheaper than waiting.
// The outputs of a token that has an infinity or NaN are NaN.
TARGET void linear_in_region(const Matrix& w, const Inputs& in) {
    const IntegerPlan plan = make_plan(w, in);
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    bool* finite = scratch<bool>(7, in.count);
    for (int64_t token = 0; token < in.count; ++token)
        finite[token] = plan.fill(w, in, plan.cut, plan.planes, token, !plan.zeros);
    run_plan(w, in, plan);
    for (int64_t token = 0; token < in.count; ++token)
        for (int64_t row = w.rows * me / threads; !finite[token] && row < w.rows * (me + 1) / threads; ++row)
            store_float(in.out, token * w.rows + row, in.type, std::numeric_limits<float>::quiet_NaN());
}

const Kernels VNNI = {"avx512_vnni", present, linear, rows};
#endif
