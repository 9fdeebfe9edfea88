// Kernels for many classes, for AVX2.
#define MOSO_FAST_VARIANT avx2
#define VL 8
#include "simd/many_classes_entry-inl.h"
