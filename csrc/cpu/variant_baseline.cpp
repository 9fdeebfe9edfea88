#define MOSO_FAST_VARIANT baseline
#define VL 4
#include "variant.inc"
