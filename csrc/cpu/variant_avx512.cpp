// The variant, for AVX-512.
#define MOSO_FAST_VARIANT avx512
#define VL 16
#include "simd/variant-inl.h"
