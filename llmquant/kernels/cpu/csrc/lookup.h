// Few inputs against the numbers of a table, as they are; lookup.cpp says how.
#pragma once
#include "matrix.h"

// Returns false, and does nothing, where the weight is not of that kind.
bool lookup_linear(const Matrix& w, const Inputs& in);
