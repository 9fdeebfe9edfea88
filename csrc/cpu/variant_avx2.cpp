// The variant, for AVX2.
#define MOSO_FAST_VARIANT avx2
#define VL 8
#include "simd/variant-inl.h"
