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

#include "panel.h"

bool fits_int8_tiles(const Matrix& w, const Inputs& in);
void int8_tile_linear(const Matrix& w, const Inputs& in);

namespace {

// Rows that are decoded at a time, and chunks of 32 columns, without and with parts: the piece, its sums and the next
// tokens lie in the second-level cache, a pair of tiles of tokens in the first.
constexpr int64_t PANEL = 256, LENGTH[] = {16, 4};
constexpr int64_t MOST_PACKED = 16 << 20;    // bytes of inputs that are packed at a time
constexpr float TINY = 0x1p-64f;             // parts of a token with no larger input may come to nothing
// Inputs from which tiles are faster than vectors: float32, float16, bfloat16; int8 codes; int8 codes that become
// bfloat16.
constexpr int64_t FEWEST_PLAIN[] = {8, 10, 10}, FEWEST_CODES = 6, FEWEST_MIXED = 20;

// Where 16 even ones and 16 odd ones stand when they take turns.
alignas(64) constexpr uint16_t IN_TURN[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

int input_parts(const Inputs& in) { return in.type == FLOAT_F32 ? 3 : in.type == FLOAT_F16 ? 2 : 1; }

// 32 inputs of a token as bfloat16, zero behind its end.
INLINE __m512i load_bfloats(const uint16_t* x, int64_t left) {
    const __mmask32 present = left >= 32 ? ~0u : (1u << (left > 0 ? left : 0)) - 1;
    return _mm512_maskz_loadu_epi16(present, x);
}

// The largest of 32 magnitudes, as bits of bfloat16.
TARGET inline uint32_t largest_magnitude(__m512i magnitudes) {
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(magnitudes), _mm512_extracti64x4_epi64(magnitudes, 1));
    const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi32(-1)));
    return static_cast<uint16_t>(~_mm_cvtsi128_si32(least));
}

// Symmetric codes of two vectors: quotients rounded as `nearest_quotients` has them, at most 127.
TILES inline void round_quotients(__m512 x[2], const Divisor& by) {
    const __m512 middle = _mm512_set1_ps(0x1.8p23f);  // a sum with it has no bits below 1
    const __m512 q[2] = {_mm512_mul_ps(x[0], by.inverse), _mm512_mul_ps(x[1], by.inverse)};
    __m512 near[2], off[2];
    for (int i = 0; i < 2; ++i) {
        near[i] = _mm512_sub_ps(_mm512_add_ps(q[i], middle), middle);
        off[i] = _mm512_abs_ps(_mm512_sub_ps(q[i], near[i]));
    }
    const bool sure =
        _mm512_cmp_ps_mask(_mm512_max_ps(off[0], off[1]), _mm512_set1_ps(SURE), _CMP_LT_OQ) == 0xffff;
    const __m512 top = _mm512_set1_ps(127.f), bottom = _mm512_set1_ps(-127.f);
    for (int i = 0; i < 2; ++i) {
        if (!sure) near[i] = _mm512_roundscale_ps(_mm512_div_ps(x[i], by.value), _MM_FROUND_TO_NEAREST_INT);
        x[i] = _mm512_max_ps(_mm512_min_ps(near[i], top), bottom);
    }
}

// `quantize_group` of symmetric bfloat16 inputs, decoded again and rounded to bfloat16.
TILES void decode_symmetric(const Inputs& in, int64_t at, int64_t count, uint16_t* out) {
    const uint16_t* x = static_cast<const uint16_t*>(in.x) + at;
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const __m512i in_turn = _mm512_load_si512(IN_TURN);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t k = 0; k < count; k += WIDTH) {
        _mm_prefetch(x + k + 512, _MM_HINT_T0);
        largest = _mm512_max_epu16(largest, _mm512_and_si512(load_bfloats(x + k, count - k), magnitude));
    }
    const uint32_t top = largest_magnitude(largest);
    const bool finite = top < 0x7f80;
    const float scale = finite ? activation_scale(in, 0.f, float_of(top << 16)) : std::numeric_limits<float>::quiet_NaN();
    const Divisor divisor = make_divisor(scale > 0 ? scale : 1.f);
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t k = 0; k < count; k += WIDTH) {
        const __m512i both = load_bfloats(x + k, count - k);
        __m512 codes[2] = {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
                           _mm512_castsi512_ps(_mm512_and_si512(both, upper))};
        round_quotients(codes, divisor);
        const __m512i values = reinterpret_cast<__m512i>(
            _mm512_cvtne2ps_pbh(_mm512_mul_ps(codes[1], factor), _mm512_mul_ps(codes[0], factor)));
        const __mmask32 present = count - k >= WIDTH ? ~0u : (1u << (count - k)) - 1;
        _mm512_mask_storeu_epi16(out + k, present, _mm512_permutexvar_epi16(in_turn, values));
    }
}

// The token's int8 activations, decoded again and rounded to bfloat16.
TILES void decode_activations(const Inputs& in, int64_t token, int64_t columns, uint16_t* out) {
    int32_t* codes = scratch<int32_t>(3, in.group + 16);
    for (int64_t start = 0; start < columns; start += in.group) {
        const int64_t at = token * columns + start, count = start + in.group < columns ? in.group : columns - start;
        if (in.activation == SYMMETRIC) {
            decode_symmetric(in, at, count, out + start);
            continue;
        }
        const __m512 scale = _mm512_set1_ps(quantize_group(in, at, count, codes));
        for (int64_t k = 0; k < count; k += 16)
            store_floats(out, start + k, FLOAT_BF16, first_lanes(count - k),
                         _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(codes + k)), scale));
    }
}

// Where inputs lie as tiles: [pieces of columns, tiles of tokens, chunks of a piece, IN], so that a piece of all tokens
// is read from one end to the other.
struct Packed {
    uint8_t* data;
    int64_t tokens, chunks, depth, parts;  // tiles of tokens, chunks of the columns and of a piece, IN

    int64_t chunks_from(int64_t piece) const { return chunks - piece < depth ? chunks - piece : depth; }
    uint8_t* at(int64_t token_tile, int64_t chunk) const {
        const int64_t piece = chunk / depth * depth;
        return data + (piece * tokens + token_tile * chunks_from(piece) + chunk - piece) * parts * TILE_BYTES;
    }
};

// Tokens `first` .. `first` + 15 of bfloat16 inputs as tiles of 16 column pairs x 16 tokens.
TILES void pack_bfloats(const Matrix& w, const Inputs& in, int64_t first, const Packed& packed) {
    const uint16_t* rows[TILE];
    uint16_t* decoded = in.activation == PLAIN ? nullptr : scratch<uint16_t>(4, TILE * w.columns);
    const int64_t count = in.count - first < TILE ? in.count - first : TILE;
    for (int64_t i = 0; i < count; ++i) {
        rows[i] = static_cast<const uint16_t*>(in.x) + (first + i) * w.columns;
        if (!decoded) continue;
        decode_activations(in, first + i, w.columns, decoded + i * w.columns);
        rows[i] = decoded + i * w.columns;
    }
    for (int64_t k = 0; k < w.columns; k += WIDTH) {
        __m512i v[TILE];
        for (int64_t i = 0; i < TILE; ++i)
            v[i] = i < count ? load_bfloats(rows[i] + k, w.columns - k) : _mm512_setzero_si512();
        transpose(v);
        uint8_t* out = packed.at(first / TILE, k / WIDTH);
        for (int64_t i = 0; i < TILE; ++i) _mm512_store_si512(out + 64 * i, v[i]);
    }
}

// The same of wider inputs, in IN parts. `plain[token]` becomes whether the plain kernel should take a token.
template <int IN>
TILES void pack_parts(const Matrix& w, const Inputs& in, int64_t first, const Packed& packed, uint8_t* plain) {
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
        uint8_t* out = packed.at(first / TILE, k / WIDTH);
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

// Up to four tiles of sums: one or two tiles of rows against one or two of tokens, over a piece's chunks. The tiles may
// still hold the sums of the block before, which go to `before`. Meanwhile `lines` cache lines a chunk are fetched.
struct Block {
    const uint8_t *a, *b;
    int64_t a_step, b_step, chunks;  // to the second tile of rows and of tokens; length
    float *before, *sums;
    int64_t sums_step;  // to the sums of the second tile of rows; those of the second tile of tokens lie behind the first's
    bool first;         // the sums start here
    const uint8_t* next;
    int64_t lines;
};

// Tiles have no other names than literals. Sums pass while products of other tiles are under way.
#define LLMQUANT_PASS(TILE_NAME, OFFSET)                                           \
    do {                                                                           \
        if (EXCHANGE && at.before) _tile_stored(TILE_NAME, at.before + (OFFSET), 64); \
        if (EXCHANGE && at.first) _tile_zero(TILE_NAME);                           \
        if (EXCHANGE && !at.first) _tile_loadd(TILE_NAME, at.sums + (OFFSET), 64); \
    } while (false)

// One chunk: rows in W parts, tokens in IN. Rows pass by and should not drive tokens out of the cache. EXCHANGE: before the first product with a tile of sums it changes hands.
template <bool EXCHANGE, int A, int B, int W, int IN>
__attribute__((always_inline)) TILES inline void multiply_chunk(const Block& at, const uint8_t* a, const uint8_t* b) {
#pragma GCC unroll 3
    for (int p = 0; p < W; ++p, a += TILE_BYTES) {
        _tile_stream_loadd(4, a, 64);
#pragma GCC unroll 3
        for (int q = 0; q < IN - p; ++q) {
            const bool exchange = EXCHANGE && p == 0 && q == 0;
            _tile_loadd(6, b + q * TILE_BYTES, 64);
            if (exchange) LLMQUANT_PASS(0, 0);
            _tile_dpbf16ps(0, 4, 6);
            if (A > 1) {
                if (q == 0) _tile_stream_loadd(5, a + at.a_step, 64);
                if (exchange) LLMQUANT_PASS(2, at.sums_step);
                _tile_dpbf16ps(2, 5, 6);
            }
            if (B > 1) {
                _tile_loadd(7, b + at.b_step + q * TILE_BYTES, 64);
                if (exchange) LLMQUANT_PASS(1, 256);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (A > 1 && B > 1) {
                if (exchange) LLMQUANT_PASS(3, at.sums_step + 256);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
}
#undef LLMQUANT_PASS

template <int A, int B, int W, int IN>
TILES void multiply(const Block& at) {
    const uint8_t *a = at.a, *b = at.b, *next = at.next;
    multiply_chunk<true, A, B, W, IN>(at, a, b);
    for (int64_t i = 1; i < at.chunks; ++i) {
        for (int64_t line = 0; line < at.lines; ++line, next += 64) _mm_prefetch(next, _MM_HINT_T1);
        multiply_chunk<false, A, B, W, IN>(at, a += W * TILE_BYTES, b += IN * TILE_BYTES);
    }
}

// The sums that the tiles hold, [2 or 1 tiles of rows, 2 or 1 of tokens].
TILES void store_sums(float* sums, int64_t step, bool tall, bool wide) {
    _tile_stored(0, sums, 64);
    if (wide) _tile_stored(1, sums + 256, 64);
    if (tall) _tile_stored(2, sums + step, 64);
    if (tall && wide) _tile_stored(3, sums + step + 256, 64);
}

using Multiply = void (*)(const Block&);

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

// All tokens against a piece of a panel, decoded as tiles [tiles, chunks, W]; adds to sums [tiles, tokens, 16 x 16].
TILES void multiply_piece(const Packed& packed, int64_t chunk, const uint8_t* decoded, int64_t tiles, int weight_parts,
                          float* sums) {
    const Multiplies multiplies = choose_multiplies(weight_parts, static_cast<int>(packed.parts));
    const int64_t chunks = packed.chunks_from(chunk), tokens = packed.tokens, pairs = (tiles + 1) / 2;
    const int64_t a_bytes = chunks * weight_parts * TILE_BYTES, b_bytes = chunks * packed.parts * TILE_BYTES;
    // The next two tiles of tokens come from afar: each pair of row tiles fetches its share of them.
    const int64_t lines = (2 * TILE * packed.parts + pairs - 1) / pairs;
    float* held = nullptr;  // sums that are still in tiles
    bool tall = false, wide = false;
    for (int64_t t = 0; t < tokens; t += 2) {
        const uint8_t* b = packed.at(t, chunk);
        for (int64_t r = 0; r < tiles; r += 2) {
            const bool tall_before = tall, wide_before = wide;
            tall = r + 1 < tiles, wide = t + 1 < tokens;
            if (held && (tall != tall_before || wide != wide_before)) {
                store_sums(held, tokens * 256, tall_before, wide_before);
                held = nullptr;
            }
            float* c = sums + (r * tokens + t) * 256;
            multiplies.of[tall][wide]({decoded + r * a_bytes, b, a_bytes, b_bytes, chunks, held, c, tokens * 256, chunk == 0,
                                       b + 2 * b_bytes + r / 2 * lines * chunks * 64, lines});
            held = c;
        }
    }
    store_sums(held, tokens * 256, tall, wide);
}

// How many times longer than LENGTH pieces are, and how many times fewer their rows: memory serves long pieces of rows
// faster, but two tiles of tokens should stay in the first-level cache unless there are no others.
int64_t choose_stretch(const Matrix& w, int input_parts, int64_t tokens) {
    constexpr int64_t LONG = 512, MOST = 4;  // bytes of a row
    int64_t stretch = 1;
    while (tokens <= 2 && stretch < MOST && stretch * bytes_before(w, LENGTH[input_parts > 1] * WIDTH) < LONG) stretch *= 2;
    return stretch;
}

TILES void tile_linear(const Matrix& w, const Inputs& in) {
    const int IN = input_parts(in);
    const int64_t threads = omp_get_max_threads();
    const int64_t chunks = (w.columns + WIDTH - 1) / WIDTH, tokens = (in.count + TILE - 1) / TILE;
    const int64_t stretch = choose_stretch(w, IN, tokens), most_rows = PANEL / stretch;
    const int64_t share = (w.rows + threads - 1) / threads, panels = (share + most_rows - 1) / most_rows;  // a thread
    const int64_t panel = (share + 2 * TILE * panels - 1) / (2 * TILE * panels) * (2 * TILE);
    // Pieces of about LENGTH chunks, all of one length but the last, and an even one, as codes are cut 64 at a time.
    const int64_t about = stretch * LENGTH[IN > 1], pieces = chunks > about ? (chunks + about / 2) / about : 1;
    const int64_t length = (chunks + 2 * pieces - 1) / (2 * pieces) * 2, depth = length * WIDTH;
    const Packed packed = {scratch<uint8_t>(0, tokens * chunks * IN * TILE_BYTES), tokens, chunks, length, IN};
    uint8_t* plain = scratch<uint8_t>(6, tokens * TILE);  // tokens that are left to the plain kernel
    static const TileConfig config;
#pragma omp parallel num_threads(threads)
    {
        const Panel weights(w, IN);
        uint8_t* decoded = scratch<uint8_t>(1, panel * depth * 2 * weights.parts);
        float* sums = scratch<float>(2, panel * tokens * TILE);
        _tile_loadconfig(&config);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; ++t)
            IN == 1   ? pack_bfloats(w, in, t * TILE, packed)
            : IN == 2 ? pack_parts<2>(w, in, t * TILE, packed, plain)
                      : pack_parts<3>(w, in, t * TILE, packed, plain);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < w.rows; row += panel) {
            const int64_t last = row + panel < w.rows ? row + panel : w.rows, tiles = (last - row + TILE - 1) / TILE;
            for (int64_t k = 0; k < w.columns; k += depth) {
                weights.decode(row, last, k, k + depth < w.columns ? k + depth : w.columns, decoded);
                multiply_piece(packed, k / WIDTH, decoded, tiles, weights.parts, sums);
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

// As many tokens as keep the packed inputs small.
int64_t most_tokens(const Matrix& w, const Inputs& in) {
    const int64_t count = MOST_PACKED / (w.columns * 2 * input_parts(in)) / (2 * TILE) * (2 * TILE);
    return count > 2 * TILE ? count : 2 * TILE;
}

void linear(const Matrix& w, const Inputs& in) {
    if (in.count >= FEWEST_CODES && fits_int8_tiles(w, in)) return in_parts(w, in, most_tokens(w, in), int8_tile_linear);
    const bool plain = in.activation == PLAIN, wide = w.bits > 5 && !w.table;
    const int64_t fewest = plain && !wide ? FEWEST_PLAIN[in.type] : FEWEST_MIXED;
    const bool many = in.count >= fewest;
    if (!many || (in.type != FLOAT_BF16 && !plain)) return VNNI.linear(w, in);
    in_parts(w, in, most_tokens(w, in), tile_linear);
}

bool has_amx() {
    if (!VNNI.present() || !__builtin_cpu_supports("amx-bf16") || !__builtin_cpu_supports("amx-int8")) return false;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // the kernel grants the use of tiles a process
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

}  // namespace

const Kernels AMX = {"amx", has_amx, linear, VNNI.rows};
#endif
