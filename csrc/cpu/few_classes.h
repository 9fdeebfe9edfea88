// Few classes (all heads together up to kFewClasses): the features are read straight from where
// they lie, once per pass.
//
//   first pass, a tile of rows at a time:
//     z(row, class) = <h, w>   lanes along D; R rows x C classes of sums in registers
//     softmax, residual        lanes along rows
//     G(class, d) += r h       classes x 2 vectors of columns in registers, tile from L2
//   second pass: a(row) = sum over classes of r <h, G>, one lane sum per row
//
// Bytes: each pass reads H once. FLOPs: 4 N C D and 2 N C D. With D columns of 4 bytes a row and
// C classes the first pass does C FLOPs a byte: beyond 8 or so it is bound by arithmetic.
//
// The R rows at work lie far apart in the tile, so that each is in a page of its own: hardware
// prefetchers follow one stream a page, and lose two rows that they meet there in turn. All groups
// of classes take a row while it is in the first-level cache.

constexpr int kFewClasses = 2 * kTileM;
constexpr int kDotClasses = VL == 16 ? 12 : 5;
constexpr int kTileRows = 96;  // at most; divisible by kRowStep
constexpr int kRowStep = 24;   // divisible by every count of rows below, and by VL or VL / 2

// Rows whose sums fit the registers beside C classes.
constexpr int dot_rows(int classes) {
  if (VL == 16) {
    constexpr int rows[] = {8, 6, 6, 4, 4, 3, 3, 3, 2, 2, 2, 2};
    return rows[classes - 1];
  }
  constexpr int rows[] = {4, 3, 2, 2, 2};
  return rows[classes - 1];
}

// Rows that go through several groups of classes together: divisible by dot_rows of each of them.
constexpr int kSharedRows = VL == 16 ? 6 : 2;

constexpr int64_t kFewTileBytes = 192 * 1024;  // of features: they stay in the second-level cache

// Further on in a row (and then in the next) by so much, memory is asked for while the arithmetic
// of three classes or more goes on; fewer wait for memory anyway.
constexpr int64_t kAheadBytes = 1024;

// Rows of a tile.
template <class T>
int64_t rows_of_few_classes(int64_t dim) {
  const int64_t rows = kFewTileBytes / (dim * int64_t(sizeof(T))) / kRowStep * kRowStep;
  return std::clamp<int64_t>(rows, kRowStep, kTileRows);
}

// acc[r][c] = lane sums of <rows[r], w[c]>, and with Norm norm[r] those of |rows[r]|^2.
template <int R, int C, bool Norm, class T>
MOSO_INLINE void dots(const T* const (&rows)[R], const float* w, int64_t ldw, int64_t dim,
                      vf (&acc)[R][C], vf (&norm)[R]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    norm[r] = vf{};
#pragma GCC unroll 12
    for (int c = 0; c < C; ++c) acc[r][c] = vf{};
  }
  const auto step = [&](const vf(&h)[R], int64_t d) __attribute__((always_inline)) {
#pragma GCC unroll 12
    for (int c = 0; c < C; ++c) {
      vf x = load(w + c * ldw + d);
      // Else the compiler reads it again for every row, and reading is what there is least of.
      if (R > 1) MOSO_IN_REGISTER(x);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][c] += h[r] * x;
    }
    if (Norm) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) norm[r] += h[r] * h[r];
    }
  };
  vf h[R];
  int64_t d = 0;
  for (; d + VL <= dim; d += VL) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (C > 2) __builtin_prefetch(rows[r] + d + kAheadBytes / sizeof(T));
      h[r] = load(rows[r] + d);
    }
    step(h, d);
  }
  if (d < dim) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) h[r] = load_first(rows[r] + d, int(dim - d));
    step(h, d);
  }
}

// Rows k * apart of a tile for k < count.
template <class T>
struct Block {
  const T* const* rows;
  int64_t count, apart;
};

template <int R, class T>
MOSO_INLINE void row_pointers(const Block<T>& block, int64_t k, const T* (&to)[R]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) to[r] = block.rows[(k + r) * block.apart];
}

// z[c * kTileRows + k * apart] for C classes of every row of a block, and with the first classes
// norms[k * apart].
template <int C, bool First, class T>
inline void dot_classes(const Block<T>& block, const float* w, int64_t ldw, int64_t dim, float* z,
                        float* norms) {
  constexpr int R = dot_rows(C), kSums = R * C + (First ? R : 0);
  for (int64_t k = 0; k < block.count; k += R) {
    const T* rows[R];
    row_pointers(block, k, rows);
    vf acc[R][C], norm[R];
    dots<R, C, First>(rows, w, ldw, dim, acc, norm);
    float lanes[(kSums + VL - 1) / VL * VL];
#pragma GCC unroll 8
    for (int i = 0; i < kSums; i += VL) {
      vf sums[VL];
#pragma GCC unroll 16
      for (int j = 0; j < VL; ++j) {
        const int at = i + j;
        sums[j] = at < R * C ? acc[at % R][at / R] : at < kSums ? norm[at % R] : vf{};
      }
      store(lanes + i, sum_each(sums));
    }
    for (int r = 0; r < R; ++r) {
      const int64_t row = (k + r) * block.apart;
      for (int c = 0; c < C; ++c) z[c * kTileRows + row] = lanes[c * R + r];
      if (First) norms[row] = lanes[C * R + r];
    }
  }
}

// Vectors of columns that M classes of sums leave registers for: long runs of a row at a time, and
// enough sums under way to hide the latency of a multiply-add.
constexpr int outer_vectors(int classes) {
  if (VL == 16) return classes <= 2 ? 8 : classes <= 6 ? 4 : classes <= 9 ? 3 : 2;
  return classes <= 2 ? 4 : classes == 3 ? 3 : 2;
}

// g[m * ldg + v * VL] += sum over rows of r[m * kTileRows + row] * rows[row][d + v * VL]; of the
// last vector only `lanes` numbers exist.
template <int M, int V, class T>
inline void add_outer_block(const T* const* rows, int64_t count, int64_t d, const float* r,
                            float* g, int64_t ldg, int lanes) {
  vf acc[M][V];
#pragma GCC unroll 14
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      acc[m][v] = v + 1 < V ? load(g + m * ldg + v * VL) : load_n(g + m * ldg + v * VL, lanes);
  for (int64_t k = 0; k < count; ++k) {
    vf h[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const T* at = rows[k] + d + v * VL;
      h[v] = v + 1 < V || lanes == VL ? load(at) : load_first(at, lanes);
    }
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m) {
      const vf x = splat(r[m * kTileRows + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[m][v] += x * h[v];
    }
  }
#pragma GCC unroll 14
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if (v + 1 < V)
        store(g + m * ldg + v * VL, acc[m][v]);
      else
        store_n(g + m * ldg + v * VL, acc[m][v], lanes);
    }
}

// The same for all dim columns of g (M, ldg).
template <int M, class T>
inline void add_outer_rows(const T* const* rows, int64_t count, int64_t dim, const float* r,
                           float* g, int64_t ldg) {
  constexpr int V = outer_vectors(M);
  int64_t d = 0;
  for (; d + V * VL <= dim; d += V * VL) add_outer_block<M, V>(rows, count, d, r, g + d, ldg, VL);
  for (; d < dim; d += VL)
    add_outer_block<M, 1>(rows, count, d, r, g + d, ldg, int(std::min<int64_t>(VL, dim - d)));
}

// Adds a block's share of the sum over C classes of r <h, G>, lane by lane: VL numbers a row of
// the tile at `lanes`.
template <int C, class T>
inline void weigh_classes(const Block<T>& block, const float* mean_grad, int64_t ldw, int64_t dim,
                          const float* r, float* lanes) {
  constexpr int R = dot_rows(C);
  for (int64_t k = 0; k < block.count; k += R) {
    const T* rows[R];
    row_pointers(block, k, rows);
    vf acc[R][C], norm[R];
    dots<R, C, false>(rows, mean_grad, ldw, dim, acc, norm);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const int64_t row = (k + i) * block.apart;
      float* to = lanes + row * VL;
      vf total = load(to);
#pragma GCC unroll 12
      for (int c = 0; c < C; ++c) total += splat(r[c * kTileRows + row]) * acc[i][c];
      store(to, total);
    }
  }
}

template <class T>
struct FewClasses {
  using Dot = void (*)(const Block<T>&, const float*, int64_t, int64_t, float*, float*);
  using Outer = void (*)(const T* const*, int64_t, int64_t, const float*, float*, int64_t);
  using Weigh = void (*)(const Block<T>&, const float*, int64_t, int64_t, const float*, float*);
  template <bool First, int... I>
  static constexpr std::array<Dot, sizeof...(I)> dot_table(std::integer_sequence<int, I...>) {
    return {&dot_classes<I + 1, First, T>...};
  }
  template <int... I>
  static constexpr std::array<Outer, sizeof...(I)> outer_table(std::integer_sequence<int, I...>) {
    return {&add_outer_rows<I + 1, T>...};
  }
  template <int... I>
  static constexpr std::array<Weigh, sizeof...(I)> weigh_table(std::integer_sequence<int, I...>) {
    return {&weigh_classes<I + 1, T>...};
  }
  using DotRange = std::make_integer_sequence<int, kDotClasses>;
  static constexpr auto kDotFirst = dot_table<true>(DotRange{});
  static constexpr auto kDotNext = dot_table<false>(DotRange{});
  static constexpr auto kOuter = outer_table(std::make_integer_sequence<int, kTileM>{});
  static constexpr auto kWeigh = weigh_table(DotRange{});

  const Problem& p;
  const int64_t width, dim, ldw, tile_rows;
  Buffer weight;
  std::vector<T> zero_row;

  explicit FewClasses(const Problem& problem)
      : p(problem),
        width(p.heads * p.classes),
        dim(p.dim),
        ldw((p.dim + VL - 1) / VL * VL),
        tile_rows(rows_of_few_classes<T>(p.dim)),
        zero_row(size_t(p.dim) + VL) {}

  // Rows padded with zeros to whole vectors.
  void pack(const float* source, Buffer* to) const {
    to->reserve(size_t(width * ldw));
    clear(to->get(), width * ldw);
    for (int64_t c = 0; c < width; ++c)
      std::memcpy(to->get() + c * ldw, source + c * dim, size_t(dim) * 4);
  }

  // One worker's tile.
  struct Tile {
    const T* rows[kTileRows];
    bool counted[kTileRows];
    int32_t label[kTileRows];
    float weight[kTileRows];
    float norms[kTileRows];
    float sums[kTileRows];
    Buffer residual;  // (width, kTileRows): logits, then residuals
    Buffer lanes;     // (heads, kTileRows, VL): alignments of the second pass
    StatusWord status;
  };

  // Pointers, labels and weights of rows [first, first + count); rows that do not count, and
  // those behind the end, read zeros.
  void choose_rows(Tile* t, int64_t first, int64_t count, const uint8_t* counted) const {
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t row = first + i;
      const bool used = i < count && (counted ? counted[row] : takes_part(p, row, &t->status));
      t->counted[i] = used;
      t->rows[i] = used ? feature_row<T>(p, row) : zero_row.data();
      t->label[i] = used ? int32_t(p.labels[row]) : 0;
      t->weight[i] = !used ? 0.0f : p.sample_weight ? p.sample_weight[row] : 1.0f;
    }
  }

  // body(block, its first row) for all rows of a tile, where groups of `classes` go over them.
  template <class Body>
  void for_blocks(const Tile& t, int64_t count, int64_t classes, const Body& body) const {
    const int64_t group = even_group(classes);
    const int64_t rows = group < classes ? kSharedRows : dot_rows(int(group));
    const int64_t apart = (count + rows - 1) / rows;
    for (int64_t row = 0; row < apart; ++row) body(Block<T>{t.rows + row, rows, apart}, row);
  }

  void logits(Tile* t, int64_t count) const {
    const int64_t group = even_group(width);
    for_blocks(*t, count, width, [&](const Block<T>& block, int64_t row) {
      for (int64_t c = 0; c < width; c += group) {
        const auto n = size_t(std::min(group, width - c));
        (c == 0 ? kDotFirst : kDotNext)[n - 1](block, weight.get() + c * ldw, ldw, dim,
                                               t->residual.get() + c * kTileRows + row,
                                               t->norms + row);
      }
    });
  }

  // Leaves out rows with non-finite features; their logits become those of a zero row.
  void leave_out_nonfinite(Tile* t, int64_t first, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      if (finite(t->norms[i])) continue;
      if (!has_nonfinite(p, first + i, t->rows[i], &t->status)) continue;
      t->rows[i] = zero_row.data();
      t->counted[i] = false;
      t->weight[i] = t->norms[i] = 0.0f;
      for (int64_t c = 0; c < width; ++c) t->residual.get()[c * kTileRows + i] = 0.0f;
    }
  }

  // Logits to residuals; statistics to out where it is given (its rows start at `first`).
  void residuals(Tile* t, int64_t first, int64_t count, const FirstPass* out) const {
    for (int64_t head = 0; head < p.heads; ++head) {
      for (int64_t i = 0; i < count; i += VL) {
        float* z = t->residual.get() + head * p.classes * kTileRows + i;
        if (p.bias)
          for (int64_t c = 0; c < p.classes; ++c)
            store(z + c * kTileRows, load(z + c * kTileRows) + splat(p.bias[head * p.classes + c]));
        vi label;
        std::memcpy(&label, t->label + i, sizeof label);
        const LaneStats stats = cross_entropy_lanes(z, kTileRows, p.classes, label,
                                                    p.label_smoothing, load(t->weight + i));
        if (!out) continue;
        const int lanes = int(std::min<int64_t>(VL, count - i));
        store_lanes(*out, head, first + i, lanes, stats, t->norms + i, &t->status);
      }
    }
  }

  void first_pass(const FirstPass& job) {
    pack(p.weight, &weight);
    const int64_t slab = slab_rows(p.rows, tile_rows), slabs = (p.rows + slab - 1) / slab;
    const int threads = int(std::min<int64_t>(p.threads.count, slabs));
    std::vector<Tile> tiles(static_cast<size_t>(threads));
    std::vector<Buffer> grads(tiles.size());
    for (size_t i = 0; i < tiles.size(); ++i) {
      tiles[i].residual.reserve(size_t(width * kTileRows));
      grads[i].reserve(size_t(width * (dim + 1)));
    }
    Turnstile order;
    run_tasks(p.threads, slabs, [&](int64_t index, int worker) {
      Tile* t = &tiles[size_t(worker)];
      float* grad = grads[size_t(worker)].get();
      clear(grad, width * (dim + 1));
      const int64_t end = std::min(p.rows, (index + 1) * slab);
      for (int64_t first = index * slab; first < end; first += tile_rows) {
        const int64_t count = std::min(tile_rows, end - first);
        choose_rows(t, first, count, nullptr);
        logits(t, count);
        leave_out_nonfinite(t, first, count);
        residuals(t, first, count, &job);
        finish_tile(job, *t, first, count);
        add_gradients(*t, count, grad);
      }
      order.pass(index, [&] {
        add_to_total(job.grad_sum, grad, width * dim);
        add_to_total(job.bias_grad_sum, grad + width * dim, width);
      });
    });
    for (const Tile& t : tiles) t.status.merge_into(job.status);
  }

  void finish_tile(const FirstPass& job, const Tile& t, int64_t first, int64_t count) const {
    std::memcpy(job.feature_sqnorm + first, t.norms, size_t(count) * 4);
    for (int64_t i = 0; i < count; ++i) job.counted[first + i] = t.counted[i];
    if (!job.residual) return;
    for (int64_t c = 0; c < width; ++c)
      std::memcpy(job.residual + c * p.rows + first, t.residual.get() + c * kTileRows,
                  size_t(count) * 4);
  }

  void add_gradients(const Tile& t, int64_t count, float* grad) const {
    const int64_t group = class_group(width);
    for (int64_t c = 0; c < width; c += group) {
      kOuter[size_t(std::min(group, width - c) - 1)](
          t.rows, count, dim, t.residual.get() + c * kTileRows, grad + c * dim, dim);
    }
    for (int64_t c = 0; c < width; ++c) {
      vf total{};
      for_lanes(count, [&](int64_t i, int lanes) {
        total += load_n(t.residual.get() + c * kTileRows + i, lanes);
      });
      grad[width * dim + c] += sum(total);
    }
  }

  void second_pass(const SecondPass& job) {
    if (!job.residual) pack(p.weight, &weight);
    Buffer mean_grad;
    pack(job.mean_grad, &mean_grad);
    const int64_t slab = slab_rows(p.rows, tile_rows), slabs = (p.rows + slab - 1) / slab;
    const int threads = int(std::min<int64_t>(p.threads.count, slabs));
    std::vector<Tile> tiles(static_cast<size_t>(threads));
    for (Tile& t : tiles) {
      t.residual.reserve(size_t(width * kTileRows));
      t.lanes.reserve(size_t(p.heads * kTileRows * VL));
    }
    run_tasks(p.threads, slabs, [&](int64_t index, int worker) {
      Tile* t = &tiles[size_t(worker)];
      const int64_t end = std::min(p.rows, (index + 1) * slab);
      for (int64_t first = index * slab; first < end; first += tile_rows) {
        const int64_t count = std::min(tile_rows, end - first);
        choose_rows(t, first, count, job.counted);
        if (job.residual) {
          load_residuals(job, t, first, count);
        } else {
          logits(t, count);
          residuals(t, first, count, nullptr);
        }
        alignments(job, t, mean_grad.get(), first, count);
      }
    });
  }

  void load_residuals(const SecondPass& job, Tile* t, int64_t first, int64_t count) const {
    for (int64_t c = 0; c < width; ++c) {
      float* to = t->residual.get() + c * kTileRows;
      std::memcpy(to, job.residual + c * p.rows + first, size_t(count) * 4);
      clear(to + count, kTileRows - count);
    }
  }

  void alignments(const SecondPass& job, Tile* t, const float* mean_grad, int64_t first,
                  int64_t count) const {
    const int64_t group = even_group(p.classes);
    float* lanes = t->lanes.get();
    clear(lanes, p.heads * kTileRows * VL);
    for_blocks(*t, count, p.classes, [&](const Block<T>& block, int64_t row) {
      for (int64_t head = 0; head < p.heads; ++head) {
        for (int64_t in_head = 0; in_head < p.classes; in_head += group) {
          const int64_t c = head * p.classes + in_head;
          kWeigh[size_t(std::min(group, p.classes - in_head) - 1)](
              block, mean_grad + c * ldw, ldw, dim, t->residual.get() + c * kTileRows + row,
              lanes + (head * kTileRows + row) * VL);
        }
      }
    });
    for (int64_t head = 0; head < p.heads; ++head) {
      for (int64_t i = 0; i < count; i += VL) {
        vf sums[VL];
        for (int64_t row = 0; row < VL; ++row)
          sums[row] = load(lanes + (head * kTileRows + i + row) * VL);
        store(t->sums + i, sum_each(sums));
      }
      const float* r = t->residual.get() + head * p.classes * kTileRows;
      for (int64_t c = 0; job.mean_bias_grad && c < p.classes; ++c)
        for (int64_t i = 0; i < count; ++i)
          t->sums[i] += r[c * kTileRows + i] * job.mean_bias_grad[head * p.classes + c];
      std::memcpy(job.alignment + head * job.alignment_stride + first, t->sums, size_t(count) * 4);
    }
  }

  // Even groups of at most kDotClasses classes.
  static int64_t even_group(int64_t classes) {
    const int64_t groups = (classes + kDotClasses - 1) / kDotClasses;
    return (classes + groups - 1) / groups;
  }
};
