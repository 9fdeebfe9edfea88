// Exponentials and logarithms of vectors.
#pragma once

#include "vectors-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

// e^x for x <= 88; 0 below -87.3 (-inf too). Within 2 units in the last place.
inline vf exp(vf x) {
  const vf kept = max(x, splat(-87.3f));
  // Rounds to nearest by adding and taking away 1.5 * 2^23.
  const vf shifted = kept * splat(1.44269504f) + splat(12582912.0f);
  const vf n = shifted - splat(12582912.0f);
  const vf r = (kept - n * splat(0.693145752f)) - n * splat(1.42860677e-6f);
  vf p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  const vi power = (reinterpret_cast<vi>(shifted) - splat_int(0x4b400000)) << 23;
  const vf result = reinterpret_cast<vf>(reinterpret_cast<vi>(p) + power);
  return select(x < splat(-87.3f), vf{}, result);
}

// log x for normal x > 0 (Cephes' minimax polynomial). Within 2 units in the last place.
inline vf log(vf x) {
  const vi bits = reinterpret_cast<vi>(x);
  vi exponent = ((bits >> 23) & 0xff) - 126;
  vf m = reinterpret_cast<vf>((bits & 0x007fffff) | 0x3f000000);
  const vi small = m < splat(0.707106781f);
  exponent += small;
  m = select(small, m + m, m) - splat(1.0f);
  const vf z = m * m, e = __builtin_convertvector(exponent, vf);
  vf p = splat(7.0376836292e-2f);
  p = p * m - splat(1.1514610310e-1f);
  p = p * m + splat(1.1676998740e-1f);
  p = p * m - splat(1.2420140846e-1f);
  p = p * m + splat(1.4249322787e-1f);
  p = p * m - splat(1.6668057665e-1f);
  p = p * m + splat(2.0000714765e-1f);
  p = p * m - splat(2.4999993993e-1f);
  p = p * m + splat(3.3333331174e-1f);
  vf y = p * m * z - e * splat(2.12194440e-4f) - z * splat(0.5f);
  return m + y + e * splat(0.693359375f);
}

// log(1 + x) for x >= 0, accurate for tiny x: log(u) x / (u - 1) with u = 1 + x rounded.
inline vf log1p(vf x) {
  const vf u = splat(1.0f) + x, d = u - splat(1.0f);
  const vi tiny = d == vf{};
  return select(tiny, x, log(u) * x / select(tiny, splat(1.0f), d));
}

inline float exp(float x) { return exp(splat(x))[0]; }
inline float log(float x) { return log(splat(x))[0]; }
inline float log1p(float x) { return log1p(splat(x))[0]; }

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
