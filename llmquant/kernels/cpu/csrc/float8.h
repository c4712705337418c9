// Few inputs against float8 weights; float8.cpp says how.
#pragma once
#include "matrix.h"

// Returns false, and does nothing, where the weight is not of that kind.
bool float8_linear(const Matrix& w, const Inputs& in);
