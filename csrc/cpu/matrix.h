// The products, as register tiles. One shape serves all: acc[m][v] += a(m, k) * b(k, v), where
// a is broadcast and b is a vector.
//
//   logits  Z += H W^T  m = row,   k = column of H, v = classes (W packed in panels)
//   grad    G += R^T H  m = class, k = row,         v = columns of H
//
// and for few classes, with lanes along the columns of H so that no lane is wasted:
//
//   dots    z(row, class) = sum over d of h(row, d) w(class, d)

// Rows of a register tile: as many as the registers hold beside two vectors of b.
constexpr int kTileM = VL == 16 ? 14 : VL == 8 ? 6 : 4;
constexpr int kTileV = 2;
constexpr int kPanel = kTileV * VL;

#define MOSO_INLINE inline __attribute__((always_inline))

// a(m, k) = a[m * step_m + k * step_k]; b(k, v) = b[k * step_b + v * VL].
template <int M, int V>
MOSO_INLINE void multiply(const float* a, int64_t step_m, int64_t step_k, const float* b,
                          int64_t step_b, int64_t depth, vf (&acc)[M][V]) {
  for (int64_t k = 0; k < depth; ++k) {
    vf column[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) column[v] = load(b + v * VL);
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m) {
      const vf x = splat(a[m * step_m]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[m][v] += x * column[v];
    }
    a += step_k;
    b += step_b;
  }
}

// c[m * ldc + v * VL] = (init ? init[v * VL] : c) + product, for M rows and V vectors, of which
// only the first `lanes` numbers exist.
template <int M, int V>
inline void multiply_store(const float* a, int64_t step_m, int64_t step_k, const float* b,
                           int64_t step_b, int64_t depth, const float* init, float* c, int64_t ldc,
                           int lanes) {
  vf acc[M][V];
  const bool whole = lanes == V * VL;
#pragma GCC unroll 14
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      if (init)
        acc[m][v] = load(init + v * VL);
      else if (whole)
        acc[m][v] = load(c + m * ldc + v * VL);
      else
        acc[m][v] = load_n(c + m * ldc + v * VL, std::clamp(lanes - v * VL, 0, VL));
    }
  multiply<M, V>(a, step_m, step_k, b, step_b, depth, acc);
#pragma GCC unroll 14
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      if (whole)
        store(c + m * ldc + v * VL, acc[m][v]);
      else
        store_n(c + m * ldc + v * VL, acc[m][v], std::clamp(lanes - v * VL, 0, VL));
    }
}

// One instance for every count of rows, so that a remainder costs no more than its share.
using MultiplyStore = void (*)(const float*, int64_t, int64_t, const float*, int64_t, int64_t,
                               const float*, float*, int64_t, int);
template <int V, int... M>
constexpr std::array<MultiplyStore, sizeof...(M)> multiply_table(std::integer_sequence<int, M...>) {
  return {&multiply_store<M + 1, V>...};
}
constexpr auto kMultiply1 = multiply_table<1>(std::make_integer_sequence<int, kTileM>{});
constexpr auto kMultiply2 = multiply_table<kTileV>(std::make_integer_sequence<int, kTileM>{});

// ---- Tiles of rows, copied and widened once: blocks of kBlockD columns with a fixed row stride,
// so that addresses are constants and no two rows share a cache set.

constexpr int64_t kBlockD = 256;
constexpr int64_t kTileStride = kBlockD + 16;

struct Tile {
  int64_t rows, dim;
  float* data;  // block, row, column
  int64_t blocks() const { return (dim + kBlockD - 1) / kBlockD; }
  int64_t width(int64_t block) const { return std::min(kBlockD, dim - block * kBlockD); }
  float* block(int64_t index) const { return data + index * rows * kTileStride; }
};
inline size_t tile_numbers(int64_t rows, int64_t dim) {
  return size_t((dim + kBlockD - 1) / kBlockD * rows * kTileStride);
}

// Copies one row into the tile; returns its squared norm. Columns behind the end become zeros up
// to a whole panel.
template <class T>
inline float pack_row(const Tile& tile, int64_t row, const T* source) {
  vf squares[2] = {};
  for (int64_t block = 0; block < tile.blocks(); ++block) {
    float* to = tile.block(block) + row * kTileStride;
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
      const int n = int(std::min<int64_t>(VL, width - d));
      const vf x = n == VL ? load(from + d) : load_first(from + d, n);
      store(to + d, x);
      squares[0] += x * x;
    }
    for (; d % kPanel; d += VL) store(to + d, vf{});
  }
  return sum(squares[0] + squares[1]);
}
inline void clear_row(const Tile& tile, int64_t row) {
  for (int64_t block = 0; block < tile.blocks(); ++block)
    std::memset(tile.block(block) + row * kTileStride, 0, size_t(kTileStride) * 4);
}

// ---- A (width x dim) matrix packed for products with tiles: for each block of columns, panels of
// kPanel classes stored column by column (a last panel of at most VL classes is half as wide).

struct Panels {
  int64_t width, dim;
  Buffer data;

  int64_t panels() const { return (width + kPanel - 1) / kPanel; }
  int lanes(int64_t panel) const { return int(std::min<int64_t>(kPanel, width - panel * kPanel)); }
  int vectors(int64_t panel) const { return lanes(panel) > VL ? kTileV : 1; }
  int64_t padded() const { return (panels() - 1) * kPanel + vectors(panels() - 1) * VL; }
  const float* panel(int64_t block, int64_t index) const {
    const int64_t depth = std::min(kBlockD, dim - block * kBlockD);
    return data.get() + block * kBlockD * padded() + index * kPanel * depth;
  }

  void pack(const float* source, int64_t width_, int64_t dim_, Threads threads) {
    width = width_;
    dim = dim_;
    data.reserve(size_t(padded() * dim));
    run_tasks(threads, panels(), [&](int64_t index, int) {
      const int n = lanes(index), stored = vectors(index) * VL;
      for (int64_t start = 0; start < dim; start += kBlockD) {
        float* to = const_cast<float*>(panel(start / kBlockD, index));
        const int64_t depth = std::min(kBlockD, dim - start);
        for (int64_t d = 0; d < depth; ++d, to += stored) {
          for (int c = 0; c < n; ++c) to[c] = source[(index * kPanel + c) * dim + start + d];
          std::fill(to + n, to + stored, 0.0f);
        }
      }
    });
  }
};

// out (rows x width, ldo) = tile * panels^T + bias.
inline void tile_times_panels(const Tile& tile, int64_t rows, const Panels& w, const float* bias,
                              float* out, int64_t ldo) {
  for (int64_t block = 0; block < tile.blocks(); ++block) {
    const float* h = tile.block(block);
    for (int64_t row = 0; row < rows; row += kTileM) {
      const int m = int(std::min<int64_t>(kTileM, rows - row));
      for (int64_t index = 0; index < w.panels(); ++index) {
        const int vectors = w.vectors(index);
        const auto kernel = (vectors == 1 ? kMultiply1 : kMultiply2)[size_t(m - 1)];
        kernel(h + row * kTileStride, kTileStride, 1, w.panel(block, index), vectors * VL,
               tile.width(block), block == 0 ? bias + index * kPanel : nullptr,
               out + row * ldo + index * kPanel, ldo, w.lanes(index));
      }
    }
  }
}

// Even groups of at most kTileM classes: no thin remainder.
inline int64_t class_group(int64_t classes) {
  const int64_t groups = (classes + kTileM - 1) / kTileM;
  return (classes + groups - 1) / groups;
}

// grad (classes x columns, ldg) += residual^T * tile, for `classes` columns of the residual (ldr)
// and the columns [first, first + columns) of the tile. scratch holds rows * kTileM numbers.
inline void add_outer(const Tile& tile, int64_t rows, const float* residual, int64_t ldr,
                      int64_t classes, int64_t first, int64_t columns, float* grad, int64_t ldg,
                      float* scratch) {
  const int64_t group = class_group(classes);
  for (int64_t c = 0; c < classes; c += group) {
    const int m = int(std::min(group, classes - c));
    for (int64_t row = 0; row < rows; ++row)
      std::memcpy(scratch + row * kTileM, residual + row * ldr + c, size_t(m) * 4);
    for (int64_t d = first; d < first + columns; d += kPanel) {
      const int64_t block = d / kBlockD;
      const int lanes = int(std::min<int64_t>(kPanel, first + columns - d));
      const float* h = tile.block(block) + d % kBlockD;
      float* g = grad + c * ldg + (d - first);
      const auto kernel = (lanes <= VL ? kMultiply1 : kMultiply2)[size_t(m - 1)];
      kernel(scratch, 1, kTileM, h, kTileStride, rows, nullptr, g, ldg, lanes);
    }
  }
}
