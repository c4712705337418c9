// Several inputs with symmetric int8 activations, for processors with AMX: exact integer products in tiles.
//
// A tile of the weights is 16 rows x 64 columns of codes, a tile of the inputs 64 columns x 16 tokens in fours, as
// `tdpbusd` wants them. A `span` is the columns under one scale of the weight and one of the activation: its sums, [16
// rows, 16 tokens] as integers, start from minus the midpoint times the inputs' sum, go through memory, and are multiplied
// by both scales in float32. Where spans are shorter than SHORTEST this way through memory takes longer than tiles of
// bfloat16 do for the same columns (about 33 against 10 ns for 32 columns).
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <omp.h>

#include "tiles.h"

namespace {

constexpr int64_t PANEL = 256, DEPTH = 512;  // rows and columns that are unpacked at a time
constexpr int64_t SHORTEST = 128;           // columns of a span for which the way through memory pays
constexpr int64_t LONGEST = 512;            // ... and whose products surely fit 32 bits

// How the columns are cut.
struct Spans {
    int64_t length, count, chunks;  // chunks of 64 columns
};

int64_t longest_span(int64_t group, int64_t columns) {
    if (group >= columns) return LONGEST;
    int64_t length = LONGEST;
    while (length > SHORTEST && group % length) length /= 2;
    return group % length ? 0 : length;
}

Spans make_spans(const Matrix& w, const Inputs& in) {
    const int64_t a = longest_span(w.group, w.columns), b = longest_span(in.group, w.columns);
    const int64_t length = a < b ? a : b;
    return {length, length ? (w.columns + length - 1) / length : 0, (w.columns + CHUNK - 1) / CHUNK};
}

// 16 tokens: codes as tiles [chunks] of 16 fours x 16 tokens, and for each span the tokens' scales, their sums as
// floats, and as integers times minus the midpoint.
struct Tokens {
    int8_t* codes;
    float *scales, *sums;
    int32_t* starts;
};

int64_t token_bytes(const Spans& s) { return s.chunks * TILE_BYTES + s.count * 3 * 64; }

Tokens tokens_at(uint8_t* data, const Spans& s, int64_t tile) {
    uint8_t* at = data + tile * token_bytes(s);
    float* scales = reinterpret_cast<float*>(at + s.chunks * TILE_BYTES);
    return {reinterpret_cast<int8_t*>(at), scales, scales + 16 * s.count,
            reinterpret_cast<int32_t*>(scales + 32 * s.count)};
}

TARGET void pack_tokens(const Matrix& w, const Inputs& in, const Spans& s, int64_t first, const Tokens& to) {
    const int64_t padded = s.chunks * CHUNK, count = in.count - first < TILE ? in.count - first : TILE;
    int32_t* codes = scratch<int32_t>(3, padded + 16);
    int8_t* bytes = scratch<int8_t>(4, TILE * padded);
    const int32_t middle = static_cast<int32_t>(w.midpoint);
    for (int64_t i = 0; i < TILE; ++i) {
        for (int64_t k = 0; k < padded; ++k) codes[k] = 0;
        for (int64_t start = 0; i < count && start < w.columns; start += in.group) {
            const int64_t stop = start + in.group < w.columns ? start + in.group : w.columns;
            const float scale = quantize_group(in, (first + i) * w.columns + start, stop - start, codes + start);
            for (int64_t k = start; k < stop; k += s.length) to.scales[k / s.length * 16 + i] = scale;
        }
        for (int64_t k = 0; k < padded; k += 16)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + i * padded + k),
                             _mm512_cvtepi32_epi8(_mm512_loadu_si512(codes + k)));
        for (int64_t span = 0; span < s.count; ++span) {
            __m512i sum = _mm512_setzero_si512();
            for (int64_t k = span * s.length; k < (span + 1) * s.length && k < padded; k += 16)
                sum = _mm512_add_epi32(sum, _mm512_loadu_si512(codes + k));
            const int32_t total = _mm512_reduce_add_epi32(sum);
            to.sums[span * 16 + i] = static_cast<float>(total);
            to.starts[span * 16 + i] = -middle * total;
            if (i >= count) to.scales[span * 16 + i] = 0;
        }
    }
    for (int64_t c = 0; c < s.chunks; ++c) {
        __m512i v[TILE];
        for (int64_t i = 0; i < TILE; ++i) v[i] = _mm512_loadu_si512(bytes + i * padded + c * CHUNK);
        transpose(v);
        for (int64_t i = 0; i < TILE; ++i) _mm512_store_si512(to.codes + c * TILE_BYTES + 64 * i, v[i]);
    }
}

// A panel of the weights: codes as tiles [row tiles, chunks], scales and zeros [rows, spans of the piece].
struct Unpacked {
    uint8_t* codes;
    float *scales, *zeros;
};

TARGET void unpack_panel(const Matrix& w, const Spans& s, const Cutter& cutter, const Groups& groups, int64_t first,
                         int64_t last, int64_t start, int64_t stop, bool zeros, const Unpacked& to) {
    const int64_t chunks = (stop - start + CHUNK - 1) / CHUNK, spans = (stop - start + s.length - 1) / s.length;
    const bool one = w.groups == 1;
    const int64_t g = one ? 0 : start / w.group, end = one ? 1 : (stop - 1) / w.group + 1;
    const int64_t per = one ? spans : w.group / s.length, head = one ? 0 : start % w.group / s.length;
    for (int64_t row = first; row < last; ++row) {
        const uint8_t* data = w.qdata + row * w.row_bytes;
        const uint8_t* next = stop < w.columns ? data + stop * w.bits / 8 : data + (last - first) * w.row_bytes;
        for (int64_t byte = 0; byte < (stop - start) * w.bits / 8; byte += 64) _mm_prefetch(next + byte, _MM_HINT_T1);
        uint8_t* tile_row = to.codes + (row - first) / TILE * chunks * TILE_BYTES + (row - first) % TILE * 64;
        for (int64_t c = 0; c < chunks; ++c)
            _mm512_store_si512(tile_row + c * TILE_BYTES, codes_of(data, w.row_bytes, start / CHUNK + c, cutter));
        float *scales = to.scales + (row - first) * spans, *points = to.zeros + (row - first) * spans;
        if (per == 1) {  // straight to their places; what is written behind them the next row overwrites
            read_groups(w, row, cutter, scales - g, groups.zero, g, end);
        } else {
            read_groups(w, row, cutter, groups.scale, groups.zero, g, end);
            for (int64_t i = 0, at = g, left = per - head; i < spans; ++i, --left) {
                if (left == 0) ++at, left = per;
                scales[i] = groups.scale[at];
            }
        }
        if (!zeros) continue;
        for (int64_t i = 0, at = g, left = per - head; i < spans; ++i, --left) {
            if (left == 0) ++at, left = per;
            points[i] = groups.zero[at];
        }
    }
}

// One tile of rows against one of tokens over a piece's spans; sums [16 rows, 16 tokens] in float32.
template <bool ZEROS>
TILES void multiply_spans(const uint8_t* a, const int8_t* b, int64_t chunks, int64_t spans, int64_t length, const float* scales,
                          const float* zeros, const Tokens& tokens, float* sums, bool first) {
    alignas(64) int32_t products[4][256];
    __m512 total[TILE];
    for (int r = 0; r < TILE; ++r) total[r] = first ? _mm512_setzero_ps() : _mm512_load_ps(sums + 16 * r);
    const auto finish = [&](int64_t i) TILES __attribute__((always_inline)) {
        const int32_t* found = products[i & 3];
        const __m512 token_scale = _mm512_load_ps(tokens.scales + 16 * i), token_sum = _mm512_load_ps(tokens.sums + 16 * i);
#pragma GCC unroll 16
        for (int r = 0; r < TILE; ++r) {
            __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(found + 16 * r));
            if (ZEROS) value = _mm512_fnmadd_ps(_mm512_set1_ps(zeros[r * spans + i]), token_sum, value);
            total[r] = _mm512_fmadd_ps(_mm512_set1_ps(scales[r * spans + i]), _mm512_mul_ps(token_scale, value), total[r]);
        }
    };
    // Sums C of span i from tiles A and B; all rows start from the same. A macro, as tiles have no other names.
#define LLMQUANT_SPAN(C, A, B)                                                                        \
    do {                                                                                              \
        if (ZEROS)                                                                                    \
            _tile_zero(C);                                                                            \
        else                                                                                          \
            _tile_loadd(C, tokens.starts + 16 * i, 0);                                                \
        for (int64_t c = i * length / CHUNK; c < (i + 1) * length / CHUNK && c < chunks; ++c) {       \
            _tile_loadd(A, a + c * TILE_BYTES, 64);                                                   \
            _tile_loadd(B, b + c * TILE_BYTES, 64);                                                   \
            _tile_dpbusd(C, A, B);                                                                    \
        }                                                                                             \
        _tile_stored(C, products[i & 3], 64);                                                         \
    } while (false)
    // Spans are on their way through memory while those before them are scaled.
    for (int64_t i = 0; i < spans; ++i) {
        switch (i & 3) {
            case 0: LLMQUANT_SPAN(0, 4, 6); break;
            case 1: LLMQUANT_SPAN(1, 5, 7); break;
            case 2: LLMQUANT_SPAN(2, 4, 6); break;
            default: LLMQUANT_SPAN(3, 5, 7);
        }
        if (i >= 3) finish(i - 3);
    }
    for (int64_t i = spans < 3 ? 0 : spans - 3; i < spans; ++i) finish(i);
#undef LLMQUANT_SPAN
    for (int r = 0; r < TILE; ++r) _mm512_store_ps(sums + 16 * r, total[r]);
}

// Where the sums of a block of two tiles of rows and two of tokens lie.
struct Corner {
    float* sums;
    int64_t row_step, token_step;  // to those of the second tile of rows, of tokens

    float* of(int rows, int tokens) const { return sums + rows * row_step + tokens * token_step; }
};

// The same for two tiles of rows, `a_step` bytes apart, against two of tokens: a tile that was loaded serves twice.
template <bool ZEROS>
TILES void multiply_block(const uint8_t* a, int64_t a_step, int64_t chunks, int64_t spans, int64_t length, const float* scales,
                          const float* zeros, const Tokens tokens[2], const Corner& corner, bool first) {
    alignas(64) int32_t products[2][4][256];  // of two spans in turn: one is scaled while the next is multiplied
    const auto finish = [&](int64_t i, int rows, int side) TILES __attribute__((always_inline)) {
        const int32_t* found = products[i & 1][2 * rows + side];
        const float *scale = scales + rows * TILE * spans + i, *zero = zeros + rows * TILE * spans + i;
        float* total = corner.of(rows, side);
        const __m512 token_scale = _mm512_load_ps(tokens[side].scales + 16 * i);
        const __m512 token_sum = _mm512_load_ps(tokens[side].sums + 16 * i);
        const bool fresh = first && i == 0;
#pragma GCC unroll 4
        for (int r = 0; r < TILE; ++r, total += 16) {
            __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(found + 16 * r));
            if (ZEROS) value = _mm512_fnmadd_ps(_mm512_set1_ps(zero[r * spans]), token_sum, value);
            const __m512 before = fresh ? _mm512_setzero_ps() : _mm512_load_ps(total);
            _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_set1_ps(scale[r * spans]), _mm512_mul_ps(token_scale, value), before));
        }
    };
    const auto finish_span = [&](int64_t i) TILES {
        for (int rows = 0; rows < 2; ++rows)
            for (int side = 0; side < 2; ++side) finish(i, rows, side);
    };
    for (int64_t i = 0; i < spans; ++i) {
        if (ZEROS) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, tokens[0].starts + 16 * i, 0);
            _tile_loadd(1, tokens[1].starts + 16 * i, 0);
            _tile_loadd(2, tokens[0].starts + 16 * i, 0);
            _tile_loadd(3, tokens[1].starts + 16 * i, 0);
        }
        for (int64_t c = i * length / CHUNK; c < (i + 1) * length / CHUNK && c < chunks; ++c) {
            _tile_stream_loadd(4, a + c * TILE_BYTES, 64);
            _tile_loadd(6, tokens[0].codes + c * TILE_BYTES, 64);
            _tile_dpbusd(0, 4, 6);
            _tile_stream_loadd(5, a + a_step + c * TILE_BYTES, 64);
            _tile_dpbusd(2, 5, 6);
            _tile_loadd(7, tokens[1].codes + c * TILE_BYTES, 64);
            _tile_dpbusd(1, 4, 7);
            _tile_dpbusd(3, 5, 7);
        }
        int32_t(*to)[256] = products[i & 1];
        _tile_stored(0, to[0], 64);
        _tile_stored(1, to[1], 64);
        _tile_stored(2, to[2], 64);
        _tile_stored(3, to[3], 64);
        if (i > 0) finish_span(i - 1);
    }
    finish_span(spans - 1);
}

TARGET void store_sums(const Matrix& w, const Inputs& in, const float* sums, int64_t row, int64_t token) {
    __m512i v[TILE];
    for (int i = 0; i < TILE; ++i) v[i] = _mm512_load_si512(sums + 16 * i);
    transpose(v);
    const __mmask16 present = first_lanes(w.rows - row);
    const __m512 bias = in.bias ? load_floats(in.bias, row, in.bias_type, present) : _mm512_setzero_ps();
    for (int i = 0; i < TILE && token + i < in.count; ++i)
        store_floats(in.out, (token + i) * w.rows + row, in.type, present, _mm512_add_ps(_mm512_castsi512_ps(v[i]), bias));
}

}  // namespace

// Whether the scales of a product cover whole spans that are long enough.
bool fits_int8_tiles(const Matrix& w, const Inputs& in) {
    return in.activation == SYMMETRIC && !w.table && make_spans(w, in).length > 0;
}

TILES void int8_tile_linear(const Matrix& w, const Inputs& in) {
    const Spans s = make_spans(w, in);
    const int64_t tiles = (in.count + TILE - 1) / TILE, threads = omp_get_max_threads();
    const int64_t share = (w.rows + threads - 1) / threads, panels = (share + PANEL - 1) / PANEL;
    const int64_t panel = (share + TILE * panels - 1) / (TILE * panels) * TILE;
    const bool zeros = w.zero_point || w.midpoint != static_cast<int32_t>(w.midpoint);
    uint8_t* packed = scratch<uint8_t>(0, tiles * token_bytes(s));
    static const TileConfig config;
#pragma omp parallel num_threads(threads)
    {
        const Cutter cutter = make_cutter(w.bits);
        const Groups groups = make_groups(w);
        const Unpacked weights = {scratch<uint8_t>(1, panel * DEPTH), scratch<float>(6, panel * DEPTH / SHORTEST + 80),
                                  scratch<float>(7, panel * DEPTH / SHORTEST)};
        float* sums = scratch<float>(2, panel * tiles * TILE);
        _tile_loadconfig(&config);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tiles; ++t) pack_tokens(w, in, s, t * TILE, tokens_at(packed, s, t));
#pragma omp for schedule(static)
        for (int64_t row = 0; row < w.rows; row += panel) {
            const int64_t last = row + panel < w.rows ? row + panel : w.rows, row_tiles = (last - row + TILE - 1) / TILE;
            for (int64_t k = 0; k < w.columns; k += DEPTH) {
                const int64_t stop = k + DEPTH < w.columns ? k + DEPTH : w.columns;
                const int64_t spans = (stop - k + s.length - 1) / s.length, chunks = (stop - k + CHUNK - 1) / CHUNK;
                unpack_panel(w, s, cutter, groups, row, last, k, stop, zeros, weights);
                const auto tokens_of = [&](int64_t t) {
                    const Tokens all = tokens_at(packed, s, t);
                    const int64_t at = k / s.length * 16;
                    return Tokens{all.codes + k / CHUNK * TILE_BYTES, all.scales + at, all.sums + at, all.starts + at};
                };
                const int64_t row_step = 256, token_step = panel / TILE * 256;
                for (int64_t t = 0; t < tiles; t += 2) {
                    const int64_t wide = t + 1 < tiles ? 2 : 1;
                    const Tokens here[2] = {tokens_of(t), tokens_of(t + wide - 1)};
                    for (int64_t r = 0; r < row_tiles; r += 2) {
                        const int64_t tall = r + 1 < row_tiles ? 2 : 1;
                        const uint8_t* codes = weights.codes + r * chunks * TILE_BYTES;
                        const float *scales = weights.scales + r * TILE * spans, *points = weights.zeros + r * TILE * spans;
                        float* to = sums + t * token_step + r * row_step;
                        if (tall == 2 && wide == 2) {
                            (zeros ? multiply_block<true> : multiply_block<false>)(codes, chunks * TILE_BYTES, chunks, spans,
                                                                                   s.length, scales, points, here,
                                                                                   {to, row_step, token_step}, k == 0);
                            continue;
                        }
                        for (int64_t i = 0; i < tall * wide; ++i)
                            (zeros ? multiply_spans<true> : multiply_spans<false>)(
                                codes + i / wide * chunks * TILE_BYTES, here[i % wide].codes, chunks, spans, s.length,
                                scales + i / wide * TILE * spans, points + i / wide * TILE * spans, here[i % wide],
                                to + i / wide * row_step + i % wide * token_step, k == 0);
                    }
                }
            }
            for (int64_t t = 0; t < tiles; ++t)
                for (int64_t r = 0; r < row_tiles; ++r)
                    store_sums(w, in, sums + (t * (panel / TILE) + r) * 256, row + r * TILE, t * TILE);
        }
        _tile_release();
    }
}
#endif
