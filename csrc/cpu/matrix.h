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

// What one 4-byte word of an operand holds, and how words multiply into float32 sums. Operands are
// passed as float* whatever their words hold; k counts words.
struct Single {  // one float32
  static constexpr int kNumbers = 1;
  static vf multiply_add(vf a, vf b, vf acc) { return acc + a * b; }
};
#ifdef MOSO_FAST_BF16_UNITS
struct Pair {  // two bfloat16, neighbours along the sum: twice the products an instruction
  static constexpr int kNumbers = 2;
  static MOSO_INLINE vf multiply_add(vf a, vf b, vf acc) {
    return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc),
                                                 reinterpret_cast<__m512bh>(a),
                                                 reinterpret_cast<__m512bh>(b)));
  }
};
#endif

// a(m, k) = a[m * step_m + k * step_k]; b(k, v) = b[k * step_b + v * VL].
template <class Op, int M, int V>
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
      for (int v = 0; v < V; ++v) acc[m][v] = Op::multiply_add(x, column[v], acc[m][v]);
    }
    a += step_k;
    b += step_b;
  }
}

// c[m * ldc + v * VL] = (init ? init[v * VL] : c) + product, for M rows and V vectors, of which
// only the first `lanes` numbers exist.
template <class Op, int M, int V>
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
  multiply<Op, M, V>(a, step_m, step_k, b, step_b, depth, acc);
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
template <class Op, int V, int... M>
constexpr std::array<MultiplyStore, sizeof...(M)> multiply_table(std::integer_sequence<int, M...>) {
  return {&multiply_store<Op, M + 1, V>...};
}
template <class Op>
struct Multiply {
  using Rows = std::make_integer_sequence<int, kTileM>;
  static constexpr auto kNarrow = multiply_table<Op, 1>(Rows{});
  static constexpr auto kWide = multiply_table<Op, kTileV>(Rows{});
  static MultiplyStore kernel(int vectors, int rows) {
    return (vectors == 1 ? kNarrow : kWide)[size_t(rows - 1)];
  }
};

// ---- Tiles of rows, copied and converted once: blocks of kBlockD columns with a fixed row stride,
// so that addresses are constants and no two rows share a cache set.

constexpr int64_t kBlockD = 256;

// Squared norms of a row: as given, and as the tile's numbers have it.
struct Norms {
  float exact, packed;
};

template <class Op>
struct Tile {
  // In words. Rows for H W^T and H G^T; for R^T H, whose sum runs along the rows, words of two
  // rows lie in a part of their own.
  static constexpr int64_t kStride = kBlockD / Op::kNumbers + 16;
  static constexpr int64_t kOuterStride = kBlockD + 16;
  static constexpr bool kOuterPart = Op::kNumbers > 1;

  int64_t rows, dim;
  float* data;

  static int64_t block_words(int64_t rows) {
    return rows * kStride + (kOuterPart ? (rows + 1) / 2 * kOuterStride : 0);
  }
  static size_t words(int64_t rows, int64_t dim) {
    return size_t((dim + kBlockD - 1) / kBlockD * block_words(rows));
  }
  int64_t blocks() const { return (dim + kBlockD - 1) / kBlockD; }
  int64_t width(int64_t block) const { return std::min(kBlockD, dim - block * kBlockD); }
  int64_t depth(int64_t block) const { return (width(block) + Op::kNumbers - 1) / Op::kNumbers; }
  float* row(int64_t block, int64_t index) const {
    return data + block * block_words(rows) + index * kStride;
  }
  float* outer(int64_t block) const { return row(block, kOuterPart ? rows : 0); }
  void clear_row(int64_t index) const {
    for (int64_t block = 0; block < blocks(); ++block) clear(row(block, index), kStride);
  }
};

// Copies one row into the tile. Columns behind the end become zeros up to a whole panel.
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
      const int n = int(std::min<int64_t>(VL, width - d));
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

template <class T>
inline Norms pack_row(const Tile<Pair>& tile, int64_t row, const T* source) {
  constexpr bool kExact = std::is_same<T, bf16>::value;
  vf exact{}, packed{};
  for (int64_t block = 0; block < tile.blocks(); ++block) {
    float* to = tile.row(block, row);
    const int64_t width = tile.width(block);
    const T* from = source + block * kBlockD;
    for (int64_t d = 0; d < width; d += kPanel) {
      T rest[kPanel] = {};
      const T* at = from + d;
      if (width - d < kPanel)
        at = static_cast<const T*>(std::memcpy(rest, at, size_t(width - d) * sizeof(T)));
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

// Words of two neighbouring rows each, from the rows [0, count).
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
}
#endif

// ---- A (width x dim) matrix packed for products with tiles: for each block of columns, panels of
// kPanel classes stored word by word (a last panel of at most VL classes is half as wide).

inline float word_of(const Single&, const float* numbers, int64_t) { return numbers[0]; }
#ifdef MOSO_FAST_BF16_UNITS
inline float word_of(const Pair&, const float* numbers, int64_t left) {
  const vf x = splat(numbers[0]), y = splat(left > 1 ? numbers[1] : 0.0f);
  const vi bits = reinterpret_cast<vi>(round_to_bf16(y)) |
                  ((reinterpret_cast<vi>(round_to_bf16(x)) >> 16) & 0xffff);
  return reinterpret_cast<vf>(bits)[0];
}
#endif

template <class Op>
struct Panels {
  int64_t width, dim;
  Buffer data;

  int64_t panels() const { return (width + kPanel - 1) / kPanel; }
  int lanes(int64_t panel) const { return int(std::min<int64_t>(kPanel, width - panel * kPanel)); }
  int vectors(int64_t panel) const { return lanes(panel) > VL ? kTileV : 1; }
  int64_t padded() const { return (panels() - 1) * kPanel + vectors(panels() - 1) * VL; }
  int64_t depth(int64_t block) const {
    return (std::min(kBlockD, dim - block * kBlockD) + Op::kNumbers - 1) / Op::kNumbers;
  }
  const float* panel(int64_t block, int64_t index) const {
    return data.get() + block * (kBlockD / Op::kNumbers) * padded() + index * kPanel * depth(block);
  }

  void pack(const float* source, int64_t width_, int64_t dim_, Threads threads) {
    width = width_;
    dim = dim_;
    data.reserve(size_t(padded() * ((dim + Op::kNumbers - 1) / Op::kNumbers)));
    run_tasks(threads, panels(), [&](int64_t index, int) {
      const int n = lanes(index), stored = vectors(index) * VL;
      for (int64_t d = 0; d < dim; d += kBlockD) {
        float* to = const_cast<float*>(panel(d / kBlockD, index));
        for (int64_t k = 0; k < depth(d / kBlockD); ++k, to += stored) {
          const int64_t column = d + k * Op::kNumbers;
          for (int c = 0; c < n; ++c)
            to[c] = word_of(Op{}, source + (index * kPanel + c) * dim + column, dim - column);
          std::fill(to + n, to + stored, 0.0f);
        }
      }
    });
  }
};

// Panels that stay within the second-level cache while all rows of a tile go past them: heads of
// many classes would else be read from memory for every kTileM rows.
constexpr int64_t kPanelGroup = (int64_t{1} << 18) / (kPanel * kBlockD * 4);

// out (rows x width, ldo) = tile * panels^T + bias.
template <class Op>
inline void tile_times_panels(const Tile<Op>& tile, int64_t rows, const Panels<Op>& w,
                              const float* bias, float* out, int64_t ldo) {
  for (int64_t block = 0; block < tile.blocks(); ++block)
    for (int64_t first = 0; first < w.panels(); first += kPanelGroup)
      for (int64_t row = 0; row < rows; row += kTileM) {
        const int m = int(std::min<int64_t>(kTileM, rows - row));
        const int64_t end = std::min(first + kPanelGroup, w.panels());
        for (int64_t index = first; index < end; ++index) {
          const int vectors = w.vectors(index);
          Multiply<Op>::kernel(vectors, m)(tile.row(block, row), Tile<Op>::kStride, 1,
                                           w.panel(block, index), vectors * VL, tile.depth(block),
                                           block == 0 ? bias + index * kPanel : nullptr,
                                           out + row * ldo + index * kPanel, ldo, w.lanes(index));
        }
      }
}

// Even groups of at most kTileM classes: no thin remainder.
inline int64_t class_group(int64_t classes) {
  const int64_t groups = (classes + kTileM - 1) / kTileM;
  return (classes + groups - 1) / groups;
}

// Words of `classes` <= kTileM columns of the residual (rows, ldr), kTileM words a step of the sum.
inline void pack_residual(const Single&, const float* residual, int64_t ldr, int64_t rows,
                          int classes, float* to) {
  for (int64_t row = 0; row < rows; ++row, to += kTileM)
    std::memcpy(to, residual + row * ldr, size_t(classes) * 4);
}
#ifdef MOSO_FAST_BF16_UNITS
inline void pack_residual(const Pair&, const float* residual, int64_t ldr, int64_t rows,
                          int classes, float* to) {
  for (int64_t row = 0; row < rows; row += 2, to += kTileM) {
    const float* r = residual + row * ldr;
    const vi x = reinterpret_cast<vi>(round_to_bf16(load_n(r, classes)));
    const vi y =
        row + 1 < rows ? reinterpret_cast<vi>(round_to_bf16(load_n(r + ldr, classes))) : vi{};
    store_n(to, reinterpret_cast<vf>(y | ((x >> 16) & 0xffff)), classes);
  }
}
#endif

// grad (classes x columns, ldg) += residual^T * tile, for `classes` columns of the residual (ldr)
// and the columns [first, first + columns) of the tile, after prepare_outer. A panel of columns
// stays in the first-level cache for a block of kOuterGroups groups of classes, whose packed
// residuals stay in the second; panels of 32 columns leave no room there beside a group of 14.
// scratch holds outer_words(rows) words.
constexpr int kOuterGroups = VL == 16 ? 1 : 36;
inline size_t outer_words(int64_t rows) { return size_t(rows * kOuterGroups * kTileM); }
template <class Op>
inline void add_outer(const Tile<Op>& tile, int64_t rows, const float* residual, int64_t ldr,
                      int64_t classes, int64_t first, int64_t columns, float* grad, int64_t ldg,
                      float* scratch) {
  constexpr int64_t kStride = Tile<Op>::kOuterPart ? Tile<Op>::kOuterStride : Tile<Op>::kStride;
  const int64_t group = class_group(classes), depth = (rows + Op::kNumbers - 1) / Op::kNumbers;
  const int64_t packed = depth * kTileM;
  for (int64_t start = 0; start < classes; start += kOuterGroups * group) {
    const int64_t end = std::min(classes, start + kOuterGroups * group);
    for (int64_t c = start; c < end; c += group)
      pack_residual(Op{}, residual + c, ldr, rows, int(std::min(group, end - c)),
                    scratch + (c - start) / group * packed);
    for (int64_t d = first; d < first + columns; d += kPanel) {
      const int lanes = int(std::min<int64_t>(kPanel, first + columns - d));
      for (int64_t c = start; c < end; c += group)
        Multiply<Op>::kernel(lanes <= VL ? 1 : kTileV, int(std::min(group, end - c)))(
            scratch + (c - start) / group * packed, 1, kTileM,
            tile.outer(d / kBlockD) + d % kBlockD, kStride, depth, nullptr,
            grad + c * ldg + (d - first), ldg, lanes);
    }
  }
}
