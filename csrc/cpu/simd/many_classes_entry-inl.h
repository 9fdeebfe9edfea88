// The passes over many classes, for every type of features and of products. Included by one
// translation unit of an instruction set.
#pragma once

#include "entries-inl.h"
#include "many_classes-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

// Calls run with the kernels that a problem asks for.
template <class Run>
void with_many_classes(const Problem& problem, const Run& run) {
  with_type(problem.dtype, [&](auto zero) {
    using T = decltype(zero);
#ifdef MOSO_FAST_BF16_UNITS
    if (problem.bf16_products) return run(ManyClasses<T, Pair>(problem));
#endif
#ifndef __AMX_BF16__  // where AVX-512 takes the others
    return run(ManyClasses<T, Single>(problem));
#endif
  });
}

void first_pass_of_many(const FirstPass& job) {
  with_many_classes(job.problem, [&](auto&& kernels) { kernels.first_pass(job); });
}

void second_pass_of_many(const SecondPass& job) {
  with_many_classes(job.problem, [&](auto&& kernels) { kernels.second_pass(job); });
}

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
