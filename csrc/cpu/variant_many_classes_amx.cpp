// Kernels for many classes, for AMX.
#define MOSO_FAST_VARIANT amx
#define VL 16
#include "simd/many_classes_entry-inl.h"
