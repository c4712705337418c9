// Many bfloat16 inputs, for processors with AMX: panels of rows are decoded to bfloat16 and multiplied in tiles.
//
// A tile of the weights is 16 rows x 32 columns, a tile of the inputs 32 columns x 16 tokens in pairs, as `tdpbf16ps`
// wants them; two by two of each make four tiles of sums, [16 rows, 16 tokens] in float32. A thread takes a panel of
// rows, decodes `DEPTH` columns of it (they then lie in its second-level cache, and so do the panel's sums) and runs
// all tokens over them. Int8 activations become the bfloat16 nearest to code x scale.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "activations.h"
#include "decode.h"

#define TILES __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,f16c,fma,amx-tile,amx-bf16")))

namespace {

constexpr int64_t TILE = 16, WIDTH = 32;                 // rows (or tokens) and columns of a tile
constexpr int64_t PANEL = 256, DEPTH = 512;              // rows and columns that are decoded at a time
constexpr int64_t MOST_PACKED = 16 << 20;                // bytes of inputs that are packed at a time
constexpr int64_t TILE_BYTES = 1024;
constexpr int64_t FEWEST = 9;  // inputs for which a tile is worth its setting up

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A 16 x 16 matrix of 32-bit values, turned over.
INLINE void transpose(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    // Quarter q of v[4 i + j] now holds column 4 q + j of rows 4 i .. 4 i + 3.
    for (int j = 0; j < 4; ++j) {
        const __m512i a = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88), b = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
        t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; ++i) v[i] = t[i];
}

// 32 inputs of a token as bfloat16, zero behind its end.
INLINE __m512i load_bfloats(const uint16_t* x, int64_t left) {
    const __mmask32 present = left >= 32 ? ~0u : (1u << (left > 0 ? left : 0)) - 1;
    return _mm512_maskz_loadu_epi16(present, x);
}

// The token's int8 activations, decoded again and rounded to bfloat16.
void decode_activations(const Inputs& in, int64_t token, int64_t columns, uint16_t* out) {
    int16_t* codes = scratch<int16_t>(3, columns);
    for (int64_t start = 0; start < columns; start += in.group) {
        const int64_t count = start + in.group < columns ? in.group : columns - start;
        const float scale = quantize_inputs(in, token * columns + start, count, codes);
        for (int64_t k = 0; k < count; ++k) out[start + k] = float_to_bfloat(static_cast<float>(codes[k]) * scale);
    }
}

// Tokens `first` .. `first` + 15 as tiles [chunks] of 16 column pairs x 16 tokens.
TARGET void pack_inputs(const Matrix& w, const Inputs& in, int64_t first, uint8_t* out) {
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

// Rows `first` .. `last` - 1, columns `start` .. `stop` - 1 as tiles [rows / 16, chunks] of 16 rows x 32 columns.
TARGET void decode_panel(Decoder& decoder, int64_t first, int64_t last, int64_t start, int64_t stop, uint8_t* out) {
    const int64_t chunks = (stop - start + WIDTH - 1) / WIDTH;
    for (int64_t row = first; row < last; ++row) {
        decoder.start(row);
        uint8_t* to = out + (row - first) / TILE * chunks * TILE_BYTES + (row - first) % TILE * 64;
        for (int64_t k = start; k < stop; k += CHUNK, to += 2 * TILE_BYTES) {
            __m512i values[2];
            decoder.bfloats(k / CHUNK, values);
            _mm512_store_si512(to, values[0]);
            if (k + WIDTH < stop) _mm512_store_si512(to + TILE_BYTES, values[1]);
        }
    }
}

// Four tiles of sums: two tiles of rows against two of tokens, `chunks` deep.
template <int A, int B>
TILES inline void multiply(const uint8_t* a, int64_t a_step, const uint8_t* b, int64_t b_step, int64_t chunks,
                           float* c, int64_t c_step, bool first) {
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
    for (int64_t i = 0; i < chunks; ++i, a += TILE_BYTES, b += TILE_BYTES) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (B > 1) {
            _tile_loadd(7, b + b_step, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (A > 1) {
            _tile_loadd(5, a + a_step, 64);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (A > 1 && B > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 64);
    if (B > 1) _tile_stored(1, c + 256, 64);
    if (A > 1) _tile_stored(2, c + c_step, 64);
    if (A > 1 && B > 1) _tile_stored(3, c + c_step + 256, 64);
}

// A tile of sums, [16 rows, 16 tokens], to the output [tokens, rows].
TARGET void store_tile(const Matrix& w, const Inputs& in, const float* sums, int64_t row, int64_t token) {
    __m512i v[TILE];
    for (int i = 0; i < TILE; ++i) v[i] = _mm512_load_si512(sums + 16 * i);
    transpose(v);
    const __mmask16 present = first_lanes(w.rows - row);
    const __m512 bias = in.bias ? load_floats(in.bias, row, in.bias_type, present) : _mm512_setzero_ps();
    for (int i = 0; i < TILE && token + i < in.count; ++i)
        store_floats(in.out, (token + i) * w.rows + row, in.type, present,
                     _mm512_add_ps(_mm512_castsi512_ps(v[i]), bias));
}

TILES void tile_linear(const Matrix& w, const Inputs& in, int64_t threads) {
    const int64_t chunks = (w.columns + WIDTH - 1) / WIDTH, tokens = (in.count + TILE - 1) / TILE;
    const int64_t share = (w.rows + threads - 1) / threads, panels = (share + PANEL - 1) / PANEL;  // a thread
    const int64_t panel = (share + 2 * TILE * panels - 1) / (2 * TILE * panels) * (2 * TILE);
    uint8_t* packed = scratch<uint8_t>(0, tokens * chunks * TILE_BYTES);
    static const TileConfig config;
#pragma omp parallel num_threads(threads)
    {
        Decoder decoder(w);
        uint8_t* decoded = scratch<uint8_t>(1, panel * DEPTH * 2);
        float* sums = scratch<float>(2, panel * tokens * TILE);
        _tile_loadconfig(&config);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; ++t) pack_inputs(w, in, t * TILE, packed + t * chunks * TILE_BYTES);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < w.rows; row += panel) {
            const int64_t last = row + panel < w.rows ? row + panel : w.rows, tiles = (last - row + TILE - 1) / TILE;
            for (int64_t k = 0; k < w.columns; k += DEPTH) {
                const int64_t stop = k + DEPTH < w.columns ? k + DEPTH : w.columns, deep = (stop - k + WIDTH - 1) / WIDTH;
                decode_panel(decoder, row, last, k, stop, decoded);
                for (int64_t t = 0; t < tokens; t += 2) {
                    const uint8_t* b = packed + (t * chunks + k / WIDTH) * TILE_BYTES;
                    for (int64_t r = 0; r < tiles; r += 2) {
                        const uint8_t* a = decoded + r * deep * TILE_BYTES;
                        float* c = sums + (r * tokens + t) * 256;
                        const auto run = r + 1 < tiles ? (t + 1 < tokens ? multiply<2, 2> : multiply<2, 1>)
                                                       : (t + 1 < tokens ? multiply<1, 2> : multiply<1, 1>);
                        run(a, deep * TILE_BYTES, b, chunks * TILE_BYTES, deep, c, tokens * 256, k == 0);
                    }
                }
            }
            for (int64_t r = 0; r < tiles; ++r)
                for (int64_t t = 0; t < tokens; ++t)
                    store_tile(w, in, sums + (r * tokens + t) * 256, row + r * TILE, t * TILE);
        }
        _tile_release();
    }
}

// As many tokens at a time as keep the packed inputs small.
void linear(const Matrix& w, const Inputs& in) {
    if (in.type != FLOAT_BF16 || in.count < FEWEST) return VNNI.linear(w, in);
    const int64_t step = MOST_PACKED / (w.columns * 2) / (2 * TILE) * (2 * TILE), size = 2;
    for (int64_t i = 0, count = step > 2 * TILE ? step : 2 * TILE; i < in.count; i += count) {
        Inputs part = in;
        part.x = static_cast<const uint8_t*>(in.x) + i * w.columns * size;
        part.out = static_cast<uint8_t*>(in.out) + i * w.rows * size;
        part.count = in.count - i < count ? in.count - i : count;
        tile_linear(w, part, omp_get_max_threads());
    }
}

bool has_amx() {
    if (!VNNI.present() || !__builtin_cpu_supports("amx-bf16")) return false;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // the kernel grants the use of tiles a process
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

}  // namespace

const Kernels AMX = {"amx", has_amx, linear, VNNI.rows};
#endif
