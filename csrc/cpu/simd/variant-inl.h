// What one instruction set offers. Included by one translation unit of it.
#pragma once

#include "entries-inl.h"
#include "few_classes_kernels-inl.h"
#include "variant.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

// AMX adds products of bfloat16 pairs to AVX-512, nothing else: what does not use them is not
// compiled a second time.
#ifdef __AMX_BF16__
inline void first_pass(const FirstPass& job) {
  const bool units = job.problem.bf16_products && !job.problem.few_classes;
  units ? first_pass_of_many(job) : variant_avx512().first_pass(job);
}
inline void second_pass(const SecondPass& job) {
  const bool units = job.problem.bf16_products && !job.problem.few_classes;
  units ? second_pass_of_many(job) : variant_avx512().second_pass(job);
}
#else
inline void first_pass(const FirstPass& job) {
  job.problem.few_classes ? first_pass_of_few(job) : first_pass_of_many(job);
}
inline void second_pass(const SecondPass& job) {
  job.problem.few_classes ? second_pass_of_few(job) : second_pass_of_many(job);
}
#endif

inline int few_classes(DType features, bool rounded) {
#ifdef __AMX_BF16__
  // The arithmetic of more classes than these costs more than copying the rows for matrix units.
  if (rounded) return features == DType::kFloat32 ? 16 : 8;
#endif
  static_cast<void>(features);
  static_cast<void>(rounded);
  return kFewClasses;
}

}  // namespace MOSO_FAST_VARIANT

#define MOSO_FAST_NAME_(x) #x
#define MOSO_FAST_NAME(x) MOSO_FAST_NAME_(x)
#define MOSO_FAST_ENTRY_(x) variant_##x
#define MOSO_FAST_ENTRY(x) MOSO_FAST_ENTRY_(x)

Variant MOSO_FAST_ENTRY(MOSO_FAST_VARIANT)() {
  return {MOSO_FAST_NAME(MOSO_FAST_VARIANT),
#ifdef MOSO_FAST_BF16_UNITS
          true,
#else
          false,
#endif
          &MOSO_FAST_VARIANT::few_classes, &MOSO_FAST_VARIANT::first_pass,
          &MOSO_FAST_VARIANT::second_pass};
}

}  // namespace moso_fast
