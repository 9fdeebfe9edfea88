// Kernels for few classes, for AVX-512.
#define MOSO_FAST_VARIANT avx512
#define VL 16
#include "simd/few_classes_entry-inl.h"
