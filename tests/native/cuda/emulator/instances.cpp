// The kernels for one dtype (MOSO_FEATURE), compiled once for each.
#include "instances.h"

#include "few_classes_first.cuh"
#include "few_classes_second.cuh"

namespace moso_fast::few_classes {
namespace {

template <Feature F, bool Exact, int ClassTiles>
void run_first(void* p) {
  first_pass<F, Exact, ClassTiles>(*static_cast<FirstPass*>(p));
}
template <Feature F>
void run_narrow(void* p) {
  first_pass<F, false, 1, kNarrowColumns>(*static_cast<FirstPass*>(p));
}
template <Feature F, bool Exact, int ClassTiles>
void run_second(void* p) {
  second_pass<F, Exact, 2 * ClassTiles>(*static_cast<SecondPass*>(p));
}

}  // namespace

template <Feature F>
Body Instances<F>::first(bool exact, int tiles, bool narrow) {
  if constexpr (F != Feature::kFloat32)
    if (narrow) return run_narrow<F>;
  if (tiles == 1) return exact ? run_first<F, true, 1> : run_first<F, false, 1>;
  if (tiles == 2) return exact ? run_first<F, true, 2> : run_first<F, false, 2>;
  if (tiles == 5) return exact ? run_first<F, true, 5> : run_first<F, false, 5>;
  return exact ? run_first<F, true, 7> : run_first<F, false, 7>;
}

template <Feature F>
Body Instances<F>::second(bool exact, int tiles) {
  if (tiles == 1) return exact ? run_second<F, true, 1> : run_second<F, false, 1>;
  if (tiles == 2) return exact ? run_second<F, true, 2> : run_second<F, false, 2>;
  if (tiles == 5) return exact ? run_second<F, true, 5> : run_second<F, false, 5>;
  return exact ? run_second<F, true, 7> : run_second<F, false, 7>;
}

template struct Instances<Feature::MOSO_FEATURE>;

}  // namespace moso_fast::few_classes
