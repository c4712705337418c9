// Packed rows as float32, exactly as the reference decodes them.
#pragma once
#include "vbmi.h"

namespace {

// One row's numbers; its scales and zeros were read into `groups`.
struct Decoder {
    const Matrix& w;
    const Groups groups;
    const Cutter cutter;
    const uint8_t* data;

    TARGET Decoder(const Matrix& matrix, const Groups& read, int64_t row)
        : w(matrix), groups(read), cutter(make_cutter(matrix)), data(matrix.qdata + row * matrix.row_bytes) {}

    __attribute__((always_inline)) TARGET inline __m512i codes(int64_t c) const {
        return codes_of(data, w.row_bytes, c, cutter);
    }

    // Columns 64 c + 16 q on, 16 of them, from the codes of chunk c.
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
        if (w.table) return _mm512_mul_ps(look_up(code), scale);
        return _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(code), zero), scale);
    }

   private:
    __attribute__((always_inline)) TARGET inline __m512 look_up(__m512i code) const {
        if (w.bits != 4) return _mm512_i32gather_ps(code, w.table, 4);
        return _mm512_permutexvar_ps(code, _mm512_loadu_ps(w.table));
    }
};

}  // namespace
