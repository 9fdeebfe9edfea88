#define MOSO_FAST_VARIANT avx2
#define VL 8
#include "variant.inc"
