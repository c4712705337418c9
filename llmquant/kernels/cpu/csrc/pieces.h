// What products in strips of rows share, however wide their vectors are: the planes of the inputs, the pieces that the
// columns are cut into, the plan of a product. strips.cpp says what they are for.
#pragma once
#include <omp.h>

#include <cstdint>

#include "floats.h"
#include "scratch.h"

// The rows at hand, up to 16 a strip: where they begin, and their scales and zeros turned over, [groups, rows].
struct StripUnit {
    const uint8_t* data[32];
    float *scale[2], *zero[2];
};

// The integers of a table in one or two planes of bytes, by code: low + 256 high, each plane `BOOK_ZERO` more than its
// signed value. Repeated, so that bits above the code do not matter. No planes: codes are integers themselves.
struct Book {
    int planes;
    alignas(64) uint8_t bytes[2][64];
};

struct Piece {
    int64_t start, count, group;  // columns, and the group of weights they belong to
};

// What a product needs beside the weight and the inputs. Its memory is the planning thread's, until its next plan.
struct StripPlan {
    using Dot = void (*)(const Matrix&, const StripPlan&, const StripUnit&, int64_t, int64_t, int64_t, float*);
    bool zeros;     // whether groups have zeros of their own, or the middle is no whole number
    int planes;     // of the inputs
    Book book;
    int lane;       // columns of a 32-bit lane
    int64_t count;  // pieces
    const Piece* pieces;
    void* codes;
    // Writes a token's codes; whether its inputs are finite.
    bool (*fill)(const Matrix&, const Inputs&, const StripPlan&, int64_t token);
    Dot dot;
};

struct RowRange {
    int64_t first, last;
};

namespace {

constexpr int QUADS = 8, PIECE = 4 * QUADS;  // fours of columns, and columns, of a piece
constexpr int64_t MOST = 64;                 // inputs that share a decoded strip: their sums stay in the first cache
constexpr int64_t MOST_IN_PLANES = 512;      // inputs that are written in planes at a time

// The inputs as planes: for each piece and token, P times the codes of 32 columns in the order in which the steps meet
// them, the scale, and the sums of each plane (times minus the midpoint as integers, or plain as floats).
template <int P>
struct Codes {
    int8_t codes[P][PIECE];
    float scale;
    int32_t sums[P];
};

constexpr int BOOK_ZERO = 128;

inline Book make_book(const Matrix& w) {
    Book book{};
    if (!w.table) return book;
    book.planes = 1;
    for (int i = 0; i < 64; ++i) {
        const int16_t value = w.integers[i & ((1 << w.bits) - 1)];
        const int8_t low = static_cast<int8_t>(value), high = static_cast<int8_t>((value - low) / 256);
        book.bytes[0][i] = static_cast<uint8_t>(low + BOOK_ZERO);
        book.bytes[1][i] = static_cast<uint8_t>(high + BOOK_ZERO);
        if (high) book.planes = 2;
    }
    return book;
}

// What is to be taken off the codes (or the bytes of their book) where groups have no zeros.
inline int32_t middle_of(const Matrix& w) { return w.table ? BOOK_ZERO : static_cast<int32_t>(w.midpoint); }

inline bool is_dense(const Matrix& w) {
    return w.bits <= 4 && w.bits != 3 && (w.groups == 1 || w.group % (32 / w.bits) == 0);
}

inline int make_lane(const Matrix& w) { return is_dense(w) ? 32 / w.bits : 4; }

// Whether integers stand for the numbers of a table (codes of up to six bits), as exactly as the inputs ask for.
inline bool fits_book(const Matrix& w, const Inputs& in) {
    return w.integers && w.bits <= 6 && (w.exact || (in.activation == PLAIN && in.type != FLOAT_F32));
}

// Whether a product can be done in pieces at all.
inline bool fits_strips(const Matrix& w, const Inputs& in) {
    if ((w.table && !fits_book(w, in)) || (w.groups > 1 && w.group % 4)) return false;
    return in.activation == PLAIN || in.group >= w.columns || in.group % make_lane(w) == 0;
}

inline int plane_count(const Inputs& in) {
    if (in.activation != PLAIN) return in.activation == SYMMETRIC ? 1 : 2;
    return in.type == FLOAT_F32 ? 3 : 2;
}

// Cuts the columns where a scale of the weight or of the activation ends, and after PIECE columns.
inline int64_t make_pieces(const Matrix& w, const Inputs& in, Piece* pieces) {
    const int64_t wide = w.groups == 1 ? w.columns : w.group;
    const int64_t inputs = in.activation == PLAIN ? w.columns : in.group;
    int64_t count = 0, group = 0, group_end = wide, input_end = inputs;
    for (int64_t start = 0; start < w.columns;) {
        int64_t stop = start + PIECE;
        stop = stop < group_end ? stop : group_end;
        stop = stop < input_end ? stop : input_end;
        stop = stop < w.columns ? stop : w.columns;
        pieces[count++] = {start, stop - start, group};
        if (stop == group_end) group_end += wide, ++group;
        if (stop == input_end) input_end += inputs;
        start = stop;
    }
    return count;
}

// Whether groups have zeros of their own, or the middle is no whole number.
inline bool has_zeros(const Matrix& w) {
    return !w.table && (w.zero_point || w.midpoint != static_cast<int32_t>(w.midpoint));
}

// The power of two under which the largest of some numbers becomes a code of `reach` + 1 bits. Zeros get the scale 0:
// products with the least exponent would be subnormal, which takes a detour.
inline float fixed_point(float largest, int reach, float* inverse) {
    int exponent = static_cast<int>(bits_of(largest) >> 23) - 127 - reach;
    exponent = exponent < -126 ? -126 : exponent;
    *inverse = float_of(static_cast<uint32_t>(127 - exponent) << 23);
    return largest > 0 ? float_of(static_cast<uint32_t>(exponent + 127) << 23) : 0.f;
}

// A plan but for its functions.
inline StripPlan start_plan(const Matrix& w, const Inputs& in) {
    StripPlan plan{};
    plan.zeros = has_zeros(w);
    plan.planes = plane_count(in);
    plan.book = make_book(w);
    plan.lane = make_lane(w);
    const int64_t ends = w.groups + (in.activation == PLAIN ? 0 : w.columns / in.group);
    Piece* pieces = scratch<Piece>(0, w.columns / PIECE + ends + 3);
    plan.pieces = pieces;
    plan.count = make_pieces(w, in, pieces);
    const size_t sizes[] = {sizeof(Codes<1>), sizeof(Codes<2>), sizeof(Codes<3>)};
    plan.codes = scratch<uint8_t>(1, in.count * plan.count * static_cast<int64_t>(sizes[plan.planes - 1]));
    return plan;
}

// Where the columns of a piece go: step j of a lane meets every `steps`-th of its columns from j on.
inline void order_columns(int lane, uint8_t order[PIECE]) {
    const int steps = lane / 4;
    for (int i = 0; i < PIECE; ++i)
        order[i] = static_cast<uint8_t>(i / lane * lane + i % lane / 4 + i % 4 * steps);
}

// This thread's share of the rows, whole units of them.
inline RowRange share_rows(int64_t rows, int64_t unit) {
    const int64_t units = (rows + unit - 1) / unit, threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t last = units * (me + 1) / threads * unit;
    return {units * me / threads * unit, last < rows ? last : rows};
}

}  // namespace
