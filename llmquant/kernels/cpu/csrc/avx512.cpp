// Weight-only kernels on the neutral layout, for AVX-512 with VBMI and BF16.
//
// A chunk is 64 neighbouring codes of a row. `vpermb` brings the bytes of each 8 codes into a 64-bit lane and
// `vpmultishiftqb` cuts the codes out, whatever their width: one byte a code, in order. From there
//   float32:  (code - zero) * scale * x, sixteen at a time, exactly the values of the reference;
//   bfloat16: 0x4300 | code is the bfloat16 number 128 + code (256 + ... needs no rounding below 2^7), so one
//             `vdpbf16ps` multiplies 32 codes; 128 + zero times the sum of the same inputs is taken off again.
// Eight-bit codes are two nibbles in the bfloat16 path: code = low + 16 * high.
// Rows are independent, so any number of threads gives the same result.
#include "matrix.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cstring>
#include <vector>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,f16c,fma")))
#define INLINE TARGET static inline __attribute__((always_inline))

namespace {

constexpr int CHUNK = 64;

inline int64_t chunks_of(int64_t columns) { return (columns + CHUNK - 1) / CHUNK; }

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

// The scales and zeros of one row in float32. `zero` counts from code 0.
INLINE void load_row(const Matrix& w, int64_t row, float* scale, float* zero) {
    for (int64_t g = 0; g < w.groups; ++g) scale[g] = load_float(w.scale, row * w.groups + g, w.scale_type);
    if (!w.zero_point) {
        for (int64_t g = 0; g < w.groups; ++g) zero[g] = w.midpoint;
        return;
    }
    const uint8_t* packed = w.zero_point + row * w.zero_bytes;
    for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t bit = g * w.bits;
        uint32_t two = packed[bit / 8];
        if (bit / 8 + 1 < w.zero_bytes) two |= static_cast<uint32_t>(packed[bit / 8 + 1]) << 8;
        zero[g] = static_cast<float>((two >> (bit % 8)) & ((1u << w.bits) - 1));
    }
}

// Which group each piece of a row belongs to. Built once a call, so that no row divides.
struct Groups {
    bool halves;                 // whether each half of a chunk (32 columns) lies in one group
    bool quarters;               // whether each quarter (16 columns) does
    std::vector<int32_t> first;  // [chunks * 4]: the group of a quarter's first column
    std::vector<int32_t> lanes;  // [chunks * 16]: of each 4 columns, where `halves` is false
    std::vector<int32_t> each;   // [chunks * 64]: of each column, where `quarters` is false

    explicit Groups(const Matrix& w)
        : halves(w.groups == 1 || w.group % 32 == 0), quarters(w.groups == 1 || w.group % 16 == 0) {
        fill(w, first, 16);
        if (!halves) fill(w, lanes, 4);
        if (!quarters) fill(w, each, 1);
    }

   private:
    static void fill(const Matrix& w, std::vector<int32_t>& index, int step) {
        index.resize(chunks_of(w.columns) * CHUNK / step);
        for (size_t i = 0; i < index.size(); ++i) {
            const int64_t g = static_cast<int64_t>(i) * step / w.group;
            index[i] = static_cast<int32_t>(g < w.groups ? g : w.groups - 1);
        }
    }
};

// One value a lane of 4 columns for chunk `c`.
template <bool HALVES>
INLINE __m512 spread_chunk(const float* values, const Groups& groups, int64_t c) {
    if (!HALVES) return _mm512_i32gather_ps(_mm512_loadu_si512(groups.lanes.data() + 16 * c), values, 4);
    const __m512 low = _mm512_set1_ps(values[groups.first[4 * c]]);
    return _mm512_mask_broadcastss_ps(low, 0xff00, _mm_load_ss(values + groups.first[4 * c + 2]));
}

// One value a column for quarter `q` of chunk `c`.
INLINE __m512 spread_quarter(const float* values, const Groups& groups, int64_t c, int q) {
    if (!groups.quarters)
        return _mm512_i32gather_ps(_mm512_loadu_si512(groups.each.data() + CHUNK * c + 16 * q), values, 4);
    return _mm512_set1_ps(values[groups.first[4 * c + q]]);
}

// The 16 values of quarter `q` of a chunk, exactly as the reference decodes them.
INLINE __m512 decode_quarter(__m512i codes, const Groups& groups, int64_t c, int q, const float* scale,
                             const float* zero) {
    __m128i part;
    switch (q) {
        case 0: part = _mm512_extracti32x4_epi32(codes, 0); break;
        case 1: part = _mm512_extracti32x4_epi32(codes, 1); break;
        case 2: part = _mm512_extracti32x4_epi32(codes, 2); break;
        default: part = _mm512_extracti32x4_epi32(codes, 3);
    }
    const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(part));
    return _mm512_mul_ps(_mm512_sub_ps(code, spread_quarter(zero, groups, c, q)),
                         spread_quarter(scale, groups, c, q));
}

// --- float32 inputs -----------------------------------------------------------------------------------------

// x [m, chunks * 64] float32, padded with zeros. One row of the matrix against `M` inputs.
template <int M>
INLINE void row_f32(const Matrix& w, const Groups& groups, int64_t row, const Cutter& cut, const float* x, int64_t stride,
                    const float* scale, const float* zero, float* out) {
    __m512 total[M];
    for (int m = 0; m < M; ++m) total[m] = _mm512_setzero_ps();
    const uint8_t* data = w.qdata + row * w.row_bytes;
    for (int64_t c = 0; c < chunks_of(w.columns); ++c) {
        _mm_prefetch(reinterpret_cast<const char*>(data + c * cut.chunk_bytes + 2048), _MM_HINT_T0);
        const __m512i codes = codes_of(data, w.row_bytes, c, cut);
        for (int q = 0; q < 4; ++q) {
            const int64_t column = c * CHUNK + 16 * q;
            if (column >= w.columns) break;
            const __m512 value = decode_quarter(codes, groups, c, q, scale, zero);
            for (int m = 0; m < M; ++m)
                total[m] = _mm512_fmadd_ps(value, _mm512_loadu_ps(x + m * stride + column), total[m]);
        }
    }
    for (int m = 0; m < M; ++m) out[m] = _mm512_reduce_add_ps(total[m]);
}

// --- bfloat16 inputs ----------------------------------------------------------------------------------------

// One input as the kernel wants it: `pairs` [chunks, 2, 32] has for each chunk the 32 even columns, then the 32 odd
// ones; `sums` [chunks, 16] for each lane the sum of the four columns that meet in it.
INLINE void prepare(const uint16_t* x, int64_t columns, uint16_t* pairs, float* sums) {
    for (int64_t c = 0; c < chunks_of(columns); ++c)
        for (int lane = 0; lane < 16; ++lane) {
            float sum = 0;
            for (int i = 0; i < 4; ++i) {
                const int64_t k = c * CHUNK + 4 * lane + i;
                const uint16_t value = k < columns ? x[k] : 0;
                pairs[c * CHUNK + (i & 1) * 32 + 2 * lane + i / 2] = value;
                sum += bfloat_to_float(value);
            }
            sums[c * 16 + lane] = sum;
        }
}

// What a row kernel for bfloat16 inputs works on; `pairs` and `sums` begin at the first of its M inputs.
struct Inputs {
    const uint16_t* pairs;
    const float* sums;
    int64_t chunks;
};

// 128 + code of the even and of the odd columns of a chunk, as bfloat16. Of eight-bit codes the low and high nibbles.
struct Numbers {
    __m512i even, odd, even_high, odd_high;
};

template <int BITS>
INLINE Numbers numbers_of(const uint8_t* packed, __mmask64 present, const Cutter& cut, __m512i field, __m512i magic) {
    Numbers n{};
    if (BITS == 4) {
        const __m512i wide = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(present), packed));
        n.even = _mm512_ternarylogic_epi32(wide, field, magic, 0xEA);  // (wide & field) | magic
        n.odd = _mm512_or_si512(_mm512_srli_epi16(wide, 4), magic);
        return n;
    }
    const __m512i codes = cut_codes(_mm512_maskz_loadu_epi8(present, packed), cut);
    n.even = _mm512_ternarylogic_epi32(codes, field, magic, 0xEA);
    n.odd = _mm512_ternarylogic_epi32(_mm512_srli_epi16(codes, 8), field, magic, 0xEA);
    if (BITS == 8) {
        n.even_high = _mm512_ternarylogic_epi32(_mm512_srli_epi16(codes, 4), field, magic, 0xEA);
        n.odd_high = _mm512_or_si512(_mm512_srli_epi16(codes, 12), magic);
    }
    return n;
}

// One row of the matrix against M inputs. Not inlined, so that each variant has the registers for itself.
template <int M, int BITS, bool HALVES, bool ZEROS>
TARGET __attribute__((noinline)) void row_bf16(const uint8_t* data, int64_t row_bytes, float midpoint,
                                               const Cutter& cutter, const Groups& groups, const Inputs& x,
                                               const float* scale, const float* zero, float* out) {
    constexpr int BYTES = 8 * BITS;
    const Cutter cut = cutter;
    const __m512i magic = _mm512_set1_epi16(0x4300), field = _mm512_set1_epi16((1 << (BITS == 8 ? 4 : BITS)) - 1);
    const float offset = BITS == 8 ? 128.f + 16 * 128.f : 128.f;
    const __m512 base = _mm512_set1_ps(offset), middle = _mm512_set1_ps(offset + midpoint);
    __m512 total[M];
    for (int m = 0; m < M; ++m) total[m] = _mm512_setzero_ps();
    const int64_t last = x.chunks - 1;
    for (int64_t c = 0; c <= last; ++c) {
        _mm_prefetch(reinterpret_cast<const char*>(data + c * BYTES + 2048), _MM_HINT_T0);
        const __mmask64 whole = BYTES == 64 ? ~0ull : (1ull << (BYTES & 63)) - 1;
        const __mmask64 present = c < last ? whole : present_bytes(row_bytes, c, BYTES);
        const Numbers n = numbers_of<BITS>(data + c * BYTES, present, cut, field, magic);
        const __m512 s = spread_chunk<HALVES>(scale, groups, c);
        const __m512 z = ZEROS ? _mm512_add_ps(spread_chunk<HALVES>(zero, groups, c), base) : middle;
        for (int m = 0; m < M; ++m) {
            const uint16_t* p = x.pairs + (m * x.chunks + c) * CHUNK;
            const __m512bh even = (__m512bh)_mm512_loadu_si512(p), odd = (__m512bh)_mm512_loadu_si512(p + 32);
            __m512 sum = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)n.even, even);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)n.odd, odd);
            if (BITS == 8) {
                __m512 high = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)n.even_high, even);
                high = _mm512_dpbf16_ps(high, (__m512bh)n.odd_high, odd);
                sum = _mm512_fmadd_ps(high, _mm512_set1_ps(16.f), sum);
            }
            sum = _mm512_fnmadd_ps(z, _mm512_loadu_ps(x.sums + (m * x.chunks + c) * 16), sum);
            total[m] = _mm512_fmadd_ps(s, sum, total[m]);
        }
    }
    for (int m = 0; m < M; ++m) out[m] = _mm512_reduce_add_ps(total[m]);
}

using RowKernel = void (*)(const uint8_t*, int64_t, float, const Cutter&, const Groups&, const Inputs&, const float*,
                           const float*, float*);

template <int M, int BITS>
RowKernel variant(bool halves, bool zeros) {
    if (halves) return zeros ? row_bf16<M, BITS, true, true> : row_bf16<M, BITS, true, false>;
    return zeros ? row_bf16<M, BITS, false, true> : row_bf16<M, BITS, false, false>;
}

template <int M>
RowKernel variant(int bits, bool halves, bool zeros) {
    switch (bits) {
        case 1: return variant<M, 1>(halves, zeros);
        case 2: return variant<M, 2>(halves, zeros);
        case 3: return variant<M, 3>(halves, zeros);
        case 4: return variant<M, 4>(halves, zeros);
        case 5: return variant<M, 5>(halves, zeros);
        case 6: return variant<M, 6>(halves, zeros);
        case 7: return variant<M, 7>(halves, zeros);
        default: return variant<M, 8>(halves, zeros);
    }
}

RowKernel row_kernel(int count, int bits, bool halves, bool zeros) {
    switch (count) {
        case 1: return variant<1>(bits, halves, zeros);
        case 2: return variant<2>(bits, halves, zeros);
        case 3: return variant<3>(bits, halves, zeros);
        default: return variant<4>(bits, halves, zeros);
    }
}

INLINE void dispatch_f32(int count, const Matrix& w, const Groups& groups, int64_t row, const Cutter& cut, const float* x, int64_t stride,
                         const float* scale, const float* zero, float* out) {
    switch (count) {
        case 1: return row_f32<1>(w, groups, row, cut, x, stride, scale, zero, out);
        case 2: return row_f32<2>(w, groups, row, cut, x, stride, scale, zero, out);
        case 3: return row_f32<3>(w, groups, row, cut, x, stride, scale, zero, out);
        default: return row_f32<4>(w, groups, row, cut, x, stride, scale, zero, out);
    }
}

TARGET void linear_bf16(const Matrix& w, const uint16_t* x, int64_t m, const void* bias, int32_t bias_type,
                        uint16_t* out) {
    const int64_t chunks = chunks_of(w.columns);
    std::vector<uint16_t> pairs(m * chunks * CHUNK);
    std::vector<float> sums(m * chunks * 16);
    for (int64_t i = 0; i < m; ++i)
        prepare(x + i * w.columns, w.columns, pairs.data() + i * chunks * CHUNK, sums.data() + i * chunks * 16);
    const Groups groups(w);
    RowKernel kernels[5] = {};
    for (int count = 1; count <= 4; ++count)
        kernels[count] = row_kernel(count, w.bits, groups.halves, w.zero_point != nullptr);
#pragma omp parallel
    {
        const Cutter cut = make_cutter(w.bits);
        std::vector<float> scale(w.groups), zero(w.groups);
        float found[4];
#pragma omp for schedule(static)
        for (int64_t row = 0; row < w.rows; ++row) {
            load_row(w, row, scale.data(), zero.data());
            const float add = bias ? load_float(bias, row, bias_type) : 0.f;
            for (int64_t i = 0; i < m; i += 4) {
                const int count = m - i < 4 ? static_cast<int>(m - i) : 4;
                const Inputs inputs{pairs.data() + i * chunks * CHUNK, sums.data() + i * chunks * 16, chunks};
                kernels[count](w.qdata + row * w.row_bytes, w.row_bytes, w.midpoint, cut, groups, inputs, scale.data(),
                               zero.data(), found);
                for (int j = 0; j < count; ++j) store_float(out, (i + j) * w.rows + row, FLOAT_BF16, found[j] + add);
            }
        }
    }
}

TARGET void linear_wide(const Matrix& w, const void* x, int32_t type, int64_t m, const void* bias, int32_t bias_type,
                        void* out) {
    const int64_t stride = chunks_of(w.columns) * CHUNK;
    std::vector<float> wide(m * stride, 0.f);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t k = 0; k < w.columns; ++k) wide[i * stride + k] = load_float(x, i * w.columns + k, type);
    const Groups groups(w);
#pragma omp parallel
    {
        const Cutter cut = make_cutter(w.bits);
        std::vector<float> scale(w.groups), zero(w.groups);
        float found[4];
#pragma omp for schedule(static)
        for (int64_t row = 0; row < w.rows; ++row) {
            load_row(w, row, scale.data(), zero.data());
            const float add = bias ? load_float(bias, row, bias_type) : 0.f;
            for (int64_t i = 0; i < m; i += 4) {
                const int count = m - i < 4 ? static_cast<int>(m - i) : 4;
                dispatch_f32(count, w, groups, row, cut, wide.data() + i * stride, stride, scale.data(), zero.data(), found);
                for (int j = 0; j < count; ++j) store_float(out, (i + j) * w.rows + row, type, found[j] + add);
            }
        }
    }
}

TARGET void dequantize_rows(const Matrix& w, int32_t type, void* out) {
    const Groups groups(w);
#pragma omp parallel
    {
        const Cutter cut = make_cutter(w.bits);
        std::vector<float> scale(w.groups), zero(w.groups);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < w.rows; ++row) {
            load_row(w, row, scale.data(), zero.data());
            const uint8_t* data = w.qdata + row * w.row_bytes;
            for (int64_t c = 0; c < chunks_of(w.columns); ++c) {
                const __m512i codes = codes_of(data, w.row_bytes, c, cut);
                for (int q = 0; q < 4; ++q) {
                    const int64_t column = c * CHUNK + 16 * q, left = w.columns - column;
                    if (left <= 0) break;
                    const __mmask16 present = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
                    const __m512 value = decode_quarter(codes, groups, c, q, scale.data(), zero.data());
                    const int64_t at = row * w.columns + column;
                    if (type == FLOAT_F32)
                        _mm512_mask_storeu_ps(static_cast<float*>(out) + at, present, value);
                    else if (type == FLOAT_F16)
                        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + at, present,
                                                 _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
                    else
                        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + at, present,
                                                 (__m256i)_mm512_cvtneps_pbh(value));
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
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
}

// x [m, columns] -> out [m, rows], both of `type`; bias [rows] of `bias_type` or null.
void llmquant_linear(const Matrix* w, const void* x, int32_t type, int64_t m, const void* bias, int32_t bias_type,
                     void* out) {
    if (type == FLOAT_BF16)
        linear_bf16(*w, static_cast<const uint16_t*>(x), m, bias, bias_type, static_cast<uint16_t*>(out));
    else
        linear_wide(*w, x, type, m, bias, bias_type, out);
}

// The matrix as floats of `type`, [rows, columns].
void llmquant_dequantize(const Matrix* w, int32_t type, void* out) { dequantize_rows(*w, type, out); }

}  // extern "C"

#else  // another processor or compiler: the library loads and says that it serves nothing

extern "C" {
int32_t llmquant_supported() { return 0; }
void llmquant_linear(const Matrix*, const void*, int32_t, int64_t, const void*, int32_t, void*) {}
void llmquant_dequantize(const Matrix*, int32_t, void*) {}
}

#endif
