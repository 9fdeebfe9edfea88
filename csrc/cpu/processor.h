// Which of the instruction sets that the kernels are compiled for this processor runs.
#pragma once

#include <vector>

#include "jobs.h"
#include "variant.h"

namespace moso_fast {

// Instruction sets that this processor and its operating system run, best first.
const std::vector<Variant>& variants();
// Whether this processor has the instructions of the variant's bfloat16 products, and whether they
// are faster than its float32 ones.
bool runs_bf16_products(const Variant& variant);
bool prefers_bf16_products(const Variant& variant);

}  // namespace moso_fast
