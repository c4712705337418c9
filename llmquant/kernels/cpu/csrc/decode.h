// Packed rows as floats: float32 exactly as the reference decodes them, or the nearest bfloat16 by table.
#pragma once
#include "vbmi.h"

namespace {

// Turns rows into numbers; made once a thread, `start` chooses the row.
struct Decoder {
    const Matrix& w;
    const Cutter cutter;
    const Groups groups;
    const bool by_group;      // bfloat16: a table of the group's values, rounded once
    const bool by_byte;       // bfloat16: float8 codes through tables of bytes
    ByteTable bytes;
    __m512 low, high;         // the first 32 codes as numbers
    const uint8_t* row;
    int64_t tail;             // columns of the last 64 that are there

    TARGET explicit Decoder(const Matrix& matrix)
        : w(matrix),
          cutter(make_cutter(matrix.bits)),
          groups(make_groups(matrix)),
          by_group(matrix.bits <= 5 && (matrix.groups == 1 || matrix.group % 32 == 0)),
          by_byte(matrix.bits == 8 && matrix.table && (matrix.groups == 1 || matrix.group % 16 == 0) &&
                  make_byte_table(matrix.table, &bytes)) {
        alignas(64) float numbers[32];
        const int top = (1 << matrix.bits) - 1;
        for (int i = 0; i < 32; ++i)
            numbers[i] = matrix.table ? matrix.table[i & top] : static_cast<float>(i & top);
        low = _mm512_load_ps(numbers);
        high = _mm512_load_ps(numbers + 16);
    }

    TARGET void start(int64_t at) {
        read_groups(w, at, cutter, groups.scale, groups.zero);
        row = w.qdata + at * w.row_bytes;
    }

    __attribute__((always_inline)) TARGET inline __m512i codes(int64_t c) const {
        return codes_of(row, w.row_bytes, c, cutter);
    }

    // The values of the 32 codes below 2^5 under the scale and zero of group `g`, as bfloat16.
    __attribute__((always_inline)) TARGET inline __m512i group_table(int64_t g) const {
        const __m512 s = _mm512_set1_ps(groups.scale[g]), z = _mm512_set1_ps(w.table ? 0.f : groups.zero[g]);
        const __m256i first = to_bfloat(_mm512_mul_ps(_mm512_sub_ps(low, z), s));
        if (w.bits <= 4) return _mm512_broadcast_i64x4(first);
        return _mm512_inserti64x4(_mm512_castsi256_si512(first), to_bfloat(_mm512_mul_ps(_mm512_sub_ps(high, z), s)), 1);
    }

    // Columns 64 c + 16 q on, 16 of them, in float32.
    __attribute__((always_inline)) TARGET inline __m512 floats(__m512i codes, int64_t c, int q) const {
        const __m512i code = quarter(codes, q);
        const int64_t column = c * CHUNK + 16 * q;
        __m512 scale, zero;
        if (w.groups == 1 || w.group % 16 == 0) {
            const int64_t g = w.groups == 1 ? 0 : column / w.group < w.groups ? column / w.group : w.groups - 1;
            scale = _mm512_set1_ps(groups.scale[g]);
            zero = _mm512_set1_ps(groups.zero[g]);
        } else {
            alignas(64) int32_t index[16];
            for (int i = 0; i < 16; ++i) {
                const int64_t g = (column + i) / w.group;
                index[i] = static_cast<int32_t>(g < w.groups ? g : w.groups - 1);
            }
            const __m512i at = _mm512_load_si512(index);
            scale = _mm512_i32gather_ps(at, groups.scale, 4);
            zero = _mm512_i32gather_ps(at, groups.zero, 4);
        }
        if (w.table) return _mm512_mul_ps(_mm512_i32gather_ps(code, w.table, 4), scale);
        return _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(code), zero), scale);
    }

    // Columns 64 c to 64 c + 63 in bfloat16; behind the row's end anything finite times the last scale.
    __attribute__((always_inline)) TARGET inline void bfloats(int64_t c, __m512i out[2]) const {
        const __m512i cut = codes(c);
        if (by_group) {
            const int64_t per = w.groups == 1 ? w.columns + CHUNK : w.group, last = w.groups - 1;
            const int64_t a = c * CHUNK / per, b = (c * CHUNK + 32) / per;
            const __m512i first = group_table(a < last ? a : last);
            const __m512i second = a == b ? first : group_table(b < last ? b : last);
            out[0] = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(cut)), first);
            out[1] = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(cut, 1)), second);
            return;
        }
        for (int half = 0; half < 2; ++half) {
            const __m256i lower = to_bfloat(floats(cut, c, 2 * half)), upper = to_bfloat(floats(cut, c, 2 * half + 1));
            out[half] = _mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1);
        }
    }
};

}  // namespace
