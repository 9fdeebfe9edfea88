// Kernels for many classes, for AVX-512.
#define MOSO_FAST_VARIANT avx512
#define VL 16
#include "simd/many_classes_entry-inl.h"
