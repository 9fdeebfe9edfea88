// The products of many classes, as register tiles. One shape serves both:
// acc[m][v] += a(m, k) * b(k, v), where a is broadcast and b is a vector.
//
//   logits  Z += H W^T  m = row,   k = column of H, v = classes (W packed in panels)
//   grad    G += R^T H  m = class, k = row,         v = columns of H
#pragma once

#include <utility>

#include "prefetch-inl.h"
#include "vectors-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

// Rows of a register tile: as many as the registers hold beside two vectors of b.
constexpr int kTileM = VL == 16 ? 14 : VL == 8 ? 6 : 4;
constexpr int kTileV = 2;
constexpr int kPanel = kTileV * VL;

// What one 4-byte word of an operand holds, and how words multiply into float32 sums. Operands are
// passed as float* whatever their words hold; k counts words.
struct Single {  // one float32
  static constexpr int kElements = 1;
  static constexpr int kStep = 1;  // sums are of so many words at a time, zeros after the last
  static constexpr bool kMatrixUnits = false;
  static vf multiply_add(vf a, vf b, vf acc) { return acc + a * b; }
};
#ifdef MOSO_FAST_BF16_UNITS
struct Pair {  // two bfloat16, neighbours along the sum: twice the products an instruction
  static constexpr int kElements = 2;
#ifdef __AMX_BF16__
  static constexpr int kStep = 16;  // amx-inl.h
  static constexpr bool kMatrixUnits = true;
#else
  static constexpr int kStep = 1;
  static constexpr bool kMatrixUnits = false;
#endif
  static MOSO_INLINE vf multiply_add(vf a, vf b, vf acc) {
    return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc),
                                                 reinterpret_cast<__m512bh>(a),
                                                 reinterpret_cast<__m512bh>(b)));
  }
};
#endif

// Words that hold so many elements along a sum.
template <class Op>
constexpr int64_t words_of(int64_t elements) {
  return (elements + Op::kElements - 1) / Op::kElements;
}

// Even groups of at most kTileM classes: no thin remainder.
inline int64_t class_group(int64_t classes) {
  const int64_t groups = (classes + kTileM - 1) / kTileM;
  return (classes + groups - 1) / groups;
}

// a(m, k) = a[m * StepM + k * StepK]; b(k, v) = b[k * step_b + v * VL].
template <class Op, int M, int V, int StepM, int StepK>
MOSO_INLINE void multiply(const float* a, const float* b, int64_t step_b, int64_t depth,
                          Prefetch* prefetch, vf (&acc)[M][V]) {
  Prefetch lines = *prefetch;  // in registers during the loop
  for (int64_t k = 0; k < depth; ++k) {
    if (kPrefetches) lines.take_step();
    vf column[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) column[v] = load(b + v * VL);
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m) {
      const vf x = splat(a[m * StepM]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[m][v] = Op::multiply_add(x, column[v], acc[m][v]);
    }
    a += StepK;
    b += step_b;
  }
  *prefetch = lines;
}

// c[m * ldc + v * VL] = (init ? init[v * VL] : c) + product, for M rows and V vectors, of which
// only the first `lanes` elements exist.
template <class Op, int M, int V, int StepM, int StepK>
inline void multiply_store(const float* a, const float* b, int64_t step_b, int64_t depth,
                           const float* init, float* c, int64_t ldc, int lanes,
                           Prefetch* prefetch) {
  vf acc[M][V];
  const bool whole = lanes == V * VL;
  const auto each = [&](const auto& visit) __attribute__((always_inline)) {
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) visit(&acc[m][v], c + m * ldc + v * VL, v);
  };
  // What is added to comes from a cache further away while the products go on.
  each([&](vf* sum, const float* to, int v) __attribute__((always_inline)) {
    __builtin_prefetch(to);
    *sum = init ? load(init + v * VL) : vf{};
  });
  multiply<Op, M, V, StepM, StepK>(a, b, step_b, depth, prefetch, acc);
  each([&](const vf* sum, float* to, int v) __attribute__((always_inline)) {
    const int n = whole ? VL : clamp(lanes - v * VL, 0, VL);
    store_n(to, init ? *sum : *sum + load_n(to, n), n);
  });
}

// One instance for every count of rows, so that a remainder costs no more than its share.
using MultiplyStore = void (*)(const float*, const float*, int64_t, int64_t, const float*, float*,
                               int64_t, int, Prefetch*);
template <class Op, int StepM, int StepK>
struct Multiply {
  template <int V, int... M>
  static constexpr Table<MultiplyStore, sizeof...(M)> table(std::integer_sequence<int, M...>) {
    return {&multiply_store<Op, M + 1, V, StepM, StepK>...};
  }
  using Rows = std::make_integer_sequence<int, kTileM>;
  static constexpr auto kNarrow = table<1>(Rows{});
  static constexpr auto kWide = table<kTileV>(Rows{});
  static MultiplyStore kernel(int vectors, int rows) {
    return (vectors == 1 ? kNarrow : kWide)[size_t(rows - 1)];
  }
};

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
