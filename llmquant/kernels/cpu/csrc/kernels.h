// Every set of kernels in the library; api.cpp lists them from the fastest on.
#pragma once
#include "matrix.h"

extern const Kernels PORTABLE;
#if defined(__x86_64__) && defined(__GNUC__)
extern const Kernels AVX2, AVX512, VNNI, AMX;
#endif
