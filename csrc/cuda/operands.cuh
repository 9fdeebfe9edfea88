// Operands of the matrix instruction: float32 numbers as sums of bfloat16 terms.
//
// A float32 has 24 digits, a bfloat16 8. All terms but the last are cut off, not rounded: then
// nothing overflows, each remainder is exact, and three terms hold every digit. Products of term i
// and term j with i + j >= max(terms) are below the rounding of the sum and left out:
//
//   1 x 1 terms   1 product, error 2^-9      2 x 2   3 products, 2^-16      3 x 3   6 products,
//   2^-23
//
// float16 (11 digits) is exactly two terms, so that residuals never have to fit its range.
#pragma once

#include "device.cuh"
#include "few_classes.h"
#include "index.cuh"

namespace moso_fast::few_classes {

constexpr float kInfinity = __builtin_huge_valf();

MOSO_DEVICE bool is_finite(float x) { return (device::float_bits(x) & 0x7f800000u) != 0x7f800000u; }

template <int Terms>
MOSO_DEVICE void split_pair(float x, float y, uint32_t (&terms)[Terms]) {
  MOSO_UNROLL
  for (int i = 0; i + 1 < Terms; ++i) {
    const uint32_t high_x = device::float_bits(x) & 0xffff0000u;
    const uint32_t high_y = device::float_bits(y) & 0xffff0000u;
    terms[i] = (high_x >> 16) | high_y;
    x -= device::bits_float(high_x);
    y -= device::bits_float(high_y);
  }
  terms[Terms - 1] = device::round_bfloat16(x, y);
}

// The number that the terms of x add up to.
template <int Terms>
MOSO_DEVICE float rounded(float x) {
  uint32_t terms[Terms];
  split_pair<Terms>(x, 0.0f, terms);
  float sum = 0.0f;
  MOSO_UNROLL
  for (int i = Terms - 1; i >= 0; --i) sum += device::bits_float(terms[i] << 16);
  return sum;
}

// One dtype and precision. Terms of the features, of weights and residuals (first pass), and of
// the mean gradient (second pass). Exact: sums leave the tensor cores after each instruction's
// group of products, because those cut sums off instead of rounding them.
template <Feature F, bool IsExact>
struct Mode;
template <bool IsExact>
struct Mode<Feature::kFloat32, IsExact> {
  static constexpr int kItem = 4, kFeatureTerms = IsExact ? 3 : 2, kTerms = IsExact ? 3 : 2,
                       kGradTerms = kTerms;
  static constexpr bool kExact = IsExact;
};
template <bool IsExact>
struct Mode<Feature::kBfloat16, IsExact> {
  static constexpr int kItem = 2, kFeatureTerms = 1, kTerms = IsExact ? 3 : 1,
                       kGradTerms = IsExact ? 3 : 2;
  static constexpr bool kExact = IsExact;
};
template <bool IsExact>
struct Mode<Feature::kFloat16, IsExact> {
  static constexpr int kItem = 2, kFeatureTerms = 2, kTerms = IsExact ? 3 : 1,
                       kGradTerms = IsExact ? 3 : 2;
  static constexpr bool kExact = IsExact;
};

// Two neighbouring numbers of 16 loaded bytes as float32.
template <Feature F>
MOSO_DEVICE Floats2 number_pair(const Words4& v, int word) {
  if (F == Feature::kFloat32)
    return {device::bits_float(v.w[2 * word]), device::bits_float(v.w[2 * word + 1])};
  if (F == Feature::kFloat16) return device::expand_float16(v.w[word]);
  return {device::bits_float(v.w[word] << 16), device::bits_float(v.w[word] & 0xffff0000u)};
}

// Terms of two 16-bit numbers packed in a word.
template <Feature F, int Terms>
MOSO_DEVICE void word_terms(uint32_t word, uint32_t (&terms)[Terms]) {
  if constexpr (F == Feature::kBfloat16) {
    terms[0] = word;
  } else {
    const Floats2 v = device::expand_float16(word);
    split_pair<Terms>(v.x, v.y, terms);
  }
}

// A operand (16 rows x 16 columns) of step `step` from the 16 bytes of row g and those of g + 8.
template <Feature F, int Terms>
MOSO_DEVICE void feature_operand(const Words4& low, const Words4& high, int step,
                                 uint32_t (&a)[Terms][4]) {
  MOSO_UNROLL
  for (int w = 0; w < 4; ++w) {
    const Words4& v = (w & 1) ? high : low;
    uint32_t terms[Terms];
    if constexpr (F == Feature::kFloat32) {
      const Floats2 pair = number_pair<F>(v, w >> 1);
      split_pair<Terms>(pair.x, pair.y, terms);
    } else {
      word_terms<F, Terms>(v.w[2 * step + (w >> 1)], terms);
    }
    MOSO_UNROLL
    for (int i = 0; i < Terms; ++i) a[i][w] = terms[i];
  }
}

template <Feature F>
MOSO_DEVICE float sum_of_squares(const Words4& v, float sum) {
  constexpr int kPairs = F == Feature::kFloat32 ? 2 : 4;
  MOSO_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    const Floats2 pair = number_pair<F>(v, i);
    sum += pair.x * pair.x;
    sum += pair.y * pair.y;
  }
  return sum;
}

template <Feature F>
MOSO_DEVICE bool all_finite(const Words4& v) {
  constexpr int kPairs = F == Feature::kFloat32 ? 2 : 4;
  bool finite = true;
  MOSO_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    const Floats2 pair = number_pair<F>(v, i);
    finite = finite && is_finite(pair.x) && is_finite(pair.y);
  }
  return finite;
}

// sums += A B over the products of terms that matter, small ones first.
template <bool Exact, int TermsA, int TermsB>
MOSO_DEVICE void multiply_terms(float (&sums)[4], const uint32_t (&a)[TermsA][4],
                                const uint32_t (&b)[TermsB][2]) {
  constexpr int kTerms = TermsA > TermsB ? TermsA : TermsB;
  float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  MOSO_UNROLL
  for (int order = kTerms - 1; order >= 0; --order) {
    MOSO_UNROLL
    for (int i = 0; i < TermsA; ++i) {
      const int j = order - i;
      if (j < 0 || j >= TermsB) continue;
      if (Exact)
        device::multiply_add(part, a[i], b[j]);
      else
        device::multiply_add(sums, a[i], b[j]);
    }
  }
  if (Exact) {
    MOSO_UNROLL
    for (int i = 0; i < 4; ++i) sums[i] += part[i];
  }
}

// 16 bytes of row numbers [column, column + E), zeros from `dim` on.
template <int Item>
MOSO_DEVICE Words4 load_features(const unsigned char* row, int column, int dim, bool aligned) {
  constexpr int kNumbers = vector_numbers(Item);
  if (aligned && column + kNumbers <= dim)
    return device::global_load_once(row + int64_t(column) * Item);
  Words4 v{{0, 0, 0, 0}};
  MOSO_UNROLL
  for (int i = 0; i < kNumbers; ++i) {
    if (column + i >= dim) continue;
    if constexpr (Item == 4)
      v.w[i] = device::global_load(reinterpret_cast<const uint32_t*>(row) + column + i);
    else
      v.w[i / 2] |=
          uint32_t(device::global_load(reinterpret_cast<const uint16_t*>(row) + column + i))
          << (16 * (i % 2));
  }
  return v;
}

// Packs `matrix` (classes, dim) float32 as the B operand at `offset` of shared memory; zeros for
// columns that do not exist. Needs a barrier before it is read.
template <int Item, int Terms>
MOSO_DEVICE void pack_operand(uint32_t offset, const float* matrix, int classes, int dim) {
  constexpr int kWords = operand_words(Item);
  const int words = groups_of(Item, dim) * classes * 4 * kWords;
  for (int index = device::thread_index(); index < words; index += kThreads) {
    const int word = index % kWords, t = index / kWords % 4;
    const int cls = index / (kWords * 4) % classes, group = index / (kWords * 4 * classes);
    const int column = operand_column(Item, group, t, word);
    const float* from = matrix + int64_t(cls) * dim + column;
    const float x = column < dim ? device::global_load(from) : 0.0f;
    const float y = column + 1 < dim ? device::global_load(from + 1) : 0.0f;
    const auto place = [&](int block) {
      return offset + operand_offset(Item, Terms, classes, group, block, cls, t);
    };
    if constexpr (Terms <= 2) {
      uint32_t terms[Terms];
      split_pair<Terms>(x, y, terms);
      MOSO_UNROLL
      for (int i = 0; i < Terms; ++i) device::shared_store(place(i) + 4 * word, terms[i]);
    } else {
      device::shared_store(place(word / 2) + 8 * (word % 2), Floats2{x, y});
    }
  }
}

// B operand of `tile` for all steps of a group. Lanes of classes behind the last get numbers that
// lead to sums nobody reads.
template <int Item, int Terms, int Steps>
MOSO_DEVICE void load_operand(uint32_t offset, int classes, int group, int tile,
                              uint32_t (&b)[Steps][Terms][2]) {
  const int lane = device::thread_index() % kLanes, wanted = operand_class(tile, lane);
  const int cls = wanted < classes ? wanted : classes - 1;
  MOSO_UNROLL
  for (int block = 0; block < operand_blocks(Item, Terms); ++block) {
    const uint32_t at = offset + operand_offset(Item, Terms, classes, group, block, cls, lane % 4);
    if constexpr (Terms > 2) {
      const auto v = device::shared_load<Words4>(at);
      MOSO_UNROLL
      for (int w = 0; w < 2; ++w) {
        uint32_t terms[Terms];
        split_pair<Terms>(device::bits_float(v.w[2 * w]), device::bits_float(v.w[2 * w + 1]),
                          terms);
        MOSO_UNROLL
        for (int i = 0; i < Terms; ++i) b[block][i][w] = terms[i];
      }
    } else if constexpr (Item == 2) {
      const auto v = device::shared_load<Words4>(at);
      MOSO_UNROLL
      for (int w = 0; w < 4; ++w) b[w / 2][block][w % 2] = v.w[w];
    } else {
      const auto v = device::shared_load<Words2>(at);
      b[0][block][0] = v.w[0];
      b[0][block][1] = v.w[1];
    }
  }
}

}  // namespace moso_fast::few_classes
