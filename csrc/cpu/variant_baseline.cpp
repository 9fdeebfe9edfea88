// The variant, for any processor.
#define MOSO_FAST_VARIANT baseline
#define VL 4
#include "simd/variant-inl.h"
