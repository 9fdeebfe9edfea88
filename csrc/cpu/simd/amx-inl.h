// Products of pairs of bfloat16 on AMX: a register holds 16 rows of 16 words, and one instruction
// multiplies 16 x 32 elements by 32 x 16 into float32 sums, sixteen times what a float32
// multiply-add does in that time. Packing, softmax and memory take the larger part then.
//
// Subnormal operands and sums count as zero.
#pragma once

#include "packing-inl.h"
#include "prefetch-inl.h"
#include "vectors-inl.h"

#ifdef __AMX_BF16__

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

constexpr int kUnit = 16;             // rows and words of a register
constexpr int kUnitRows = 2 * kUnit;  // of a and of b, at a time: every register read is used twice
constexpr int kUnitPrefetches = 4;    // lines a step: what memory delivers in that time
static_assert(VL == kUnit && Pair::kStep == kUnit && kPanel == kUnitRows);

// All eight registers in their full size, for as long as it lives. An operating system saves them
// with a thread once they are in use: they are let go of after each product.
class UnitsInUse {
 public:
  UnitsInUse() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof config == 64);
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 4 * kUnit;
      config.rows[i] = kUnit;
    }
    _tile_loadconfig(&config);
  }
  ~UnitsInUse() { _tile_release(); }
  UnitsInUse(const UnitsInUse&) = delete;
  UnitsInUse& operator=(const UnitsInUse&) = delete;
};

// sums (16 M x 16 N, kUnitRows apart) = a b, for a of 16 M rows of `depth` words and b of `depth`
// words for each of 16 N columns; depth is a multiple of kStep.
template <int M, int N>
inline void multiply_units(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                           float* sums, Prefetch* prefetch) {
  Prefetch lines = *prefetch;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; k += kUnit) {
#pragma GCC unroll 4
    for (int i = 0; i < kUnitPrefetches; ++i) lines.take_step();
    _tile_loadd(4, a + k, size_t(lda) * 4);
    _tile_loadd(6, b + k * ldb, size_t(ldb) * 4);
    _tile_dpbf16ps(0, 4, 6);
    if (N > 1) {
      _tile_loadd(7, b + k * ldb + kUnit, size_t(ldb) * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (M > 1) {
      _tile_loadd(5, a + kUnit * lda + k, size_t(lda) * 4);
      _tile_dpbf16ps(2, 5, 6);
      if (N > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kUnitRows * 4);
  if (N > 1) _tile_stored(1, sums + kUnit, kUnitRows * 4);
  if (M > 1) _tile_stored(2, sums + kUnit * kUnitRows, kUnitRows * 4);
  if (M > 1 && N > 1) _tile_stored(3, sums + kUnit * kUnitRows + kUnit, kUnitRows * 4);
  *prefetch = lines;
}

struct MatrixUnitProducts {
  static int64_t steps(int64_t rows, const Panels<Pair>& w) {
    return round_up(rows, kUnitRows) / kUnitRows * w.panels() * prefetches(words_of<Pair>(w.dim));
  }
  static int64_t outer_steps(int64_t rows, int64_t classes, int64_t columns) {
    return round_up(classes, kUnitRows) / kUnitRows * (round_up(columns, kUnitRows) / kUnitRows) *
           prefetches(words_of<Pair>(rows));
  }
  static size_t outer_words(int64_t rows) { return size_t(kUnitRows * packed_stride(rows)); }

  static void times_panels(const Tile<Pair>& tile, int64_t rows, const Panels<Pair>& w,
                           int64_t block, const float* bias, float* out, int64_t ldo,
                           Prefetch* prefetch) {
    const UnitsInUse units;
    const float* init = block == 0 ? bias : nullptr;
    for (int64_t first = 0; first < w.panels(); first += kPanelGroup)
      for (int64_t row = 0; row < rows; row += kUnitRows) {
        const int m = int(min<int64_t>(kUnitRows, rows - row));
        const int64_t end = min(first + kPanelGroup, w.panels());
        for (int64_t index = first; index < end; ++index) {
          const int64_t c = index * kPanel;
          add_product(tile.row(0, row), Tile<Pair>::kStride, w.panel(block, index),
                      w.vectors(index) * VL, w.depth(block), m, w.lanes(index),
                      init ? init + c : nullptr, out + row * ldo + c, ldo, prefetch);
        }
      }
  }

  static void add_outer(const Tile<Pair>& tile, int64_t rows, const float* residual, int64_t ldr,
                        int64_t classes, int64_t columns, float* grad, int64_t ldg, float* scratch,
                        Prefetch* prefetch) {
    const UnitsInUse units;
    const int64_t stride = packed_stride(rows);
    for (int64_t c = 0; c < classes; c += kUnitRows) {
      const int m = int(min<int64_t>(kUnitRows, classes - c));
      pack_transposed(residual + c, ldr, rows, m, scratch, stride);
      for (int64_t d = 0; d < columns; d += kPanel)
        add_product(scratch, stride, tile.outer(d / kBlockD) + d % kBlockD,
                    Tile<Pair>::kOuterStride, round_up(words_of<Pair>(rows), kUnit), m,
                    int(min<int64_t>(kPanel, columns - d)), nullptr, grad + c * ldg + d, ldg,
                    prefetch);
    }
  }

 private:
  static int64_t prefetches(int64_t words) {
    return round_up(words, kUnit) / kUnit * kUnitPrefetches;
  }

  // Words from one class to the next: no two share a cache set.
  static int64_t packed_stride(int64_t rows) {
    return round_up(words_of<Pair>(rows), kUnit) + kUnit;
  }

  // Words of `classes` <= kUnitRows columns of the residual, those of a class one after another.
  static void pack_transposed(const float* residual, int64_t ldr, int64_t rows, int classes,
                              float* to, int64_t stride) {
    for (int c = 0; c < classes; c += kUnit)
      for (int64_t row = 0; row < rows; row += 2 * kUnit) {
        vf words[VL];
        for (int i = 0; i < kUnit; ++i)
          words[i] = residual_words(residual + c, ldr, row + 2 * i, rows, min(classes - c, kUnit));
        transpose(words);
        for (int i = 0; i < kUnit; ++i) store(to + (c + i) * stride + row / 2, words[i]);
      }
  }

  // c (rows x lanes, ldc) = (init or c) + a b.
  static void add_product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                          int rows, int lanes, const float* init, float* c, int64_t ldc,
                          Prefetch* prefetch) {
    alignas(64) float sums[kUnitRows * kUnitRows];
    const bool tall = rows > kUnit, wide = lanes > kUnit;
    (tall   ? wide ? multiply_units<2, 2> : multiply_units<2, 1>
     : wide ? multiply_units<1, 2>
            : multiply_units<1, 1>)(a, lda, b, ldb, depth, sums, prefetch);
    for (int i = 0; i < rows; ++i)
      for_lanes(lanes, [&](int64_t j, int n) {
        float* to = c + i * ldc + j;
        store_n(to, (init ? load(init + j) : load_n(to, n)) + load(sums + i * kUnitRows + j), n);
      });
  }
};

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast

#endif
