// The set of kernels for AVX-512 with VBMI and VNNI: strips of integers, float8, and rows decoded.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <omp.h>

#include "decode.h"
#include "float8.h"
#include "strips.h"

namespace {

void integer_linear(const Matrix& w, const Inputs& in) {
    const StripPlan plan = plan_strips(w, in);
    bool finite = true;
#pragma omp parallel reduction(&& : finite)
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < in.count; ++token) finite = plan.fill(w, in, plan, token) && finite;
        run_strips(w, in, plan);
    }
    // Infinities and NaN have no fixed point: the plain kernel takes such inputs, at its own pace.
    if (!finite) PLAIN_AVX512.linear(w, in);
}

void linear(const Matrix& w, const Inputs& in) {
    if (fits_strips(w, in))
        integer_linear(w, in);
    else if (!float8_linear(w, in))
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
    const StripPlan plan = plan_strips(w, in);
    bool* finite = scratch<bool>(7, in.count);
    for (int64_t token = 0; token < in.count; ++token) finite[token] = plan.fill(w, in, plan, token);
    run_strips(w, in, plan);
    const RowRange mine = strip_rows(w);
    for (int64_t token = 0; token < in.count; ++token)
        for (int64_t row = mine.first; !finite[token] && row < mine.last; ++row)
            store_float(in.out, token * w.rows + row, in.type, std::numeric_limits<float>::quiet_NaN());
}

const Kernels VNNI = {"avx512_vnni", present, linear, rows};
#endif
