// First pass for few classes: one read of the features gives residuals, every row statistic and
// one partial sum of the mean gradient for each slab of rows.
//
//   Z = H W^T + b     R = softmax(Z) - onehot(y)     partial(slab) = R^T H over the slab's rows
//   H (n, D), W (C, D) with the classes of all heads, C padded to 16 ClassTiles
//
// A block of 8 warps stages tiles of 16, 32 or 64 whole rows in shared memory, up to two tiles
// ahead of the arithmetic, and reads each tile twice there. Bulk copies bring a row at a time from
// sm_90 on; else, or where rows are no multiple of 16 bytes, cp.async brings 16 bytes at a time:
//
//   logits     warp = 16 rows x a slice of D; slices are added up in fixed order
//   softmax    4 lanes a row, or up to 32 (few_classes_softmax.cuh); R goes back as packed
//              fragments; meanwhile the second half of the warps requests the next tile to stage
//   gradient   warp = 16 columns of every 128, all classes; sums stay in registers for a slab
//
//        D ->                    stage (whole rows, 16 bytes between them)
//   rows  +--------+--------+
//         | slice 0| slice 1|   Z: 16 rows x C     G: C x 16 columns a warp
//         +--------+--------+
//
// Bytes from memory: rows x D x item + rows x C x 4 (residuals) + slabs x C x D x 4. FLOPs: 4 rows
// C D a product of terms. With bfloat16 that is 2 C FLOPs a byte: bound by memory below C of about
// 100. The sums a thread keeps must fit its 255 registers: 16 classes at D = 2048, 32 at 1024, 80
// at 512. From 81 to 112 classes two blocks take the same rows at the same time, each for half of
// the classes: the second read of H is one of the L2 cache, the logits are computed twice. One
// block a multiprocessor, because its tiles fill the shared memory; two of the narrow kernel (16
// classes, 512 columns, 16-bit elements), whose tiles of 32 rows leave room and whose threads keep
// to 128 registers.
#pragma once

#include "few_classes_products.cuh"
#include "few_classes_stages.cuh"

namespace moso_fast::few_classes {

// Writes the slab's sums and starts new ones.
template <int MTiles, int NTiles>
MOSO_DEVICE void store_partial(const FirstPass& p, int slab, int begin,
                               float (&sums)[MTiles][NTiles][4]) {
  const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
  const int width = p.heads * p.classes, columns = partial_columns(p.dim);
  float* to = p.partial + int64_t(slab) * width * columns + 2 * (lane % 4);
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

// Sums of the residuals for the mean bias gradient, kept in registers over a slab.
//
// Up to 32 classes lane t of a row's four sums classes t, t + 4, ..; with more, lane t of a warp
// sums classes t, t + 32, .. of the warp's share of the rows.
template <int ClassTiles>
struct BiasSums {
  static constexpr bool kByRow = ClassTiles <= 2;
  static constexpr int kParts = kByRow ? 4 * ClassTiles : (ClassTiles + 1) / 2;
  static constexpr int kStep = kByRow ? 4 : kLanes;
  float part[kParts];

  MOSO_DEVICE void clear() {
    MOSO_UNROLL
    for (float& sum : part) sum = 0.0f;
  }
  MOSO_DEVICE static int first_class() { return device::thread_index() % kStep; }

  // Adds the residuals of a tile that lie where its logits were.
  MOSO_DEVICE void add_tile(const FirstLayout& layout, int width) {
    const int warp = device::thread_index() / kLanes;
    const int rows = kByRow ? 1 : layout.tile_rows / kWarps;
    const int begin = kByRow ? device::thread_index() / 4 : warp * rows;
    MOSO_UNROLL
    for (int i = 0; i < kParts; ++i) {
      const int cls = first_class() + kStep * i;
      if (cls >= width || begin >= layout.tile_rows) continue;
      for (int row = begin; row < begin + rows; ++row)
        part[i] += device::shared_load<float>(layout.logits +
                                              4 * uint32_t(row * layout.logit_stride + cls));
    }
  }
  // Adds up the warps in order. One barrier; the next call must be after another one.
  MOSO_DEVICE void store(const FirstLayout& layout, int width, float* to) {
    const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
    device::sync_warp();
    MOSO_UNROLL
    for (int i = 0; i < kParts; ++i) {
      const int cls = first_class() + kStep * i;
      float sum = part[i];
      if (kByRow) {
        MOSO_UNROLL
        for (int mask = 16; mask >= 4; mask /= 2) sum += device::shuffle_xor(sum, mask);
      }
      if (cls < width && lane < kStep)
        device::shared_store(layout.bias_sums + 4 * uint32_t(warp * width + cls), sum);
    }
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

// Residuals of a tile, which lie where its logits were, to memory.
MOSO_DEVICE void store_residuals(const FirstPass& p, int first, int count) {
  const FirstLayout& layout = p.layout;
  const int width = p.heads * p.classes, elements = count * width;
  const int rows = kThreads / width, classes = kThreads % width;  // from one element to the next
  int row = device::thread_index() / width, cls = device::thread_index() % width;
  for (int i = device::thread_index(); i < elements; i += kThreads) {
    device::global_store(
        p.residual + int64_t(first) * width + i,
        device::shared_load<float>(layout.logits + 4 * uint32_t(row * layout.logit_stride + cls)));
    row += rows;
    cls += classes;
    if (cls < width) continue;
    cls -= width;
    ++row;
  }
}

// Rows with a norm that is not finite become zeros: 0 x inf would reach the mean gradient.
MOSO_DEVICE void clear_rows(const FirstLayout& layout, uint32_t stage) {
  const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
  MOSO_NO_UNROLL
  for (int row = warp; row < layout.tile_rows; row += kWarps) {
    float norm = 0.0f;
    for (int s = 0; s < layout.slices; ++s)
      norm += device::shared_load<float>(layout.norms + 4 * (s * layout.tile_rows + row));
    if (is_finite(norm)) continue;
    MOSO_NO_UNROLL
    for (int chunk = lane; chunk < layout.row_bytes / 16; chunk += kLanes)
      device::shared_store(stage + feature_offset(row, chunk, layout.pitch), Words4{{0, 0, 0, 0}});
  }
}

// Logits and residuals of a staged tile, both where the logits are. Returns whether this thread met
// a row whose features must not enter the mean gradient. `between` runs when the logits are done.
template <Feature F, class M, int ClassTiles, class Places, class Between>
MOSO_DEVICE bool tile_residuals(const FirstPass& p, uint32_t tile, int first, int count,
                                bool by_row, bool writes, const Places& places,
                                const float (&bias)[BiasSums<ClassTiles>::kParts],
                                BiasSums<ClassTiles>& bias_sums, const Between& between) {
  using Bias = BiasSums<ClassTiles>;
  if constexpr (Bias::kByRow) {
    RowInput in{0, 1.0f};
    if (by_row) in = load_row(p, first, count);
    if constexpr (!M::kExact)
      some_logits<F, M>(p, tile, places);
    else
      tile_logits<F, M, ClassTiles>(p, tile);
    device::sync_block();
    between();
    if (by_row && p.smoothing == 0.0f)
      return softmax_rows<F, M::kTerms, Bias::kParts, false>(p, ClassTiles, tile, first, count, in,
                                                             bias, bias_sums.part);
    if (by_row)
      return softmax_rows<F, M::kTerms, Bias::kParts, true>(p, ClassTiles, tile, first, count, in,
                                                            bias, bias_sums.part);
  } else {
    tile_logits<F, M, ClassTiles>(p, tile);
    device::sync_block();
    between();
  }
  return softmax_tile<F, M::kTerms>(p, ClassTiles, tile, first, count, writes);
}

// The kernel: up to 16 ClassTiles classes and Columns columns; p.heads * p.classes and p.dim decide
// how much of that is worked on. Launch with FirstLayout::bytes of shared memory and a multiple of
// parts_of(ClassTiles) blocks.
template <Feature F, bool Exact, int ClassTiles, int Columns = most_columns(ClassTiles)>
MOSO_DEVICE void first_pass(const FirstPass& p) {
  using M = Mode<F, Exact>;
  constexpr int kParts = parts_of(ClassTiles), kMTiles = class_tiles_of(ClassTiles);
  constexpr int kNTiles = Columns / 64;
  const int width = p.heads * p.classes;
  const int part = int(device::block_index() % kParts), begin = part * kMTiles;
  if (part > 0 && !p.partial) return;
  const FirstLayout& layout = p.layout;
  const TileWalk& walk = p.walk;
  TileCursor now = first_tile(walk, int(device::block_index()) / kParts);
  Stages<M::kItem> stages{p, now};
  if (stages.bulk()) prepare_bulk(layout, p.dim * M::kItem);
  for (int stage = 0; stage + 1 < layout.stages; ++stage) stages.request(stage);

  pack_operand<M::kItem, M::kTerms, M::kItem == 2>(layout.weights, p.weight, width, p.dim);
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
  using Bias = BiasSums<ClassTiles>;
  Bias bias_sums;
  bias_sums.clear();
  float bias[Bias::kParts];
  if constexpr (Bias::kByRow) load_bias(p, bias);

  // Kept where there are registers for it; worked out for every tile where there are not.
  constexpr bool kKept = Bias::kByRow && !Exact;
  using Places = LogitPlaces<M, 0, kKept ? 2 * ClassTiles : 1>;
  Places places(p);
  if (kKept && F != Feature::kFloat16) places.keep();
  int turn = 0;  // stage, and stages more while their barriers are in odd phases
  for (; !past_last(walk, now); advance(walk, now)) {
    const int parity = turn >= layout.stages, stage = parity ? turn - layout.stages : turn;
    const int previous = stage == 0 ? layout.stages - 1 : stage - 1;
    stages.begin_tile(stage, previous, parity);
    const uint32_t tile = uint32_t(stage) * layout.stage_bytes;
    turn = turn + 1 == 2 * layout.stages ? 0 : turn + 1;
    const int count = rows_of(walk, now);

    const bool by_row = Bias::kByRow && p.heads == 1;
    const auto request_bulk = [&] {
      if (stages.bulk()) stages.request(previous);
    };
    const bool dirty = tile_residuals<F, M, ClassTiles>(p, tile, now.row, count, by_row, part == 0,
                                                        places, bias, bias_sums, request_bulk);
    if (device::sync_block_or(dirty)) {
      clear_rows(layout, tile);
      if (stages.bulk()) device::fence_bulk();
      device::sync_block();
    }
    if (!by_row && p.residual && part == 0) store_residuals(p, now.row, count);
    if (!p.partial) continue;
    if (!by_row) bias_sums.add_tile(layout, width);
    tile_gradient<F, M, ClassTiles>(p, tile, begin, sums);
    if (!last_of_slab(walk, now)) continue;
    store_partial(p, now.slab, begin, sums);
    bias_sums.store(layout, width,
                    part == 0 ? p.bias_partial + int64_t(now.slab) * width : nullptr);
  }
}

}  // namespace moso_fast::few_classes
