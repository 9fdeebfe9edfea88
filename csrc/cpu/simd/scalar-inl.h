// Arithmetic on single values, and tables of functions: what <algorithm>, <numeric>, <cmath> and
// <array> have, in the namespace of the instruction set (see target-inl.h).
#pragma once

#include <limits>

#include "target-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// References as in the standard library: handed over by value, GCC 12 vectorises the choice between
// them and takes the registers for it from the loop before.
template <class T>
constexpr const T& min(const T& a, const T& b) {
  return b < a ? b : a;
}
template <class T>
constexpr const T& max(const T& a, const T& b) {
  return a < b ? b : a;
}
template <class T>
constexpr const T& clamp(const T& x, const T& least, const T& most) {
  return x < least ? least : most < x ? most : x;
}

inline float absolute(float x) { return __builtin_fabsf(x); }
inline double absolute(double x) { return __builtin_fabs(x); }
inline bool finite(float x) { return __builtin_isfinite(x); }

constexpr int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }
constexpr int64_t round_up(int64_t x, int64_t to) { return divide_up(x, to) * to; }
constexpr int64_t least_common_multiple(int64_t a, int64_t b) {
  int64_t x = a, y = b;
  while (y != 0) {
    const int64_t remainder = x % y;
    x = y;
    y = remainder;
  }
  return a / x * b;
}

// Index of the first of the largest elements.
inline int64_t index_of_largest(const float* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i)
    if (x[best] < x[i]) best = i;
  return best;
}

// A constant table.
template <class T, size_t N>
struct Table {
  T items[N];
  constexpr T operator[](size_t i) const { return items[i]; }
};

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
