// Few inputs against the numbers of a table, for AVX-512 with VBMI, where integers do not stand for them: codes of a byte
// (float8), of which two tables of bytes give bfloat16 numbers, and those of four bits (nf4), which `vpermps` looks up.
// Products are of float32.
//
// A vector of packed codes has 16 lanes of 32 bits, PARTS codes each; part p of it is a vector of numbers, one a lane. All
// codes of a lane are in one group.
#include "lookup.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include "float_rows.h"

namespace {

struct Bytes {
    static constexpr int PARTS = 4, WHOLE = 16;  // WHOLE: columns that lanes share among them
    ByteTable table;
};

INLINE bool make_table(const Matrix& w, Bytes* found) {
    return w.bits == 8 && !w.sparse && make_byte_table(w.table, &found->table);
}

INLINE void start_look_up(__m512i packed, const Bytes& codes, __m512i words[2]) {
    look_up_bytes(packed, codes.table, &words[0], &words[1]);
}

INLINE __m512 look_up(const __m512i words[2], const Bytes&, int part) {
    const __m512i pair = words[part / 2];
    if (part % 2 == 0) return _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
    return _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

inline int64_t column_of(const Bytes&, int lane, int part) {
    return 16 * (lane / 4) + 2 * (lane % 4) + part % 2 + 8 * (part / 2);
}

struct Nibbles {
    static constexpr int PARTS = 8, WHOLE = 8;
    __m512 table;
};

INLINE bool make_table(const Matrix& w, Nibbles* found) {
    if (w.bits == 4) found->table = _mm512_loadu_ps(w.table);
    return w.bits == 4;
}

INLINE void start_look_up(__m512i packed, const Nibbles&, __m512i words[2]) { words[0] = packed; }

INLINE __m512 look_up(const __m512i words[2], const Nibbles& codes, int part) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words[0], 4 * part), codes.table);  // it sees four bits
}

inline int64_t column_of(const Nibbles&, int lane, int part) { return 8 * lane + part; }

// Which group each lane belongs to.
struct Lanes {
    int64_t vectors;
    const int32_t *first;     // [vectors]: the group of a vector's first column
    const int32_t *relative;  // [vectors, 16]: each lane's group, counted from there
};

Lanes make_lanes(const Matrix& w, int parts) {
    Lanes lanes;
    lanes.vectors = (w.columns + 16 * parts - 1) / (16 * parts);
    int32_t* group = scratch<int32_t>(0, lanes.vectors * 17);
    int32_t* first = group + lanes.vectors * 16;
    const int64_t lanes_a_group = w.groups == 1 ? lanes.vectors * 16 : w.group / parts;
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

// Inputs as float32 in the order of the numbers: [vectors, PARTS, 16].
template <typename Table>
void order_floats(const Inputs& in, const Table& table, int64_t token, int64_t columns, int64_t vectors, float* to) {
    constexpr int PARTS = Table::PARTS;
    for (int64_t v = 0; v < vectors; ++v)
        for (int part = 0; part < PARTS; ++part)
            for (int lane = 0; lane < 16; ++lane, ++to) {
                const int64_t k = v * 16 * PARTS + column_of(table, lane, part);
                *to = k < columns ? load_float(in.x, token * columns + k, in.type) : 0.f;
            }
}

template <typename Table, int M, int R>
TARGET __attribute__((noinline)) void dot(int64_t row_bytes, const Rows& rows, const Table& given, const Lanes& groups,
                                          const float* x, float out[MOST_ROWS][MOST]) {
    constexpr int PARTS = Table::PARTS, COLUMNS = 16 * PARTS;
    const Table table = given;
    const int64_t vectors = groups.vectors, step = vectors * COLUMNS;
    __m512 total[R][M];
    for (auto& row : total)
        for (__m512& sum : row) sum = _mm512_setzero_ps();
    for (int64_t v = 0; v < vectors; ++v, x += COLUMNS) {
        const __mmask64 present = present_bytes(row_bytes, v, 64);
        const __m512i lanes = _mm512_loadu_si512(groups.relative + 16 * v);
        __m512i words[R][2];
        for (int r = 0; r < R; ++r) {
            _mm_prefetch(reinterpret_cast<const char*>(rows.data[r] + 64 * v + AHEAD), _MM_HINT_T0);
            start_look_up(_mm512_maskz_loadu_epi8(present, rows.data[r] + 64 * v), table, words[r]);
        }
        __m512 sum[R][M];
#pragma GCC unroll 8
        for (int part = 0; part < PARTS; ++part)
            for (int r = 0; r < R; ++r) {
                const __m512 number = look_up(words[r], table, part);
                for (int m = 0; m < M; ++m) {
                    const __m512 input = _mm512_loadu_ps(x + m * step + 16 * part);
                    sum[r][m] = part ? _mm512_fmadd_ps(number, input, sum[r][m]) : _mm512_mul_ps(number, input);
                }
            }
        for (int r = 0; r < R; ++r) {
            const __m512 scale = _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(rows.scale[r] + groups.first[v]));
            for (int m = 0; m < M; ++m) total[r][m] = _mm512_fmadd_ps(scale, sum[r][m], total[r][m]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) out[r][m] = _mm512_reduce_add_ps(total[r][m]);
}

template <typename Table>
TARGET bool run(const Matrix& w, const Inputs& in) {
    Table table;
    if ((w.groups > 1 && w.group % Table::WHOLE) || !make_table(w, &table)) return false;
    using Dot = void (*)(int64_t, const Rows&, const Table&, const Lanes&, const float*, float[MOST_ROWS][MOST]);
    const bool one = in.count == 1;
    const Dot dots[] = {nullptr, one ? dot<Table, 1, 4> : dot<Table, 1, 2>, dot<Table, 2, 2>, dot<Table, 3, 2>, dot<Table, 4, 2>};
    const Lanes lanes = make_lanes(w, Table::PARTS);
    const int64_t step = lanes.vectors * 16 * Table::PARTS;
    float* x = scratch<float>(1, in.count * step);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < in.count; ++token)
            order_floats(in, table, token, w.columns, lanes.vectors, x + token * step);
        for_rows(w, in, one ? 4 : 2, [&](const Rows& rows, int64_t i, int64_t count, float found[MOST_ROWS][MOST]) {
            dots[count](w.row_bytes, rows, table, lanes, x + i * step, found);
        });
    }
    return true;
}

}  // namespace

bool lookup_linear(const Matrix& w, const Inputs& in) {
    return in.activation == PLAIN && w.table && (w.bits == 8 ? run<Bytes>(w, in) : run<Nibbles>(w, in));
}

#endif
