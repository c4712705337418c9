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
#include "tile_inputs.h"

bool fits_int8_tiles(const Matrix& w, const Inputs& in);
void int8_tile_linear(const Matrix& w, const Inputs& in);

namespace {

// Rows that are decoded at a time, and chunks of 32 columns, without and with parts: the piece, its sums and the next
// tokens lie in the second-level cache, a pair of tiles of tokens in the first.
constexpr int64_t PANEL = 256, LENGTH[] = {16, 4};
constexpr int64_t MOST_PACKED = 16 << 20;    // bytes of inputs that are packed at a time
// Inputs from which tiles are faster than vectors, timed at 4096 x 4096 on one thread. Of plain inputs, by their type
// (float32, float16, bfloat16): for codes of up to five bits and tables that integers stand for, for wider codes, for
// tables that integers are just near to (nf4), and for those of bytes, which vectors multiply as float32.
constexpr int64_t FEWEST_PLAIN[] = {12, 16, 10}, FEWEST_WIDE[] = {18, 16, 12}, FEWEST_NEAR[] = {12, 12, 6}, FEWEST_BYTES = 5;
// Of int8 codes: as they are; as bfloat16, symmetric ones (one plane in vectors) and asymmetric ones.
constexpr int64_t FEWEST_CODES = 6, FEWEST_SYMMETRIC = 20, FEWEST_ASYMMETRIC = 10;

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

int64_t fewest_inputs(const Matrix& w, const Inputs& in) {
    if (in.activation != PLAIN) return in.activation == SYMMETRIC ? FEWEST_SYMMETRIC : FEWEST_ASYMMETRIC;
    if (w.table && w.bits == 8) return FEWEST_BYTES;
    if (w.table && !w.exact) return FEWEST_NEAR[in.type];
    return w.bits > 5 && !w.table ? FEWEST_WIDE[in.type] : FEWEST_PLAIN[in.type];
}

void linear(const Matrix& w, const Inputs& in) {
    if (in.count >= FEWEST_CODES && fits_int8_tiles(w, in)) return in_parts(w, in, most_tokens(w, in), int8_tile_linear);
    const bool fits = in.type == FLOAT_BF16 || in.activation == PLAIN;
    if (!fits || in.count < fewest_inputs(w, in)) return VNNI.linear(w, in);
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
