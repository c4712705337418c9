// Very few inputs against integer codes, row by row; rows.cpp says how.
#pragma once
#include "pieces.h"

// How a row is cut into vectors of 16 lanes of `lane` columns, and the planes of the inputs. Its memory is the planning
// thread's, until its next plan.
struct RowsPlan {
    using Dot = void (*)(const RowsPlan&, const uint8_t* const*, const float* const*, const float* const*, int64_t, float*);
    bool zeros;  // as in StripPlan
    int lane, steps, bits;
    int64_t columns, bytes, row_bytes, vectors;  // of a vector, of a row
    const int32_t *first, *relative;  // [vectors]: the group of a vector's first column; [vectors, 16]: each lane's, from there
    uint8_t* codes;
    Book book;
    int64_t vector_bytes;  // of the inputs
    bool (*fill)(const Matrix&, const Inputs&, const RowsPlan&, int64_t token);
    Dot dot;
};

// Whether the inputs are few enough for the rows to be faster than strips; and what `fits_strips` asks.
bool fits_rows(const Matrix& w, const Inputs& in);
RowsPlan plan_rows(const Matrix& w, const Inputs& in);

// As `run_strips`: a thread's rows, those of share_rows(rows, 1).
void run_rows(const Matrix& w, const Inputs& in, const RowsPlan& plan);
