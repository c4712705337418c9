// Few inputs against integer codes in strips of 16 rows; strips.cpp says how.
#pragma once
#include "pieces.h"

StripPlan plan_strips(const Matrix& w, const Inputs& in);

// The rest is called by each thread of a parallel region: its share of the rows, and their products once all tokens are
// filled in.
RowRange strip_rows(const Matrix& w);
void run_strips(const Matrix& w, const Inputs& in, const StripPlan& plan);
