// The passes over few classes, for every type of features. Included by one translation unit of an
// instruction set.
#pragma once

#include "entries-inl.h"
#include "few_classes-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

void first_pass_of_few(const FirstPass& job) {
  with_type(job.problem.dtype,
            [&](auto zero) { FewClasses<decltype(zero)>(job.problem).first_pass(job); });
}

void second_pass_of_few(const SecondPass& job) {
  with_type(job.problem.dtype,
            [&](auto zero) { FewClasses<decltype(zero)>(job.problem).second_pass(job); });
}

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
