// The two matrix products of the first pass on a staged tile, and its staging: Z = H W^T by 16 rows
// and a slice of the columns a warp, partial G = R^T H by 16 columns of every 128 a warp. The
// picture and the numbers are in few_classes_first.cuh.
#pragma once

#include "few_classes_softmax.cuh"

namespace moso_fast::few_classes {

// What the bulk copies need once: their barriers, and zeros behind the columns. All threads.
MOSO_DEVICE void prepare_bulk(const FirstLayout& layout, int filled) {
  if (device::thread_index() == 0) {
    for (int stage = 0; stage < layout.stages; ++stage)
      device::init_barrier(bulk_barrier(layout, stage));
  }
  const int empty = (layout.row_bytes - filled) / 16;
  for (int i = device::thread_index(); i < empty * layout.tile_rows * layout.stages; i += kThreads)
    device::shared_store(feature_offset(i / empty, filled / 16 + i % empty, layout.pitch),
                         Words4{{0, 0, 0, 0}});
  device::fence_bulk();
  device::sync_block();
}

// As stage_tile, a whole row a lane; the stage's barrier counts their bytes. The rows are shared
// out over the warps because a warp asks for one row after another.
template <int Item>
MOSO_DEVICE void stage_tile_bulk(const FirstPass& p, int stage, int64_t first, int count) {
  const FirstLayout& layout = p.layout;
  const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
  const int bytes = p.dim * Item, row = warp + kWarps * lane;
  const uint32_t tile = uint32_t(stage) * layout.stage_bytes, barrier = bulk_barrier(layout, stage);
  // Bytes may arrive before they are announced: the phase ends with the announcement at the least.
  if (device::thread_index() == 0) device::announce_bulk(barrier, count * bytes);
  if (row < count)
    device::copy_bulk(
        tile + feature_offset(row, 0, layout.pitch),
        static_cast<const unsigned char*>(p.features) + (first + row) * p.row_stride * Item, bytes,
        barrier);
  // Only the last of all tiles has rows that do not exist, and nothing is copied there after it.
  const int chunks = layout.row_bytes / 16;
  for (int i = device::thread_index(); i < (layout.tile_rows - count) * chunks; i += kThreads)
    device::shared_store(tile + feature_offset(count + i / chunks, i % chunks, layout.pitch),
                         Words4{{0, 0, 0, 0}});
}

// Asks for rows [first, first + count) of the features; rows and columns that do not exist become
// zeros. All threads take part.
template <int Item>
MOSO_DEVICE void stage_tile(const FirstPass& p, uint32_t stage, int64_t first, int count) {
  constexpr int kNumbers = vector_numbers(Item);
  const int pitch = p.layout.pitch, chunks = p.layout.row_bytes / 16;
  const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
  // A warp copies one row at a time, or as many as it has lanes for.
  const int rows_at_once = chunks < kLanes ? kLanes / chunks : 1;
  const int sub = chunks < kLanes ? lane / chunks : 0;
  const int begin = chunks < kLanes ? lane % chunks : lane;
  if (sub >= rows_at_once) return;
  const auto* base = static_cast<const unsigned char*>(p.features);
  for (int row = warp * rows_at_once + sub; row < p.layout.tile_rows;
       row += kWarps * rows_at_once) {
    const unsigned char* from = base + (first + row) * p.row_stride * Item;
    for (int chunk = begin; chunk < chunks; chunk += kLanes) {
      const int column = chunk * kNumbers;
      const uint32_t to = stage + feature_offset(row, chunk, pitch);
      const int left = row < count ? (p.dim - column) * Item : 0;
      if (p.aligned) {
        const int copied = left < 0 ? 0 : left > 16 ? 16 : left;
        device::copy_async(to, copied > 0 ? from + chunk * 16 : base, copied);
      } else {
        const int dim = left > 0 ? p.dim : 0;
        device::shared_store(to, load_features<Item>(from, column, dim, false));
      }
    }
  }
}

// Logits of 16 rows over a slice of the columns, classes 8 First .. 8 (First + Count), and with
// the first classes the squared norms of the rows' slices.
template <Feature F, class M, int First, int Count>
MOSO_DEVICE void some_logits(const FirstPass& p, uint32_t stage) {
  const FirstLayout& layout = p.layout;
  constexpr int kSteps = group_steps(M::kItem);
  const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
  const int row_groups = layout.tile_rows / 16, width = p.heads * p.classes;
  const int row = 16 * (warp % row_groups) + logit_row(lane / 4), slice = warp / row_groups;
  const int groups = layout.groups, pitch = layout.pitch;
  const int end = groups * (slice + 1) / layout.slices;

  device::sync_warp();
  float sums[Count][4];
  float norms[2] = {0.0f, 0.0f};
  MOSO_UNROLL
  for (int n = 0; n < Count; ++n) {
    MOSO_UNROLL
    for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
  }
  MOSO_NO_UNROLL
  for (int group = groups * slice / layout.slices; group < end; ++group) {
    const int chunk = 4 * group + lane % 4;
    const auto low = device::shared_load<Words4>(stage + feature_offset(row, chunk, pitch));
    const auto high = device::shared_load<Words4>(stage + feature_offset(row + 8, chunk, pitch));
    if (First == 0) {
      norms[0] = sum_of_squares<F>(low, norms[0]);
      norms[1] = sum_of_squares<F>(high, norms[1]);
    }
    uint32_t a[kSteps][M::kFeatureTerms][4];
    MOSO_UNROLL
    for (int step = 0; step < kSteps; ++step)
      feature_operand<F, M::kFeatureTerms>(low, high, step, a[step]);
    MOSO_UNROLL
    for (int n = 0; n < Count; ++n) {
      if (8 * (First + n) >= width) continue;
      uint32_t b[kSteps][M::kTerms][2];
      load_operand<M::kItem, M::kTerms, kSteps>(layout.weights, width, group, First + n, b);
      MOSO_UNROLL
      for (int step = 0; step < kSteps; ++step)
        multiply_terms<M::kExact>(sums[n], a[step], b[step]);
    }
  }
  MOSO_UNROLL
  for (int n = 0; n < Count; ++n) {
    if (8 * (First + n) >= width) continue;
    MOSO_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int at = (row + 8 * half) * layout.logit_stride + 8 * (First + n) + 2 * (lane % 4);
      device::shared_store(layout.logits + slice * layout.slice_bytes + 4 * at,
                           Floats2{sums[n][2 * half], sums[n][2 * half + 1]});
    }
  }
  MOSO_UNROLL
  for (int half = 0; half < 2; ++half) {
    if (First != 0) continue;
    const float norm = combine_lanes(norms[half], 4, Add{});
    const int at = slice * layout.tile_rows + row + 8 * half;
    if (lane % 4 == 0) device::shared_store(layout.norms + 4 * at, norm);
  }
}

// All logits, First and up: as many at once as there are registers beside the sums of the gradient.
template <Feature F, class M, int ClassTiles, int First = 0>
MOSO_DEVICE void tile_logits(const FirstPass& p, uint32_t stage) {
  constexpr int kTiles = 2 * ClassTiles, kWide = F == Feature::kFloat16 ? 4 : 5;
  constexpr int kAtOnce = ClassTiles <= 2          ? kTiles
                          : kTiles - First < kWide ? kTiles - First
                                                   : kWide;
  some_logits<F, M, First, kAtOnce>(p, stage);
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

  MOSO_DEVICE GradientOperand(uint32_t stage, int pitch, int row) {
    const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
    const int column = gradient_column(warp, 0);
    if constexpr (M::kItem == 2) {
      places[0] = stage + feature_offset(row + lane % 16, column / 8 + lane / 16, pitch);
    } else {
      MOSO_UNROLL
      for (int i = 0; i < kPlaces; ++i) {
        const int at = column + 8 * (i / 4) + lane / 4;
        places[i] = stage + feature_offset(row + gradient_row(lane, i % 4), at / 4, pitch) +
                    4 * uint32_t(at % 4);
      }
    }
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

// sums[m][n] += R^T H of the staged tile: class tiles begin + m, this warp's columns.
template <Feature F, class M, int ClassTiles, int MTiles, int NTiles>
MOSO_DEVICE void tile_gradient(const FirstPass& p, uint32_t stage, int begin,
                               float (&sums)[MTiles][NTiles][4]) {
  const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
  const FirstLayout& layout = p.layout;
  const int width = p.heads * p.classes, pitch = layout.pitch;
  device::sync_warp();
  MOSO_NO_UNROLL
  for (int step = 0; step < layout.tile_rows / 16; ++step) {
    const GradientOperand<F, M> operand(stage, pitch, 16 * step);
    MOSO_UNROLL
    for (int pair = 0; pair < NTiles / 2; ++pair) {
      if (gradient_column(warp, pair) >= p.dim) break;
      uint32_t b[2][M::kFeatureTerms][2];
      operand.load(pair, b);
      MOSO_UNROLL
      for (int m = 0; m < MTiles; ++m) {
        if (16 * (begin + m) >= width) continue;
        uint32_t a[M::kTerms][4];
        MOSO_UNROLL
        for (int i = 0; i < M::kTerms; ++i) {
          const auto block = uint32_t((step * M::kTerms + i) * ClassTiles + begin + m);
          const auto v =
              device::shared_load<Words4>(layout.residuals + (block * kLanes + lane) * 16);
          MOSO_UNROLL
          for (int w = 0; w < 4; ++w) a[i][w] = v.w[w];
        }
        MOSO_UNROLL
        for (int tile = 0; tile < 2; ++tile)
          multiply_terms<M::kExact>(sums[m][2 * pair + tile], a, b[tile]);
      }
    }
  }
}

}  // namespace moso_fast::few_classes
