// One instruction set's entry points; the same source is compiled once for each (simd/).
#pragma once

#include "jobs.h"

namespace moso_fast {

struct Variant {
  const char* name;
  bool bf16_products;  // compiled in; whether the processor has the instructions is another matter
  // Classes of all heads together up to which the few-classes kernels are the faster ones, where
  // products of many may have their operands rounded to bfloat16 or not.
  int (*few_classes)(DType features, bool rounded);
  void (*first_pass)(const FirstPass&);
  void (*second_pass)(const SecondPass&);
};

Variant variant_baseline();
#ifdef MOSO_FAST_X86
Variant variant_avx2();
Variant variant_avx512();
#ifndef MOSO_FAST_NO_AMX
Variant variant_amx();
#endif
#endif

}  // namespace moso_fast
