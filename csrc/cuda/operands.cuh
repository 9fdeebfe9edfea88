// Operands of the matrix instruction: float32 values as sums of bfloat16 terms.
//
// A float32 has 24 digits, a bfloat16 8. All terms but the last are cut off, not rounded: then
// nothing overflows, each remainder is exact, and three terms hold every digit. Products of term i
// and term j with i + j >= max(terms) are below the rounding of the sum and left out:
//
//   1 x 1 terms   1 product,  error 2^-9
//   2 x 2         3 products, error 2^-16
//   3 x 3         6 products, error 2^-23
//
// float16 (11 digits) is exactly two terms, so that residuals never have to fit its range.
#pragma once

#include "device.cuh"
#include "few_classes.h"
#include "index.cuh"

namespace moso_fast::few_classes {

constexpr float kInfinity = __builtin_huge_valf();

MOSO_DEVICE bool is_finite(float x) { return (device::float_bits(x) & 0x7f800000u) != 0x7f800000u; }

struct Add {
  MOSO_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Max {
  MOSO_DEVICE float operator()(float a, float b) const { return a > b ? a : b; }
};

// All `lanes` (a power of two) get the same bits: each step combines the same two values.
template <class Op>
MOSO_DEVICE float combine_lanes(float value, int lanes, Op op) {
  for (int mask = lanes / 2; mask > 0; mask /= 2)
    value = op(value, device::shuffle_xor(value, mask));
  return value;
}

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

// Two neighbouring elements of 16 loaded bytes as float32.
template <Feature F>
MOSO_DEVICE Floats2 number_pair(const Words4& v, int word) {
  if (F == Feature::kFloat32)
    return {device::bits_float(v.w[2 * word]), device::bits_float(v.w[2 * word + 1])};
  if (F == Feature::kFloat16) return device::expand_float16(v.w[word]);
  return {device::bits_float(v.w[word] << 16), device::bits_float(v.w[word] & 0xffff0000u)};
}

// Terms of two 16-bit elements packed in a word.
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

// Squared norms of 16 rows.
//
// Of 16-bit elements the matrix instruction makes them: a word of an A operand is one of a B
// operand as well, so a product gives rows 0-7 times rows 0-7 and another one rows 8-15 times
// themselves, and the norms are the sums where both are the same row. Such products are exact. An
// infinity or NaN reaches the norm of its own row, and beside it sums that nobody reads.
//
//   rows 0-7   A words 0 1, B word 0:  row g is number g % 2 of lane 4 g + g / 2
//   rows 8-15  A words 0 1, B word 1:  row g + 8 is number 2 + g % 2 of the same lane
template <Feature F, bool Exact>
struct RowNorms {
  static constexpr bool kProducts = F != Feature::kFloat32;
  float sums[2][kProducts ? 4 : 1];

  MOSO_DEVICE RowNorms() {
    MOSO_UNROLL
    for (int half = 0; half < 2; ++half) {
      MOSO_UNROLL
      for (float& sum : sums[half]) sum = 0.0f;
    }
  }

  // float32: 16 bytes of rows g and g + 8.
  MOSO_DEVICE void add(const Words4& low, const Words4& high) {
    MOSO_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float x = device::bits_float(low.w[i]), y = device::bits_float(high.w[i]);
      sums[0][0] += x * x;
      sums[1][0] += y * y;
    }
  }
  // 16-bit elements: the words of an A operand.
  MOSO_DEVICE void add(const uint32_t (&a)[4]) {
    MOSO_UNROLL
    for (int half = 0; half < 2; ++half) {
      if constexpr (Exact) {  // these sums must not be cut off again and again
        float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        multiply(part, a, half);
        MOSO_UNROLL
        for (int i = 2 * half; i < 2 * half + 2; ++i) sums[half][i] += part[i];
      } else {
        multiply(sums[half], a, half);
      }
    }
  }

  // Norms of rows g and g + 8, right in the lane for which has() holds.
  MOSO_DEVICE float get(int half) const {
    if constexpr (kProducts)
      return device::thread_index() & 4 ? sums[half][2 * half + 1] : sums[half][2 * half];
    else
      return combine_lanes(sums[half][0], 4, Add{});
  }
  MOSO_DEVICE static bool has() {
    const int lane = device::thread_index() % kLanes;
    return lane % 4 == (kProducts ? lane / 8 : 0);
  }

 private:
  MOSO_DEVICE static void multiply(float (&to)[4], const uint32_t (&a)[4], int half) {
    constexpr bool kFloat16 = F == Feature::kFloat16;
    device::multiply_add_short<kFloat16>(to, a[0], a[1], a[half]);
    device::multiply_add_short<kFloat16>(to, a[2], a[3], a[half + 2]);
  }
};

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

// 16 bytes of a row's elements [column, column + E), zeros from `dim` on.
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
// columns that do not exist. Needs a barrier before it is read. `Natural`: for features that come
// by load_matrices.
template <int Item, int Terms, bool Natural = false>
MOSO_DEVICE void pack_operand(uint32_t offset, const float* matrix, int classes, int dim) {
  constexpr int kWords = operand_words(Item);
  const int words = groups_of(Item, dim) * classes * 4 * kWords;
  for (int index = device::thread_index(); index < words; index += kThreads) {
    const int word = index % kWords, t = index / kWords % 4;
    const int cls = index / (kWords * 4) % classes, group = index / (kWords * 4 * classes);
    const int column =
        Natural ? natural_column(group, t, word) : operand_column(Item, group, t, word);
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

// Byte offset of what this lane reads first of `tile` in a group. Lanes of classes past the last
// get values that lead to sums nobody reads.
template <int Item, int Terms>
MOSO_DEVICE uint32_t operand_place(uint32_t offset, int classes, int group, int tile) {
  const int lane = device::thread_index() % kLanes, wanted = operand_class(tile, lane);
  const int cls = wanted < classes ? wanted : classes - 1;
  return offset + operand_offset(Item, Terms, classes, group, 0, cls, lane % 4);
}

// B operand for all steps of a group, from its place.
template <int Item, int Terms, int Steps>
MOSO_DEVICE void load_operand(uint32_t place, int classes, uint32_t (&b)[Steps][Terms][2]) {
  MOSO_UNROLL
  for (int block = 0; block < operand_blocks(Item, Terms); ++block) {
    const uint32_t at = place + uint32_t(block) * operand_block_bytes(Item, Terms, classes);
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
