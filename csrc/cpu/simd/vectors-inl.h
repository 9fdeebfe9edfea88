// Vectors of VL floats, on GCC's and Clang's vector extensions: one source for every instruction
// set. Loads, stores, and moves between lanes.
#pragma once

#include <utility>

#include "scalar-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

typedef float vf __attribute__((vector_size(4 * VL), may_alias));
typedef float vf_unaligned __attribute__((vector_size(4 * VL), aligned(2), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * VL), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * VL), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <int... I>
inline vf splat_lanes(float x, std::integer_sequence<int, I...>) {
  return vf{((void)I, x)...};
}
inline vf splat(float x) { return splat_lanes(x, std::make_integer_sequence<int, VL>{}); }
inline vi splat_int(int32_t x) { return vi{} + x; }

// Keeps x in a register: to the compiler it is then no longer what memory holds.
#if defined(__x86_64__) || defined(__i386__)
#define MOSO_IN_REGISTER(x) asm("" : "+v"(x))
#elif defined(__aarch64__)
#define MOSO_IN_REGISTER(x) asm("" : "+w"(x))
#else
#define MOSO_IN_REGISTER(x)
#endif

inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }

inline vf load(const bf16* p) {
  const vh narrow = *reinterpret_cast<const vh*>(p);
  return reinterpret_cast<vf>(__builtin_convertvector(narrow, vi) << 16);
}

// Exact for every half-precision number, infinities and NaN included.
inline float widen(fp16 h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {
    bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;
  } else if (magnitude >= 0x400u) {
    bits = (magnitude << 13) + 0x38000000u;
  } else {
    const float value = float(magnitude) * 5.9604644775390625e-8f;  // 2^-24: subnormal halves
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline float widen(bf16 h) {
  const uint32_t bits = uint32_t(h.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline float widen(float x) { return x; }

inline vf load(const fp16* p) {
#if VL == 16
  return reinterpret_cast<vf>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif VL == 8 && defined(__F16C__)
  return reinterpret_cast<vf>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  vf v;
  for (int i = 0; i < VL; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

// The first n < VL elements, zeros after them.
template <class T>
inline vf load_first(const T* p, int n) {
  T lanes[VL] = {};
  std::memcpy(lanes, p, size_t(n) * sizeof(T));
  return load(lanes);
}

// What one read of VL words gives: a vector of float32; of bfloat16 two, first the even elements
// and then the odd ones. Each of those takes one instruction, a vector in order two, on the units
// that multiply-adds need. Half precision is widened in order.
template <class T>
constexpr int kParts = 1;
template <>
constexpr int kParts<bf16> = 2;

template <class T>
inline vf load_part(const T* p, int) {
  return load(p);
}
inline vf load_part(const bf16* p, int part) {
  vi words;
  std::memcpy(&words, p, sizeof words);
  return reinterpret_cast<vf>(part == 0 ? words << 16 : words & splat_int(-65536));
}
// The same of the first n elements, zeros after them.
template <class T>
inline vf load_first_part(const T* p, int n, int part) {
  T elements[kParts<T> * VL] = {};
  std::memcpy(elements, p, size_t(n) * sizeof(T));
  return load_part(elements, part);
}

inline vf load_first(const float* p, int n, float fill) {
#if VL == 16
  return reinterpret_cast<vf>(
      _mm512_mask_loadu_ps(_mm512_set1_ps(fill), __mmask16((1u << n) - 1u), p));
#else
  vf v = splat(fill);
  std::memcpy(&v, p, size_t(n) * 4);
  return v;
#endif
}
inline void store_first(float* p, vf v, int n) {
#if VL == 16
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1u), reinterpret_cast<__m512>(v));
#else
  std::memcpy(p, &v, size_t(n) * 4);
#endif
}

inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline vf min(vf a, vf b) { return a < b ? a : b; }

inline float sum(vf v) {
  float lanes[VL];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = VL / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
inline float max(vf v) {
  float top = v[0];
  for (int i = 1; i < VL; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

template <int Step, int... I>
inline vf interleave_low(vf x, vf y, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, y, ((I & Step) ? VL + I - Step : I)...);
}
template <int Step, int... I>
inline vf interleave_high(vf x, vf y, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, y, ((I & Step) ? VL + I : I + Step)...);
}
// Lanes Odd, Odd + 2, ... of x and then of y: of every four lanes by themselves while Step < 4, of
// groups of four lanes from there on. Both are one instruction.
template <int Step, int Odd, int... I>
inline vf every_other(vf x, vf y, std::integer_sequence<int, I...>) {
  constexpr auto pick = [](int lane) {
    if (Step < 4) return lane / 4 * 4 + lane % 2 * 2 + Odd + (lane % 4 < 2 ? 0 : VL);
    const int half = VL / 2, group = lane % half / 4;
    return (2 * group + Odd) * 4 + lane % 4 + (lane < half ? 0 : VL);
  };
  return __builtin_shufflevector(x, y, pick(I)...);
}
// Lane i of the result is the sum of the lanes of v[i]; v holds VL vectors and is overwritten.
template <int Step = 1>
MOSO_INLINE vf sum_each(vf* v) {
  if constexpr (Step == VL) {
    return v[0];
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, VL>{};
#pragma GCC unroll 16
    for (int i = 0; i < VL; i += 2 * Step)
      v[i] = every_other<Step, 0>(v[i], v[i + Step], lanes) +
             every_other<Step, 1>(v[i], v[i + Step], lanes);
    return sum_each<2 * Step>(v);
  }
}

// v[i] lane j <-> v[j] lane i; v holds VL vectors.
template <int Step = 1>
inline void transpose(vf* v) {
  if constexpr (Step < VL) {
    constexpr auto lanes = std::make_integer_sequence<int, VL>{};
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) {
      if (i & Step) continue;
      const vf x = v[i], y = v[i + Step];
      v[i] = interleave_low<Step>(x, y, lanes);
      v[i + Step] = interleave_high<Step>(x, y, lanes);
    }
    transpose<2 * Step>(v);
  }
}

// Calls body(vector index, lanes in use) over n elements; lanes < VL only for the last.
template <class Body>
inline void for_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) body(i, VL);
  if (i < n) body(i, int(n - i));
}
inline vf load_n(const float* p, int n, float fill = 0.0f) {
  return n == VL ? load(p) : load_first(p, n, fill);
}
inline void store_n(float* p, vf v, int n) {
  if (n == VL)
    store(p, v);
  else
    store_first(p, v, n);
}

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
