#define MOSO_FAST_VARIANT avx512
#define VL 16
#include "variant.inc"
