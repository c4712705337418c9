// Many inputs, for processors with AMX: panels of rows are decoded to bfloat16 and multiplied in tiles.
//
// Numbers that bfloat16 does not hold are taken apart: part 0 is the bfloat16 nearest to the number, part 1 the one
// nearest to what is left, and so on. Inputs have as many parts as their type needs, IN (bfloat16 1, float16 2, float32
// 3: exact), weights no more than that, W. Part p of a weight meets part q of an input where p + q < IN: the products
// that are left out lie below the rounding of the output. Parts lie side by side, so all of them add to the same sums.
// AMX takes what is below 2^-126 for zero, and parts of small numbers come to that; the parts of an infinity add up to
// NaN. So tokens of tiny inputs only, and those whose sums are not finite, go to the plain kernel. (Of a weight below
// 2^-110 bits are lost all the same.)
//
// A tile of the weights is 16 rows x 32 columns, a tile of the inputs 32 columns x 16 tokens in pairs, as `tdpbf16ps`
// wants them; two by two of each make four tiles of sums, [16 rows, 16 tokens] in float32. A thread takes a panel of
// rows, decodes about `DEPTH` columns of it (they then lie in its second-level cache, and so do the panel's sums) and
// runs all tokens over them. Int8 activations become the bfloat16 nearest to code x scale.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "decode.h"
#include "tiles.h"

bool fits_int8_tiles(const Matrix& w, const Inputs& in);
void int8_tile_linear(const Matrix& w, const Inputs& in);

namespace {

constexpr int64_t WIDTH = 32;                // columns of a tile
constexpr int64_t PANEL = 256, DEPTH = 512;  // rows and columns that are decoded at a time ...
constexpr int64_t DEPTH_OF_PARTS = 128;      // ... and columns where inputs have several parts
constexpr int64_t MOST_PACKED = 16 << 20;    // bytes of inputs that are packed at a time
constexpr float TINY = 0x1p-64f;             // parts of a token with no larger input may come to nothing
// Inputs from which tiles are faster than vectors: float32, float16, bfloat16; int8 codes; int8 codes that become
// bfloat16.
constexpr int64_t FEWEST_PLAIN[] = {8, 10, 10}, FEWEST_CODES = 6, FEWEST_MIXED = 20;

int input_parts(const Inputs& in) { return in.type == FLOAT_F32 ? 3 : in.type == FLOAT_F16 ? 2 : 1; }

// 32 inputs of a token as bfloat16, zero behind its end.
INLINE __m512i load_bfloats(const uint16_t* x, int64_t left) {
    const __mmask32 present = left >= 32 ? ~0u : (1u << (left > 0 ? left : 0)) - 1;
    return _mm512_maskz_loadu_epi16(present, x);
}

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

// The token's int8 activations, decoded again and rounded to bfloat16.
TARGET void decode_activations(const Inputs& in, int64_t token, int64_t columns, uint16_t* out) {
    int32_t* codes = scratch<int32_t>(3, in.group + 16);
    for (int64_t start = 0; start < columns; start += in.group) {
        const int64_t count = start + in.group < columns ? in.group : columns - start;
        const __m512 scale = _mm512_set1_ps(quantize_group(in, token * columns + start, count, codes));
        for (int64_t k = 0; k < count; k += 16)
            store_floats(out, start + k, FLOAT_BF16, first_lanes(count - k),
                         _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(codes + k)), scale));
    }
}

// Tokens `first` .. `first` + 15 of bfloat16 inputs as tiles [chunks] of 16 column pairs x 16 tokens.
TARGET void pack_bfloats(const Matrix& w, const Inputs& in, int64_t first, uint8_t* out) {
    const uint16_t* rows[TILE];
    uint16_t* decoded = in.activation == PLAIN ? nullptr : scratch<uint16_t>(4, TILE * w.columns);
    const int64_t count = in.count - first < TILE ? in.count - first : TILE;
    for (int64_t i = 0; i < count; ++i) {
        rows[i] = static_cast<const uint16_t*>(in.x) + (first + i) * w.columns;
        if (!decoded) continue;
        decode_activations(in, first + i, w.columns, decoded + i * w.columns);
        rows[i] = decoded + i * w.columns;
    }
    for (int64_t k = 0; k < w.columns; k += WIDTH, out += TILE_BYTES) {
        __m512i v[TILE];
        for (int64_t i = 0; i < TILE; ++i)
            v[i] = i < count ? load_bfloats(rows[i] + k, w.columns - k) : _mm512_setzero_si512();
        transpose(v);
        for (int64_t i = 0; i < TILE; ++i) _mm512_store_si512(out + 64 * i, v[i]);
    }
}

// The same of wider inputs, as tiles [chunks, IN]. `plain[token]` becomes whether the plain kernel should take a token.
template <int IN>
TILES void pack_parts(const Matrix& w, const Inputs& in, int64_t first, uint8_t* out, uint8_t* plain) {
    const int64_t count = in.count - first < TILE ? in.count - first : TILE;
    __m512 largest[TILE] = {};
    for (int64_t k = 0; k < w.columns; k += WIDTH) {
        const __mmask16 low = first_lanes(w.columns - k), high = first_lanes(w.columns - k - 16);
        Numbers x[TILE] = {};
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = (first + i) * w.columns + k;
            x[i].low = load_floats(in.x, at, in.type, low);
            if (high) x[i].high = load_floats(in.x, at + 16, in.type, high);
            largest[i] = _mm512_max_ps(largest[i], _mm512_max_ps(_mm512_abs_ps(x[i].low), _mm512_abs_ps(x[i].high)));
        }
        for (int part = 0; part < IN; ++part, out += TILE_BYTES) {
            __m512i v[TILE];
            for (int64_t i = 0; i < TILE; ++i) v[i] = x[i].take_part(part, IN);
            transpose(v);
            for (int64_t i = 0; i < TILE; ++i) _mm512_store_si512(out + 64 * i, v[i]);
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        const float top = _mm512_reduce_max_ps(largest[i]);
        plain[first + i] = top > 0 && top <= TINY;
    }
}

// --- weights as bfloat16 ------------------------------------------------------------------------------------

// How codes become bfloat16 numbers, or the parts of them.
//   TABLE: up to five bits: the values of all codes, taken apart once a group, and `vpermw` looks them up;
//   NUMBERS: more bits: converted, zero taken off, multiplied by the scale;
//   FLOAT8: tables of bytes; any other table goes through float32.
// Where a row has one scale it is left out here, which is exact, and multiplied with the sums.
enum How { TABLE, NUMBERS, FLOAT8, OTHER };

struct Panel {
    // What is alike for all rows of a panel: the columns, the bytes of a row of tiles, the groups of the columns, the
    // cache lines of a row's codes, and how far behind the row's start the codes lie that are wanted next.
    struct Block {
        int64_t start, stop, tile_bytes, group, groups, lines, ahead;
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
    alignas(64) float numbers[32];

    TILES Panel(const Matrix& matrix, int most_parts)
        : w(matrix), cutter(make_cutter(matrix.bits)), groups(make_groups(matrix)), one_scale(matrix.groups == 1) {
        const bool halves = one_scale || w.group % 32 == 0;
        if (w.table && w.bits == 8 && one_scale && make_byte_table(w.table, &bytes))
            how = FLOAT8;
        else
            how = w.bits <= 5 && halves ? TABLE : !w.table && halves ? NUMBERS : OTHER;
        const int needed = needed_parts();
        parts = needed < most_parts ? needed : most_parts;
        decode_block = parts == 1 ? choose_decoder<1>() : parts == 2 ? choose_decoder<2>() : choose_decoder<3>();
        const int top = (1 << w.bits) - 1;
        for (int i = 0; i < 64; ++i) {
            const int first_bit = i / 8 * 4 * w.bits;
            from[i] = static_cast<uint8_t>((first_bit / 8 + i % 8) & 31);
            shifts[i] = static_cast<uint8_t>(first_bit % 8 + i % 8 / 2 * w.bits);
        }
        for (int i = 0; i < 32; ++i) numbers[i] = w.table ? w.table[i & top] : static_cast<float>(i & top);
    }

    // Rows first .. last - 1, columns start .. stop - 1 as tiles [rows / 16, chunks, parts] of 16 rows x 32
    // columns.
    TILES void decode(int64_t first, int64_t last, int64_t start, int64_t stop, uint8_t* out) const {
        const int64_t tile_bytes = (stop - start + WIDTH - 1) / WIDTH * parts * TILE_BYTES;
        Block at = {start, stop, tile_bytes, 0, 1, 0, stop * w.bits / 8};
        if (!one_scale) at.group = start / w.group, at.groups = (stop - 1) / w.group + 1 - at.group;
        at.lines = ((stop - start) * w.bits / 8 + 63) / 64;
        // Rows are read piece by piece, which no hardware foresees: fetch the next piece, or the next panel's first.
        if (stop >= w.columns) at.ahead = (last - first) * w.row_bytes;
        (this->*decode_block)(first, last, at, out);
    }

    // The scales of 16 rows where they were left out.
    TILES __m512 row_scales(int64_t row) const {
        if (!one_scale || how == OTHER) return _mm512_set1_ps(1.f);
        if (w.shared == 1) return load_floats(w.scale, row, w.scale_type, first_lanes(w.rows - row));
        alignas(64) float scales[TILE];
        for (int64_t i = 0; i < TILE; ++i)
            scales[i] = load_float(w.scale, (row + i < w.rows ? row + i : w.rows - 1) / w.shared, w.scale_type);
        return _mm512_load_ps(scales);
    }

   private:
    // W parts hold 9 W - 1 bits (the next one's sign counts); a product has as many as its factors together.
    int needed_parts() const {
        if (how == FLOAT8) return 1;
        const int scale = w.scale_type == FLOAT_F32 ? 24 : w.scale_type == FLOAT_F16 ? 11 : 8;
        const int bits = (w.table ? 24 : w.bits) + (one_scale && how != OTHER ? 0 : scale);
        return bits <= 8 ? 1 : bits <= 17 ? 2 : 3;
    }

    template <int W>
    auto choose_decoder() const -> decltype(decode_block) {
        const bool zeros = w.zero_point != nullptr;
        if (how == NUMBERS) return &Panel::by_number<W>;
        if (how == FLOAT8) return &Panel::by_bytes;
        if (how == OTHER) return &Panel::by_float<W>;
        if (w.bits <= 4) return zeros ? &Panel::by_table<true, true, W> : &Panel::by_table<true, false, W>;
        return zeros ? &Panel::by_table<false, true, W> : &Panel::by_table<false, false, W>;
    }

    // Reads each row's scales and calls `decode_row(row, where its tiles begin)`.
    template <typename DecodeRow>
    __attribute__((always_inline)) TILES inline void each_row(int64_t first, int64_t last, const Block& at, uint8_t* out,
                                                             const DecodeRow& decode_row) const {
        for (int64_t row = first; row < last; ++row) {
            const uint8_t* next = w.qdata + row * w.row_bytes + at.ahead;
            for (int64_t line = 0; line < at.lines; ++line) _mm_prefetch(next + 64 * line, _MM_HINT_T1);
            read_groups(w, row, cutter, groups.scale, groups.zero, at.group, at.group + at.groups);
            decode_row(row, out + (row - first) / TILE * at.tile_bytes + (row - first) % TILE * 64);
        }
    }

    // Calls `set(group)` for each group between two columns, and `put(column, to)` for each 32 columns of it.
    template <int W, typename Set, typename Put>
    __attribute__((always_inline)) TILES inline void by_groups(const Block& at, uint8_t* to, const Set& set,
                                                              const Put& put) const {
        int64_t g = at.group;
        for (int64_t k = at.start; k < at.stop; ++g) {
            const int64_t end = one_scale || (g + 1) * w.group > at.stop ? at.stop : (g + 1) * w.group;
            set(g);
            for (; k < end; k += WIDTH, to += W * TILE_BYTES) put(k, to);
        }
    }

    // The packed bytes of the 32 codes from column `k` on, and more behind them, but never behind the row.
    __attribute__((always_inline)) TILES inline __m512i packed_at(const uint8_t* data, int64_t k) const {
        const int64_t byte = k * w.bits / 8, left = w.row_bytes - byte;
        if (left >= 32) return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + byte)));
        return _mm512_castsi256_si512(_mm256_maskz_loadu_epi8((1u << left) - 1, data + byte));
    }

    // Four codes a 64-bit lane: `vpermb` brings the bytes they lie in, `vpmultishiftqb` each one to a word, with other
    // bits above it; `vpermw` looks at five, so the table repeats itself where codes are shorter (SHORT).
    template <bool SHORT, bool ZEROS, int W>
    TILES void by_table(int64_t first, int64_t last, const Block& at, uint8_t* out) const {
        const __m512i bytes_from = _mm512_load_si512(from), shift = _mm512_load_si512(shifts);
        const __m512 middle = _mm512_set1_ps(ZEROS || w.table ? 0.f : w.midpoint);
        const __m512 low = _mm512_sub_ps(_mm512_load_ps(numbers), middle);
        const __m512 high = _mm512_sub_ps(_mm512_load_ps(numbers + 16), middle);
        const int64_t step = 4 * w.bits, pieces = (at.stop - at.start + WIDTH - 1) / WIDTH;
        const int64_t per = one_scale ? pieces : w.group / WIDTH, head = one_scale ? per : per - at.start % w.group / WIDTH;
        const bool scaled = !one_scale;
        // From so many pieces 32 bytes can be read without leaving the row.
        const int64_t safe = w.row_bytes < 32 ? 0 : (w.row_bytes - 32) / step - at.start / WIDTH + 1;
        each_row(first, last, at, out, [&](int64_t row, uint8_t* to) TILES __attribute__((always_inline)) {
            const uint8_t* packed = w.qdata + row * w.row_bytes + at.start / WIDTH * step;
            const uint8_t* end = w.qdata + (row + 1) * w.row_bytes;
            const float *scale = groups.scale + at.group, *zero = groups.zero + at.group;
            __m512i table[W] = {};
            for (int64_t i = 0, left = 0; i < pieces; ++i, packed += step, to += W * TILE_BYTES) {
                if (left-- == 0) {
                    const __m512 s = _mm512_set1_ps(scaled ? *scale++ : 1.f), z = _mm512_set1_ps(ZEROS ? *zero++ : 0.f);
                    Numbers values;
                    values.low = _mm512_mul_ps(ZEROS ? _mm512_sub_ps(low, z) : low, s);
                    values.high = SHORT ? values.low : _mm512_mul_ps(ZEROS ? _mm512_sub_ps(high, z) : high, s);
                    for (int p = 0; p < W; ++p) {
                        table[p] = values.take_part(p, W);
                        if (SHORT) values.high = values.low;
                    }
                    left = (i ? per : head) - 1;
                }
                const __m256i bytes = i < safe ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed))
                                               : _mm256_maskz_loadu_epi8((1u << (end - packed)) - 1, packed);
                const __m512i lanes = _mm512_permutexvar_epi8(bytes_from, _mm512_castsi256_si512(bytes));
                const __m512i codes = _mm512_multishift_epi64_epi8(shift, lanes);
                for (int p = 0; p < W; ++p)
                    _mm512_store_si512(to + p * TILE_BYTES, _mm512_permutexvar_epi16(codes, table[p]));
            }
        });
    }

    template <int W>
    TILES void by_number(int64_t first, int64_t last, const Block& at, uint8_t* out) const {
        each_row(first, last, at, out, [&](int64_t row, uint8_t* to) TILES { number_row<W>(row, at, to); });
    }

    template <int W>
    TILES void number_row(int64_t row, const Block& at, uint8_t* to) const {
        const uint8_t* data = w.qdata + row * w.row_bytes;
        __m512 scale = _mm512_setzero_ps(), zero = scale;
        by_groups<W>(
            at, to,
            [&](int64_t g) TILES __attribute__((always_inline)) {
                scale = _mm512_set1_ps(one_scale ? 1.f : groups.scale[g]);
                zero = _mm512_set1_ps(groups.zero[g]);
            },
            [&](int64_t k, uint8_t* tile_row) TILES __attribute__((always_inline)) {
                const __m256i codes = _mm512_castsi512_si256(cut_codes(packed_at(data, k), cutter));
                const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes)));
                const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(codes, 1)));
                Numbers values = {_mm512_mul_ps(_mm512_sub_ps(low, zero), scale),
                                  _mm512_mul_ps(_mm512_sub_ps(high, zero), scale)};
                for (int p = 0; p < W; ++p) _mm512_store_si512(tile_row + p * TILE_BYTES, values.take_part(p, W));
            });
    }

    TILES void by_bytes(int64_t first, int64_t last, const Block& at, uint8_t* out) const {
        each_row(first, last, at, out, [&](int64_t row, uint8_t* to) TILES { byte_row(row, at, to); });
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

// Four tiles of sums: two tiles of rows in W parts against two of tokens in IN parts, `chunks` deep. Meanwhile `lines`
// cache lines a chunk are fetched from `next` on.
template <int A, int B, int W, int IN>
TILES inline void multiply(const uint8_t* a, int64_t a_step, const uint8_t* b, int64_t b_step, int64_t chunks,
                           float* c, int64_t c_step, bool first, const uint8_t* next, int64_t lines) {
    if (first) {
        _tile_zero(0);
        if (B > 1) _tile_zero(1);
        if (A > 1) _tile_zero(2);
        if (A > 1 && B > 1) _tile_zero(3);
    } else {
        _tile_loadd(0, c, 64);
        if (B > 1) _tile_loadd(1, c + 256, 64);
        if (A > 1) _tile_loadd(2, c + c_step, 64);
        if (A > 1 && B > 1) _tile_loadd(3, c + c_step + 256, 64);
    }
    for (int64_t i = 0; i < chunks; ++i, b += IN * TILE_BYTES) {
        for (int64_t line = 0; line < lines; ++line, next += 64) _mm_prefetch(next, _MM_HINT_T1);
#pragma GCC unroll 3
        for (int p = 0; p < W; ++p, a += TILE_BYTES) {
            _tile_loadd(4, a, 64);
            if (A > 1) _tile_loadd(5, a + a_step, 64);
#pragma GCC unroll 3
            for (int q = 0; q < IN - p; ++q) {
                _tile_loadd(6, b + q * TILE_BYTES, 64);
                _tile_dpbf16ps(0, 4, 6);
                if (B > 1) {
                    _tile_loadd(7, b + b_step + q * TILE_BYTES, 64);
                    _tile_dpbf16ps(1, 4, 7);
                }
                if (A > 1) _tile_dpbf16ps(2, 5, 6);
                if (A > 1 && B > 1) _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, c, 64);
    if (B > 1) _tile_stored(1, c + 256, 64);
    if (A > 1) _tile_stored(2, c + c_step, 64);
    if (A > 1 && B > 1) _tile_stored(3, c + c_step + 256, 64);
}

using Multiply = void (*)(const uint8_t*, int64_t, const uint8_t*, int64_t, int64_t, float*, int64_t, bool,
                          const uint8_t*, int64_t);

// For a pair of row tiles or one, and of token tiles or one: [row tiles - 1][token tiles - 1].
struct Multiplies {
    Multiply of[2][2];
};

template <int W, int IN>
constexpr Multiplies MULTIPLIES = {
    {{multiply<1, 1, W, IN>, multiply<1, 2, W, IN>}, {multiply<2, 1, W, IN>, multiply<2, 2, W, IN>}}};

Multiplies choose_multiplies(int weight_parts, int input_parts) {
    if (input_parts == 1) return MULTIPLIES<1, 1>;
    if (input_parts == 2) return weight_parts == 1 ? MULTIPLIES<1, 2> : MULTIPLIES<2, 2>;
    return weight_parts == 1 ? MULTIPLIES<1, 3> : weight_parts == 2 ? MULTIPLIES<2, 3> : MULTIPLIES<3, 3>;
}

// A tile of sums, [16 rows, 16 tokens], as floats [tokens, rows]: scaled where the scale was left out, and with bias.
// Returns the tokens that have a sum that is not finite.
TARGET uint32_t finish_tile(const Panel& panel, const Inputs& in, const float* sums, int64_t row, __m512 out[TILE]) {
    const Matrix& w = panel.w;
    __m512i v[TILE];
    for (int i = 0; i < TILE; ++i) v[i] = _mm512_load_si512(sums + 16 * i);
    transpose(v);
    const __mmask16 present = first_lanes(w.rows - row);
    const __m512 scale = panel.row_scales(row);
    const __m512 bias = in.bias ? load_floats(in.bias, row, in.bias_type, present) : _mm512_setzero_ps();
    uint32_t bad = 0;
    for (int i = 0; i < TILE; ++i) {
        const __m512 sum = _mm512_castsi512_ps(v[i]);
        bad |= (_mm512_mask_fpclass_ps_mask(present, sum, 0x99) ? 1u : 0u) << i;  // infinities and NaN
        out[i] = _mm512_fmadd_ps(sum, scale, bias);
    }
    return bad;
}

// One or two tiles of sums, 16 or 32 rows of 16 tokens, to the output [tokens, rows]: whole cache lines where it can be.
// Marks the tokens that have a sum that is not finite.
TILES void store_tiles(const Panel& panel, const Inputs& in, const float* sums, int64_t step, int64_t row,
                       int64_t token, uint8_t* plain) {
    const int64_t rows = panel.w.rows;
    __m512 low[TILE], high[TILE];
    uint32_t bad = finish_tile(panel, in, sums, row, low);
    if (step) bad |= finish_tile(panel, in, sums + step, row + TILE, high);
    const int64_t left = step ? rows - row : rows - row < TILE ? rows - row : TILE;
    const __mmask32 present = left >= 32 ? ~0u : (1u << left) - 1;
    for (int i = 0; i < TILE && token + i < in.count; ++i) {
        const int64_t at = (token + i) * rows + row;
        if (in.type == FLOAT_BF16) {
            const __m512bh both = _mm512_cvtne2ps_pbh(step ? high[i] : low[i], low[i]);
            _mm512_mask_storeu_epi16(static_cast<uint16_t*>(in.out) + at, present, reinterpret_cast<__m512i>(both));
            continue;
        }
        store_floats(in.out, at, in.type, first_lanes(left), low[i]);
        if (step) store_floats(in.out, at + TILE, in.type, first_lanes(left - TILE), high[i]);
    }
    for (; bad; bad &= bad - 1) __atomic_store_n(plain + token + __builtin_ctz(bad), 1, __ATOMIC_RELAXED);
}

TILES void tile_linear(const Matrix& w, const Inputs& in) {
    const int IN = input_parts(in);
    const int64_t threads = omp_get_max_threads();
    const int64_t chunks = (w.columns + WIDTH - 1) / WIDTH, tokens = (in.count + TILE - 1) / TILE;
    const int64_t share = (w.rows + threads - 1) / threads, panels = (share + PANEL - 1) / PANEL;  // a thread
    const int64_t panel = (share + 2 * TILE * panels - 1) / (2 * TILE * panels) * (2 * TILE);
    // Pieces of about `wanted` columns, all of one length but the last.
    const int64_t wanted = IN == 1 ? DEPTH : DEPTH_OF_PARTS, whole = (w.columns + wanted / 2) / wanted;
    const int64_t pieces = whole > 1 ? whole : 1;
    const int64_t depth = (w.columns + CHUNK * pieces - 1) / (CHUNK * pieces) * CHUNK;
    const int64_t token_bytes = chunks * IN * TILE_BYTES;  // of a tile of tokens
    uint8_t* packed = scratch<uint8_t>(0, tokens * token_bytes);
    uint8_t* plain = scratch<uint8_t>(6, tokens * TILE);  // tokens that are left to the plain kernel
    static const TileConfig config;
#pragma omp parallel num_threads(threads)
    {
        const Panel weights(w, IN);
        const Multiplies multiplies = choose_multiplies(weights.parts, IN);
        uint8_t* decoded = scratch<uint8_t>(1, panel * depth * 2 * weights.parts);
        float* sums = scratch<float>(2, panel * tokens * TILE);
        _tile_loadconfig(&config);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; ++t) {
            uint8_t* to = packed + t * token_bytes;
            IN == 1   ? pack_bfloats(w, in, t * TILE, to)
            : IN == 2 ? pack_parts<2>(w, in, t * TILE, to, plain)
                      : pack_parts<3>(w, in, t * TILE, to, plain);
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < w.rows; row += panel) {
            const int64_t last = row + panel < w.rows ? row + panel : w.rows, tiles = (last - row + TILE - 1) / TILE;
            for (int64_t k = 0; k < w.columns; k += depth) {
                const int64_t stop = k + depth < w.columns ? k + depth : w.columns, deep = (stop - k + WIDTH - 1) / WIDTH;
                const int64_t a_bytes = deep * weights.parts * TILE_BYTES, b_bytes = deep * IN * TILE_BYTES;
                weights.decode(row, last, k, stop, decoded);
                for (int64_t t = 0; t < tokens; t += 2) {
                    const uint8_t* b = packed + t * token_bytes + k / WIDTH * IN * TILE_BYTES;
                    // The next two tiles of tokens come from afar: each pair of row tiles fetches its share of them.
                    const int64_t pairs = (tiles + 1) / 2, lines = (2 * TILE * IN + pairs - 1) / pairs;
                    for (int64_t r = 0; r < tiles; r += 2) {
                        const uint8_t* a = decoded + r * a_bytes;
                        float* c = sums + (r * tokens + t) * 256;
                        const int64_t share = r / 2 * lines * deep * 64;
                        const uint8_t* next =
                            b + share + (share < b_bytes ? 2 * token_bytes : 3 * token_bytes - b_bytes);
                        const Multiply run = multiplies.of[r + 1 < tiles][t + 1 < tokens];
                        run(a, a_bytes, b, token_bytes, deep, c, tokens * 256, k == 0, next, lines);
                    }
                }
            }
            for (int64_t t = 0; t < tokens; ++t)
                for (int64_t r = 0; r < tiles; r += 2)
                    store_tiles(weights, in, sums + (r * tokens + t) * 256, r + 1 < tiles ? tokens * 256 : 0,
                                row + r * TILE, t * TILE, plain);
        }
        _tile_release();
    }
    if (IN > 1) redo_marked(PLAIN_AVX512, w, in, plain);
}

// As many tokens at a time as keep the packed inputs small.
template <typename Run>
void in_parts(const Matrix& w, const Inputs& in, const Run& run) {
    const int64_t step = MOST_PACKED / (w.columns * 2 * input_parts(in)) / (2 * TILE) * (2 * TILE);
    for (int64_t i = 0, count = step > 2 * TILE ? step : 2 * TILE; i < in.count; i += count)
        run(w, part_of(w, in, i, in.count - i < count ? in.count - i : count));
}

void linear(const Matrix& w, const Inputs& in) {
    if (in.count >= FEWEST_CODES && fits_int8_tiles(w, in)) return in_parts(w, in, int8_tile_linear);
    const bool plain = in.activation == PLAIN, wide = w.bits > 5 && !w.table;
    const int64_t fewest = plain && !wide ? FEWEST_PLAIN[in.type] : FEWEST_MIXED;
    const bool many = in.count >= fewest;
    if (!many || (in.type != FLOAT_BF16 && !plain)) return VNNI.linear(w, in);
    in_parts(w, in, tile_linear);
}

bool has_amx() {
    if (!VNNI.present() || !__builtin_cpu_supports("amx-bf16") || !__builtin_cpu_supports("amx-int8")) return false;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // the kernel grants the use of tiles a process
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

}  // namespace

const Kernels AMX = {"amx", has_amx, linear, VNNI.rows};
#endif
