// Operands of the products of many classes, copied and rounded once: tiles of rows, panels of
// classes, groups of residuals.
#pragma once

#include <type_traits>

#include "buffers-inl.h"
#include "matrix-inl.h"
#include "scalar-inl.h"
#include "tasks-inl.h"
#include "vectors-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

// ---- Tiles of rows: blocks of kBlockD columns with a fixed row stride,
// so that addresses are constants and no two rows share a cache set.

constexpr int64_t kBlockD = 256;
constexpr int64_t kRowsMax = 18 * 14;  // a multiple of kTileM for every vector length

// Squared norms of a row: as given, and as the tile's elements have it.
struct Norms {
  float exact, packed;
};

template <class Op>
struct Tile {
  // In words. Rows for H W^T and H G^T; for R^T H, whose sum runs along the rows, words of two
  // rows lie in a part of their own.
  static constexpr int64_t kStride = kBlockD / Op::kElements + 16;
  static constexpr int64_t kOuterStride = kBlockD + 16;
  static constexpr bool kOuterPart = Op::kElements > 1;

  int64_t rows, dim;
  float* data;

  static int64_t block_words(int64_t rows) {
    return rows * kStride +
           (kOuterPart ? round_up(words_of<Op>(rows), Op::kStep) * kOuterStride : 0);
  }
  static size_t words(int64_t rows, int64_t dim) {
    return size_t((dim + kBlockD - 1) / kBlockD * block_words(rows));
  }
  int64_t blocks() const { return (dim + kBlockD - 1) / kBlockD; }
  int64_t width(int64_t block) const { return min(kBlockD, dim - block * kBlockD); }
  float* row(int64_t block, int64_t index) const {
    return data + block * block_words(rows) + index * kStride;
  }
  float* outer(int64_t block) const { return row(block, kOuterPart ? rows : 0); }
  void clear_row(int64_t index) const {
    for (int64_t block = 0; block < blocks(); ++block) clear(row(block, index), kStride);
  }
};

// Copies one row into the tile. Columns past the end become zeros up to a whole panel.
template <class T>
inline Norms pack_row(const Tile<Single>& tile, int64_t row, const T* source) {
  vf squares[2] = {};
  for (int64_t block = 0; block < tile.blocks(); ++block) {
    float* to = tile.row(block, row);
    const int64_t width = tile.width(block);
    const T* from = source + block * kBlockD;
    int64_t d = 0;
    for (; d + 2 * VL <= width; d += 2 * VL) {
      const vf x = load(from + d), y = load(from + d + VL);
      store(to + d, x);
      store(to + d + VL, y);
      squares[0] += x * x;
      squares[1] += y * y;
    }
    for (; d < width; d += VL) {
      const int n = int(min<int64_t>(VL, width - d));
      const vf x = n == VL ? load(from + d) : load_first(from + d, n);
      store(to + d, x);
      squares[0] += x * x;
    }
    for (; d % kPanel; d += VL) store(to + d, vf{});
  }
  const float norm = sum(squares[0] + squares[1]);
  return {norm, norm};
}
inline void prepare_outer(const Tile<Single>&, int64_t) {}

#ifdef MOSO_FAST_BF16_UNITS
// The words of two vectors of float32, x first, rounded to nearest even.
inline vf to_pairs(vf x, vf y) {
  return reinterpret_cast<vf>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(y), reinterpret_cast<__m512>(x)));
}
inline vf to_pairs(const float* p) { return to_pairs(load(p), load(p + VL)); }
inline vf to_pairs(const fp16* p) { return to_pairs(load(p), load(p + VL)); }
inline vf to_pairs(const bf16* p) { return load(reinterpret_cast<const float*>(p)); }

// x as bfloat16 holds it.
inline vf round_to_bf16(vf x) {
  const __m256bh narrow = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
  return load(reinterpret_cast<const bf16*>(&narrow));
}

// How far ahead in a row, and then in the next, memory is prefetched: with few classes the copy of
// 16-bit elements would else wait for it.
constexpr int64_t kPackPrefetchBytes = 4096;

template <class T>
inline Norms pack_row(const Tile<Pair>& tile, int64_t row, const T* source) {
  constexpr bool kExact = std::is_same<T, bf16>::value;
  vf exact{}, packed{};
  for (int64_t block = 0; block < tile.blocks(); ++block) {
    float* to = tile.row(block, row);
    const int64_t width = tile.width(block);
    const T* from = source + block * kBlockD;
    for (int64_t d = 0; d < width; d += kPanel) {
      T tail[kPanel] = {};
      const T* at = from + d;
      __builtin_prefetch(at + kPackPrefetchBytes / sizeof(T), 0, 2);
      if (width - d < kPanel)
        at = static_cast<const T*>(std::memcpy(tail, at, size_t(width - d) * sizeof(T)));
      const vf words = to_pairs(at);
      store(to + d / 2, words);
      packed = Pair::multiply_add(words, words, packed);
      if (kExact) continue;
      const vf x = load(at), y = load(at + VL);
      exact += x * x + y * y;
    }
  }
  const float norm = sum(packed);
  return {kExact ? norm : sum(exact), norm};
}

// Words of two neighbouring rows each, from the rows [0, count), and zeros up to a whole step.
inline void prepare_outer(const Tile<Pair>& tile, int64_t count) {
  alignas(64) uint16_t low[2 * VL], high[2 * VL];
  for (int i = 0; i < VL; ++i) {
    low[2 * i] = uint16_t(i);
    low[2 * i + 1] = uint16_t(2 * VL + i);
    high[2 * i] = uint16_t(VL + i);
    high[2 * i + 1] = uint16_t(3 * VL + i);
  }
  const __m512i to_low = _mm512_load_si512(low), to_high = _mm512_load_si512(high);
  for (int64_t block = 0; block < tile.blocks(); ++block)
    for (int64_t i = 0; i < count; i += 2) {
      const float* above = tile.row(block, i);
      float* to = tile.outer(block) + i / 2 * Tile<Pair>::kOuterStride;
      for (int64_t d = 0; d < tile.width(block); d += kPanel) {
        const __m512i x = _mm512_loadu_si512(above + d / 2);
        const __m512i y = i + 1 < count ? _mm512_loadu_si512(above + Tile<Pair>::kStride + d / 2)
                                        : _mm512_setzero_si512();
        _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(x, to_low, y));
        _mm512_storeu_si512(to + d + VL, _mm512_permutex2var_epi16(x, to_high, y));
      }
    }
  const int64_t words = words_of<Pair>(count), end = round_up(words, Pair::kStep);
  for (int64_t block = 0; block < tile.blocks(); ++block)
    clear(tile.outer(block) + words * Tile<Pair>::kOuterStride,
          (end - words) * Tile<Pair>::kOuterStride);
}
#endif

// ---- A (width x dim) matrix packed for products with tiles: for each block of columns, panels of
// kPanel classes stored word by word (a last panel of at most VL classes is half as wide). A few
// float32 classes past the last full panel would leave most of its lanes unused: they stay as rows,
// with lanes along the columns (dot_tail).

template <class Op>
constexpr int kTailClasses = VL == 16 && Op::kElements == 1 ? 8 : 0;

// VL words of neighbouring elements.
inline vf load_words(const Single&, const float* elements) { return load(elements); }
#ifdef MOSO_FAST_BF16_UNITS
inline vf load_words(const Pair&, const float* elements) { return to_pairs(elements); }
#endif

template <class Op>
struct Panels {
  int64_t width, dim;
  Buffer data, tail_rows;

  int tail() const { return width % kPanel <= kTailClasses<Op> ? int(width % kPanel) : 0; }
  int64_t row_stride() const { return round_up(dim, VL); }  // of the tail
  int64_t panels() const { return (width - tail() + kPanel - 1) / kPanel; }
  int lanes(int64_t panel) const { return int(min<int64_t>(kPanel, width - panel * kPanel)); }
  int vectors(int64_t panel) const { return lanes(panel) > VL ? kTileV : 1; }
  int64_t padded() const {
    const int64_t last = panels() - 1;
    return last < 0 ? 0 : last * kPanel + vectors(last) * VL;
  }
  int64_t depth(int64_t block) const {
    return round_up(words_of<Op>(min(kBlockD, dim - block * kBlockD)), Op::kStep);
  }
  const float* panel(int64_t block, int64_t index) const {
    return data.get() + block * (kBlockD / Op::kElements) * padded() +
           index * kPanel * depth(block);
  }

  void pack(const float* source, int64_t width_, int64_t dim_, Threads threads) {
    width = width_;
    dim = dim_;
    data.reserve(size_t(padded() * round_up(words_of<Op>(dim), Op::kStep)));
    tail_rows.reserve(size_t(tail() * row_stride()));
    clear(tail_rows.get(), tail() * row_stride());
    for (int64_t c = 0; c < tail(); ++c)
      std::memcpy(tail_rows.get() + c * row_stride(), source + (width - tail() + c) * dim,
                  size_t(dim) * 4);
    run_tasks(threads, panels(), [&](int64_t index, int) {
      const int stored = vectors(index) * VL;
      for (int64_t d = 0; d < dim; d += kBlockD) {
        float* to = const_cast<float*>(panel(d / kBlockD, index));
        const int64_t words = depth(d / kBlockD);
        for (int64_t k = 0; k < words; k += VL)
          for (int c = 0; c < stored; c += VL) {
            vf square[VL];
            for (int i = 0; i < VL; ++i)
              square[i] = words_at(source, index * kPanel + c + i, d + k * Op::kElements);
            transpose(square);
            for (int i = 0; i < min<int64_t>(VL, words - k); ++i)
              store(to + (k + i) * stored + c, square[i]);
          }
      }
    });
  }

 private:
  // Words of a class from a column on; zeros past the last column and the last class.
  vf words_at(const float* source, int64_t c, int64_t column) const {
    constexpr int64_t kCount = VL * Op::kElements;
    const int64_t left = dim - column;
    if (c >= width || left <= 0) return vf{};
    const float* elements = source + c * dim + column;
    if (left >= kCount) return load_words(Op{}, elements);
    float tail[kCount] = {};
    std::memcpy(tail, elements, size_t(left) * 4);
    return load_words(Op{}, tail);
  }
};

// Panels that stay within the second-level cache while all rows of a tile go past them: heads of
// many classes would else be read from memory for every kTileM rows.
constexpr int64_t kPanelGroup = (int64_t{1} << 18) / (kPanel * kBlockD * 4);

// Words of `classes` <= kTileM columns of the residual (rows, ldr), kTileM words a step of the sum.
inline void pack_residual(const Single&, const float* residual, int64_t ldr, int64_t rows,
                          int classes, float* to) {
  for (int64_t row = 0; row < rows; ++row, to += kTileM)
    std::memcpy(to, residual + row * ldr, size_t(classes) * 4);
}
#ifdef MOSO_FAST_BF16_UNITS
// Words of `classes` <= VL columns of residual rows `row` and the next, as far as there are rows.
inline vf residual_words(const float* residual, int64_t ldr, int64_t row, int64_t rows,
                         int classes) {
  const float* r = residual + row * ldr;
  const vf none{};
  const vi x = reinterpret_cast<vi>(row < rows ? round_to_bf16(load_n(r, classes)) : none);
  const vi y =
      reinterpret_cast<vi>(row + 1 < rows ? round_to_bf16(load_n(r + ldr, classes)) : none);
  return reinterpret_cast<vf>(y | ((x >> 16) & 0xffff));
}
inline void pack_residual(const Pair&, const float* residual, int64_t ldr, int64_t rows,
                          int classes, float* to) {
  for (int64_t row = 0; row < rows; row += 2, to += kTileM)
    store_n(to, residual_words(residual, ldr, row, rows, classes), classes);
}
#endif

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
