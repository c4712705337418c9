// Every set of kernels in the library; api.cpp lists them from the fastest on.
#pragma once
#include "matrix.h"

extern const Kernels PORTABLE;
#if defined(__x86_64__) && defined(__GNUC__)
extern const Kernels AVX2, AVX2_VNNI, AVX512, VNNI, AMX;
// Without integer products, for what those refuse; in no list.
extern const Kernels PLAIN_AVX2, PLAIN_AVX512;
#endif

// The inputs from token `first` on, `count` of them.
inline Inputs part_of(const Matrix& w, const Inputs& in, int64_t first, int64_t count) {
    const int64_t size = in.type == FLOAT_F32 ? 4 : 2;
    Inputs part = in;
    part.x = static_cast<const uint8_t*>(in.x) + first * w.columns * size;
    part.out = static_cast<uint8_t*>(in.out) + first * w.rows * size;
    part.count = count;
    return part;
}

// `run` on `step` tokens at a time, so that what kernels make of the inputs stays small.
template <typename Run>
void in_parts(const Matrix& w, const Inputs& in, int64_t step, const Run& run) {
    for (int64_t i = 0; i < in.count; i += step) run(w, part_of(w, in, i, in.count - i < step ? in.count - i : step));
}

// The marked tokens once more, by plain kernels: infinities and NaN have no fixed point. As many in one go as lie side by
// side.
inline void redo_marked(const Kernels& plain, const Matrix& w, const Inputs& in, const uint8_t* marks) {
    for (int64_t first = 0, last; first < in.count; first = last) {
        for (last = first + 1; last < in.count && marks[last] == marks[first];) ++last;
        if (marks[first]) plain.linear(w, part_of(w, in, first, last - first));
    }
}
