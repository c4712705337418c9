// Drives the native kernels without Python over random shapes: built with AddressSanitizer, and for other processors.
// Every buffer ends at a page that may not be touched, so a vector that reads too far stops the program, whether the
// sanitizer knows the instruction or not. Results are compared with plain loops in float64.
//   driver SEED COUNT
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "floats.h"
#include "matrix.h"

extern "C" {
const char* llmquant_kernels(int32_t, int32_t*);
void llmquant_linear(int32_t, const Matrix*, const void*, int32_t, int64_t, const void*, int32_t, int32_t, int64_t, const float*,
                     const int8_t*, void*);
int64_t llmquant_rows(int32_t, const Matrix*, const int64_t*, int64_t, int32_t, void*);
void llmquant_round(const Rounding*);
uint64_t llmquant_read(const uint64_t*, int64_t);
}

namespace {

std::mt19937_64 random_bits;
int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }
float normal() { return std::normal_distribution<float>()(random_bits); }

// Bytes that end where a page begins that must not be touched.
struct Guarded {
    size_t size, room;
    uint8_t *base, *data;
    explicit Guarded(size_t bytes, uint8_t fill = 0xff) : size(bytes), room((bytes / 4096 + 2) * 4096) {
        base = static_cast<uint8_t*>(mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base == MAP_FAILED || mprotect(base + room - 4096, 4096, PROT_NONE)) std::abort();
        data = base + room - 4096 - bytes;
        std::memset(data, fill, bytes);
    }
    Guarded(const Guarded&) = delete;
    ~Guarded() { munmap(base, room); }
};

size_t float_bytes(int32_t type) { return type == FLOAT_F32 ? 4 : 2; }

uint32_t code_at(const uint8_t* row, int bits, int64_t i) {
    uint32_t code = 0;
    for (int b = 0; b < bits; ++b) code |= (row[(i * bits + b) / 8] >> (i * bits + b) % 8 & 1u) << b;
    return code;
}

double scale_at(const Matrix& w, int64_t row, int64_t k) { return load_scale(w, row / w.shared, k / w.group); }

// Of 2:4 sparse codes: five bytes for eight columns, the places of two fours and then two codes of each.
uint32_t sparse_code_at(const uint8_t* row, int64_t k) {
    const uint8_t* unit = row + k / 8 * 5;
    const int64_t places = unit[0] >> k % 8 / 4 * 4, first = 1 + k % 8 / 4 * 2;
    return (places & 3) == k % 4 ? unit[first] : (places >> 2 & 3) == k % 4 ? unit[first + 1] : 0;
}

double value_at(const Matrix& w, int64_t row, int64_t k) {
    const int64_t g = k / w.group;
    const uint8_t* data = w.qdata + row * w.row_bytes;
    const uint32_t code = w.sparse ? sparse_code_at(data, k) : code_at(data, w.bits, k);
    const double scale = scale_at(w, row, k);
    if (w.table) return w.table[code] * scale;
    const double zero = w.zero_point ? code_at(w.zero_point + row / w.shared * zero_bytes(w), w.bits, g) : w.midpoint;
    return (code - zero) * scale;
}

// The rule of primitives/dynamic.py: what the activations become, with a scale of their own or one chosen before.
std::vector<double> quantized(const std::vector<float>& x, int64_t columns, int32_t activation, int64_t group,
                              const float* fixed_scale, const int8_t* fixed_zero) {
    std::vector<double> out(x.begin(), x.end());
    if (activation == PLAIN) return out;
    for (size_t token = 0; token < x.size(); token += columns)
        for (int64_t start = 0; start < columns; start += group) {
            const int64_t stop = std::min(start + group, columns);
            float low = 0, high = 0;
            for (int64_t k = start; k < stop; ++k) low = std::min(low, x[token + k]), high = std::max(high, x[token + k]);
            const bool even = activation == SYMMETRIC;
            const float own = even ? std::max(high, -low) / 127.f : (high - low) / 255.f;
            const float scale = fixed_scale ? *fixed_scale : own, safe = scale > 0 ? scale : 1.f;
            const float bottom = even ? -127.f : -128.f;
            const auto clamp = [bottom](float v) { return std::min(std::max(v, bottom), 127.f); };
            const float zero = even ? 0.f : fixed_scale ? *fixed_zero : clamp(std::nearbyint(-128.f - low / safe));
            for (int64_t k = start; k < stop; ++k)
                out[token + k] = (clamp(std::nearbyint(x[token + k] / safe) + zero) - zero) * double(scale);
        }
    return out;
}

struct Case {
    std::string text;
    bool failed = false;
    void check(double found, double exact, double bound, const char* what, int64_t i) {
        if (failed || std::fabs(found - exact) <= bound || std::fabs(exact) > 65000) return;  // NaN fails
        failed = true;
        std::printf("%s\n  %s[%lld] is %g, not %g (off by more than %g)\n", text.c_str(), what, static_cast<long long>(i),
                    found, exact, bound);
    }
};

// A scale of about 0.01, or what its type has in the place of it.
void store_scale(const Matrix& w, uint8_t* data, int64_t i) {
    if (w.scale_type <= FLOAT_BF16) return store_float(data, i, w.scale_type, 0.01f * (1.5f + normal()));
    if (w.scale_type == SCALE_I8) return void(data[i] = static_cast<uint8_t>(pick(-20, 20)));
    const int64_t lowest = w.scale_type == SCALE_E8M0 ? 117 : w.scale_type == SCALE_E4M3 ? 0 : 1;
    data[i] = static_cast<uint8_t>(lowest + pick(0, w.scale_type == SCALE_E8M0 ? 8 : w.scale_type == SCALE_E4M3 ? 60 : 20));
}

// A table of few bits, which integers of one byte or two are, or are near to.
void make_integers(Matrix* w, int16_t* integers, float* values) {
    const int64_t reach[] = {12, 60, 448, 32512};
    const int64_t most = reach[pick(0, 3)];
    w->exact = static_cast<int32_t>(most < 32512 || pick(0, 1));
    w->unit = w->exact ? most < 32512 ? 0.0625f : 0x1p-14f : 1.f / 32512.f;
    for (int i = 0; i < 1 << w->bits; ++i) {
        integers[i] = static_cast<int16_t>(pick(-most, most));
        values[i] = static_cast<float>(integers[i]) * w->unit + (w->exact ? 0.f : 0.4f * w->unit);
    }
    w->integers = integers;
}

// Activations of any length, rounded in place of their own: nothing is read or written outside them.
bool run_rounding() {
    const int64_t tokens = pick(0, 20), columns = pick(0, 200), most = tokens * columns;
    const int32_t type = static_cast<int32_t>(pick(0, 2)), rule = static_cast<int32_t>(pick(0, 5));
    Guarded x(most * float_bytes(type)), out(most * float_bytes(type));
    for (int64_t i = 0; i < most; ++i) store_float(x.data, i, type, normal());
    const bool fp4 = rule != ROUND_FLOAT8;
    const Rounding rounding = {x.data, out.data, tokens, columns, fp4 ? 16 * pick(1, 2) : pick(1, columns + 1), type, rule,
                               static_cast<int32_t>(rule % 5 == 0 && pick(0, 1)), fp4 ? 1 : 3, fp4 ? 2 : 8, fp4 ? 6.f : 448.f,
                               fp4 ? 1.f : 0x1p-6f, fp4 ? 0x1.8p22f : 0x1.8p20f, nullptr};
    llmquant_round(&rounding);
    for (int64_t i = 0; i < most; ++i) {
        const float before = load_float(x.data, i, type), after = load_float(out.data, i, type);
        if (std::fabs(after - before) <= (fp4 ? 2.f : 0.5f)) continue;  // NaN fails; scales are those of about 4
        std::printf("rounding rule %d, type %d, %lld x %lld: %g became %g\n", rule, type, (long long)tokens,
                    (long long)columns, before, after);
        return false;
    }
    return true;
}

// Places of two columns of every four, the first one the lower.
void place_codes(const Matrix& w, uint8_t* qdata) {
    const int places[] = {0x4, 0x8, 0xc, 0x9, 0xd, 0xe};
    for (int64_t i = 0; i < w.rows; ++i)
        for (int64_t at = 0; at < w.row_bytes; at += 5)
            qdata[i * w.row_bytes + at] = static_cast<uint8_t>(places[pick(0, 5)] | places[pick(0, 5)] << 4);
}

bool run_case(const std::vector<std::string>& names, const std::vector<int32_t>& which) {
    const bool big = pick(0, 9) == 0;
    Matrix w{};
    w.bits = static_cast<int32_t>(pick(1, 8));
    w.rows = pick(1, big ? 300 : 40);
    w.columns = pick(1, big ? 2000 : 300);
    const int64_t steps[] = {1, 4, 8, 32, 64};
    const int64_t unit = steps[pick(0, 4)];
    const bool table = w.bits % 2 == 0 && w.bits >= 4 && pick(0, 1), shared = pick(0, 3) == 0;
    w.sparse = table && w.bits == 8 && pick(0, 1);
    w.group = w.sparse || pick(0, 4) == 0 ? w.columns : std::min(w.columns, unit * pick(1, 6));
    w.groups = (w.columns + w.group - 1) / w.group;
    const int64_t fours = (w.columns + 3) / 4;
    w.row_bytes = w.sparse ? 2 * fours + (fours + 1) / 2 : (w.columns * w.bits + 7) / 8;
    const bool zeros = !table && pick(0, 1);
    w.shared = shared ? pick(1, w.rows) : 1;
    const int64_t scale_rows = (w.rows + w.shared - 1) / w.shared;
    w.scale_type = static_cast<int32_t>(pick(0, table ? 6 : 3));
    if (!table && w.scale_type > FLOAT_BF16) w.scale_type = SCALE_I8;
    w.midpoint = w.bits == 1 ? 0.5f : static_cast<float>(1 << (w.bits - 1));
    Guarded qdata(w.rows * w.row_bytes), scale(scale_rows * w.groups * scale_bytes(w));
    Guarded points(zeros ? scale_rows * zero_bytes(w) : 0), values(256 * 4);
    for (size_t i = 0; i < qdata.size; ++i) qdata.data[i] = static_cast<uint8_t>(random_bits());
    if (w.sparse) place_codes(w, qdata.data);
    for (size_t i = 0; i < points.size; ++i) points.data[i] = static_cast<uint8_t>(random_bits());
    for (int64_t i = 0; i < scale_rows * w.groups; ++i) store_scale(w, scale.data, i);
    w.outer_step = pick(0, 1);
    Guarded outer(w.outer_step ? scale_rows * 4 : 4), integers(table && w.bits < 8 ? 2 << w.bits : 0);
    for (size_t i = 0; i < outer.size / 4; ++i) reinterpret_cast<float*>(outer.data)[i] = 0.3f + 0.1f * normal();
    if (w.scale_type > FLOAT_BF16 && pick(0, 1)) w.outer = reinterpret_cast<const float*>(outer.data);
    for (int i = 0; i < 256; ++i) {  // e5m2 without its infinities: a sign, and numbers that bfloat16 holds
        const float magnitude = half_to_float(static_cast<uint16_t>(std::min(i & 127, 0x7b) << 8));
        reinterpret_cast<float*>(values.data)[i] = i & 128 ? -magnitude : magnitude;
    }
    w.qdata = qdata.data;
    w.scale = scale.data;
    w.zero_point = zeros ? points.data : nullptr;
    w.table = table ? reinterpret_cast<const float*>(values.data) : nullptr;
    if (integers.size) make_integers(&w, reinterpret_cast<int16_t*>(integers.data), reinterpret_cast<float*>(values.data));

    const int64_t count = pick(0, big ? 70 : 20), groups_of[] = {32, 128, w.columns, pick(1, w.columns)};
    const int32_t type = static_cast<int32_t>(pick(0, 2)), activation = table && !w.exact ? 0 : static_cast<int32_t>(pick(0, 2));
    const int32_t bias_type = static_cast<int32_t>(pick(0, 2));
    const bool biased = pick(0, 1);
    const float tiny = type == FLOAT_F32 && pick(0, 9) == 0 ? 0x1p-110f : 1.f;  // tiles leave such tokens to plain loops
    Guarded x(count * w.columns * float_bytes(type)), bias(w.rows * float_bytes(bias_type));
    std::vector<float> inputs(count * w.columns);
    for (size_t i = 0; i < inputs.size(); ++i) {
        store_float(x.data, i, type, normal() * (pick(0, 50) ? tiny : 30.f * tiny));
        inputs[i] = load_float(x.data, i, type);
    }
    for (int64_t i = 0; i < w.rows; ++i) store_float(bias.data, i, bias_type, normal());
    Guarded fixed_scale(sizeof(float)), fixed_zero(1);  // most inputs fit, some lie far outside
    const bool fixed = activation != PLAIN && pick(0, 2) == 0;
    store_float(fixed_scale.data, 0, FLOAT_F32, std::ldexp(0.02f, static_cast<int>(pick(0, 1)) * -40));
    *fixed_zero.data = static_cast<uint8_t>(pick(-128, 127));
    const float* chosen_scale = fixed ? reinterpret_cast<const float*>(fixed_scale.data) : nullptr;
    const int8_t* chosen_zero = fixed && activation == ASYMMETRIC ? reinterpret_cast<const int8_t*>(fixed_zero.data) : nullptr;
    const int64_t group = fixed ? w.columns : groups_of[pick(0, 3)];
    const std::vector<double> seen = quantized(inputs, w.columns, activation, group, chosen_scale, chosen_zero);
    std::vector<double> weights(w.rows * w.columns);
    for (int64_t i = 0; i < w.rows * w.columns; ++i) weights[i] = value_at(w, i / w.columns, i % w.columns);

    Case at;
    for (size_t n = 0; n < names.size() && !at.failed; ++n) {
        char text[300];
        std::snprintf(text, sizeof text,
                      "%s: int%d%s %lld x %lld, group %lld, %s%s%s, scale type %d, %lld inputs of type %d, activation %d in %lld",
                      names[n].c_str(), w.bits, w.sparse ? " sparse" : table ? w.exact ? " exact table" : " table" : "", (long long)w.rows, (long long)w.columns,
                      (long long)w.group, zeros ? "asymmetric" : "symmetric", shared ? ", rows share" : "", w.outer ? ", outer" : "", w.scale_type,
                      (long long)count, type, activation, (long long)group);
        at.text = text;
        Guarded out(count * w.rows * float_bytes(type)), decoded(w.rows * w.columns * float_bytes(type));
        llmquant_linear(which[n], &w, x.data, type, count, biased ? bias.data : nullptr, bias_type, activation, group,
                        chosen_scale, chosen_zero, out.data);
        // Sums in float32, rounded to the output's type; tiles take weights and decoded activations as bfloat16 where the
        // inputs are, and half inputs in fixed point are 14 bits long at least.
        const double sums = type == FLOAT_F32 ? 1e-6 : names[n] == "amx" && type == FLOAT_BF16 ? 6e-3 : 2e-5;
        const double steps = type != FLOAT_F32 && activation == PLAIN ? 6.2e-5 : 5e-7;
        const double last = type == FLOAT_F32 ? 1e-6 : type == FLOAT_F16 ? 5e-4 : 4e-3;
        for (int64_t i = 0; i < count * w.rows; ++i) {
            const double add = biased ? load_float(bias.data, i % w.rows, bias_type) : 0.;
            double exact = add, size = std::fabs(add), weight = 0, largest = 0, between = 0;  // `between`: from the table to its nearest integers
            for (int64_t k = 0; k < w.columns; ++k) {
                const double product = seen[i / w.rows * w.columns + k] * weights[i % w.rows * w.columns + k];
                exact += product;
                size += std::fabs(product);
                weight += std::fabs(weights[i % w.rows * w.columns + k]);
                if (w.integers && !w.exact)
                    between += w.unit * std::fabs(scale_at(w, i % w.rows, k) * seen[i / w.rows * w.columns + k]);
                largest = std::max(largest, std::fabs(seen[i / w.rows * w.columns + k]));
            }
            at.check(load_float(out.data, i, type), exact, last * std::fabs(exact) + sums * size + steps * weight * largest + between + 1e-7, "out", i);
        }
        std::vector<int64_t> indices(w.rows);
        for (int64_t& index : indices) index = pick(0, w.rows - 1);
        if (llmquant_rows(which[n], &w, indices.data(), w.rows, type, decoded.data) != -1) at.check(NAN, 0, 0, "rows", 0);
        for (int64_t i = 0; i < w.rows * w.columns; ++i) {
            const double exact = weights[indices[i / w.columns] * w.columns + i % w.columns];
            at.check(load_float(decoded.data, i, type), exact, (type == FLOAT_F32 ? 1e-7 : last) * std::fabs(exact) + 6e-8, "rows", i);
        }
        indices[0] = w.rows;
        if (llmquant_rows(which[n], &w, indices.data(), w.rows, type, decoded.data) != 0) at.check(NAN, 0, 0, "index", 0);
    }
    return !at.failed;
}

}  // namespace

int main(int argc, char** argv) {
    random_bits.seed(argc > 1 ? std::atoll(argv[1]) : 0);
    const int64_t count = argc > 2 ? std::atoll(argv[2]) : 100;
    std::vector<std::string> names;
    std::vector<int32_t> which;
    int32_t present = 0;
    for (int32_t i = 0; const char* name = llmquant_kernels(i, &present); ++i)
        if (present) names.emplace_back(name), which.push_back(i);
    Guarded words(8 * 1001, 1);
    if (llmquant_read(reinterpret_cast<uint64_t*>(words.data), 1001) != 0x0101010101010101u) return 1;
    for (int64_t i = 0; i < count; ++i)
        if (!run_case(names, which) || !run_rounding()) return 1;
    std::string list;
    for (const std::string& name : names) list += " " + name;
    std::printf("%lld cases right on%s\n", static_cast<long long>(count), list.c_str());
}
