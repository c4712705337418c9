// The C interface: every name here has its signature in ../library.py.
#include "kernels.h"

#include <cstddef>

namespace {

const Kernels* const ALL[] = {
#if defined(__x86_64__) && defined(__GNUC__)
    &AMX, &VNNI, &AVX512, &AVX2,
#endif
    &PORTABLE,
};

}  // namespace

extern "C" {

// The name of set `i`, from the fastest on, or null behind the last; `present`: whether this processor can run it.
const char* llmquant_kernels(int32_t i, int32_t* present) {
    if (i < 0 || static_cast<size_t>(i) >= sizeof(ALL) / sizeof(*ALL)) return nullptr;
    *present = ALL[i]->present();
    return ALL[i]->name;
}

void llmquant_linear(int32_t kernels, const Matrix* w, const void* x, int32_t type, int64_t count, const void* bias,
                     int32_t bias_type, int32_t activation, int64_t group, void* out) {
    ALL[kernels]->linear(*w, {x, bias, out, count, group, type, bias_type, activation});
}

// Rows as floats of `type`: all of them where `indices` is null. Returns the place of the first index that is out of
// range, and then writes nothing, or -1.
int64_t llmquant_rows(int32_t kernels, const Matrix* w, const int64_t* indices, int64_t count, int32_t type, void* out) {
    for (int64_t i = 0; indices && i < count; ++i)
        if (indices[i] < 0 || indices[i] >= w->rows) return i;
    ALL[kernels]->rows(*w, indices, count, type, out);
    return -1;
}

// The exclusive or of `count` words, read as the kernels read weights: by all threads, with prefetching.
uint64_t llmquant_read(const uint64_t* data, int64_t count) {
    constexpr int64_t LINE = 8, AHEAD = 1024;
    uint64_t sum = 0;
#pragma omp parallel for schedule(static) reduction(^ : sum)
    for (int64_t i = 0; i < count; i += LINE) {
        __builtin_prefetch(data + i + AHEAD);
        for (int64_t k = i; k < i + LINE && k < count; ++k) sum ^= data[k];
    }
    return sum;
}

}  // extern "C"
