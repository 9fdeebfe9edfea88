// Few classes, float32 features.
#include "few_classes_launch.cuh"

MOSO_FEW_CLASSES(kFloat32)
