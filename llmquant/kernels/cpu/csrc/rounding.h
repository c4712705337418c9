// Activations rounded to small floats and back: the rules of primitives/dynamic.py and primitives/blockfloat.py, bit for
// bit. generic.cpp includes this file once a target, with GENERIC its namespace, and leaves the vectors to the compiler.

namespace GENERIC {

// The largest magnitude as bits of float32: infinities are above all numbers, and NaN above them.
uint32_t largest_bits(const float* values, int64_t count) {
    uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t k = 0; k < count; ++k) {
        const uint32_t bits = bits_of(values[k]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

void load_token(const Rounding& r, int64_t token, float* values) {
    const int64_t at = token * r.columns;
    const uint16_t* halves = static_cast<const uint16_t*>(r.x) + at;
    if (r.type == FLOAT_F32) std::memcpy(values, static_cast<const float*>(r.x) + at, r.columns * 4);
    for (int64_t k = 0; r.type == FLOAT_BF16 && k < r.columns; ++k) values[k] = bfloat_to_float(halves[k]);
    for (int64_t k = 0; r.type == FLOAT_F16 && k < r.columns; ++k) values[k] = half_to_float(halves[k]);
}

void store_token(const Rounding& r, int64_t token, const float* values) {
    const int64_t at = token * r.columns;
    uint16_t* halves = static_cast<uint16_t*>(r.out) + at;
    if (r.type == FLOAT_F32) std::memcpy(static_cast<float*>(r.out) + at, values, r.columns * 4);
    for (int64_t k = 0; r.type == FLOAT_BF16 && k < r.columns; ++k) halves[k] = float_to_bfloat(values[k]);
    for (int64_t k = 0; r.type == FLOAT_F16 && k < r.columns; ++k) halves[k] = float_to_half(values[k]);
}

// The nearest number of the element to one within its range, half to even, as `round_to_` of primitives/lowfloat.py.
inline float nearest(const Rounding& r, float value) {
    const float power = float_of(bits_of(value) & 0x7f800000), least = r.least_normal;
    const float anchor = (power < least ? least : power) * r.anchor;
    return value + anchor - anchor;
}

inline float within(float value, float limit) { return value < -limit ? -limit : value > limit ? limit : value; }

// floor(log2) of a magnitude, subnormals included; -150 for zero.
int exponent_of(float value) {
    int exponent;
    return value == 0 ? -150 : (std::frexp(value, &exponent), exponent - 1);
}

int exponent_above(float value) {
    const int below = exponent_of(value);
    return below + (std::ldexp(1.f, below) < value);
}

// The exponent of the scale of a block of Microscaling.
int block_exponent(const Rounding& r, float largest) {
    const uint32_t half = 1u << (22 - r.mantissa_bits);
    switch (r.rule) {
        case ROUND_FLOOR: return exponent_of(largest) - r.largest_exponent;
        case ROUND_CEIL: return exponent_above(largest) - r.largest_exponent;
        case ROUND_EVEN:
            return exponent_of(largest) + static_cast<int>(((bits_of(largest) & 0x7fffff) + half) >> 23) - r.largest_exponent;
        default: return exponent_above(largest / r.largest);
    }
}

// The scale of a block as it is stored. NaN where a number is not finite.
float block_scale(const Rounding& r, float largest) {
    if (!(largest <= std::numeric_limits<float>::max())) return std::numeric_limits<float>::quiet_NaN();
    if (r.rule != ROUND_NVFP4) {
        const int code = block_exponent(r, largest) + 127;
        return e8m0_to_float(static_cast<uint8_t>(code < 0 ? 0 : code > 254 ? 254 : code));
    }
    Rounding scales = r;
    scales.least_normal = 0x1p-6f;
    scales.anchor = 0x1.8p20f;
    return nearest(scales, within(largest / r.largest, 448.f));
}

// 1 / scale, finite, and 0 for 0.
float inverse_of(float scale) { return scale == 0 ? 0.f : within(1.f / scale, std::numeric_limits<float>::max()); }

// Blocks of a token whose numbers lie under `outer` (1 where there is nothing outside the blocks).
void round_blocks(const Rounding& r, float outer, float* values) {
    const float limit = r.type == FLOAT_F16 ? 65504.f : r.type == FLOAT_BF16 ? bfloat_to_float(0x7f7f) : std::numeric_limits<float>::max();
    if (r.rule == ROUND_NVFP4)
        for (int64_t k = 0; k < r.columns; ++k) values[k] /= outer;
    for (int64_t start = 0; start < r.columns; start += r.group) {
        const int64_t count = r.columns - start < r.group ? r.columns - start : r.group;
        float* block = values + start;
        const float scale = block_scale(r, float_of(largest_bits(block, count)));
        const float inverse = inverse_of(scale), meant = r.rule == ROUND_NVFP4 ? scale * outer : scale;
#pragma omp simd
        for (int64_t k = 0; k < count; ++k)
            block[k] = within(nearest(r, within(block[k] * inverse, r.largest)) * meant, limit);
    }
}

// Groups of float8; `all`: the largest magnitude where all tokens share a scale.
void round_groups(const Rounding& r, const float* all, float* values) {
    for (int64_t start = 0; start < r.columns; start += r.group) {
        const int64_t count = r.columns - start < r.group ? r.columns - start : r.group;
        float* group = values + start;
        const float largest = all ? *all : float_of(largest_bits(group, count));
        const bool finite = largest <= std::numeric_limits<float>::max();
        const float chosen = r.fixed ? *r.fixed : largest / r.largest;
        const float scale = finite ? chosen : std::numeric_limits<float>::quiet_NaN();
        const float divisor = scale == 0 ? 1.f : scale;
#pragma omp simd
        for (int64_t k = 0; k < count; ++k) group[k] = nearest(r, within(group[k] / divisor, r.largest)) * scale;
    }
}

// The float32 scale of NVFP4 for the largest magnitude under it.
float outer_scale(const Rounding& r, float largest) {
    if (!(largest <= std::numeric_limits<float>::max())) return std::numeric_limits<float>::quiet_NaN();
    const float scale = largest / (448.f * r.largest), tiny = std::numeric_limits<float>::min();
    return scale < tiny ? tiny : scale;
}

void round_tokens(const Rounding& r) {
    float* largest = scratch<float>(0, r.tokens + 1);
    const bool nested = r.rule == ROUND_NVFP4, shared = r.together;
#pragma omp parallel if (r.tokens > 1 && r.tokens * r.columns > 8192)
    {
        float* values = scratch<float>(1, r.columns);
        if (nested || shared) {
#pragma omp for schedule(static)
            for (int64_t token = 0; token < r.tokens; ++token) {
                load_token(r, token, values);
                largest[token] = float_of(largest_bits(values, r.columns));
            }
        }
        if (shared) {
#pragma omp single
            largest[r.tokens] = float_of(largest_bits(largest, r.tokens));
        }
#pragma omp for schedule(static)
        for (int64_t token = 0; token < r.tokens; ++token) {
            const float& most = largest[shared ? r.tokens : token];
            load_token(r, token, values);
            if (r.rule == ROUND_FLOAT8)
                round_groups(r, shared ? &most : nullptr, values);
            else
                round_blocks(r, nested ? outer_scale(r, most) : 1.f, values);
            store_token(r, token, values);
        }
    }
}

}  // namespace GENERIC
