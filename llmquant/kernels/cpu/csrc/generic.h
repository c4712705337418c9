// Kernels in plain C++, right on any machine: a row is decoded, then multiplied by every input. generic.cpp includes
// this file once a target, with GENERIC its namespace, and leaves the vectors to the compiler.
// No templates of the standard library here: the linker would keep one copy of them for all targets.

namespace GENERIC {

template <int BITS>
void unpack(const uint8_t* row, int64_t row_bytes, int64_t count, uint8_t* codes) {
    constexpr uint8_t mask = (1 << BITS) - 1;
    const int64_t whole = row_bytes / BITS;  // blocks of 8 codes that are all there
    for (int64_t block = 0; block < whole; ++block) {
        uint64_t word = 0;
        for (int j = 0; j < BITS; ++j) word |= static_cast<uint64_t>(row[block * BITS + j]) << 8 * j;
        for (int i = 0; i < 8; ++i) codes[8 * block + i] = static_cast<uint8_t>(word >> BITS * i) & mask;
    }
    for (int64_t i = 8 * whole; i < count; ++i) {
        const int64_t bit = i * BITS, byte = bit / 8;
        const uint32_t next = byte + 1 < row_bytes ? row[byte + 1] : 0;
        codes[i] = static_cast<uint8_t>((row[byte] | next << 8) >> bit % 8) & mask;
    }
}

// The codes of a packed row; `codes` has room for 8 more than `count`.
void unpack(int bits, const uint8_t* row, int64_t row_bytes, int64_t count, uint8_t* codes) {
    switch (bits) {
        case 1: return unpack<1>(row, row_bytes, count, codes);
        case 2: return unpack<2>(row, row_bytes, count, codes);
        case 3: return unpack<3>(row, row_bytes, count, codes);
        case 4: return unpack<4>(row, row_bytes, count, codes);
        case 5: return unpack<5>(row, row_bytes, count, codes);
        case 6: return unpack<6>(row, row_bytes, count, codes);
        case 7: return unpack<7>(row, row_bytes, count, codes);
        default: std::memcpy(codes, row, count);
    }
}

// The same of 2:4 sparse codes; see packing/sparse24.py.
void unpack_sparse(const uint8_t* row, int64_t count, uint8_t* codes) {
    for (int64_t k = 0; k < count; k += 4) {
        const uint8_t *unit = row + k / 8 * 5, *kept = unit + 1 + k % 8 / 2;
        const int places = unit[0] >> k % 8;
        std::memset(codes + k, 0, 4);
        codes[k + (places & 3)] = kept[0];
        codes[k + (places >> 2 & 3)] = kept[1];
    }
}

// A row's codes, and the scale and zero of each of its groups.
struct Row {
    uint8_t *codes, *zeros;
    float scale(const Matrix& w, int64_t row, int64_t g) const {
        return load_scale(w, row / w.shared, g);
    }
    float zero(const Matrix& w, int64_t g) const { return w.zero_point ? zeros[g] : w.midpoint; }
};

Row read_row(const Matrix& w, int64_t row) {
    const Row found = {scratch<uint8_t>(0, w.columns + 8), scratch<uint8_t>(1, w.groups + 8)};
    const uint8_t* data = w.qdata + row * w.row_bytes;
    w.sparse ? unpack_sparse(data, w.columns, found.codes)
             : unpack(w.bits, data, w.row_bytes, w.columns, found.codes);
    if (w.zero_point) unpack(w.bits, w.zero_point + row / w.shared * zero_bytes(w), zero_bytes(w), w.groups, found.zeros);
    return found;
}

void decode_row(const Matrix& w, int64_t row, float* values) {
    const Row at = read_row(w, row);
    for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t start = g * w.group, stop = start + w.group < w.columns ? start + w.group : w.columns;
        const float scale = at.scale(w, row, g), zero = at.zero(w, g);
        if (w.table)
            for (int64_t k = start; k < stop; ++k) values[k] = w.table[at.codes[k]] * scale;
        else
            for (int64_t k = start; k < stop; ++k) values[k] = (static_cast<float>(at.codes[k]) - zero) * scale;
    }
}

void rows(const Matrix& w, const int64_t* indices, int64_t count, int32_t type, void* out) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
        float* values = scratch<float>(2, w.columns);
        decode_row(w, indices ? indices[i] : i, values);
        for (int64_t k = 0; k < w.columns; ++k) store_float(out, i * w.columns + k, type, values[k]);
    }
}

// Integer products: segments are the columns between any two neighbouring borders of weight and activation groups.
// A zero of 0.5 (one bit) is made whole by doubling codes and zero and halving the scale. Codes of a table are its integers.
float dot_codes(const Matrix& w, const Inputs& in, int64_t row, const Row& at, const int16_t* numbers,
                const int16_t* x, const float* scales, float unit) {
    float total = 0;
    int64_t g = 0, h = 0;
    for (int64_t k = 0; k < w.columns;) {
        const int64_t ends[] = {(g + 1) * w.group, (h + 1) * in.group, k + MOST_EXACT, w.columns};
        int64_t stop = ends[0];
        for (int64_t end : ends) stop = end < stop ? end : stop;
        int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = k; i < stop; ++i) sum += static_cast<int32_t>(numbers[i]) * x[i];
        total += at.scale(w, row, g) * unit * scales[h] * static_cast<float>(sum);
        k = stop;
        g += k == ends[0];
        h += k == ends[1];
    }
    return total;
}

void linear_codes(const Matrix& w, const Inputs& in) {
    const int64_t groups = (w.columns + in.group - 1) / in.group;
    const bool doubled = !w.zero_point && w.midpoint != static_cast<int32_t>(w.midpoint);
    const int32_t times = doubled ? 2 : 1;
    const float unit = w.table ? w.unit : 1.f / times;
    int16_t* codes = scratch<int16_t>(3, in.count * w.columns);
    float* scales = scratch<float>(4, in.count * groups);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < in.count; ++i)
            for (int64_t h = 0; h < groups; ++h) {
                const int64_t start = h * in.group, stop = start + in.group < w.columns ? start + in.group : w.columns;
                scales[i * groups + h] =
                    quantize_inputs(in, i * w.columns + start, stop - start, codes + i * w.columns + start);
            }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < w.rows; ++row) {
            const Row at = read_row(w, row);
            int16_t* numbers = scratch<int16_t>(5, w.columns);
            for (int64_t g = 0; g < w.groups; ++g) {
                const int64_t start = g * w.group, stop = start + w.group < w.columns ? start + w.group : w.columns;
                const int16_t zero = static_cast<int16_t>(at.zero(w, g) * times);
                for (int64_t k = start; k < stop; ++k)
                    numbers[k] = w.table ? w.integers[at.codes[k]] : static_cast<int16_t>(at.codes[k] * times - zero);
            }
            const float add = in.bias ? load_float(in.bias, row, in.bias_type) : 0.f;
            for (int64_t i = 0; i < in.count; ++i)
                store_float(in.out, i * w.rows + row, in.type,
                            dot_codes(w, in, row, at, numbers, codes + i * w.columns, scales + i * groups, unit) +
                                add);
        }
    }
}

void linear_floats(const Matrix& w, const Inputs& in) {
    float* x = scratch<float>(3, in.count * w.columns);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < in.count * w.columns; ++i) x[i] = load_float(in.x, i, in.type);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < w.rows; ++row) {
            float* values = scratch<float>(2, w.columns);
            decode_row(w, row, values);
            const float add = in.bias ? load_float(in.bias, row, in.bias_type) : 0.f;
            for (int64_t i = 0; i < in.count; ++i) {
                const float* input = x + i * w.columns;
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t k = 0; k < w.columns; ++k) sum += values[k] * input[k];
                store_float(in.out, i * w.rows + row, in.type, sum + add);
            }
        }
    }
}

void linear(const Matrix& w, const Inputs& in) {
    in.activation == PLAIN ? linear_floats(w, in) : linear_codes(w, in);
}

}  // namespace GENERIC
