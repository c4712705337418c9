// Few inputs against 2:4 sparse weights; sparse.cpp says how.
#pragma once
#include "matrix.h"

// Returns false, and does nothing, where the weight is not of that kind.
bool sparse_linear(const Matrix& w, const Inputs& in);
