// Weight-only kernels on the neutral layout, for AVX-512 with VBMI.
//
// A vector has 16 lanes of 32 bits, and each lane takes L neighbouring columns of a row: its next L codes. Widths that
// divide 32 lie in the lanes as they are on disk (L = 32 / bits); of the others `vpermb` and `vpmultishiftqb` make one
// byte a code (L = 4). Step j then shifts the lanes to code j, `vpermps` looks its number up in a table of 16 (two
// tables of 16 for five bits, a conversion beyond), and one FMA multiplies it by the inputs of those columns, which
// were put in that order once a call. At the end of L steps each lane holds a sum over columns of one group, so one
// more FMA applies the scales. All numbers are float32: only the order of the sums differs from the reference.
// Rows are independent, so any number of threads gives the same result.
#include "matrix.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cstring>
#include <vector>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,f16c,fma")))
#define INLINE TARGET static inline __attribute__((always_inline))

namespace {

constexpr int CHUNK = 64;

// How to turn the bytes of one chunk into 64 codes.
struct Cutter {
    __m512i bytes, shifts, mask;
    int bits, chunk_bytes;
};

INLINE Cutter make_cutter(int bits) {
    alignas(64) uint8_t bytes[64], shifts[64];
    for (int lane = 0; lane < 8; ++lane)
        for (int i = 0; i < 8; ++i) {
            bytes[8 * lane + i] = static_cast<uint8_t>(i < bits ? lane * bits + i : 63);
            shifts[8 * lane + i] = static_cast<uint8_t>(i * bits);
        }
    return {_mm512_load_si512(bytes), _mm512_load_si512(shifts), _mm512_set1_epi8(static_cast<char>((1 << bits) - 1)),
            bits, 8 * bits};
}

// How many bytes of chunk `c` lie in the row; those behind its end are never read.
INLINE __mmask64 present_bytes(int64_t row_bytes, int64_t c, int chunk_bytes) {
    const int64_t left = row_bytes - c * chunk_bytes;
    const int64_t count = left < chunk_bytes ? left : chunk_bytes;
    return count >= 64 ? ~0ull : (1ull << count) - 1;
}

// 64 codes, one a byte, from the packed bytes of a chunk.
INLINE __m512i cut_codes(__m512i packed, const Cutter& cut) {
    if (cut.bits == 8) return packed;
    const __m512i lanes = _mm512_permutexvar_epi8(cut.bytes, packed);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(cut.shifts, lanes), cut.mask);
}

INLINE __m512i codes_of(const uint8_t* row, int64_t row_bytes, int64_t c, const Cutter& cut) {
    const __mmask64 present = present_bytes(row_bytes, c, cut.chunk_bytes);
    return cut_codes(_mm512_maskz_loadu_epi8(present, row + c * cut.chunk_bytes), cut);
}

INLINE float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
INLINE float bfloat_to_float(uint16_t h) {
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

INLINE float load_float(const void* data, int64_t i, int32_t type) {
    if (type == FLOAT_F32) return static_cast<const float*>(data)[i];
    const uint16_t h = static_cast<const uint16_t*>(data)[i];
    return type == FLOAT_F16 ? half_to_float(h) : bfloat_to_float(h);
}

INLINE void store_float(void* data, int64_t i, int32_t type, float value) {
    if (type == FLOAT_F32)
        static_cast<float*>(data)[i] = value;
    else if (type == FLOAT_F16)
        static_cast<uint16_t*>(data)[i] = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
    else {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        const bool nan = (bits & 0x7fffffff) > 0x7f800000;
        bits += 0x7fff + ((bits >> 16) & 1);
        static_cast<uint16_t*>(data)[i] = nan ? 0x7fc0 : static_cast<uint16_t>(bits >> 16);
    }
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

INLINE __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count > 0 ? count : 0)) - 1);
}

// The 16 codes of quarter `q` of 64, as float32.
INLINE __m512 quarter(__m512i codes, int q) {
    alignas(64) static const int32_t lanes[4][4] = {{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}, {12, 13, 14, 15}};
    const __m512i index = _mm512_castsi128_si512(_mm_load_si128(reinterpret_cast<const __m128i*>(lanes[q])));
    const __m128i part = _mm512_castsi512_si128(_mm512_permutexvar_epi32(index, codes));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(part));
}

// The scales and zeros of one row as float32; both have room for 64 entries more than there are groups.
INLINE void load_row(const Matrix& w, int64_t row, const Cutter& cut, float* scale, float* zero) {
    for (int64_t g = 0; g < w.groups; g += 16)
        _mm512_storeu_ps(scale + g, load_floats(w.scale, row * w.groups + g, w.scale_type, first_lanes(w.groups - g)));
    if (!w.zero_point) return;
    for (int64_t c = 0; c * CHUNK < w.groups; ++c) {
        const __m512i codes = codes_of(w.zero_point + row * w.zero_bytes, w.zero_bytes, c, cut);
        for (int q = 0; q < 4; ++q) _mm512_storeu_ps(zero + c * CHUNK + 16 * q, quarter(codes, q));
    }
}

// Scales and zeros of the row at hand, kept by each thread.
struct Row {
    std::vector<float> scale, zero;
    explicit Row(const Matrix& w) : scale(w.groups + 80, 0.f), zero(w.groups + 80, w.midpoint) {}
};

// --- products -----------------------------------------------------------------------------------------------

// How a row is cut: `lane` columns a lane, so `columns` = 16 * lane a vector; and which group each lane belongs to.
struct Cut {
    int lane;
    int64_t columns, bytes, vectors;
    std::vector<int32_t> first;     // [vectors]: the group of a vector's first column
    std::vector<int32_t> relative;  // [vectors, 16]: each lane's group, counted from there

    explicit Cut(const Matrix& w) {
        const bool dense = 32 % w.bits == 0 && w.bits < 8 && (w.groups == 1 || w.group % (32 / w.bits) == 0);
        lane = dense ? 32 / w.bits : 4;
        columns = 16 * lane;
        bytes = columns * w.bits / 8;
        vectors = (w.columns + columns - 1) / columns;
        first.resize(vectors);
        relative.resize(vectors * 16);
        for (int64_t v = 0; v < vectors; ++v) {
            first[v] = group_of(w, v * columns);
            for (int i = 0; i < 16; ++i) relative[16 * v + i] = group_of(w, v * columns + i * lane) - first[v];
        }
    }

   private:
    static int32_t group_of(const Matrix& w, int64_t column) {
        const int64_t g = column / w.group;
        return static_cast<int32_t>(g < w.groups ? g : w.groups - 1);
    }
};

// Inputs in the kernel's order: `x` [m, vectors, lane, 16], and for each lane their sum, `sums` [m, vectors, 16].
struct Inputs {
    int64_t x_stride, sums_stride;
    std::vector<float> x, sums;

    TARGET Inputs(const Cut& cut, const Matrix& w, const void* data, int32_t type, int64_t m)
        : x_stride(cut.vectors * cut.columns),
          sums_stride(cut.vectors * 16),
          x(m * x_stride, 0.f),
          sums(m * sums_stride, 0.f) {
        for (int64_t i = 0; i < m; ++i)
            for (int64_t lane = 0, k = 0; k < w.columns; ++lane) {  // lanes of all vectors, one behind the other
                float* to = x.data() + i * x_stride + (lane / 16) * cut.columns + lane % 16;
                float sum = 0;
                for (int step = 0; step < cut.lane && k < w.columns; ++step, ++k) {
                    const float value = load_float(data, i * w.columns + k, type);
                    to[16 * step] = value;
                    sum += value;
                }
                sums[i * sums_stride + lane] = sum;
            }
    }
};

// The numbers that codes stand for: code - midpoint from a table, or the code itself where it is converted.
struct Numbers {
    __m512 low, high;
};

INLINE Numbers make_numbers(int bits, float midpoint) {
    alignas(64) float table[32];
    for (int i = 0; i < 32; ++i) table[i] = static_cast<float>(i & ((1 << bits) - 1)) - midpoint;
    return {_mm512_load_ps(table), _mm512_load_ps(table + 16)};
}

template <int BITS>
INLINE __m512 number(__m512i shifted, const Numbers& numbers) {
    if (BITS <= 4) return _mm512_permutexvar_ps(shifted, numbers.low);  // looks at four bits; see make_numbers
    if (BITS == 5) return _mm512_permutex2var_ps(numbers.low, shifted, numbers.high);
    return _mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(0xff)));
}

// Two rows against M inputs: they share each load of the inputs. An odd last row is given twice. Not inlined, so that
// each variant has the registers for itself.
constexpr int ROWS = 2, MOST = 4;

struct Pair {
    const uint8_t* data[ROWS];
    const float *scale[ROWS], *zero[ROWS];
};

template <int M, int BITS, int LANE, bool ZEROS>
TARGET __attribute__((noinline)) void dot(const Pair& rows, int64_t row_bytes, float midpoint, const Cut& cut,
                                          const Cutter& cutter, const Inputs& inputs, int64_t from,
                                          float out[ROWS][MOST]) {
    constexpr int BYTES = 16 * LANE * BITS / 8, SHIFT = LANE == 4 ? 8 : BITS;
    const Cutter local = cutter;
    const Numbers numbers = make_numbers(BITS, midpoint);
    const __m512 taken = _mm512_set1_ps(BITS <= 5 ? midpoint : 0.f);
    const float* x = inputs.x.data() + from * inputs.x_stride;
    const float* sums = inputs.sums.data() + from * inputs.sums_stride;
    const int64_t x_stride = inputs.x_stride, sums_stride = inputs.sums_stride, vectors = cut.vectors;
    __m512 total[ROWS][M];
    for (int r = 0; r < ROWS; ++r)
        for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_ps();
    __mmask64 present = BYTES == 64 ? ~0ull : (1ull << (BYTES & 63)) - 1;
    for (int64_t v = 0; v < vectors; ++v) {
        if (v == vectors - 1) present = present_bytes(row_bytes, v, BYTES);
        __m512i codes[ROWS];
        __m512 sum[ROWS][M];
        for (int r = 0; r < ROWS; ++r) {
            _mm_prefetch(reinterpret_cast<const char*>(rows.data[r] + v * BYTES + 4096), _MM_HINT_T0);
            codes[r] = _mm512_maskz_loadu_epi8(present, rows.data[r] + v * BYTES);
            if (LANE == 4) codes[r] = cut_codes(codes[r], local);
            for (int m = 0; m < M; ++m) sum[r][m] = _mm512_setzero_ps();
        }
#pragma GCC unroll 32
        for (int j = 0; j < LANE; ++j) {
            __m512 w[ROWS];
            for (int r = 0; r < ROWS; ++r) w[r] = number<BITS>(_mm512_srli_epi32(codes[r], SHIFT * j), numbers);
            for (int m = 0; m < M; ++m) {
                const __m512 input = _mm512_loadu_ps(x + m * x_stride + (v * LANE + j) * 16);
                for (int r = 0; r < ROWS; ++r) sum[r][m] = _mm512_fmadd_ps(w[r], input, sum[r][m]);
            }
        }
        const __m512i lanes = _mm512_loadu_si512(cut.relative.data() + 16 * v);
        const int64_t first = cut.first[v];
        for (int r = 0; r < ROWS; ++r) {
            const __m512 s = _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(rows.scale[r] + first));
            if (ZEROS || BITS > 5) {
                const __m512 z = _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(rows.zero[r] + first));
                const __m512 left = _mm512_sub_ps(z, taken);
                for (int m = 0; m < M; ++m)
                    sum[r][m] = _mm512_fnmadd_ps(left, _mm512_loadu_ps(sums + m * sums_stride + 16 * v), sum[r][m]);
            }
            for (int m = 0; m < M; ++m) total[r][m] = _mm512_fmadd_ps(s, sum[r][m], total[r][m]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int m = 0; m < M; ++m) out[r][m] = _mm512_reduce_add_ps(total[r][m]);
}

using Dot = void (*)(const Pair&, int64_t, float, const Cut&, const Cutter&, const Inputs&, int64_t, float[ROWS][MOST]);

template <int M, int BITS, int LANE>
Dot choose_dot(bool zeros) {
    return zeros ? dot<M, BITS, LANE, true> : dot<M, BITS, LANE, false>;
}

template <int M>
Dot choose_dot(int bits, int lane, bool zeros) {
    if (lane == 4) switch (bits) {
            case 1: return choose_dot<M, 1, 4>(zeros);
            case 2: return choose_dot<M, 2, 4>(zeros);
            case 3: return choose_dot<M, 3, 4>(zeros);
            case 4: return choose_dot<M, 4, 4>(zeros);
            case 5: return choose_dot<M, 5, 4>(zeros);
            case 6: return choose_dot<M, 6, 4>(zeros);
            case 7: return choose_dot<M, 7, 4>(zeros);
            default: return choose_dot<M, 8, 4>(zeros);
        }
    return bits == 1 ? choose_dot<M, 1, 32>(zeros) : bits == 2 ? choose_dot<M, 2, 16>(zeros) : choose_dot<M, 4, 8>(zeros);
}

TARGET void linear(const Matrix& w, const void* data, int32_t type, int64_t m, const void* bias, int32_t bias_type,
                   void* out) {
    const Cut cut(w);
    const Inputs inputs(cut, w, data, type, m);
    const bool zeros = w.zero_point != nullptr;
    const Dot dots[MOST + 1] = {nullptr, choose_dot<1>(w.bits, cut.lane, zeros), choose_dot<2>(w.bits, cut.lane, zeros),
                                choose_dot<3>(w.bits, cut.lane, zeros), choose_dot<4>(w.bits, cut.lane, zeros)};
#pragma omp parallel
    {
        const Cutter cutter = make_cutter(w.bits);
        Row parameters[ROWS] = {Row(w), Row(w)};
        float found[ROWS][MOST];
#pragma omp for schedule(static)
        for (int64_t row = 0; row < w.rows; row += ROWS) {
            Pair rows;
            for (int r = 0; r < ROWS; ++r) {
                const int64_t at = row + r < w.rows ? row + r : w.rows - 1;
                load_row(w, at, cutter, parameters[r].scale.data(), parameters[r].zero.data());
                rows.data[r] = w.qdata + at * w.row_bytes;
                rows.scale[r] = parameters[r].scale.data();
                rows.zero[r] = parameters[r].zero.data();
            }
            for (int64_t i = 0; i < m; i += MOST) {
                const int64_t count = m - i < MOST ? m - i : MOST;
                dots[count](rows, w.row_bytes, w.midpoint, cut, cutter, inputs, i, found);
                for (int r = 0; r < ROWS && row + r < w.rows; ++r) {
                    const float add = bias ? load_float(bias, row + r, bias_type) : 0.f;
                    for (int k = 0; k < count; ++k)
                        store_float(out, (i + k) * w.rows + row + r, type, found[r][k] + add);
                }
            }
        }
    }
}

// --- decoding -----------------------------------------------------------------------------------------------

// The group of each column from `start` on, for 16 of them.
INLINE __m512 spread(const float* values, const int32_t* groups, int64_t column, bool whole) {
    if (whole) return _mm512_set1_ps(values[groups[column]]);
    return _mm512_i32gather_ps(_mm512_loadu_si512(groups + column), values, 4);
}

// The values of the 32 codes below 2^5 under one scale and zero, rounded to bfloat16.
INLINE __m512i bfloat_table(float scale, float zero) {
    const __m512 low = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 s = _mm512_set1_ps(scale), z = _mm512_set1_ps(zero), high = _mm512_add_ps(low, _mm512_set1_ps(16.f));
    const __m256i first = to_bfloat(_mm512_mul_ps(_mm512_sub_ps(low, z), s));
    const __m256i second = to_bfloat(_mm512_mul_ps(_mm512_sub_ps(high, z), s));
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

// Rows of up to five bits as bfloat16, where a scale spans 32 columns or more: each group's values are rounded once,
// and `vpermw` looks the codes up.
TARGET void dequantize_by_table(const Matrix& w, uint16_t* out) {
    const int64_t chunks = (w.columns + CHUNK - 1) / CHUNK, halves_a_group = w.groups == 1 ? 2 * chunks : w.group / 32;
#pragma omp parallel
    {
        const Cutter cutter = make_cutter(w.bits);
        Row parameters(w);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < w.rows; ++row) {
            load_row(w, row, cutter, parameters.scale.data(), parameters.zero.data());
            __m512i table = _mm512_setzero_si512();
            for (int64_t c = 0, group = -1, left = 0; c < chunks; ++c) {
                const __m512i codes = codes_of(w.qdata + row * w.row_bytes, w.row_bytes, c, cutter);
                for (int half = 0; half < 2 && c * CHUNK + 32 * half < w.columns; ++half, --left) {
                    if (left == 0) {
                        ++group;
                        table = bfloat_table(parameters.scale[group], parameters.zero[group]);
                        left = halves_a_group;
                    }
                    const int64_t column = c * CHUNK + 32 * half, rest = w.columns - column;
                    const __mmask32 present = rest >= 32 ? ~0u : (1u << rest) - 1;
                    const __m256i part = half ? _mm512_extracti64x4_epi64(codes, 1) : _mm512_castsi512_si256(codes);
                    const __m512i values = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(part), table);
                    _mm512_mask_storeu_epi16(out + row * w.columns + column, present, values);
                }
            }
        }
    }
}

TARGET void dequantize(const Matrix& w, int32_t type, void* out) {
    if (type == FLOAT_BF16 && w.bits <= 5 && (w.groups == 1 || w.group % 32 == 0))
        return dequantize_by_table(w, static_cast<uint16_t*>(out));
    const int64_t chunks = (w.columns + CHUNK - 1) / CHUNK;
    const bool whole = w.groups == 1 || w.group % 16 == 0;  // whether 16 columns always lie in one group
    std::vector<int32_t> groups(chunks * CHUNK, 0);
    if (w.groups > 1)
        for (int64_t g = 0, k = 0; k < w.columns; ++g)
            for (int64_t end = k + w.group; k < end && k < w.columns; ++k) groups[k] = static_cast<int32_t>(g);
#pragma omp parallel
    {
        const Cutter cutter = make_cutter(w.bits);
        Row parameters(w);
        const float *scale = parameters.scale.data(), *zero = parameters.zero.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < w.rows; ++row) {
            load_row(w, row, cutter, parameters.scale.data(), parameters.zero.data());
            for (int64_t c = 0; c < chunks; ++c) {
                const __m512i codes = codes_of(w.qdata + row * w.row_bytes, w.row_bytes, c, cutter);
                for (int q = 0; q < 4; ++q) {
                    const int64_t column = c * CHUNK + 16 * q, at = row * w.columns + column;
                    if (column >= w.columns) break;
                    const __mmask16 present = first_lanes(w.columns - column);
                    const __m512 value =
                        _mm512_mul_ps(_mm512_sub_ps(quarter(codes, q), spread(zero, groups.data(), column, whole)),
                                      spread(scale, groups.data(), column, whole));
                    if (type == FLOAT_F32)
                        _mm512_mask_storeu_ps(static_cast<float*>(out) + at, present, value);
                    else
                        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + at, present,
                                                 type == FLOAT_F16
                                                     ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)
                                                     : to_bfloat(value));
                }
            }
        }
    }
}

}  // namespace

extern "C" {

// Whether this processor has what the kernels need.
int32_t llmquant_supported() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi");
}

// x [m, columns] -> out [m, rows], both of `type`; bias [rows] of `bias_type` or null.
void llmquant_linear(const Matrix* w, const void* x, int32_t type, int64_t m, const void* bias, int32_t bias_type,
                     void* out) {
    linear(*w, x, type, m, bias, bias_type, out);
}

// The matrix as floats of `type`, [rows, columns].
void llmquant_dequantize(const Matrix* w, int32_t type, void* out) { dequantize(*w, type, out); }

}  // extern "C"

#else  // another processor or compiler: the library loads and says that it serves nothing

extern "C" {
int32_t llmquant_supported() { return 0; }
void llmquant_linear(const Matrix*, const void*, int32_t, int64_t, const void*, int32_t, void*) {}
void llmquant_dequantize(const Matrix*, int32_t, void*) {}
}

#endif
