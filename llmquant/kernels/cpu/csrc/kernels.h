// Every set of kernels in the library; api.cpp lists them from the fastest on.
#pragma once
#include "matrix.h"

extern const Kernels PORTABLE;
#if defined(__x86_64__) && defined(__GNUC__)
extern const Kernels AVX2, AVX2_VNNI, AVX512, VNNI, AMX;
// Without integer products, for what those refuse; in no list.
extern const Kernels PLAIN_AVX2, PLAIN_AVX512;
#endif
