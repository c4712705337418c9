// The C interface: every name here has its signature in ../library.py.
#include "chain.h"
#include "kernels.h"

#include <omp.h>

#include <cstddef>

void run_chain(const Step* steps, int64_t count, int64_t tokens, int32_t type);
bool can_attend(int32_t type);

namespace {

const Kernels* const ALL[] = {
#if defined(__x86_64__) && defined(__GNUC__)
    &AMX, &VNNI, &AVX512, &AVX2_VNNI, &AVX2,
#endif
    &PORTABLE,
};

const Kernels& fastest_plain() {
#if defined(__x86_64__) && defined(__GNUC__)
    if (PLAIN_AVX512.present()) return PLAIN_AVX512;
    if (PLAIN_AVX2.present()) return PLAIN_AVX2;
#endif
    return PORTABLE;
}

}  // namespace

extern "C" {

// The name of set `i`, from the fastest on, or null behind the last; `present`: whether this processor can run it.
const char* llmquant_kernels(int32_t i, int32_t* present) {
    if (i < 0 || static_cast<size_t>(i) >= sizeof(ALL) / sizeof(*ALL)) return nullptr;
    *present = ALL[i]->present();
    return ALL[i]->name;
}

void llmquant_linear(int32_t kernels, const Matrix* w, const void* x, int32_t type, int64_t count, const void* bias,
                     int32_t bias_type, int32_t activation, int64_t group, const float* scale,
                     const int8_t* zero_point, void* out) {
    if (!count) return;  // an expert that no token chose
    ALL[kernels]->linear(*w, {x, bias, out, count, group, type, bias_type, activation, {scale, zero_point}});
}

// Activations as their codes stand for them.
void llmquant_round(const Rounding* rounding) {
    if (rounding->tokens && rounding->columns) fastest_plain().round(*rounding);
}

// Operators one after the other on few tokens of a half type, where the set "avx512_vnni" can run.
void llmquant_chain(const Step* steps, int64_t count, int64_t tokens, int32_t type) {
    run_chain(steps, count, tokens, type);
}

// Whether this processor has what attentions in chains of a type need.
int32_t llmquant_can_attend(int32_t type) { return can_attend(type); }

// Rows as floats of `type`: all of them where `indices` is null. Returns the place of the first index that is out of
// range, and then writes nothing, or -1.
int64_t llmquant_rows(int32_t kernels, const Matrix* w, const int64_t* indices, int64_t count, int32_t type, void* out) {
    for (int64_t i = 0; indices && i < count; ++i)
        if (indices[i] < 0 || indices[i] >= w->rows) return i;
    ALL[kernels]->rows(*w, indices, count, type, out);
    return -1;
}

// The exclusive or of `count` words, read as fast as this machine can: by all threads, each in several places at once,
// with prefetching.
uint64_t llmquant_read(const uint64_t* data, int64_t count) {
    constexpr int64_t LINE = 8, AHEAD = 512, STREAMS = 8;
    uint64_t sum = 0;
#pragma omp parallel reduction(^ : sum)
    {
        const int64_t pieces = STREAMS * omp_get_num_threads(), step = count / (LINE * pieces) * LINE;
        const uint64_t* from[STREAMS];
        for (int64_t s = 0; s < STREAMS; ++s) from[s] = data + (omp_get_thread_num() * STREAMS + s) * step;
        for (int64_t i = 0; i < step; i += LINE)
            for (const uint64_t* stream : from) {
                __builtin_prefetch(stream + i + AHEAD);
                for (int64_t k = 0; k < LINE; ++k) sum ^= stream[i + k];
            }
#pragma omp single
        for (int64_t i = step * pieces; i < count; ++i) sum ^= data[i];
    }
    return sum;
}

}  // extern "C"
