// The score formulas, one sample at a time; moso_fast/core/formulas.py says what they mean.
#pragma once

#ifdef __CUDACC__
#define MOSO_FORMULA __device__ __forceinline__
#else
#define MOSO_FORMULA inline
#endif

namespace moso_fast {

// In the order in which Python numbers them (FORMULAS).
enum class Formula : int { kMoso, kOneStep, kOfficial, kOfficialExact, kAlignment, kCosine };

// `a` = <g, G>, `q` = |g|^2, `g2` = |G|^2, `n` samples that count; `root` is the square root. The
// operations and their order are those of the formulas in Python.
template <class Root>
MOSO_FORMULA double score_of(Formula formula, double a, double q, double g2, double n, Root root) {
  const double others = n - 1.0;
  switch (formula) {
    case Formula::kMoso:
      return (a * n - q) / others;
    case Formula::kOneStep:
      return ((n + 1.0) * a - n * g2 - q) / (others * others);
    case Formula::kOfficial:
      return a - q / n;
    case Formula::kOfficialExact:
      return ((2.0 * n - 3.0) * g2 - q + (2.0 * n - 4.0) * (a - q / n)) / (others * others);
    case Formula::kAlignment:
      return a;
    case Formula::kCosine: {
      const double norms = root(q) * root(g2);
      return norms == 0.0 ? 0.0 : a / norms;  // NaN stays: it is not equal to zero
    }
  }
  return a;
}

}  // namespace moso_fast
