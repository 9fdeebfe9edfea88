// Kernels for many classes, for any processor.
#define MOSO_FAST_VARIANT baseline
#define VL 4
#include "simd/many_classes_entry-inl.h"
