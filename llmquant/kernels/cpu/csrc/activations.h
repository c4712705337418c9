// The rule that turns activations into int8 codes; see primitives/dynamic.py, which defines it.
#pragma once
#include <cmath>
#include <limits>

#include "floats.h"

namespace {

// Codes minus zero point of `count` inputs from `at` on, and their scale as the value. NaN where an input is not
// finite, so that everything it touches is.
inline float quantize_inputs(const Inputs& in, int64_t at, int64_t count, int16_t* codes) {
    float low = 0, high = 0, poison = 0;
    for (int64_t i = at; i < at + count; ++i) {
        const float value = load_float(in.x, i, in.type);
        low = value < low ? value : low;
        high = value > high ? value : high;
        poison += value * 0.f;
    }
    const bool symmetric = in.activation == SYMMETRIC;
    const float scale = activation_scale(in, low, high), safe = scale > 0 ? scale : 1.f;
    const int bottom = symmetric ? -127 : -128;
    const auto clamp = [bottom](float value) { return value < bottom ? bottom : value > 127 ? 127 : static_cast<int>(value); };
    if (poison != 0 || !(scale <= std::numeric_limits<float>::max())) {
        for (int64_t i = 0; i < count; ++i) codes[i] = 0;
        return std::numeric_limits<float>::quiet_NaN();
    }
    const int zero = symmetric ? 0 : in.fixed.zero_point ? *in.fixed.zero_point : clamp(std::nearbyint(-128.f - low / safe));
    for (int64_t i = 0; i < count; ++i)
        codes[i] = static_cast<int16_t>(clamp(std::nearbyint(load_float(in.x, at + i, in.type) / safe) + zero) - zero);
    return scale;
}

}  // namespace
