#define MOSO_FAST_VARIANT amx
#define VL 16
#include "variant.inc"
