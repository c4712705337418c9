// Integer products for processors without AVX-512 VBMI, on the scheme of strips.cpp with vectors of 256 bits: a strip
// is 8 rows, and rows are read 32 bytes at a time (or as the bytes of 32 codes).
//
// Two ways to add products of codes and inputs: `vpdpbusd` where the processor has AVX-VNNI, else `vpmaddubsw`, whose
// sums of two products have 16 bits. Such a sum is at most 2 x 128 x code: codes of four bits leave room to add up all
// eight steps of a piece before anything is widened, those of five to seven bits are widened at each step, and codes of
// eight bits are split into halves of four.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include "avx2_inputs.h"

#define TARGET2_VNNI __attribute__((target("avx2,fma,f16c,avxvnni")))

namespace {

constexpr int STRIP = 8, STRIPS = 2, UNIT = STRIP * STRIPS;  // rows of a strip, strips that share the inputs, their rows
constexpr int RING = 16;                         // turned vectors of a strip that are kept

// How codes lie in a vector: packed, or a byte each, cut from up to four bits, from five to seven, or bytes before.
enum Kind { NARROW = 0, DENSE1 = 1, DENSE2 = 2, DENSE4 = 4, WIDE = 7, BYTES = 8 };

// --- the rows ----------------------------------------------------------------------------------------------

// 8 scales from group `g` of a row of scales on; those of one byte are SCALE_I8, as tables are not for here.
INLINE2 __m256 load_scales(const Matrix& w, int64_t row, int64_t g) {
    const int64_t i = row * w.groups + g, left = w.groups - g;
    if (w.scale_type <= FLOAT_BF16) return load_eight(w.scale, i, w.scale_type, left);
    alignas(16) int8_t bytes[16] = {};
    std::memcpy(bytes, static_cast<const int8_t*>(w.scale) + i, static_cast<size_t>(left < 8 ? left : 8));
    const __m256 found = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes))));
    return w.outer ? _mm256_mul_ps(found, _mm256_set1_ps(w.outer[row * w.outer_step])) : found;
}

// Scales and zeros of 8 rows from `first` on.
TARGET2 void turn_groups(const Matrix& w, int64_t first, const Cutter2& cutter, float* scale, float* zero) {
    int64_t rows[STRIP];
    for (int i = 0; i < STRIP; ++i) rows[i] = (first + i < w.rows ? first + i : w.rows - 1) / w.shared;
    __m256 v[STRIP];
    for (int64_t g = 0; g < w.groups; g += 8) {
        for (int i = 0; i < STRIP; ++i) v[i] = load_scales(w, rows[i], g);
        turn_rows(v);
        for (int i = 0; i < 8; ++i) _mm256_store_ps(scale + STRIP * (g + i), v[i]);
        if (!zero) continue;
        for (int i = 0; i < STRIP; ++i) {
            const uint8_t* packed = w.zero_point ? w.zero_point + rows[i] * zero_bytes(w) : nullptr;
            v[i] = packed ? _mm256_cvtepi32_ps(load_codes(packed, zero_bytes(w), g, w.bits, cutter))
                          : _mm256_set1_ps(w.midpoint);
        }
        turn_rows(v);
        for (int i = 0; i < 8; ++i) _mm256_store_ps(zero + STRIP * (g + i), v[i]);
    }
}

// What a strip reads at a time: 32 bytes of each row, or those of 32 codes.
struct Block {
    Cutter2 cutter;
    int bytes;
    int64_t lines;        // cache lines of a block of all rows
    const uint8_t* next;  // unit, which is fetched meanwhile, in the order in which it lies in memory
};

template <int KIND>
INLINE2 Block make_block(const Matrix& w, const StripUnit& unit) {
    const int bytes = KIND == NARROW || KIND == WIDE ? 4 * w.bits : 32;
    return {make_cutter2(w.bits), bytes, UNIT * bytes / 64, unit.data[0] + UNIT * w.row_bytes};
}

INLINE2 void fetch(Block* block) {
    for (int64_t line = 0; line < block->lines; ++line, block->next += 64)
        _mm_prefetch(reinterpret_cast<const char*>(block->next), _MM_HINT_T1);
}

// Turns the next 8 lanes of strip `s` into its ring.
template <int KIND>
INLINE2 void turn_block(const Matrix& w, const StripUnit& unit, const Block& block, int s, int64_t filled,
                        __m256i* ring) {
    const uint8_t* const* rows = unit.data + STRIP * s;
    const int64_t at = filled / 8 * block.bytes;
    __m256i v[8];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
        const int64_t half = at + h * block.bytes / 2, left = w.row_bytes - half;
        for (int i = 0; i < 4; ++i) {
            const __m128i low = load_bytes(rows[i] + half, left), high = load_bytes(rows[4 + i] + half, left);
            v[4 * h + i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
            if (KIND == NARROW || KIND == WIDE) v[4 * h + i] = cut_halves(v[4 * h + i], block.cutter);
        }
    }
    turn_halves(v);
    for (int i = 0; i < 8; ++i) ring[filled % RING + i] = v[i];
    if (filled % RING == 0)
        for (int i = 0; i < QUADS; ++i) ring[RING + i] = v[i];
}

// The codes of a piece, one a byte, in the order of the steps.
template <int KIND>
INLINE2 void shift_out(const __m256i* packed, __m256i code[QUADS]) {
    constexpr int STEPS = KIND == DENSE1 ? 8 : KIND == DENSE2 ? 4 : KIND == DENSE4 ? 2 : 1;
#pragma GCC unroll 8
    for (int q = 0; q < QUADS; ++q) {
        code[q] = _mm256_srli_epi32(packed[q / STEPS], q % STEPS * KIND);
        if (STEPS > 1) code[q] = _mm256_and_si256(code[q], _mm256_set1_epi8((1 << KIND % 8) - 1));
    }
}

// --- products ----------------------------------------------------------------------------------------------

// One sum of products for each lane: `start`, then `add` for the steps q = 0 .. 7 of a piece, then `total`.
namespace vnni {
template <int KIND>
struct Sum {
    __m256i all;
};

template <int KIND>
TARGET2_VNNI inline __attribute__((always_inline)) void start(Sum<KIND>* sum, int32_t from) {
    sum->all = _mm256_set1_epi32(from);
}

template <int KIND>
TARGET2_VNNI inline __attribute__((always_inline)) void add(Sum<KIND>* sum, int, __m256i code, __m256i input) {
    sum->all = _mm256_dpbusd_avx_epi32(sum->all, code, input);
}

template <int KIND>
TARGET2_VNNI inline __attribute__((always_inline)) __m256i total(const Sum<KIND>& sum) {
    return sum.all;
}
}  // namespace vnni

namespace pairs {
template <int KIND>
struct Sum {
    __m256i all;          // widened
    __m256i pairs, high;  // sums of 16 bits: of codes or their lower halves, of their upper halves
};

template <int KIND>
INLINE2 void start(Sum<KIND>* sum, int32_t from) {
    *sum = {_mm256_set1_epi32(from), _mm256_setzero_si256(), _mm256_setzero_si256()};
}

template <int KIND>
INLINE2 void add(Sum<KIND>* sum, int q, __m256i code, __m256i input) {
    const __m256i four = _mm256_set1_epi8(15);
    const __m256i low = KIND == BYTES ? _mm256_and_si256(code, four) : code;
    const __m256i products = _mm256_maddubs_epi16(low, input);
    if (KIND == WIDE) {
        sum->all = _mm256_add_epi32(sum->all, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
        return;
    }
    sum->pairs = q ? _mm256_add_epi16(sum->pairs, products) : products;
    if (KIND != BYTES) return;
    const __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(code, 4), four), input);
    sum->high = q ? _mm256_add_epi16(sum->high, high) : high;
}

template <int KIND>
INLINE2 __m256i total(const Sum<KIND>& sum) {
    if (KIND == WIDE) return sum.all;
    const __m256i all = _mm256_add_epi32(sum.all, _mm256_madd_epi16(sum.pairs, _mm256_set1_epi16(1)));
    return KIND == BYTES ? _mm256_add_epi32(all, _mm256_madd_epi16(sum.high, _mm256_set1_epi16(16))) : all;
}
}  // namespace pairs

#define WAY vnni
#define WAY_TARGET TARGET2_VNNI
#include "avx2_dot.h"
#undef WAY
#undef WAY_TARGET

#define WAY pairs
#define WAY_TARGET TARGET2
#include "avx2_dot.h"
#undef WAY
#undef WAY_TARGET

TARGET2 void run(const Matrix& w, const Inputs& in, const StripPlan& plan) {
    const Cutter2 cutter = make_cutter2(w.bits);
    const RowRange mine = share_rows(w.rows, UNIT);
    const int64_t groups = (w.groups + 7) / 8 * 8;
    float* turned = scratch<float>(5, 2 * UNIT * groups);
    float* totals = scratch<float>(6, MOST * UNIT);
    StripUnit unit;
    for (int s = 0; s < STRIPS; ++s) {
        unit.scale[s] = turned + 2 * s * STRIP * groups;
        unit.zero[s] = unit.scale[s] + STRIP * groups;
    }
    for (int64_t row = mine.first; row < mine.last; row += UNIT) {
        for (int64_t r = 0; r < UNIT; ++r)
            unit.data[r] = w.qdata + (row + r < w.rows ? row + r : w.rows - 1) * w.row_bytes;
        for (int s = 0; s < STRIPS; ++s)
            turn_groups(w, row + STRIP * s, cutter, unit.scale[s], plan.zeros ? unit.zero[s] : nullptr);
        for (int64_t k = 0; k < in.count; k += MOST) {
            const int64_t count = in.count - k < MOST ? in.count - k : MOST;
            plan.dot(w, plan, unit, k, in.count, count, totals);
            for (int s = 0; s < STRIPS; ++s) {
                const int64_t at = row + STRIP * s, rows = w.rows - at;
                const __m256 bias = in.bias ? load_eight(in.bias, at, in.bias_type, rows) : _mm256_setzero_ps();
                for (int64_t m = 0; m < count; ++m)
                    store_eight(in.out, (k + m) * w.rows + at, in.type, rows,
                                _mm256_add_ps(_mm256_load_ps(totals + (m * STRIPS + s) * STRIP), bias));
            }
        }
    }
}

using ChooseDot = StripPlan::Dot (*)(const Matrix&, const StripPlan&);

// `plain`: the kernels that take what has no integer product: other groups, tables, infinities and NaN.
void strip_linear(const Matrix& w, const Inputs& in, ChooseDot choose_dot, const Kernels& plain) {
    StripPlan plan = start_plan(w, in);
    plan.fill = plan.planes == 1 ? fill_token<1> : plan.planes == 2 ? fill_token<2> : fill_token<3>;
    plan.dot = choose_dot(w, plan);
    uint8_t* bad = scratch<uint8_t>(7, in.count);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < in.count; ++token) bad[token] = !plan.fill(w, in, plan, token);
        run(w, in, plan);
    }
    redo_marked(plain, w, in, bad);
}

void linear(const Matrix& w, const Inputs& in, ChooseDot choose_dot, const Kernels& plain) {
    if (w.table || !fits_strips(w, in)) return plain.linear(w, in);
    in_parts(w, in, MOST_IN_PLANES,
             [&](const Matrix&, const Inputs& part) { strip_linear(w, part, choose_dot, plain); });
}

void linear_vnni(const Matrix& w, const Inputs& in) { linear(w, in, vnni::choose_dot, PLAIN_AVX2); }
void linear_pairs(const Matrix& w, const Inputs& in) { linear(w, in, pairs::choose_dot, PLAIN_AVX2); }
void linear_avx512(const Matrix& w, const Inputs& in) { linear(w, in, pairs::choose_dot, PLAIN_AVX512); }

bool has_vnni() { return PLAIN_AVX2.present() && __builtin_cpu_supports("avxvnni"); }

}  // namespace

const Kernels AVX2_VNNI = {"avx2_vnni", has_vnni, linear_vnni, PLAIN_AVX2.rows};
const Kernels AVX2 = {"avx2", PLAIN_AVX2.present, linear_pairs, PLAIN_AVX2.rows};
const Kernels AVX512 = {"avx512", PLAIN_AVX512.present, linear_avx512, PLAIN_AVX512.rows};
#endif
