// The two matrix products of the first pass on a staged tile: Z = H W^T by 16 rows and a slice of
// the columns a warp, partial G = R^T H by 16 columns of every 128 a warp. The picture and the
// costs are in few_classes_first.cuh.
#pragma once

#include "few_classes_softmax_rows.cuh"

namespace moso_fast::few_classes {

// What a warp reads and writes for its logits: 16 rows of a tile, a slice of the columns, classes
// 8 First .. 8 (First + Count). The same for every tile but for the stage, which `features` is to
// be added to.
template <class M, int First, int Count>
struct LogitPlaces {
  uint32_t features, sums, norms, weights[Count];
  int groups;

  MOSO_DEVICE explicit LogitPlaces(const FirstPass& p) {
    const FirstLayout& layout = p.layout;
    const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
    const int width = p.heads * p.classes, slice = warp >> layout.split;
    const int first = 16 * (warp & ((1 << layout.split) - 1));
    const int row = first + (M::kItem == 2 ? lane / 4 : logit_row(lane / 4));
    const int begin = (layout.groups * slice) >> (3 - layout.split);
    groups = ((layout.groups * (slice + 1)) >> (3 - layout.split)) - begin;
    features = M::kItem == 2
                   ? feature_offset(first + lane % 16, 4 * begin + lane / 16, layout.pitch)
                   : feature_offset(row, 4 * begin + lane % 4, layout.pitch);
    const int at = row * layout.logit_stride + 8 * First + 2 * (lane % 4);
    sums = layout.logits + uint32_t(slice) * layout.slice_bytes + 4 * uint32_t(at);
    norms = layout.norms + 4 * uint32_t(slice * layout.tile_rows + row);
    MOSO_UNROLL
    for (int n = 0; n < Count; ++n)
      weights[n] = operand_place<M::kItem, M::kTerms>(layout.weights, width, begin, First + n);
  }

  MOSO_DEVICE void keep() {
    features = device::kept(features);
    sums = device::kept(sums);
    norms = device::kept(norms);
    groups = int(device::kept(uint32_t(groups)));
    MOSO_UNROLL
    for (uint32_t& place : weights) place = device::kept(place);
  }
};

// The logits themselves, and with the first classes the squared norms of the rows' slices.
template <Feature F, class M, int First, int Count>
MOSO_DEVICE void some_logits(const FirstPass& p, uint32_t stage,
                             LogitPlaces<M, First, Count> places) {
  constexpr int kSteps = group_steps(M::kItem);
  const int width = p.heads * p.classes;
  const uint32_t group_bytes =
      operand_blocks(M::kItem, M::kTerms) * operand_block_bytes(M::kItem, M::kTerms, width);
  places.features += stage;

  device::sync_warp();
  float sums[Count][4];
  RowNorms<F, M::kExact> norms;
  MOSO_UNROLL
  for (int n = 0; n < Count; ++n) {
    MOSO_UNROLL
    for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
  }
  MOSO_NO_UNROLL
  for (; places.groups > 0; --places.groups) {
    uint32_t a[kSteps][M::kFeatureTerms][4];
    if constexpr (M::kItem == 2) {
      MOSO_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        uint32_t words[4];
        device::load_matrices(words, places.features + 32 * step);
        if (First == 0) norms.add(words);
        MOSO_UNROLL
        for (int w = 0; w < 4; ++w) {
          uint32_t terms[M::kFeatureTerms];
          word_terms<F, M::kFeatureTerms>(words[w], terms);
          MOSO_UNROLL
          for (int i = 0; i < M::kFeatureTerms; ++i) a[step][i][w] = terms[i];
        }
      }
    } else {
      const auto low = device::shared_load<Words4>(places.features);
      const auto high =
          device::shared_load<Words4>(places.features + feature_offset(8, 0, p.layout.pitch));
      if (First == 0) norms.add(low, high);
      feature_operand<F, M::kFeatureTerms>(low, high, 0, a[0]);
    }
    places.features += 64;
    MOSO_UNROLL
    for (int n = 0; n < Count; ++n) {
      if (First + n > 0 && 8 * (First + n) >= width) continue;
      uint32_t b[kSteps][M::kTerms][2];
      load_operand<M::kItem, M::kTerms, kSteps>(places.weights[n], width, b);
      places.weights[n] += group_bytes;
      MOSO_UNROLL
      for (int step = 0; step < kSteps; ++step)
        multiply_terms<M::kExact>(sums[n], a[step], b[step]);
    }
  }
  const uint32_t below = 8 * 4 * uint32_t(p.layout.logit_stride);
  MOSO_UNROLL
  for (int n = 0; n < Count; ++n) {
    if (First + n > 0 && 8 * (First + n) >= width) continue;
    device::shared_store(places.sums + 32 * n, Floats2{sums[n][0], sums[n][1]});
    device::shared_store(places.sums + 32 * n + below, Floats2{sums[n][2], sums[n][3]});
  }
  if constexpr (First == 0) {
    MOSO_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float norm = norms.get(half);
      if (norms.has()) device::shared_store(places.norms + 32 * half, norm);
    }
  }
}

// All logits, First and up: as many at once as there are registers beside the sums of the gradient.
template <Feature F, class M, int ClassTiles, int First = 0>
MOSO_DEVICE void tile_logits(const FirstPass& p, uint32_t stage) {
  constexpr int kTiles = 2 * ClassTiles, kWide = F == Feature::kFloat16 ? 4 : 5;
  constexpr int kAtOnce = ClassTiles <= 2          ? kTiles
                          : kTiles - First < kWide ? kTiles - First
                                                   : kWide;
  some_logits<F, M>(p, stage, LogitPlaces<M, First, kAtOnce>(p));
  if constexpr (First + kAtOnce < kTiles) {
    if (8 * (First + kAtOnce) < p.heads * p.classes)
      tile_logits<F, M, ClassTiles, First + kAtOnce>(p, stage);
  }
}

// B operand of 16 rows x 16 columns of the staged tile: two tiles of 8 columns.
template <Feature F, class M>
struct GradientOperand {
  // 2 bytes a number: what this lane names for ldmatrix. 4 bytes: its four rows in both tiles.
  static constexpr int kPlaces = M::kItem == 2 ? 1 : 8;
  uint32_t places[kPlaces];

  MOSO_DEVICE GradientOperand(uint32_t stage, int pitch) {
    const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
    const int column = gradient_column(warp, 0);
    if constexpr (M::kItem == 2) {
      places[0] = stage + feature_offset(lane % 16, column / 8 + lane / 16, pitch);
    } else {
      MOSO_UNROLL
      for (int i = 0; i < kPlaces; ++i) {
        const int at = column + 8 * (i / 4) + lane / 4;
        places[i] =
            stage + feature_offset(gradient_row(lane, i % 4), at / 4, pitch) + 4 * uint32_t(at % 4);
      }
    }
  }

  // The same columns of the next 16 rows.
  MOSO_DEVICE void advance(int pitch) {
    MOSO_UNROLL
    for (uint32_t& place : places) place += 16 * uint32_t(pitch);
  }

  MOSO_DEVICE void load(int pair, uint32_t (&b)[2][M::kFeatureTerms][2]) const {
    const uint32_t shift = uint32_t(pair * gradient_pair_bytes(M::kItem));
    uint32_t words[4];
    if constexpr (M::kItem == 2) device::load_matrices_transposed(words, places[0] + shift);
    MOSO_UNROLL
    for (int w = 0; w < 4; ++w) {
      uint32_t terms[M::kFeatureTerms];
      if constexpr (M::kItem == 2)
        word_terms<F, M::kFeatureTerms>(words[w], terms);
      else
        split_pair<M::kFeatureTerms>(device::shared_load<float>(places[2 * w] + shift),
                                     device::shared_load<float>(places[2 * w + 1] + shift), terms);
      MOSO_UNROLL
      for (int i = 0; i < M::kFeatureTerms; ++i) b[w / 2][i][w % 2] = terms[i];
    }
  }
};

// Terms of the residuals of 16 rows and 16 classes, the A operand R^T, from its place.
template <int Terms, int ClassTiles>
MOSO_DEVICE void load_residuals(uint32_t place, uint32_t (&a)[Terms][4]) {
  MOSO_UNROLL
  for (int i = 0; i < Terms; ++i) {
    const auto v = device::shared_load<Words4>(place + uint32_t(i * ClassTiles * kLanes * 16));
    MOSO_UNROLL
    for (int w = 0; w < 4; ++w) a[i][w] = v.w[w];
  }
}

// sums[m][n] += R^T H of the staged tile: class tiles begin + m, this warp's columns.
template <Feature F, class M, int ClassTiles, int MTiles, int NTiles>
MOSO_DEVICE void tile_gradient(const FirstPass& p, uint32_t stage, int begin,
                               float (&sums)[MTiles][NTiles][4]) {
  const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
  const FirstLayout& layout = p.layout;
  const int width = p.heads * p.classes;
  constexpr bool kKept = MTiles * M::kTerms <= 3;  // residuals, over all columns
  GradientOperand<F, M> operand(stage, layout.pitch);
  uint32_t residuals = layout.residuals + uint32_t(begin * kLanes + lane) * 16;
  const int pairs = (p.dim - gradient_column(warp, 0) + gradient_column(0, 1) - 1) /
                    gradient_column(0, 1);  // that have columns; 0 or less: none
  device::sync_warp();
  MOSO_NO_UNROLL
  for (int step = 0; step < layout.tile_rows / 16; ++step) {
    uint32_t a[MTiles][M::kTerms][4];
    MOSO_UNROLL
    for (int m = 0; m < MTiles; ++m)
      if (kKept) load_residuals<M::kTerms, ClassTiles>(residuals + m * kLanes * 16, a[m]);
    MOSO_UNROLL
    for (int pair = 0; pair < NTiles / 2; ++pair) {
      if (pair >= pairs) break;
      uint32_t b[2][M::kFeatureTerms][2];
      operand.load(pair, b);
      MOSO_UNROLL
      for (int m = 0; m < MTiles; ++m) {
        if ((m > 0 || parts_of(ClassTiles) > 1) && 16 * (begin + m) >= width) continue;
        if (!kKept) load_residuals<M::kTerms, ClassTiles>(residuals + m * kLanes * 16, a[m]);
        MOSO_UNROLL
        for (int tile = 0; tile < 2; ++tile)
          multiply_terms<M::kExact>(sums[m][2 * pair + tile], a[m], b[tile]);
      }
    }
    operand.advance(layout.pitch);
    residuals += M::kTerms * ClassTiles * kLanes * 16;
  }
}

}  // namespace moso_fast::few_classes
