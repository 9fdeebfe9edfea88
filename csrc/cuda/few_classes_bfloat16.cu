// Few classes, bfloat16 features.
#include "few_classes_launch.cuh"

MOSO_FEW_CLASSES(kBfloat16)
