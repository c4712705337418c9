// Rows against few inputs in products of float32: what lookup.cpp and sparse.cpp share.
#pragma once
#include <omp.h>

#include "vbmi.h"

namespace {

// R rows against M inputs: they share each load of the inputs, and as they lie far apart, memory serves them side by
// side (one stream a thread reaches four fifths of what several do).
constexpr int MOST_ROWS = 4, MOST = 4, AHEAD = 4096;

struct Rows {
    const uint8_t* data[MOST_ROWS];
    const float* scale[MOST_ROWS];
};

// A thread's rows, R of them at a time, and the inputs MOST at a time.
template <typename Product>
INLINE void for_rows(const Matrix& w, const Inputs& in, int R, const Product& product) {
    const Cutter cutter = make_cutter(w.bits);
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t begin = w.rows * me / threads, end = w.rows * (me + 1) / threads, step = (end - begin + R - 1) / R;
    const auto row_at = [&](int r, int64_t i) { return begin + r * step + i < end ? begin + r * step + i : end - 1; };
    // Scales are read one turn ahead: a load that straddles stores just made would wait for them.
    Groups groups[2][MOST_ROWS];
    for (int i = 0; i < 2 * R; ++i) groups[i / R][i % R] = make_groups(w, i, 2 * R);
    for (int r = 0; r < R && step; ++r) read_groups(w, row_at(r, 0), cutter, groups[0][r].scale, groups[0][r].zero);
    float found[MOST_ROWS][MOST];
    Rows rows;
    for (int64_t i = 0; i < step; ++i) {
        int64_t at[MOST_ROWS];  // at the end of a share some rows are done twice
        for (int r = 0; r < R; ++r) {
            const Groups &now = groups[i & 1][r], &next = groups[~i & 1][r];
            at[r] = row_at(r, i);
            rows.data[r] = w.qdata + at[r] * w.row_bytes;
            rows.scale[r] = now.scale;
            if (i + 1 < step) read_groups(w, row_at(r, i + 1), cutter, next.scale, next.zero);
        }
        for (int64_t k = 0; k < in.count; k += MOST) {
            const int64_t count = in.count - k < MOST ? in.count - k : MOST;
            product(rows, k, count, found);
            for (int r = 0; r < R; ++r) {
                const float add = in.bias ? load_float(in.bias, at[r], in.bias_type) : 0.f;
                for (int m = 0; m < count; ++m) store_float(in.out, (k + m) * w.rows + at[r], in.type, found[r][m] + add);
            }
        }
    }
}

}  // namespace
