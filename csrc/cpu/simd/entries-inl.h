// The functions by which the translation units of an instruction set reach each other: each family
// of kernels has one of its own, and they are compiled side by side.
#pragma once

#include "vectors-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

// variant_few_classes_*.cpp
void first_pass_of_few(const FirstPass& job);
void second_pass_of_few(const SecondPass& job);
// variant_many_classes_*.cpp
void first_pass_of_many(const FirstPass& job);
void second_pass_of_many(const SecondPass& job);

// Calls run with a zero of the features' type.
template <class Run>
void with_type(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kBFloat16:
      return run(bf16{});
    case DType::kFloat16:
      return run(fp16{});
  }
}

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
