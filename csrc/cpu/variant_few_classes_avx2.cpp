// Kernels for few classes, for AVX2.
#define MOSO_FAST_VARIANT avx2
#define VL 8
#include "simd/few_classes_entry-inl.h"
