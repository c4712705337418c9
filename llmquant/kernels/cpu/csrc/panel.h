// Packed weights as tiles of bfloat16, for amx.cpp, and numbers taken apart into bfloat16 parts.
#pragma once
#include <cmath>

#include "decode.h"
#include "tiles.h"

namespace {

constexpr int64_t WIDTH = 32;  // columns of a tile
constexpr int64_t SOON = 6;    // rows that codes are brought to the first-level cache ahead

alignas(64) constexpr uint16_t UPPER_HALVES[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                   33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};

// 32 numbers, from which one part after the other is taken.
struct Numbers {
    __m512 low, high;

    // Part `p` of `parts`: what is nearest to the numbers, which keep the rest.
    __attribute__((always_inline)) TILES inline __m512i take_part(int p, int parts) {
        if (p + 1 == parts) return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
        const __m512 near_low = round(low), near_high = round(high);
        low = _mm512_sub_ps(low, near_low);
        high = _mm512_sub_ps(high, near_high);
        const __m512i upper = _mm512_load_si512(UPPER_HALVES);
        return _mm512_permutex2var_epi16(_mm512_castps_si512(near_low), upper, _mm512_castps_si512(near_high));
    }

   private:
    // To as many bits as bfloat16 has. A NaN may be lost here, but not in the rest.
    __attribute__((always_inline)) TILES static inline __m512 round(__m512 value) {
        const __m512i up = _mm512_add_epi32(_mm512_castps_si512(value), _mm512_set1_epi32(0x8000));
        return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    }
};

// Which code goes to each byte, so that after two bytes of its own meet at every second eight of them the columns 0 .. 15
// of each 32 are in even words and 16 .. 31 in odd ones.
struct Places {
    alignas(64) uint8_t from[64];
    constexpr Places() : from() {
        for (int i = 0; i < 64; ++i) {
            const int word = i / 16 * 8 + i % 8, tile = i / 8 % 2;
            from[i] = static_cast<uint8_t>(32 * tile + word / 2 + word % 2 * 16);
        }
    }
};
constexpr Places IN_HALVES;

// How codes become bfloat16 numbers, or the parts of them.
//   TABLE: up to five bits, or a table of six: the values of all codes, taken apart once a group, and `vpermw` looks them
//   up; HALVES: the same of up to four bits in groups of 16 columns, two groups side by side in a table;
//   NUMBERS: more bits: converted, zero taken off, multiplied by the scale;
//   FLOAT8: tables of bytes; any other table goes through float32 (OTHER).
// Where a row has one scale it is left out here, which is exact, and multiplied with the sums.
enum How { TABLE, HALVES, NUMBERS, FLOAT8, OTHER };

// What a table in vectors of 32 words holds: the same 16 numbers twice, 32 or 64 of them, or 16 of each of two groups.
enum Shape { TWICE, ONE_VECTOR, TWO_VECTORS, TWO_GROUPS };

// The bits that the mantissas of a table's numbers take, the leading one among them.
inline int significant_bits(const float* table, int count) {
    int most = 1;
    for (int i = 0; i < count; ++i) {
        const uint32_t mantissa = (bits_of(table[i]) & 0x7fffff) | 0x800000;
        const int bits = 24 - __builtin_ctz(mantissa);
        if (std::isfinite(table[i])) most = bits > most ? bits : most;
    }
    return most;
}

struct Panel {
    // What is alike for all rows of a panel: the columns, the bytes of a row of tiles, the groups of the columns, the
    // cache lines of a row's codes, and how far behind the row's start the codes lie that are wanted next. And, by pieces
    // of 32 columns: how many there are, those of a group and of the first one, those of which 32 bytes can be read
    // without leaving the row.
    struct Block {
        int64_t start, stop, tile_bytes, group, groups, lines, ahead;
        int64_t pieces, per, head, safe;
    };

    const Matrix& w;
    const Cutter cutter;
    const Groups groups;
    const bool one_scale;
    How how;
    int parts;  // of a weight
    void (Panel::*decode_block)(int64_t, int64_t, const Block&, uint8_t*) const;
    ByteTable bytes;
    alignas(64) uint8_t from[64], shifts[64];  // see `by_table`
    alignas(64) float numbers[64];

    TILES Panel(const Matrix& matrix, int most_parts)
        : w(matrix), cutter(make_cutter(matrix)), groups(make_groups(matrix)), one_scale(matrix.groups == 1) {
        const bool whole = one_scale || w.group % 32 == 0;
        if (w.table && w.bits == 8)
            how = whole && make_byte_table(w.table, &bytes) ? FLOAT8 : OTHER;
        else if (whole)
            how = w.bits <= (w.table ? 6 : 5) ? TABLE : w.table ? OTHER : NUMBERS;
        else
            how = w.bits <= 4 && w.group == 16 ? HALVES : OTHER;
        const int needed = needed_parts();
        parts = needed < most_parts ? needed : most_parts;
        decode_block = parts == 1 ? choose_decoder<1>() : parts == 2 ? choose_decoder<2>() : choose_decoder<3>();
        const int top = (1 << w.bits) - 1;
        for (int i = 0; i < 64; ++i) {
            const int first_bit = i / 8 * 4 * w.bits;
            from[i] = static_cast<uint8_t>((first_bit / 8 + i % 8) & 31);
            shifts[i] = static_cast<uint8_t>(first_bit % 8 + i % 8 / 2 * w.bits);
        }
        if (how == NUMBERS) place_numbers();
        for (int i = 0; i < 64; ++i) numbers[i] = w.table ? w.table[i & top] : static_cast<float>(i & top);
    }

    // Rows first .. last - 1, columns start .. stop - 1 as tiles [rows / 16, chunks, parts] of 16 rows x 32
    // columns.
    TILES void decode(int64_t first, int64_t last, int64_t start, int64_t stop, uint8_t* out) const {
        const int64_t pieces = (stop - start + WIDTH - 1) / WIDTH;
        Block at = {start, stop, pieces * parts * TILE_BYTES, 0, 1, 0, bytes_before(w, stop), pieces, pieces, pieces, 0};
        if (!one_scale) {
            at.group = start / w.group, at.groups = (stop - 1) / w.group + 1 - at.group;
            at.per = w.group < WIDTH ? 1 : w.group / WIDTH;
            at.head = at.per - start / WIDTH % at.per;
        }
        if (w.row_bytes >= 32) at.safe = (w.row_bytes - 32) / (4 * w.bits) - start / WIDTH + 1;
        at.lines = (bytes_before(w, stop - start) + 63) / 64;
        // Rows are read piece by piece, which no hardware foresees: fetch the next piece, or the next panel's first.
        if (stop >= w.columns) at.ahead = (last - first) * w.row_bytes;
        (this->*decode_block)(first, last, at, out);
    }

    // The scales of 16 rows where they were left out.
    TILES __m512 row_scales(int64_t row) const {
        if (!one_scale || how == OTHER) return _mm512_set1_ps(1.f);
        alignas(64) float scales[TILE];
        for (int64_t i = 0; i < TILE; ++i)
            scales[i] = load_scale(w, (row + i < w.rows ? row + i : w.rows - 1) / w.shared, 0);
        return _mm512_load_ps(scales);
    }

   private:
    // See `by_number`.
    void place_numbers() {
        for (int i = 0; i < 64; ++i) {
            const int first_bit = i / 8 * 2 * w.bits, high = i % 8 / 4;  // of the columns from 16 on
            from[i] = static_cast<uint8_t>((first_bit / 8 + high * 2 * w.bits + i % 4) & 31);
            shifts[i] = static_cast<uint8_t>(first_bit % 8 + i % 8 / 4 * w.bits + i % 2 * 32);
        }
    }

    // W parts hold 9 W - 1 bits (the next one's sign counts); a product has as many as its factors together.
    int needed_parts() const {
        constexpr int SCALES[] = {24, 11, 8, 1, 4, 8, 7};  // by type
        const int scale = w.outer ? 24 : SCALES[w.scale_type];
        const int number = w.table ? significant_bits(w.table, 1 << w.bits) : w.bits;
        const int bits = number + (one_scale && how != OTHER ? 0 : scale);
        return bits <= 8 ? 1 : bits <= 17 ? 2 : 3;
    }

    template <int W>
    auto choose_decoder() const -> decltype(decode_block) {
        const bool zeros = w.zero_point != nullptr;
        if (how == NUMBERS) return zeros ? &Panel::by_number<true, W> : &Panel::by_number<false, W>;
        if (how == FLOAT8) return one_scale ? &Panel::by_bytes<false, 1> : &Panel::by_bytes<true, W>;
        if (how == OTHER) return &Panel::by_float<W>;
        if (how == HALVES) return zeros ? &Panel::by_table<TWO_GROUPS, true, W> : &Panel::by_table<TWO_GROUPS, false, W>;
        if (w.bits == 6) return &Panel::by_table<TWO_VECTORS, false, W>;
        if (w.bits == 5) return zeros ? &Panel::by_table<ONE_VECTOR, true, W> : &Panel::by_table<ONE_VECTOR, false, W>;
        return zeros ? &Panel::by_table<TWICE, true, W> : &Panel::by_table<TWICE, false, W>;
    }

    // Reads each row's scales and calls `decode_row(row, where its tiles begin)`.
    template <typename DecodeRow>
    __attribute__((always_inline)) TILES inline void each_row(int64_t first, int64_t last, const Block& at, uint8_t* out,
                                                             const DecodeRow& decode_row) const {
        for (int64_t row = first; row < last; ++row) {
            const uint8_t* next = w.qdata + row * w.row_bytes + at.ahead;
            const uint8_t* soon = w.qdata + (row + SOON) * w.row_bytes + bytes_before(w, at.start);
            for (int64_t line = 0; line < at.lines; ++line) _mm_prefetch(soon + 64 * line, _MM_HINT_T0);
            for (int64_t line = 0; line < at.lines; ++line) _mm_prefetch(next + 64 * line, _MM_HINT_T1);
            read_groups(w, row, cutter, groups.scale, groups.zero, at.group, at.group + at.groups);
            decode_row(row, out + (row - first) / TILE * at.tile_bytes + (row - first) % TILE * 64);
        }
    }

    // Calls `set()` where a group begins, and `put(bytes, to)` with the packed bytes of each 32 columns (more lie behind
    // them, but never behind the row) and where their numbers go.
    template <int W, typename Set, typename Put>
    __attribute__((always_inline)) TILES inline void by_pieces(const Block& at, int64_t row, uint8_t* to, const Set& set,
                                                              const Put& put) const {
        const int64_t step = 4 * w.bits, pieces = at.pieces, per = at.per, head = at.head, safe = at.safe;
        const uint8_t* packed = w.qdata + row * w.row_bytes + at.start / WIDTH * step;
        const uint8_t* end = w.qdata + (row + 1) * w.row_bytes;
        for (int64_t i = 0, left = 0; i < pieces; ++i, packed += step, to += W * TILE_BYTES) {
            if (left-- == 0) {
                set();
                left = (i ? per : head) - 1;
            }
            put(_mm512_castsi256_si512(i < safe ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed))
                                                : _mm256_maskz_loadu_epi8((1u << (end - packed)) - 1, packed)),
                to);
        }
    }

    // Four codes a 64-bit lane: `vpermb` brings the bytes they lie in, `vpmultishiftqb` each one to a word, with other
    // bits above it, which `vpermw` does not look at: it sees five, or with two vectors six.
    template <int SHAPE, bool ZEROS, int W>
    TILES void by_table(int64_t first, int64_t last, const Block& at, uint8_t* out) const {
        constexpr bool PAIR = SHAPE == TWO_GROUPS;
        constexpr int VECTORS = SHAPE == TWO_VECTORS ? 2 : 1;
        const __m512i bytes_from = _mm512_load_si512(from), shift = _mm512_load_si512(shifts);
        const __m512i fifteen = _mm512_set1_epi16(15), second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
        const int64_t last_group = at.group + at.groups - 1;
        const bool scaled = !one_scale;
        __m512 base[4];  // the table under a scale of 1
        for (int v = 0; v < 4; ++v)
            base[v] = _mm512_sub_ps(_mm512_load_ps(numbers + 16 * v), _mm512_set1_ps(ZEROS || w.table ? 0.f : w.midpoint));
        each_row(first, last, at, out, [&](int64_t row, uint8_t* to) TILES __attribute__((always_inline)) {
            const float *scales = groups.scale, *zeros = groups.zero;
            int64_t g = at.group;
            const auto numbers_of_group = [&](int v) TILES __attribute__((always_inline)) {
                const __m512 number = ZEROS ? _mm512_sub_ps(base[v], _mm512_set1_ps(zeros[g])) : base[v];
                return _mm512_mul_ps(number, _mm512_set1_ps(scaled ? scales[g] : 1.f));
            };
            __m512i table[W][VECTORS] = {};
            const auto make_table = [&]() TILES __attribute__((always_inline)) {
                Numbers values[VECTORS];
                for (int v = 0; v < VECTORS; ++v) {
                    values[v].low = numbers_of_group(2 * v);
                    if (PAIR) g += g < last_group;  // the row may end before its tile
                    values[v].high = SHAPE == TWICE ? values[v].low : numbers_of_group(PAIR ? 0 : 2 * v + 1);
                }
                for (int p = 0; p < W; ++p)
                    for (int v = 0; v < VECTORS; ++v) table[p][v] = values[v].take_part(p, W);
                ++g;
            };
            by_pieces<W>(at, row, to, make_table, [&](__m512i packed, uint8_t* tile_row) TILES __attribute__((always_inline)) {
                __m512i codes = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(bytes_from, packed));
                if (PAIR) codes = _mm512_ternarylogic_epi64(codes, fifteen, second, 0xea);  // (codes & 15) | 16
                for (int p = 0; p < W; ++p)
                    _mm512_store_si512(tile_row + p * TILE_BYTES,
                                       VECTORS == 2 ? _mm512_permutex2var_epi16(table[p][0], codes, table[p][VECTORS - 1])
                                                    : _mm512_permutexvar_epi16(codes, table[p][0]));
            });
        });
    }

    // Codes come to the lowest bytes of words, those of columns 16 .. 31 above those of 0 .. 15. There they are the last
    // bits of 2^23 + code in float32: no conversion is needed.
    template <bool ZEROS, int W>
    TILES void by_number(int64_t first, int64_t last, const Block& at, uint8_t* out) const {
        constexpr float START = 0x1p23f;
        const __m512i bytes_from = _mm512_load_si512(from), shift = _mm512_load_si512(shifts);
        const __m512i mask = _mm512_set1_epi32((1 << w.bits) - 1), start = _mm512_castps_si512(_mm512_set1_ps(START));
        const bool scaled = !one_scale;
        each_row(first, last, at, out, [&](int64_t row, uint8_t* to) TILES __attribute__((always_inline)) {
            const float *next_scale = groups.scale + at.group, *next_zero = groups.zero + at.group;
            __m512 scale = _mm512_set1_ps(1.f), zero = _mm512_set1_ps(START + w.midpoint);
            const auto begin_group = [&]() TILES __attribute__((always_inline)) {
                if (scaled) scale = _mm512_set1_ps(*next_scale++);
                if (ZEROS) zero = _mm512_set1_ps(START + *next_zero++);
            };
            const auto number = [&](__m512i code) TILES __attribute__((always_inline)) {
                const __m512 sum = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(code, mask, start, 0xea));  // code & mask | start
                return _mm512_mul_ps(_mm512_sub_ps(sum, zero), scale);
            };
            by_pieces<W>(at, row, to, begin_group, [&](__m512i packed, uint8_t* tile_row) TILES __attribute__((always_inline)) {
                const __m512i codes = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(bytes_from, packed));
                Numbers values = {number(codes), number(_mm512_srli_epi32(codes, 8))};
                for (int p = 0; p < W; ++p) _mm512_store_si512(tile_row + p * TILE_BYTES, values.take_part(p, W));
            });
        });
    }

    // SCALED: each group has a scale; else the numbers as they are, in one part.
    template <bool SCALED, int W>
    TILES void by_bytes(int64_t first, int64_t last, const Block& at, uint8_t* out) const {
        each_row(first, last, at, out, [&](int64_t row, uint8_t* to) TILES {
            SCALED ? scaled_byte_row<W>(row, at, to) : byte_row(row, at, to);
        });
    }

    TILES void byte_row(int64_t row, const Block& at, uint8_t* to) const {
        const uint8_t* data = w.qdata + row * w.row_bytes;
        // `look_up_bytes` leaves columns in eights: 0, 2, 4, 6 of them in the first vector, the odd ones in the second.
        const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        for (int64_t k = at.start; k < at.stop; k += CHUNK, to += 2 * TILE_BYTES) {
            __m512i first, second;
            look_up_bytes(codes_of(data, w.row_bytes, k / CHUNK, cutter), bytes, &first, &second);
            _mm512_store_si512(to, _mm512_permutex2var_epi64(first, low, second));
            if (k + WIDTH < at.stop) _mm512_store_si512(to + TILE_BYTES, _mm512_permutex2var_epi64(first, high, second));
        }
    }

    // Codes change places first: then `look_up_bytes` leaves in each vector the first 16 of 32 columns in the even words
    // and the others in the odd ones, where they are float32 numbers but for a shift or a mask.
    template <int W>
    TILES void scaled_byte_row(int64_t row, const Block& at, uint8_t* to) const {
        const uint8_t* data = w.qdata + row * w.row_bytes;
        const ByteTable table = bytes;  // a copy: stores might change what `this` points to, for all the compiler knows
        const __m512i places = _mm512_load_si512(IN_HALVES.from);
        const float* scale = groups.scale + at.group;
        const int64_t per = w.group / WIDTH;
        int64_t left = per - at.start % w.group / WIDTH;
        const auto put = [&](__m512i words) TILES __attribute__((always_inline)) {
            put_scaled<W>(words, *scale, to);
            if (--left == 0) ++scale, left = per;
            to += W * TILE_BYTES;
        };
        for (int64_t k = at.start; k < at.stop; k += CHUNK) {
            __m512i first, second;
            const __m512i codes = codes_of(data, w.row_bytes, k / CHUNK, cutter);
            look_up_bytes(_mm512_permutexvar_epi8(places, codes), table, &first, &second);
            put(first);
            if (k + WIDTH < at.stop) put(second);
        }
    }

    // 32 bfloat16 numbers, the first 16 in the even words, times a scale.
    template <int W>
    __attribute__((always_inline)) TILES inline void put_scaled(__m512i words, float scale, uint8_t* to) const {
        const __m512 factor = _mm512_set1_ps(scale);
        const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
        Numbers values = {_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), factor),
                          _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(words, upper)), factor)};
        for (int p = 0; p < W; ++p) _mm512_store_si512(to + p * TILE_BYTES, values.take_part(p, W));
    }

    template <int W>
    TILES void by_float(int64_t first, int64_t last, const Block& at, uint8_t* out) const {
        each_row(first, last, at, out, [&](int64_t row, uint8_t* to) TILES { float_row<W>(row, at, to); });
    }

    template <int W>
    TILES void float_row(int64_t row, const Block& at, uint8_t* to) const {
        const Decoder decoder(w, groups, row);
        for (int64_t k = at.start; k < at.stop; k += WIDTH, to += W * TILE_BYTES) {
            const __m512i codes = decoder.codes(k / CHUNK);
            const int q = k % CHUNK / 16;
            // A tile's columns behind the row meet inputs of 0, so they need only be finite.
            Numbers values = {decoder.floats(codes, k / CHUNK, q), _mm512_setzero_ps()};
            if (k + 16 < at.stop) values.high = decoder.floats(codes, k / CHUNK, q + 1);
            for (int p = 0; p < W; ++p) _mm512_store_si512(to + p * TILE_BYTES, values.take_part(p, W));
        }
    }
};

}  // namespace
