// Kernels for few classes, for any processor.
#define MOSO_FAST_VARIANT baseline
#define VL 4
#include "simd/few_classes_entry-inl.h"
