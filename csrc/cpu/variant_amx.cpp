// The variant, for AMX.
#define MOSO_FAST_VARIANT amx
#define VL 16
#include "simd/variant-inl.h"
