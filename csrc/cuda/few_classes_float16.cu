// Few classes, float16 features.
#include "few_classes_launch.cuh"

MOSO_FEW_CLASSES(kFloat16)
