// Few inputs against 2:4 sparse codes of bytes, for AVX-512 with VBMI: only the codes that were kept are decoded and
// multiplied, each by the input at its place.
//
// Four columns of float32 inputs are a lane of 128 bits, out of which `vpermilps` picks any four numbers: two for the
// codes of one row, two for those of another. So rows go in pairs, and a chunk of 64 columns of two rows is four vectors
// of numbers: vector t has in lane f what belongs to four 4 t + f. A row has one scale, which its sum meets at the end.
#include "sparse.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include "float_rows.h"
#include "kernels.h"

namespace {

constexpr int CHUNK_BYTES = 40;  // of 64 columns: eight times the places of two fours, and four codes

// Where what two rows have in a chunk goes: bytes for the first of them, which the second one fills the rest of.
struct Picks {
    // Such that `look_up_bytes` leaves the numbers of vector t in lanes, in the order that the file begins with.
    alignas(64) uint8_t codes[64];
    // Byte t of a word of 32 bits: the places of vector t, those of an odd four still in the upper half.
    alignas(64) uint8_t places[64];
    // By how many bits such a word is to be shifted, so that it begins with the place of its own code.
    alignas(64) int32_t shifts[16];
    // Which bytes are of the second row.
    uint64_t second_codes, second_places;

    constexpr Picks() : codes(), places(), shifts(), second_codes(0), second_places(0) {
        for (int f = 0; f < 4; ++f)
            for (int word = 0; word < 4; ++word) {
                shifts[4 * f + word] = f % 2 * 4 + word % 2 * 2;
                for (int t = 0; t < 4; ++t) {
                    const int unit = (4 * t + f) / 2 * 5, code = 16 * f + t / 2 * 8 + 2 * word + t % 2, place = 16 * f + 4 * word + t;
                    codes[code] = static_cast<uint8_t>(unit + 1 + f % 2 * 2 + word % 2);
                    places[place] = static_cast<uint8_t>(unit);
                    second_codes |= static_cast<uint64_t>(word > 1) << code;
                    second_places |= static_cast<uint64_t>(word > 1) << place;
                }
            }
    }
};
constexpr Picks PICKS;

// A chunk of two rows: numbers, and in the lowest two bits of a word the column of its four that each one stands in.
struct Pair {
    __m512 numbers[4];
    __m512i columns[4];
};

INLINE Pair decode_pair(__m512i first, __m512i second, const ByteTable& table) {
    const __m512i code_at = _mm512_load_si512(PICKS.codes), place_at = _mm512_load_si512(PICKS.places);
    const __m512i codes = _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(code_at, first), PICKS.second_codes, code_at, second);
    const __m512i places =
        _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(place_at, first), PICKS.second_places, place_at, second);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    __m512i low, high;
    look_up_bytes(codes, table, &low, &high);
    Pair pair;
    pair.numbers[0] = _mm512_castsi512_ps(_mm512_slli_epi32(low, 16));
    pair.numbers[1] = _mm512_castsi512_ps(_mm512_and_si512(low, upper));
    pair.numbers[2] = _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
    pair.numbers[3] = _mm512_castsi512_ps(_mm512_and_si512(high, upper));
    pair.columns[0] = _mm512_srlv_epi32(places, _mm512_load_si512(PICKS.shifts));
    for (int t = 1; t < 4; ++t) pair.columns[t] = _mm512_srli_epi32(pair.columns[0], 8 * t);
    return pair;
}

// The inputs as float32, [vectors, 64]; whether all are finite.
TARGET bool widen(const Inputs& in, int64_t token, int64_t columns, int64_t vectors, float* to) {
    __mmask16 bad = 0;
    for (int64_t k = 0; k < vectors * CHUNK; k += 16) {
        const __m512 x = load_floats(in.x, token * columns + k, in.type, first_lanes(columns - k));
        bad |= _mm512_fpclass_ps_mask(x, 0x99);  // infinities and NaN
        _mm512_storeu_ps(to + k, x);
    }
    return bad == 0;
}

// MOST_ROWS rows, two by two, against M inputs.
template <int M>
TARGET __attribute__((noinline)) void dot(const Rows& rows, int64_t row_bytes, const ByteTable& bytes, int64_t vectors,
                                          const float* x, float out[MOST_ROWS][MOST]) {
    constexpr int PAIRS = MOST_ROWS / 2;
    const ByteTable table = bytes;
    __m512 total[PAIRS][M];
    for (auto& pair : total)
        for (__m512& sum : pair) sum = _mm512_setzero_ps();
    for (int64_t v = 0; v < vectors; ++v) {
        const __mmask64 present = present_bytes(row_bytes, v, CHUNK_BYTES);
        for (int i = 0; i < PAIRS; ++i) {
            __m512i packed[2];
            for (int r = 0; r < 2; ++r) {
                const uint8_t* data = rows.data[2 * i + r] + v * CHUNK_BYTES;
                _mm_prefetch(reinterpret_cast<const char*>(data + AHEAD), _MM_HINT_T0);
                packed[r] = _mm512_maskz_loadu_epi8(present, data);
            }
            const Pair pair = decode_pair(packed[0], packed[1], table);
            for (int m = 0; m < M; ++m)
                for (int t = 0; t < 4; ++t) {
                    const __m512 four = _mm512_loadu_ps(x + (m * vectors + v) * CHUNK + 16 * t);
                    total[i][m] = _mm512_fmadd_ps(pair.numbers[t], _mm512_permutevar_ps(four, pair.columns[t]), total[i][m]);
                }
        }
    }
    for (int r = 0; r < MOST_ROWS; ++r)
        for (int m = 0; m < M; ++m)
            out[r][m] = _mm512_mask_reduce_add_ps(r % 2 ? 0xcccc : 0x3333, total[r / 2][m]) * rows.scale[r][0];
}

}  // namespace

TARGET bool sparse_linear(const Matrix& w, const Inputs& in) {
    ByteTable table;
    if (!w.sparse || w.groups != 1 || !make_byte_table(w.table, &table)) return false;
    using Dot = void (*)(const Rows&, int64_t, const ByteTable&, int64_t, const float*, float[MOST_ROWS][MOST]);
    constexpr Dot DOTS[] = {nullptr, dot<1>, dot<2>, dot<3>, dot<4>};
    const int64_t vectors = (w.columns + CHUNK - 1) / CHUNK, step = vectors * CHUNK;
    float* x = scratch<float>(1, in.count * step);
    uint8_t* bad = scratch<uint8_t>(7, in.count);  // where an input meets codes that were dropped, too: 0 times NaN
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < in.count; ++token)
            bad[token] = !widen(in, token, w.columns, vectors, x + token * step);
        for_rows(w, in, MOST_ROWS, [&](const Rows& rows, int64_t i, int64_t count, float found[MOST_ROWS][MOST]) {
            DOTS[count](rows, w.row_bytes, table, vectors, x + i * step, found);
        });
    }
    redo_marked(PLAIN_AVX512, w, in, bad);
    return true;
}

#endif
