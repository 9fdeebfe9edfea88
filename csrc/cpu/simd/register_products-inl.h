// The products of many classes: packed operands past the register tiles, in an order that keeps
// them in the caches. amx-inl.h has the same for pairs of bfloat16 on matrix units.
#pragma once

#include <utility>

#include "few_classes_kernels-inl.h"
#include "matrix-inl.h"
#include "packing-inl.h"
#include "prefetch-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

// Groups of classes whose packed residuals stay in the second-level cache, while a panel of columns
// stays in the first for all of them; panels of 32 columns leave no room there beside a group
// of 14.
constexpr int kOuterGroups = VL == 16 ? 1 : 36;

// The classes past the last full panel: out (rows x C, ldo) = (bias or out) + <row, w>, for a tile
// of one block of columns.
template <int C>
inline void dot_tail(const Tile<Single>& tile, int64_t rows, const float* w, int64_t ldw,
                     const float* bias, float* out, int64_t ldo) {
  constexpr int R = dot_rows(C);
  for (int64_t row = 0; row < rows; row += R) {
    const float* from[R];
    for (int r = 0; r < R; ++r) from[r] = tile.row(0, min(row + r, rows - 1));
    vf acc[R][C], norm[R];
    dots<R, C, false>(from, w, ldw, round_up(tile.width(0), VL), acc, norm);
    float lanes[(R * C + VL - 1) / VL * VL];
    sum_lanes<false>(acc, norm, lanes);
    for (int r = 0; r < R && row + r < rows; ++r)
      for (int c = 0; c < C; ++c) {
        float* to = out + (row + r) * ldo + c;
        *to = (bias ? bias[c] : *to) + lanes[c * R + r];
      }
  }
}

template <class Op>
struct RegisterProducts {
  // Steps that times_panels and add_outer take of a Prefetch.
  static int64_t steps(int64_t rows, const Panels<Op>& w) {
    return max<int64_t>(1, (rows + kTileM - 1) / kTileM * w.panels() * words_of<Op>(w.dim));
  }
  static int64_t outer_steps(int64_t rows, int64_t classes, int64_t columns) {
    return (classes + kTileM - 1) / kTileM * ((columns + kPanel - 1) / kPanel) * words_of<Op>(rows);
  }

  // Words of scratch for add_outer.
  static size_t outer_words(int64_t rows) { return size_t(rows * kOuterGroups * kTileM); }

  // out (rows x width, ldo) = (bias for the first block, else out) + tile * panels^T, for a tile of
  // one block of columns.
  static void times_panels(const Tile<Op>& tile, int64_t rows, const Panels<Op>& w, int64_t block,
                           const float* bias, float* out, int64_t ldo, Prefetch* prefetch) {
    const float* init = block == 0 ? bias : nullptr;
    times_tail(tile, rows, w, block, init, out, ldo);
    for (int64_t first = 0; first < w.panels(); first += kPanelGroup)
      for (int64_t row = 0; row < rows; row += kTileM) {
        const int m = int(min<int64_t>(kTileM, rows - row));
        const int64_t end = min(first + kPanelGroup, w.panels());
        for (int64_t index = first; index < end; ++index) {
          const int vectors = w.vectors(index);
          const int64_t c = index * kPanel;
          Multiply<Op, int(Tile<Op>::kStride), 1>::kernel(vectors, m)(
              tile.row(0, row), w.panel(block, index), vectors * VL, w.depth(block),
              init ? init + c : nullptr, out + row * ldo + c, ldo, w.lanes(index), prefetch);
        }
      }
  }

  // grad (classes x columns, ldg) += residual^T * tile, for `classes` columns of the residual (ldr)
  // and the first columns of the tile, after prepare_outer.
  static void add_outer(const Tile<Op>& tile, int64_t rows, const float* residual, int64_t ldr,
                        int64_t classes, int64_t columns, float* grad, int64_t ldg, float* scratch,
                        Prefetch* prefetch) {
    constexpr int64_t kStride = Tile<Op>::kOuterPart ? Tile<Op>::kOuterStride : Tile<Op>::kStride;
    const int64_t group = class_group(classes), depth = words_of<Op>(rows);
    const int64_t packed = depth * kTileM;
    for (int64_t start = 0; start < classes; start += kOuterGroups * group) {
      const int64_t end = min(classes, start + kOuterGroups * group);
      for (int64_t c = start; c < end; c += group)
        pack_residual(Op{}, residual + c, ldr, rows, int(min(group, end - c)),
                      scratch + (c - start) / group * packed);
      for (int64_t d = 0; d < columns; d += kPanel) {
        const int lanes = int(min<int64_t>(kPanel, columns - d));
        for (int64_t c = start; c < end; c += group)
          Multiply<Op, 1, kTileM>::kernel(lanes <= VL ? 1 : kTileV, int(min(group, end - c)))(
              scratch + (c - start) / group * packed, tile.outer(d / kBlockD) + d % kBlockD,
              kStride, depth, nullptr, grad + c * ldg + d, ldg, lanes, prefetch);
      }
    }
  }

 private:
  static void times_tail(const Tile<Op>& tile, int64_t rows, const Panels<Op>& w, int64_t block,
                         const float* init, float* out, int64_t ldo) {
    if constexpr (kTailClasses<Op> > 0) {
      if (w.tail() == 0) return;
      const int64_t c = w.width - w.tail();
      tail_table(std::make_integer_sequence<int, kTailClasses<Op>>{})[size_t(w.tail() - 1)](
          tile, rows, w.tail_rows.get() + block * kBlockD, w.row_stride(),
          init ? init + c : nullptr, out + c, ldo);
    }
  }
  using Tail = void (*)(const Tile<Single>&, int64_t, const float*, int64_t, const float*, float*,
                        int64_t);
  template <int... C>
  static constexpr Table<Tail, sizeof...(C)> tail_table(std::integer_sequence<int, C...>) {
    return {&dot_tail<C + 1>...};
  }
};

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
