// First pass for few classes: one read of the features gives residuals, every row statistic and
// one partial sum of the mean gradient for each slab of rows.
//
//   Z = H W^T + b     R = softmax(Z) - onehot(y)     partial(slab) = R^T H over the slab's rows
//   H (n, D), W (C, D) with the classes of all heads, C padded to 16 ClassTiles
//
// A block of 8 warps stages tiles of 16, 32 or 64 whole rows in shared memory (cp.async, up to
// two tiles ahead of the arithmetic) and reads each tile twice there:
//
//   logits     warp = 16 rows x a slice of D; slices are added up in fixed order
//   softmax    4 to 32 lanes a row (few_classes_softmax.cuh); R goes back as packed fragments
//   gradient   warp = 16 columns of every 128, all classes; sums stay in registers for a slab
//
//        D ->                    stage (swizzled 16-byte chunks)
//   rows  +--------+--------+
//         | slice 0| slice 1|   Z: 16 rows x C     G: C x 16 columns a warp
//         +--------+--------+
//
// Bytes from memory: rows x D x item + rows x C x 4 (residuals) + slabs x C x D x 4. FLOPs: 4 rows
// C D a product of terms. With bfloat16 that is 2 C FLOPs a byte: bound by memory below C of about
// 100. The sums a thread keeps must fit its 255 registers: 16 classes at D = 2048, 32 at 1024, 80
// at 512. From 81 to 112 classes two blocks take the same rows at the same time, each for half of
// the classes: the second read of H is one of the L2 cache, the logits are computed twice. One
// block a multiprocessor, because its tiles fill the shared memory.
#pragma once

#include "few_classes_softmax.cuh"

namespace moso_fast::few_classes {

// Asks for rows [first, first + count) of the features; rows and columns that do not exist become
// zeros. All threads take part.
template <int Item>
MOSO_DEVICE void stage_tile(const FirstPass& p, uint32_t stage, int64_t first, int count) {
  constexpr int kNumbers = vector_numbers(Item);
  const int bytes = p.layout.row_bytes, chunks = bytes / 16;
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
      const uint32_t to = stage + feature_offset(row, chunk, bytes);
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
  const int row = 16 * (warp % row_groups) + lane / 4, slice = warp / row_groups;
  const int groups = layout.groups, bytes = layout.row_bytes;
  const int end = groups * (slice + 1) / layout.slices;

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
    const auto low = device::shared_load<Words4>(stage + feature_offset(row, chunk, bytes));
    const auto high = device::shared_load<Words4>(stage + feature_offset(row + 8, chunk, bytes));
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

  MOSO_DEVICE GradientOperand(uint32_t stage, int bytes, int row) {
    const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
    const int column = gradient_column(warp, 0);
    if constexpr (M::kItem == 2) {
      places[0] = stage + feature_offset(row + lane % 16, column / 8 + lane / 16, bytes);
    } else {
      MOSO_UNROLL
      for (int i = 0; i < kPlaces; ++i) {
        const int at = column + 8 * (i / 4) + lane / 4;
        places[i] = stage + feature_offset(row + gradient_row(4, lane, i % 4), at / 4, bytes) +
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
  const int width = p.heads * p.classes, bytes = layout.row_bytes;
  MOSO_NO_UNROLL
  for (int step = 0; step < layout.tile_rows / 16; ++step) {
    const GradientOperand<F, M> operand(stage, bytes, 16 * step);
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

// Writes the slab's sums and starts new ones.
template <int MTiles, int NTiles>
MOSO_DEVICE void store_partial(const FirstPass& p, int64_t slab, int begin,
                               float (&sums)[MTiles][NTiles][4]) {
  const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
  const int width = p.heads * p.classes, columns = partial_columns(p.dim);
  float* to = p.partial + slab * width * columns + 2 * (lane % 4);
  MOSO_UNROLL
  for (int pair = 0; pair < NTiles / 2; ++pair) {
    const int column = gradient_column(warp, pair);
    if (column >= p.dim) break;
    MOSO_UNROLL
    for (int m = 0; m < MTiles; ++m) {
      MOSO_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int cls = 16 * (begin + m) + accumulator_row(lane, 2 * half);
        MOSO_UNROLL
        for (int n = 2 * pair; n < 2 * pair + 2; ++n) {
          if (cls < width)
            device::global_store(
                reinterpret_cast<Floats2*>(to + cls * columns + column + 8 * (n % 2)),
                Floats2{sums[m][n][2 * half], sums[m][n][2 * half + 1]});
          sums[m][n][2 * half] = sums[m][n][2 * half + 1] = 0.0f;
        }
      }
    }
  }
}

template <int Parts>
struct BiasSums {
  float part[Parts];  // classes lane, lane + 32, ..: this warp's rows of the slab

  MOSO_DEVICE void clear() {
    MOSO_UNROLL
    for (int i = 0; i < Parts; ++i) part[i] = 0.0f;
  }
  MOSO_DEVICE void add_tile(const FirstLayout& layout, int width) {
    const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
    const int rows = layout.tile_rows / kWarps;
    MOSO_UNROLL
    for (int i = 0; i < Parts; ++i) {
      const int cls = lane + kLanes * i;
      if (cls >= width) continue;
      for (int row = warp * rows; row < (warp + 1) * rows; ++row)
        part[i] += device::shared_load<float>(layout.logits +
                                              4 * uint32_t(row * layout.logit_stride + cls));
    }
  }
  // Adds up the warps in order. One barrier; the next call must be behind another one.
  MOSO_DEVICE void store(const FirstLayout& layout, int width, float* to) {
    const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
    MOSO_UNROLL
    for (int i = 0; i < Parts; ++i)
      if (lane + kLanes * i < width)
        device::shared_store(layout.bias_sums + 4 * uint32_t(warp * width + lane + kLanes * i),
                             part[i]);
    device::sync_block();
    const int cls = device::thread_index();
    if (cls < width) {
      float sum = 0.0f;
      for (int w = 0; w < kWarps; ++w)
        sum += device::shared_load<float>(layout.bias_sums + 4 * uint32_t(w * width + cls));
      if (to) device::global_store(to + cls, sum);
    }
    clear();
  }
};

MOSO_DEVICE void store_residuals(const FirstPass& p, int64_t first, int count) {
  const FirstLayout& layout = p.layout;
  const int width = p.heads * p.classes;
  for (int i = device::thread_index(); i < count * width; i += kThreads)
    device::global_store(
        p.residual + first * width + i,
        device::shared_load<float>(layout.logits +
                                   4 * uint32_t(i / width * layout.logit_stride + i % width)));
}

// Rows with a norm that is not finite become zeros: 0 x inf would reach the mean gradient.
MOSO_DEVICE void clear_rows(const FirstLayout& layout, uint32_t stage) {
  const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
  for (int row = warp; row < layout.tile_rows; row += kWarps) {
    float norm = 0.0f;
    for (int s = 0; s < layout.slices; ++s)
      norm += device::shared_load<float>(layout.norms + 4 * (s * layout.tile_rows + row));
    if (is_finite(norm)) continue;
    for (int chunk = lane; chunk < layout.row_bytes / 16; chunk += kLanes)
      device::shared_store(stage + feature_offset(row, chunk, layout.row_bytes),
                           Words4{{0, 0, 0, 0}});
  }
}

// The kernel: up to 16 ClassTiles classes and most_columns(ClassTiles) columns; p.heads * p.classes
// and p.dim decide how much of that is worked on. Launch with FirstLayout::bytes of shared memory
// and a multiple of parts_of(ClassTiles) blocks.
template <Feature F, bool Exact, int ClassTiles>
MOSO_DEVICE void first_pass(const FirstPass& p) {
  using M = Mode<F, Exact>;
  constexpr int kParts = parts_of(ClassTiles), kMTiles = class_tiles_of(ClassTiles);
  constexpr int kNTiles = most_columns(ClassTiles) / 64;
  const int width = p.heads * p.classes;
  const int part = int(device::block_index() % kParts), begin = part * kMTiles;
  if (part > 0 && !p.partial) return;
  const FirstLayout& layout = p.layout;
  const TileWalk& walk = p.walk;
  TileCursor ahead = first_tile(walk, device::block_index() / kParts), now = ahead;

  const auto stage_next = [&](int stage) {
    if (!behind_last(walk, ahead)) {
      stage_tile<M::kItem>(p, uint32_t(stage) * layout.stage_bytes, ahead.row,
                           rows_of(walk, ahead));
      advance(walk, ahead);
    }
    device::copy_commit();
  };
  for (int stage = 0; stage + 1 < layout.stages; ++stage) stage_next(stage);

  pack_operand<M::kItem, M::kTerms>(layout.weights, p.weight, width, p.dim);
  const int fragments = int(residual_bytes(M::kTerms, ClassTiles, layout.tile_rows)) / 16;
  for (int i = device::thread_index(); i < fragments; i += kThreads)
    device::shared_store(layout.residuals + 16 * uint32_t(i), Words4{{0, 0, 0, 0}});

  float sums[kMTiles][kNTiles][4];
  MOSO_UNROLL
  for (int m = 0; m < kMTiles; ++m) {
    MOSO_UNROLL
    for (int n = 0; n < kNTiles; ++n) {
      MOSO_UNROLL
      for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
    }
  }
  BiasSums<(ClassTiles + 1) / 2> bias_sums;
  bias_sums.clear();

  int stage = 0;
  for (; !behind_last(walk, now); advance(walk, now)) {
    if (layout.stages == 1) {
      device::sync_block();  // everybody is done with the tile before
      stage_next(0);
      device::copy_wait(0);
      device::sync_block();
    } else {
      device::copy_wait(layout.stages - 2);
      device::sync_block();
      stage_next(stage == 0 ? layout.stages - 1 : stage - 1);  // the stage of the tile before
    }
    const uint32_t tile = uint32_t(stage) * layout.stage_bytes;
    stage = stage + 1 == layout.stages ? 0 : stage + 1;
    const int count = rows_of(walk, now);

    tile_logits<F, M, ClassTiles>(p, tile);
    device::sync_block();
    const bool dirty = softmax_tile<F, M::kTerms>(p, ClassTiles, tile, now.row, count, part == 0);
    if (device::sync_block_or(dirty)) {
      clear_rows(layout, tile);
      device::sync_block();
    }
    if (p.residual && part == 0) store_residuals(p, now.row, count);
    if (!p.partial) continue;
    bias_sums.add_tile(layout, width);
    tile_gradient<F, M, ClassTiles>(p, tile, begin, sums);
    if (!last_of_slab(walk, now)) continue;
    store_partial(p, now.slab, begin, sums);
    bias_sums.store(layout, width, part == 0 ? p.bias_partial + now.slab * width : nullptr);
  }
}

}  // namespace moso_fast::few_classes
