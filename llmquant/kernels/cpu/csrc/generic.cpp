// The plain kernels, compiled for each kind of processor: all it has, or what its own kernels leave to them.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "activations.h"
#include "floats.h"
#include "kernels.h"
#include "matrix.h"
#include "scratch.h"

namespace {
constexpr int64_t MOST_EXACT = 16384;  // products of two 9-bit numbers whose sum surely fits 32 bits
}

#define GENERIC portable
#include "generic.h"
#include "rounding.h"
#undef GENERIC

bool everywhere() { return true; }
const Kernels PORTABLE = {"portable", everywhere, portable::linear, portable::rows, portable::round_tokens};

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define GENERIC avx2
#include "generic.h"
#include "rounding.h"
#undef GENERIC
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,prefer-vector-width=512")
#define GENERIC avx512
#include "generic.h"
#include "rounding.h"
#undef GENERIC
#pragma GCC pop_options

bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
const Kernels PLAIN_AVX2 = {"avx2", has_avx2, avx2::linear, avx2::rows, avx2::round_tokens};
const Kernels PLAIN_AVX512 = {"avx512", has_avx512, avx512::linear, avx512::rows, avx512::round_tokens};
#endif
