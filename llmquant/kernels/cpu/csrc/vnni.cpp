// The set of kernels for AVX-512 with VBMI and VNNI: strips of integers, tables of floats, and rows decoded.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <omp.h>

#include "decode.h"
#include "lookup.h"
#include "rows.h"
#include "sparse.h"
#include "strips.h"

namespace {

// A plan and how a thread runs its share of it: rows one by one for very few inputs, else strips.
template <typename Plan>
void integer_linear(const Matrix& w, const Inputs& in, const Plan& plan, void (*run)(const Matrix&, const Inputs&, const Plan&)) {
    uint8_t* bad = scratch<uint8_t>(7, in.count);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < in.count; ++token) bad[token] = !plan.fill(w, in, plan, token);
        run(w, in, plan);
    }
    redo_marked(PLAIN_AVX512, w, in, bad);
}

template <typename Plan>
void integer_linear_in_region(const Matrix& w, const Inputs& in, const Plan& plan, RowRange mine,
                              void (*run)(const Matrix&, const Inputs&, const Plan&)) {
    bool* finite = scratch<bool>(7, in.count);
    for (int64_t token = 0; token < in.count; ++token) finite[token] = plan.fill(w, in, plan, token);
    run(w, in, plan);
    for (int64_t token = 0; token < in.count; ++token)
        for (int64_t row = mine.first; !finite[token] && row < mine.last; ++row)
            store_float(in.out, token * w.rows + row, in.type, std::numeric_limits<float>::quiet_NaN());
}

void strip_linear(const Matrix& w, const Inputs& in) { integer_linear(w, in, plan_strips(w, in), run_strips); }

void linear(const Matrix& w, const Inputs& in) {
    if (fits_rows(w, in))
        integer_linear(w, in, plan_rows(w, in), run_rows);
    else if (fits_strips(w, in))
        in_parts(w, in, MOST_IN_PLANES, strip_linear);
    else if (!sparse_linear(w, in) && !lookup_linear(w, in))
        PLAIN_AVX512.linear(w, in);
}

TARGET void rows(const Matrix& w, const int64_t* indices, int64_t count, int32_t type, void* out) {
#pragma omp parallel if (count * w.columns > 4096)
    {
        const Groups groups = make_groups(w);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = indices ? indices[i] : i;
            const Decoder decoder(w, groups, row);
            read_groups(w, row, decoder.cutter, groups.scale, groups.zero);
            for (int64_t c = 0; c * CHUNK < w.columns; ++c) {
                const __m512i codes = decoder.codes(c);
                for (int q = 0; q < 4 && c * CHUNK + 16 * q < w.columns; ++q)
                    store_floats(out, i * w.columns + c * CHUNK + 16 * q, type,
                                 first_lanes(w.columns - c * CHUNK - 16 * q), decoder.floats(codes, c, q));
            }
        }
    }
}

bool present() {
    return PLAIN_AVX512.present() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace

// Inside a parallel region: every thread prepares the inputs for itself, which for few of them is cheaper than waiting.
// The outputs of a token that has an infinity or NaN are NaN.
void linear_in_region(const Matrix& w, const Inputs& in) {
    if (fits_rows(w, in))
        integer_linear_in_region(w, in, plan_rows(w, in), share_rows(w.rows, 1), run_rows);
    else
        integer_linear_in_region(w, in, plan_strips(w, in), strip_rows(w), run_strips);
}

const Kernels VNNI = {"avx512_vnni", present, linear, rows};
#endif
