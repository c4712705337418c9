// Integer products of few inputs, for AVX-512 with VBMI and VNNI, on the neutral layout.
//
// A strip is 16 rows, one a 32-bit lane of a vector. Rows are read 64 bytes at a time (or as the bytes of 64 codes) and
// turned over, 16 x 16 lanes: then a vector holds the same few columns of all 16 rows. Widths that divide 32 stay packed
// (`lane` = 32 / bits columns): step j shifts and masks byte-wise, which leaves four codes a lane; other widths were cut to
// bytes before (`lane` = 4, one step). `vpdpbusd` then adds four products a lane, of 16 rows with four inputs that a
// broadcast brings. So a sum's lanes are rows: scaling takes one instruction for 16 of them, and nothing is added across.
//
// The inputs are integers too, written in P planes of 8 signed bits: x = scale * (p0 + 256 p1 + 65536 p2).
//   int8 activations are one plane (symmetric) or two (asymmetric: code - zero point has nine bits), exactly;
//   float16 and bfloat16 are two planes, float32 three, under a power of two for each piece: 15 and 23 bits below the
//   largest of it. The difference to float32 products is below the rounding of the result.
// A piece is up to 32 columns that share their scales; its integer sums are exact. So one kernel serves weight-only and
// dynamic activations. Rows are independent of each other, and so are inputs: any number of threads, and any company of
// other inputs, gives the same result.
#include "strips.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include "tiles.h"

namespace {

constexpr int STRIP = 16, STRIPS = 1, UNIT = STRIP * STRIPS;  // rows of a strip, strips that are done together, their rows
constexpr int64_t AHEAD = 512;                    // bytes of each row that are fetched ahead
constexpr int RING = 32;                          // turned vectors of a strip that are kept

using half_t = uint16_t __attribute__((may_alias));

// 32 floats of a piece as codes under a power of two. `reach`: the exponent of the largest code. Returns the scale; sets
// `bad` where an input is not finite.
INLINE float fix_floats(const Inputs& in, int64_t at, int64_t count, int reach, __m512i code[2], __mmask16* bad) {
    __m512 x[2], top = _mm512_setzero_ps();
    for (int i = 0; i < 2; ++i) {
        x[i] = load_floats(in.x, at + 16 * i, in.type, first_lanes(count - 16 * i));
        top = _mm512_max_ps(top, _mm512_abs_ps(x[i]));
        *bad |= _mm512_fpclass_ps_mask(x[i], 0x99);  // infinities and NaN
    }
    float inverse;
    const float scale = fixed_point(_mm512_reduce_max_ps(top), reach, &inverse);
    for (int i = 0; i < 2; ++i) code[i] = _mm512_cvtps_epi32(_mm512_mul_ps(x[i], _mm512_set1_ps(inverse)));
    return scale;
}

// Splits 32 codes into planes: the lowest eight bits, signed; what is left is shifted down.
template <int P>
INLINE void write_codes(const Matrix& w, __m512i code[2], float scale, __m256i order, bool whole_midpoint, Codes<P>* to) {
    to->scale = w.table ? scale * w.unit : scale;
    for (int p = 0; p < P; ++p) {
        const __m256i plane = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm512_cvtepi32_epi8(code[0])),
                                                      _mm512_cvtepi32_epi8(code[1]), 1);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to->codes[p]), _mm256_permutexvar_epi8(order, plane));
        const __m512i low[2] = {_mm512_cvtepi8_epi32(_mm256_castsi256_si128(plane)),
                                _mm512_cvtepi8_epi32(_mm256_extracti128_si256(plane, 1))};
        const int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(low[0], low[1]));
        to->sums[p] = whole_midpoint ? -middle_of(w) * sum
                                     : static_cast<int32_t>(bits_of(static_cast<float>(sum)));
        for (int i = 0; i < 2; ++i) code[i] = _mm512_srai_epi32(_mm512_sub_epi32(code[i], low[i]), 8);
    }
}

// One token's inputs. Returns whether they are finite (int8 activations always pass: their scale says NaN).
template <int P>
TARGET bool fill_token(const Matrix& w, const Inputs& in, const StripPlan& plan, int64_t token) {
    const Piece* pieces = plan.pieces;
    Codes<P>* to = static_cast<Codes<P>*>(plan.codes) + token;
    alignas(32) uint8_t places[PIECE];
    order_columns(plan.lane, places);
    const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(places));
    const int64_t at = token * w.columns;
    __mmask16 bad = 0;
    __m512i code[2];
    if (in.activation == PLAIN) {
        for (int64_t i = 0; i < plan.count; ++i) {
            const float scale = fix_floats(in, at + pieces[i].start, pieces[i].count, P == 2 ? 13 : 21, code, &bad);
            write_codes<P>(w, code, scale, order, !plan.zeros, to + i * in.count);
        }
        return bad == 0;
    }
    int32_t* codes = scratch<int32_t>(2, w.columns + 16);
    float scale = 0;
    for (int64_t i = 0, end = 0; i < plan.count; ++i) {
        const int64_t start = pieces[i].start, count = pieces[i].count;
        if (start == end) {
            end = start + in.group < w.columns ? start + in.group : w.columns;
            scale = quantize_group(in, at + start, end - start, codes + start);
        }
        for (int q = 0; q < 2; ++q)
            code[q] = _mm512_maskz_loadu_epi32(first_lanes(count - 16 * q), codes + start + 16 * q);
        write_codes<P>(w, code, scale, order, !plan.zeros, to + i * in.count);
    }
    return true;
}

// Scales and zeros of 16 rows.
TARGET void turn_groups(const Matrix& w, const int64_t* at, const Cutter& cutter, float* scale, float* zero) {
    int64_t rows[STRIP];
    for (int i = 0; i < STRIP; ++i) rows[i] = at[i] / w.shared;
    __m512i v[STRIP];
    for (int64_t g = 0; g < w.groups; g += 16) {
        const __mmask16 present = first_lanes(w.groups - g);
        for (int i = 0; i < STRIP; ++i)
            v[i] = _mm512_castps_si512(load_scales(w, rows[i], g, present));
        transpose(v);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(scale + 16 * (g + i), v[i]);
        if (!zero) continue;
        for (int i = 0; i < STRIP; ++i) {
            const uint8_t* packed = w.zero_point ? w.zero_point + rows[i] * zero_bytes(w) : nullptr;
            const __m512 found = packed ? _mm512_cvtepi32_ps(quarter(codes_of(packed, zero_bytes(w), g / CHUNK, cutter),
                                                                     static_cast<int>(g % CHUNK / 16)))
                                        : _mm512_set1_ps(w.midpoint);
            v[i] = _mm512_castps_si512(found);
        }
        transpose(v);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(zero + 16 * (g + i), v[i]);
    }
}

void fetch_groups(const Matrix& w, const int64_t* at) {
    const int64_t bytes = w.groups * scale_bytes(w);
    for (int i = 0; i < STRIP; ++i)
        for (int64_t k = 0; k < bytes; k += 64)
            __builtin_prefetch(static_cast<const uint8_t*>(w.scale) + at[i] / w.shared * bytes + k);
}

enum Kind { DENSE1 = 1, DENSE2 = 2, DENSE4 = 4, BYTES = 8, CUT = 0 };

// Sums of tokens `first` to `first` + count - 1: [count, STRIPS, 16] floats.
// ZEROS: a zero a group, taken off as a float (exact: products of it are below 2^24), else the whole midpoint, which
// the sums start from. W: planes of the book (see rows.cpp), or 0 where codes are integers.
// Q: fours of columns of the longest piece.
template <int P, int KIND, bool ZEROS, int W, int Q>
TARGET __attribute__((noinline)) void dot(const Matrix& w, const StripPlan& plan, const StripUnit& unit, int64_t first,
                                          int64_t tokens, int64_t count, float* totals) {
    constexpr int STEPS = KIND == DENSE1 ? 8 : KIND == DENSE2 ? 4 : KIND == DENSE4 ? 2 : 1;
    constexpr int LANES = Q / STEPS;  // a piece
    constexpr int FACTORS = W == 2 ? 2 : 1;
    const __m512i book[2] = {_mm512_load_si512(plan.book.bytes[0]), _mm512_load_si512(plan.book.bytes[1])};
    const Piece* pieces = plan.pieces;
    const Codes<P>* inputs = static_cast<const Codes<P>*>(plan.codes) + first;
    const Cutter cutter = make_cutter(w.bits);
    const int bytes = KIND == CUT ? cutter.chunk_bytes : 64;
    const __m512i mask = _mm512_set1_epi8((1 << (KIND ? KIND : 1)) - 1);
    // Turned vectors; the first ones are kept behind the last, too, so that a piece never meets the end.
    alignas(64) __m512i ring[STRIPS][RING + QUADS];
    for (int64_t m = 0; m < count * STRIPS; ++m) _mm512_store_ps(totals + STRIP * m, _mm512_setzero_ps());
    int64_t filled = 0;  // lanes
    for (int64_t i = 0; i < plan.count; ++i) {
        const int64_t lane = pieces[i].start / (4 * STEPS);
        for (; filled < lane + LANES; filled += 16) {
            const int64_t block = filled / 16 * bytes;
            const __mmask64 present = present_bytes(w.row_bytes, filled / 16, bytes);
            for (int s = 0; s < STRIPS; ++s) {
                __m512i v[16];
                for (int r = 0; r < STRIP; ++r) {
                    const uint8_t* data = unit.data[STRIP * s + r] + block;
                    v[r] = _mm512_maskz_loadu_epi8(present, data);
                    if (KIND == CUT) v[r] = cut_codes(v[r], cutter);
                }
                transpose(v);
                __m512i* to = ring[s] + filled % RING;
                for (int r = 0; r < 16; ++r) to[r] = v[r];
                if (filled % RING == 0)
                    for (int r = 0; r < QUADS; ++r) ring[s][RING + r] = v[r];
            }
        }
        // Each piece fetches for some of the rows: all at once they would hold up everything else.
        constexpr int PIECES = 16 / LANES, ROWS = UNIT / PIECES;
        for (int r = 0; r < ROWS; ++r)
            _mm_prefetch(reinterpret_cast<const char*>(unit.data[i % PIECES * ROWS + r] + lane / 16 * bytes + AHEAD), _MM_HINT_T0);
        __m512i code[STRIPS][FACTORS][Q];
        __m512 scale[STRIPS], zero[STRIPS];
        for (int s = 0; s < STRIPS; ++s) {
            scale[s] = _mm512_load_ps(unit.scale[s] + STRIP * pieces[i].group);
            if (ZEROS) zero[s] = _mm512_load_ps(unit.zero[s] + STRIP * pieces[i].group);
            for (int l = 0; l < LANES; ++l) {
                const __m512i packed = ring[s][lane % RING + l];
#pragma GCC unroll 8
                for (int j = 0; j < STEPS; ++j) {
                    __m512i found = STEPS > 1 && j ? _mm512_srli_epi32(packed, KIND * j) : packed;
                    if (!W && STEPS > 1) found = _mm512_and_si512(found, mask);
                    for (int f = 0; f < FACTORS; ++f)
                        code[s][f][l * STEPS + j] = W ? _mm512_permutexvar_epi8(found, book[f]) : found;
                }
            }
        }
        const Codes<P>* in = inputs + i * tokens;
        for (int64_t m = 0; m < count; ++m, ++in) {
            __m512 value[STRIPS];
#pragma GCC unroll 3
            for (int p = P - 1; p >= 0; --p) {
                const __m512i start = ZEROS ? _mm512_setzero_si512() : _mm512_set1_epi32(in->sums[p]);
                __m512i sum[STRIPS][FACTORS];
                for (auto& strip : sum)
                    for (__m512i& one : strip) one = start;
#pragma GCC unroll 8
                for (int q = 0; q < Q; ++q) {
                    int32_t four;
                    std::memcpy(&four, in->codes[p] + 4 * q, 4);
                    const __m512i input = _mm512_set1_epi32(four);
                    for (int s = 0; s < STRIPS; ++s)
                        for (int f = 0; f < FACTORS; ++f)
                            sum[s][f] = _mm512_dpbusd_epi32(sum[s][f], code[s][f][q], input);
                }
                for (int s = 0; s < STRIPS; ++s) {
                    __m512 part = _mm512_cvtepi32_ps(sum[s][0]);
                    if (W == 2) part = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[s][1]), _mm512_set1_ps(256.f), part);
                    if (ZEROS) part = _mm512_fnmadd_ps(zero[s], _mm512_set1_ps(float_of(in->sums[p])), part);
                    value[s] = p == P - 1 ? part : _mm512_fmadd_ps(value[s], _mm512_set1_ps(256.f), part);
                }
            }
            const __m512 input_scale = _mm512_set1_ps(in->scale);
            for (int s = 0; s < STRIPS; ++s) {
                float* total = totals + (m * STRIPS + s) * STRIP;
                const __m512 both = _mm512_mul_ps(scale[s], input_scale);
                _mm512_store_ps(total, _mm512_fmadd_ps(both, value[s], _mm512_load_ps(total)));
            }
        }
    }
}

template <typename Number>
INLINE void scatter(const Number* found, Number* to, const int64_t* rows) {
#pragma GCC unroll 16
    for (int r = 0; r < STRIP; ++r) to[rows[r]] = found[r];
}

// The outputs of 16 rows for some tokens, from their sums [count, UNIT].
TARGET void store_rows(const Matrix& w, const Inputs& in, int64_t first, int64_t count, const int64_t* rows,
                       const float* totals) {
    alignas(64) float bias[STRIP] = {}, found[STRIP];
    for (int r = 0; in.bias && r < STRIP; ++r) bias[r] = load_float(in.bias, rows[r], in.bias_type);
    const __m512 add = _mm512_load_ps(bias);
    for (int64_t m = 0; m < count; ++m) {
        store_floats(found, 0, in.type, 0xffff, _mm512_add_ps(_mm512_load_ps(totals + m * UNIT), add));
        const int64_t at = (first + m) * w.rows;
        if (in.type == FLOAT_F32)
            scatter(found, static_cast<float*>(in.out) + at, rows);
        else
            scatter(reinterpret_cast<const half_t*>(found), static_cast<half_t*>(in.out) + at, rows);
    }
}

template <int P, bool ZEROS>
StripPlan::Dot choose_dot(int bits, bool dense, bool halves) {
    if (!dense) return bits == 8 ? dot<P, BYTES, ZEROS, 0, QUADS> : dot<P, CUT, ZEROS, 0, QUADS>;
    if (bits == 4) return halves ? dot<P, DENSE4, ZEROS, 0, QUADS / 2> : dot<P, DENSE4, ZEROS, 0, QUADS>;
    return bits == 1 ? dot<P, DENSE1, ZEROS, 0, QUADS> : dot<P, DENSE2, ZEROS, 0, QUADS>;
}

template <int P>
StripPlan::Dot choose_book_dot(int planes, bool dense, bool halves) {
    if (dense && planes == 2) return dot<P, DENSE4, false, 2, QUADS>;
    if (dense) return halves ? dot<P, DENSE4, false, 1, QUADS / 2> : dot<P, DENSE4, false, 1, QUADS>;
    return planes == 2 ? dot<P, CUT, false, 2, QUADS> : dot<P, CUT, false, 1, QUADS>;
}

template <int P>
void choose(const Matrix& w, StripPlan* plan) {
    plan->fill = fill_token<P>;
    const bool dense = is_dense(w), halves = w.group <= PIECE / 2;  // of four bits in groups of 16, as nvfp4 is
    plan->dot = plan->book.planes ? choose_book_dot<P>(plan->book.planes, dense, halves)
                : plan->zeros     ? choose_dot<P, true>(w.bits, dense, halves)
                                  : choose_dot<P, false>(w.bits, dense, halves);
}

}  // namespace

StripPlan plan_strips(const Matrix& w, const Inputs& in) {
    StripPlan plan = start_plan(w, in);
    plan.planes == 1 ? choose<1>(w, &plan) : plan.planes == 2 ? choose<2>(w, &plan) : choose<3>(w, &plan);
    return plan;
}

TARGET void run_strips(const Matrix& w, const Inputs& in, const StripPlan& plan) {
    const Cutter cutter = make_cutter(w.bits);
    const RowRange mine = strip_rows(w);
    const int64_t groups = (w.groups + 15) / 16 * 16, step = (mine.last - mine.first + UNIT - 1) / UNIT;
    float* turned = scratch<float>(5, 2 * UNIT * groups);
    float* totals = scratch<float>(6, MOST * UNIT);
    StripUnit unit{};
    for (int s = 0; s < STRIPS; ++s) {
        unit.scale[s] = turned + 2 * s * STRIP * groups;
        unit.zero[s] = unit.scale[s] + STRIP * groups;
    }
    // Rows that are done together lie far apart: each is part of a stream of its own, which the processor foresees. They are
    // one row out of step, lest they all fall into the same places of the caches.
    const auto row_at = [&](int64_t r, int64_t i) {
        const int64_t row = mine.first + r * step + (i + r) % step;
        return row < mine.last ? row : mine.last - 1;
    };
    int64_t rows[UNIT];
    for (int64_t i = 0; i < step; ++i) {
        for (int64_t r = 0; r < UNIT; ++r) {
            rows[r] = row_at(r, i);
            unit.data[r] = w.qdata + rows[r] * w.row_bytes;
        }
        for (int s = 0; s < STRIPS; ++s)
            turn_groups(w, rows + STRIP * s, cutter, unit.scale[s], plan.zeros ? unit.zero[s] : nullptr);
        int64_t next[UNIT];
        for (int64_t r = 0; r < UNIT; ++r) next[r] = row_at(r, i + 1);
        for (int s = 0; s < STRIPS; ++s) fetch_groups(w, next + STRIP * s);
        for (int64_t k = 0; k < in.count; k += MOST) {
            const int64_t count = in.count - k < MOST ? in.count - k : MOST;
            plan.dot(w, plan, unit, k, in.count, count, totals);
            for (int s = 0; s < STRIPS; ++s) store_rows(w, in, k, count, rows + STRIP * s, totals + STRIP * s);
        }
    }
}

RowRange strip_rows(const Matrix& w) { return share_rows(w.rows, UNIT); }

#endif
