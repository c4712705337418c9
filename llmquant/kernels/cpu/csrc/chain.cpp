// Decoding a small model takes more time between its products than in them. Here the operators between two attentions
// run in one parallel region: threads meet at barriers, and nothing returns to Python.
#include "chain.h"

#include <algorithm>
#include <cmath>

#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <omp.h>

#include "attention.h"
#include "vbmi.h"

void linear_in_region(const Matrix& w, const Inputs& in);

namespace {

// The sum of squares in the order in which torch sums a row of float32 (cascade_sum of ATen's SumKernel.cpp): vectors
// of 8 in four interleaved rows, partial sums kept in levels, then the four, then the lanes one by one.
TARGET float sum_of_squares(const void* x, int64_t at, int64_t n, int32_t type) {
    constexpr int LEVELS = 4, ROWS = 4, LANES = 8;
    const int64_t vectors = n / LANES, size = vectors / ROWS;
    int log = 0;
    while ((int64_t{1} << log) < size) ++log;
    const int64_t power = log / LEVELS > 4 ? log / LEVELS : 4, step = int64_t{1} << power, mask = step - 1;
    const auto square = [&](int64_t vector) TARGET __attribute__((always_inline)) {
        const __m256 v = _mm512_castps512_ps256(load_floats(x, at + LANES * vector, type, 0xff));
        return _mm256_mul_ps(v, v);
    };
    __m256 sums[LEVELS][ROWS];
    for (auto& level : sums)
        for (__m256& sum : level) sum = _mm256_setzero_ps();
    int64_t i = 0;
    while (i + step <= size) {
        for (int64_t j = 0; j < step; ++j, ++i)
            for (int k = 0; k < ROWS; ++k) sums[0][k] = _mm256_add_ps(sums[0][k], square(ROWS * i + k));
        for (int j = 1; j < LEVELS; ++j) {
            for (int k = 0; k < ROWS; ++k) {
                sums[j][k] = _mm256_add_ps(sums[j][k], sums[j - 1][k]);
                sums[j - 1][k] = _mm256_setzero_ps();
            }
            if (i & mask << j * power) break;
        }
    }
    for (; i < size; ++i)
        for (int k = 0; k < ROWS; ++k) sums[0][k] = _mm256_add_ps(sums[0][k], square(ROWS * i + k));
    for (int j = 1; j < LEVELS; ++j)
        for (int k = 0; k < ROWS; ++k) sums[0][k] = _mm256_add_ps(sums[0][k], sums[j][k]);
    for (int64_t v = size * ROWS; v < vectors; ++v) sums[0][0] = _mm256_add_ps(sums[0][0], square(v));
    for (int k = 1; k < ROWS; ++k) sums[0][0] = _mm256_add_ps(sums[0][0], sums[0][k]);
    float total = 0;
    for (int64_t k = vectors * LANES; k < n; ++k) {
        const float value = load_float(x, at + k, type);
        total += value * value;
    }
    alignas(32) float lanes[LANES];
    _mm256_store_ps(lanes, sums[0][0]);
    for (float lane : lanes) total += lane;
    return total;
}

// x / sqrt(mean(x^2) + eps) in float32, rounded; times the weight, rounded.
TARGET void norm(const Step& s, int64_t token, int32_t type) {
    const int64_t at = token * s.width;
    const float mean = sum_of_squares(s.x, at, s.width, type) / static_cast<float>(s.width);
    const __m512 inverse = _mm512_set1_ps(1.f / std::sqrt(mean + s.eps));
    alignas(64) uint16_t rounded[16];
    for (int64_t k = 0; k < s.width; k += 16) {
        const __mmask16 present = first_lanes(s.width - k);
        store_floats(rounded, 0, type, 0xffff, _mm512_mul_ps(load_floats(s.x, at + k, type, present), inverse));
        store_floats(s.out, at + k, type, present,
                     _mm512_mul_ps(load_floats(rounded, 0, type, 0xffff), load_floats(s.y, k, type, present)));
    }
}

TARGET void add(const Step& s, int64_t first, int64_t last, int32_t type) {
    for (int64_t k = first; k < last; k += 16) {
        const __mmask16 present = first_lanes(last - k);
        store_floats(s.out, k, type, present,
                     _mm512_add_ps(load_floats(s.x, k, type, present), load_floats(s.y, k, type, present)));
    }
}

// [tokens, 2 width] -> silu of the first half, looked up by its bits, times the second.
TARGET void gate(const Step& s, int64_t token, int64_t first, int64_t last, int32_t type) {
    const uint16_t* codes = static_cast<const uint16_t*>(s.x) + token * 2 * s.width;
    const uint16_t* silu = static_cast<const uint16_t*>(s.y);
    alignas(64) uint16_t gates[16] = {};
    for (int64_t k = first; k < last; k += 16) {
        const __mmask16 present = first_lanes(last - k);
        for (int i = 0; i < 16 && k + i < last; ++i) gates[i] = silu[codes[k + i]];
        store_floats(s.out, token * s.width + k, type, present,
                     _mm512_mul_ps(load_floats(gates, 0, type, 0xffff), load_floats(codes, s.width + k, type, present)));
    }
}

float rounded(float value, int32_t type) {
    return type == FLOAT_F16 ? half_to_float(float_to_half(value)) : bfloat_to_float(float_to_bfloat(value));
}

// A head turned by its position: x cos + (x with its halves exchanged) sin, each rounded.
void rope(const Step& s, int64_t token, int64_t head, int32_t type) {
    void* data = const_cast<void*>(s.x);
    const int64_t at = token * s.width + head * s.head, place = token * s.place_step, half = s.head / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float low = load_float(data, at + i, type), high = load_float(data, at + half + i, type);
        const auto turned = [&](float own, float other, int64_t k) {
            return rounded(own * load_float(s.y, place + k, type), type) +
                   rounded(other * load_float(s.z, place + k, type), type);
        };
        store_float(data, at + i, type, turned(low, high, i));
        store_float(data, at + half + i, type, turned(high, low, half + i));
    }
}

// The new tokens' keys and values become the last rows of their caches.
void append(const Step& s, int64_t head) {
    const int64_t token = head / s.kv_heads, from = token * s.width + (s.heads + head % s.kv_heads) * s.head;
    const uint16_t* key = static_cast<const uint16_t*>(s.x) + from;
    const int64_t at = (head * s.room + s.length) * s.head, bytes = 2 * s.head;
    std::memcpy(static_cast<uint16_t*>(s.keys) + at, key, bytes);
    std::memcpy(static_cast<uint16_t*>(s.values) + at, key + s.kv_heads * s.head, bytes);
}

// Piece `i` of every token's attention: up to `together` heads that share keys and values.
void attend(const Step& s, int64_t i, int64_t together, int32_t type) {
    const int64_t group = s.heads / s.kv_heads, pieces = (group + together - 1) / together;
    const int64_t kv_head = i / pieces, in_group = i % pieces * together;  // kv_head counts through all tokens
    const int64_t token = kv_head / s.kv_heads, head = kv_head % s.kv_heads * group + in_group;
    const uint16_t* q = static_cast<const uint16_t*>(s.x) + token * s.width + head * s.head;
    const int64_t cache = kv_head * s.room * s.head, heads = std::min(together, group - in_group);
    const int64_t at = token * s.heads + head;
    const uint16_t *keys = static_cast<uint16_t*>(s.keys) + cache, *values = static_cast<uint16_t*>(s.values) + cache;
    attend({q, keys, values, heads, s.length + 1, s.head, s.scale, type},
           static_cast<uint16_t*>(s.out) + at * s.head, s.logsumexp ? s.logsumexp + at : nullptr);
}

void attention(const Step& s, int64_t tokens, int32_t type) {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    for (int64_t i = me; i < tokens * s.kv_heads; i += threads) append(s, i);
#pragma omp barrier
    const int64_t group = s.heads / s.kv_heads, share = (tokens * s.heads + threads - 1) / threads;
    const int64_t together = std::min({TOGETHER, group, share});
    const int64_t pieces = tokens * s.kv_heads * ((group + together - 1) / together);
    for (int64_t i = me; i < pieces; i += threads) attend(s, i, together, type);
}

TARGET void run(const Step& s, int64_t tokens, int32_t type) {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const auto share = [&](int64_t n, int64_t i) { return (n / 32 * i / threads) * 32 + (i == threads ? n % 32 : 0); };
    if (s.kind == LINEAR)
        linear_in_region(*s.weight, {s.x, s.y, s.out, tokens, s.group, type, type, s.activation, s.fixed});
    else if (s.kind == ADD)
        add(s, share(tokens * s.width, me), share(tokens * s.width, me + 1), type);
    else if (s.kind == GATE)
        for (int64_t t = 0; t < tokens; ++t) gate(s, t, share(s.width, me), share(s.width, me + 1), type);
    else if (s.kind == NORM)
        for (int64_t t = me; t < tokens; t += threads) norm(s, t, type);
    else if (s.kind == ROPE)
        for (int64_t i = me; i < tokens * s.heads; i += threads) rope(s, i / s.heads, i % s.heads, type);
    else
        attention(s, tokens, type);
}

}  // namespace

void run_chain(const Step* steps, int64_t count, int64_t tokens, int32_t type) {
#pragma omp parallel
    for (int64_t i = 0; i < count; ++i) {
        run(steps[i], tokens, type);
#pragma omp barrier
    }
}

bool can_attend(int32_t type) {
    return VNNI.present() && (type == FLOAT_F16 || (type == FLOAT_BF16 && __builtin_cpu_supports("avx512bf16")));
}

#else
void run_chain(const Step*, int64_t, int64_t, int32_t) {}
bool can_attend(int32_t) { return false; }
#endif
