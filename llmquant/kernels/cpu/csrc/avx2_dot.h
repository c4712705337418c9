// The products of two strips of 8 rows. avx2.cpp includes this file once a way to add integer products, with WAY its
// namespace (which has `Sum`, `start`, `add` and `total`) and WAY_TARGET its processor.

namespace WAY {

// Sums of tokens `first` to `first` + count - 1: [count, STRIPS, 8] floats.
// ZEROS: a zero a group, taken off as a float (exact: products of it are below 2^24), else the whole midpoint, which
// the sums start from.
template <int P, int KIND, bool ZEROS>
WAY_TARGET __attribute__((noinline)) void dot(const Matrix& w, const StripPlan& plan, const StripUnit& unit,
                                              int64_t first, int64_t tokens, int64_t count, float* totals) {
    constexpr int STEPS = KIND == DENSE1 ? 8 : KIND == DENSE2 ? 4 : KIND == DENSE4 ? 2 : 1;
    constexpr int LANES = QUADS / STEPS;  // a piece
    const Codes<P>* inputs = static_cast<const Codes<P>*>(plan.codes) + first;
    Block block = make_block<KIND>(w, unit);
    // Turned vectors; the first ones are kept behind the last, too, so that a piece never meets the end.
    alignas(32) __m256i ring[STRIPS][RING + QUADS], code[STRIPS][QUADS];
    for (int64_t m = 0; m < count * STRIPS; ++m) _mm256_store_ps(totals + STRIP * m, _mm256_setzero_ps());
    int64_t filled = 0;  // lanes
    for (int64_t i = 0; i < plan.count; ++i) {
        const Piece& piece = plan.pieces[i];
        const int64_t lane = piece.start / (4 * STEPS);
        for (; filled < lane + LANES; filled += 8) {
            fetch(&block);
            for (int s = 0; s < STRIPS; ++s) turn_block<KIND>(w, unit, block, s, filled, ring[s]);
        }
        __m256 scale[STRIPS], zero[STRIPS];
        for (int s = 0; s < STRIPS; ++s) {
            scale[s] = _mm256_load_ps(unit.scale[s] + STRIP * piece.group);
            if (ZEROS) zero[s] = _mm256_load_ps(unit.zero[s] + STRIP * piece.group);
            shift_out<KIND>(ring[s] + lane % RING, code[s]);
        }
        const Codes<P>* in = inputs + i * tokens;
        for (int64_t m = 0; m < count; ++m, ++in) {
            Sum<KIND> sum[P][STRIPS];
#pragma GCC unroll 3
            for (int p = 0; p < P; ++p)
                for (int s = 0; s < STRIPS; ++s) start(&sum[p][s], ZEROS ? 0 : in->sums[p]);
#pragma GCC unroll 8
            for (int q = 0; q < QUADS; ++q)
#pragma GCC unroll 3
                for (int p = 0; p < P; ++p) {
                    int32_t four;
                    std::memcpy(&four, in->codes[p] + 4 * q, 4);
                    const __m256i input = _mm256_set1_epi32(four);
                    for (int s = 0; s < STRIPS; ++s) add(&sum[p][s], q, code[s][q], input);
                }
            const __m256 input_scale = _mm256_broadcast_ss(&in->scale);
            for (int s = 0; s < STRIPS; ++s) {
                __m256 value = _mm256_setzero_ps();
#pragma GCC unroll 3
                for (int p = P - 1; p >= 0; --p) {
                    __m256 part = _mm256_cvtepi32_ps(total(sum[p][s]));
                    if (ZEROS) part = _mm256_fnmadd_ps(zero[s], _mm256_set1_ps(float_of(in->sums[p])), part);
                    value = p == P - 1 ? part : _mm256_fmadd_ps(value, _mm256_set1_ps(256.f), part);
                }
                float* to = totals + (m * STRIPS + s) * STRIP;
                const __m256 both = _mm256_mul_ps(scale[s], input_scale);
                _mm256_store_ps(to, _mm256_fmadd_ps(both, value, _mm256_load_ps(to)));
            }
        }
    }
}

template <int P, bool ZEROS>
StripPlan::Dot choose_dot(int bits, bool dense) {
    if (dense) return bits == 1 ? dot<P, DENSE1, ZEROS> : bits == 2 ? dot<P, DENSE2, ZEROS> : dot<P, DENSE4, ZEROS>;
    return bits == 8 ? dot<P, BYTES, ZEROS> : bits > 4 ? dot<P, WIDE, ZEROS> : dot<P, NARROW, ZEROS>;
}

template <int P>
StripPlan::Dot choose_dot(const Matrix& w, bool zeros) {
    return zeros ? choose_dot<P, true>(w.bits, is_dense(w)) : choose_dot<P, false>(w.bits, is_dense(w));
}

StripPlan::Dot choose_dot(const Matrix& w, const StripPlan& plan) {
    if (plan.planes == 1) return choose_dot<1>(w, plan.zeros);
    return plan.planes == 2 ? choose_dot<2>(w, plan.zeros) : choose_dot<3>(w, plan.zeros);
}

}  // namespace WAY
