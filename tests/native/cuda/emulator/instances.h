// Which instantiation serves a launch, as in few_classes_launch.cuh, for the emulator.
#pragma once

#include "few_classes.h"

namespace moso_fast::few_classes {

using Body = void (*)(void*);

template <Feature F>
struct Instances {
  static Body first(bool exact, int tiles, bool narrow);
  static Body second(bool exact, int tiles);
};

inline Body first_body(Feature feature, bool exact, int tiles, bool narrow) {
  if (feature == Feature::kFloat32)
    return Instances<Feature::kFloat32>::first(exact, tiles, narrow);
  if (feature == Feature::kBfloat16)
    return Instances<Feature::kBfloat16>::first(exact, tiles, narrow);
  return Instances<Feature::kFloat16>::first(exact, tiles, narrow);
}
inline Body second_body(Feature feature, bool exact, int tiles) {
  if (feature == Feature::kFloat32) return Instances<Feature::kFloat32>::second(exact, tiles);
  if (feature == Feature::kBfloat16) return Instances<Feature::kBfloat16>::second(exact, tiles);
  return Instances<Feature::kFloat16>::second(exact, tiles);
}

}  // namespace moso_fast::few_classes
