// Second pass for few classes: alignment of every row with the mean gradient, one read of H.
//
//   a(row, head) = sum over the head's classes c of r_c (<h, G_c> + gb_c)
//   H (n, D), R (n, C) float32, G (C, D) with the classes of all heads, C padded to 8 Tiles
//
// A warp takes 16 rows and all of D. Features go from memory directly to registers, 16 bytes a
// lane, which are the A operand as they lie because the packed G in shared memory has its columns
// in the same order (index.cuh). No barrier after the packing, no shared memory for H:
//
//   H row g    |t0: 16 B|t1|t2|t3| group 1 | ..      2 kBatch loads under way while the ones
//   H row g+8  |t0: 16 B|t1|t2|t3| group 1 | ..      before them are multiplied
//
// Rows are taken from the last to the first, so that what the first pass left in the L2 cache is
// used. Bytes: rows x (D x item + C x 4). FLOPs: 2 rows C D a product of terms.
//
// The score of a row is N a - q with the exact q = |g|^2, so a must hold the row's own gradient
// exactly: what rounding R to one term took from <g, g> inside N a is given back here.
#pragma once

#include "few_classes_softmax.cuh"

namespace moso_fast::few_classes {

template <Feature F, bool Exact, int Tiles>
struct RowTile {
  using M = Mode<F, Exact>;
  static constexpr int kSteps = group_steps(M::kItem);
  // Groups of columns loaded at once; three-term float32 operands leave registers for one less.
  static constexpr int kBatch = F == Feature::kFloat32 && Exact ? 3 : 4;

  const SecondPass& p;
  const int width, groups;
  const bool whole;  // every 16 bytes lie inside a row and can be loaded as they are
  float sums[Tiles][4];

  MOSO_DEVICE explicit RowTile(const SecondPass& pass)
      : p(pass),
        width(pass.heads * pass.classes),
        groups(groups_of(M::kItem, pass.dim)),
        whole(pass.aligned && pass.dim % group_columns(M::kItem) == 0) {
    clear();
  }

  MOSO_DEVICE void clear() {
    MOSO_UNROLL
    for (int n = 0; n < Tiles; ++n) {
      MOSO_UNROLL
      for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
    }
  }

  // Groups [group, group + kBatch) of this lane's two rows; those past the end read anything
  // valid and are not used.
  MOSO_DEVICE void load(int64_t first, int group, Words4 (&v)[kBatch][2]) const {
    const int lane = device::thread_index() % kLanes;
    const auto* base = static_cast<const unsigned char*>(p.features);
    const unsigned char* from[2];
    MOSO_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t wanted = first + lane / 4 + 8 * half;
      from[half] = base + (wanted < p.rows ? wanted : p.rows - 1) * p.row_stride * M::kItem;
    }
    if (whole) {
      MOSO_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        MOSO_UNROLL
        for (int half = 0; half < 2; ++half)
          v[u][half] = device::global_load_once(from[half] + column_of(group + u) * M::kItem);
      }
    } else {
      MOSO_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        MOSO_UNROLL
        for (int half = 0; half < 2; ++half)
          v[u][half] =
              load_features<M::kItem>(from[half], column_of(group + u), p.dim, p.aligned != 0);
      }
    }
  }

  MOSO_DEVICE int column_of(int group) const {
    const int lane = device::thread_index() % kLanes;
    return operand_column(M::kItem, group < groups ? group : groups - 1, lane, 0);
  }

  MOSO_DEVICE void multiply(const Words4 (&v)[kBatch][2], int group) {
    MOSO_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      if (group + u >= groups) continue;
      uint32_t a[kSteps][M::kFeatureTerms][4];
      MOSO_UNROLL
      for (int step = 0; step < kSteps; ++step)
        feature_operand<F, M::kFeatureTerms>(v[u][0], v[u][1], step, a[step]);
      MOSO_UNROLL
      for (int n = 0; n < Tiles; ++n) {
        if (8 * n >= width) continue;
        uint32_t b[kSteps][M::kGradTerms][2];
        load_operand<M::kItem, M::kGradTerms, kSteps>(
            operand_place<M::kItem, M::kGradTerms>(0, width, group + u, n), width, b);
        MOSO_UNROLL
        for (int step = 0; step < kSteps; ++step)
          multiply_terms<M::kExact>(sums[n], a[step], b[step]);
      }
    }
  }

  // sums become r (<h, G> + gb); lost[i] what rounding took from |r|^2, of the rows g and g + 8
  // for one head at a time.
  MOSO_DEVICE void finish(int64_t first) {
    const int lane = device::thread_index() % kLanes;
    const int64_t rows[2] = {first + lane / 4, first + lane / 4 + 8};
    const int64_t mean_rows = p.count ? max_of_one(device::global_load(p.count)) : p.mean_rows;
    const float shrink = mean_rows > 0 ? 1.0f / float(mean_rows) : 0.0f;
    float lost[Tiles][4];
    MOSO_UNROLL
    for (int n = 0; n < Tiles; ++n) {
      MOSO_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int cls = 8 * n + accumulator_column(lane, i);
        const int64_t row = rows[i >> 1];
        const bool inside = cls < width && row < p.rows;
        const float r = inside ? device::global_load(p.residual + row * width + cls) : 0.0f;
        const float bias =
            inside && p.mean_bias_grad ? device::global_load(p.mean_bias_grad + cls) : 0.0f;
        sums[n][i] = r * (sums[n][i] + bias);
        lost[n][i] = M::kTerms == 1 ? r * (r - rounded<M::kTerms>(r)) : 0.0f;
      }
    }
    MOSO_NO_UNROLL
    for (int head = 0; head < p.heads; ++head) {
      const int begin = head * p.classes, end = begin + p.classes;
      float total[2] = {0.0f, 0.0f}, missing[2] = {0.0f, 0.0f};
      MOSO_UNROLL
      for (int n = 0; n < Tiles; ++n) {
        if (8 * n + 8 <= begin || 8 * n >= end) continue;
        MOSO_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int cls = 8 * n + accumulator_column(lane, i);
          if (cls < begin || cls >= end) continue;
          total[i >> 1] += sums[n][i];
          missing[i >> 1] += lost[n][i];
        }
      }
      MOSO_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float sum = combine_lanes(total[half], 4, Add{});
        const float gap = combine_lanes(missing[half], 4, Add{});
        const int64_t row = rows[half];
        if (lane % 4 != 0 || row >= p.rows) continue;
        float a = sum;
        if (M::kTerms == 1 && mean_rows > 0)
          a += gap * device::global_load(p.feature_sqnorm + row) * shrink;
        const bool counted = device::global_load(p.counted + row) != 0;
        device::global_store(p.alignment + head * p.alignment_stride + row, counted ? a : 0.0f);
      }
    }
    clear();
    device::sync_warp();
  }

  MOSO_DEVICE static int64_t max_of_one(int64_t count) { return count > 1 ? count : 1; }
};

// The kernel. Launch with operand_bytes(item, grad terms, classes, dim) of shared memory.
template <Feature F, bool Exact, int Tiles>
MOSO_DEVICE void second_pass(const SecondPass& p) {
  using M = Mode<F, Exact>;
  RowTile<F, Exact, Tiles> tile(p);
  pack_operand<M::kItem, M::kGradTerms>(0, p.mean_grad, tile.width, p.dim);
  device::sync_block();

  const int64_t row_tiles = ceil_div(p.rows, 16), stride = device::block_count() * kWarps;
  int64_t index = device::block_index() * kWarps + device::thread_index() / kLanes;
  if (index >= row_tiles) return;
  const auto first_row = [&](int64_t i) { return 16 * (row_tiles - 1 - i); };

  constexpr int kBatch = RowTile<F, Exact, Tiles>::kBatch;
  Words4 now[kBatch][2], next[kBatch][2];
  int group = 0;
  tile.load(first_row(index), 0, next);
  while (index < row_tiles) {
    MOSO_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      now[u][0] = next[u][0];
      now[u][1] = next[u][1];
    }
    const bool last = group + kBatch >= tile.groups;
    const int64_t next_index = last ? index + stride : index;
    const int next_group = last ? 0 : group + kBatch;
    if (next_index < row_tiles) tile.load(first_row(next_index), next_group, next);
    tile.multiply(now, group);
    if (last) tile.finish(first_row(index));
    index = next_index;
    group = next_group;
  }
}

}  // namespace moso_fast::few_classes
