// Few inputs against integer codes in strips of 16 rows; strips.cpp says how.
#pragma once
#include "matrix.h"

// What a product needs beside the weight and the inputs. Its memory is the planning thread's, until its next plan.
struct StripPlan {
    using Dot = void (*)(const Matrix&, const StripPlan&, const struct StripUnit&, int64_t, int64_t, int64_t, float*);
    bool zeros;     // whether groups have zeros of their own, or the middle is no whole number
    int lane;       // columns of a 32-bit lane
    int64_t count;  // pieces
    const void* pieces;
    void* codes;
    bool (*fill)(const Matrix&, const Inputs&, const StripPlan&, int64_t token);  // whether the token's inputs are finite
    Dot dot;
};

struct RowRange {
    int64_t first, last;
};

bool fits_strips(const Matrix& w, const Inputs& in);
StripPlan plan_strips(const Matrix& w, const Inputs& in);

// The rest is called by each thread of a parallel region: its share of the rows, and their products once all tokens are
// filled in.
RowRange strip_rows(const Matrix& w);
void run_strips(const Matrix& w, const Inputs& in, const StripPlan& plan);
