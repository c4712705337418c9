// Few inputs against weights of 256 numbers, each a byte (float8), for AVX-512 with VBMI: two tables of bytes give bfloat16
// numbers, products are of float32.
#include "float8.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include "byte_rows.h"

namespace {

// Which group each lane of four columns belongs to.
struct Lanes {
    int64_t vectors;
    const int32_t *first;     // [vectors]: the group of a vector's first column
    const int32_t *relative;  // [vectors, 16]: each lane's group, counted from there
};

Lanes make_lanes(const Matrix& w) {
    Lanes lanes;
    lanes.vectors = (w.columns + CHUNK - 1) / CHUNK;
    int32_t* group = scratch<int32_t>(0, lanes.vectors * 17);
    int32_t* first = group + lanes.vectors * 16;
    const int64_t lanes_a_group = w.groups == 1 ? lanes.vectors * 16 : w.group / 4;
    int32_t g = 0;
    for (int64_t i = 0, left = lanes_a_group; i < lanes.vectors * 16; ++i, --left) {
        if (left == 0) g += g + 1 < w.groups, left = lanes_a_group;
        if (i % 16 == 0) first[i / 16] = g;
        group[i] = g - first[i / 16];
    }
    lanes.first = first;
    lanes.relative = group;
    return lanes;
}

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
TARGET __attribute__((noinline)) void dot(const Matrix& w, const Rows& rows, const ByteTable& bytes,
                                                const Lanes& groups, const float* x, float out[MOST_ROWS][MOST]) {
    const ByteTable table = bytes;
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const int64_t vectors = groups.vectors, step = vectors * CHUNK;
    __m512 total[R][M];
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_ps();
    for (int64_t v = 0; v < vectors; ++v) {
        const __mmask64 present = present_bytes(w.row_bytes, v, CHUNK);
        const __m512i lanes = _mm512_loadu_si512(groups.relative + 16 * v);
        __m512 number[R][4], scale[R];
        for (int r = 0; r < R; ++r) {
            _mm_prefetch(reinterpret_cast<const char*>(rows.data[r] + v * CHUNK + AHEAD), _MM_HINT_T0);
            __m512i first, second;
            look_up_bytes(_mm512_maskz_loadu_epi8(present, rows.data[r] + v * CHUNK), table, &first, &second);
            number[r][0] = _mm512_castsi512_ps(_mm512_slli_epi32(first, 16));
            number[r][1] = _mm512_castsi512_ps(_mm512_and_si512(first, upper));
            number[r][2] = _mm512_castsi512_ps(_mm512_slli_epi32(second, 16));
            number[r][3] = _mm512_castsi512_ps(_mm512_and_si512(second, upper));
            scale[r] = _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(rows.scale[r] + groups.first[v]));
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

}  // namespace

TARGET bool float8_linear(const Matrix& w, const Inputs& in) {
    ByteTable table;
    if (!w.table || w.bits != 8 || w.sparse || (w.groups > 1 && w.group % 16) || !make_byte_table(w.table, &table)) return false;
    using Dot = void (*)(const Matrix&, const Rows&, const ByteTable&, const Lanes&, const float*, float[MOST_ROWS][MOST]);
    const bool one = in.count == 1;
    const Dot dots[] = {nullptr, one ? dot<1, 4> : dot<1, 2>, dot<2, 2>, dot<3, 2>, dot<4, 2>};
    const Lanes lanes = make_lanes(w);
    const int64_t step = lanes.vectors * CHUNK;
    float* x = scratch<float>(1, in.count * step);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < in.count; ++token)
            order_floats(in, token, w.columns, lanes.vectors, x + token * step);
        for_rows(w, in, one ? 4 : 2, [&](const Rows& rows, int64_t i, int64_t count, float found[MOST_ROWS][MOST]) {
            dots[count](w, rows, table, lanes, x + i * step, found);
        });
    }
    return true;
}

#endif
