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

constexpr int kFewClasses = 2 * kTileM;
constexpr int kDotClasses = VL == 16 ? 12 : 5;
constexpr int kTileRows = 96;  // divisible by every count of rows below, and by VL

// Rows whose sums fit the registers beside C classes.
constexpr int dot_rows(int classes) {
  if (VL == 16) {
    constexpr int rows[] = {8, 6, 6, 4, 4, 3, 3, 3, 2, 2, 2, 2};
    return rows[classes - 1];
  }
  constexpr int rows[] = {4, 3, 2, 2, 2};
  return rows[classes - 1];
}

// Rows ahead of those at work that are asked for, into the second-level cache. In the first pass
// the gradient, which reads what is cached already, asks for the first rows of the next tile
// meanwhile, so that memory is never idle.
constexpr int kAheadFirst = kTileRows / 4;
constexpr int kAheadSecond = kTileRows / 8;

// acc[r][c] = lane sums of <rows[r], w[c]>, and with Norm norm[r] those of |rows[r]|^2; asks for
// ahead[r] where ahead is given.
template <int R, int C, bool Norm, class T>
MOSO_INLINE void dots(const T* const* rows, const T* const* ahead, const float* w, int64_t ldw,
                      int64_t dim, vf (&acc)[R][C], vf (&norm)[R]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    norm[r] = vf{};
#pragma GCC unroll 12
    for (int c = 0; c < C; ++c) acc[r][c] = vf{};
  }
  const auto step = [&](const vf(&h)[R], int64_t d) __attribute__((always_inline)) {
#pragma GCC unroll 12
    for (int c = 0; c < C; ++c) {
      const vf x = load(w + c * ldw + d);
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
      if (ahead) __builtin_prefetch(ahead[r] + d, 0, 2);
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

// Lane sums are taken for this many rows at once: whole vectors of results.
constexpr int sum_rows(int rows) { return rows % 3 ? VL : 3 * VL; }

// z[c * kTileRows + row] for C classes of every row, and the norms with the first classes.
template <int C, bool First, class T>
inline void dot_classes(const T* const* rows, int64_t count, const float* w, int64_t ldw,
                        int64_t dim, float* z, float* norms) {
  constexpr int R = dot_rows(C), kSums = R * C + (First ? R : 0);
  for (int64_t row = 0; row < count; row += R) {
    vf acc[R][C], norm[R];
    const T* const* ahead = rows + std::min<int64_t>(row + kAheadFirst, kTileRows - R);
    dots<R, C, First>(rows + row, First ? ahead : nullptr, w, ldw, dim, acc, norm);
    vf sums[(kSums + VL - 1) / VL * VL] = {};
#pragma GCC unroll 12
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[c * R + r] = acc[r][c];
    if (First) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[C * R + r] = norm[r];
    }
    float lanes[(kSums + VL - 1) / VL * VL];
#pragma GCC unroll 8
    for (int i = 0; i < kSums; i += VL) store(lanes + i, sum_each(sums + i));
    for (int c = 0; c < C; ++c) std::memcpy(z + c * kTileRows + row, lanes + c * R, R * 4);
    if (First) std::memcpy(norms + row, lanes + C * R, R * 4);
  }
}

// Vectors of columns that M classes of sums leave registers for: long runs of a row at a time, and
// enough sums under way to hide the latency of a multiply-add.
constexpr int outer_vectors(int classes) {
  if (VL == 16) return classes <= 2 ? 8 : classes <= 6 ? 4 : classes <= 9 ? 3 : 2;
  return classes <= 2 ? 4 : classes == 3 ? 3 : 2;
}

// g[m * ldg + v * VL] += sum over rows of r[m * kTileRows + row] * rows[row][d + v * VL]; of the
// last vector only `lanes` numbers exist. Asks for the same columns of next[0 ... kAheadFirst),
// where next is given.
template <int M, int V, class T>
inline void add_outer_block(const T* const* rows, const T* const* next, int64_t count, int64_t d,
                            const float* r, float* g, int64_t ldg, int lanes) {
  vf acc[M][V];
#pragma GCC unroll 14
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      acc[m][v] = v + 1 < V ? load(g + m * ldg + v * VL) : load_n(g + m * ldg + v * VL, lanes);
  const auto add = [&](int64_t k) __attribute__((always_inline)) {
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
  };
  int64_t k = 0;
  if (next) {
    for (const int64_t end = std::min<int64_t>(count, kAheadFirst); k < end; ++k) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) __builtin_prefetch(next[k] + d + v * VL, 0, 2);
      add(k);
    }
  }
  for (; k < count; ++k) add(k);
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
inline void add_outer_rows(const T* const* rows, const T* const* next, int64_t count, int64_t dim,
                           const float* r, float* g, int64_t ldg) {
  constexpr int V = outer_vectors(M);
  int64_t d = 0;
  for (; d + V * VL <= dim; d += V * VL)
    add_outer_block<M, V>(rows, next, count, d, r, g + d, ldg, VL);
  for (; d < dim; d += VL)
    add_outer_block<M, 1>(rows, next, count, d, r, g + d, ldg, int(std::min<int64_t>(VL, dim - d)));
}

// sums[row] += sum over C classes of r <h, G>.
template <int C, class T>
inline void weigh_classes(const T* const* rows, int64_t count, const float* mean_grad, int64_t ldw,
                          int64_t dim, const float* r, float* sums) {
  constexpr int R = dot_rows(C), kGroup = sum_rows(R);
  vf weighted[kGroup];
  for (int64_t start = 0; start < count; start += kGroup) {
    for (int64_t row = 0; row < kGroup; row += R) {
      vf acc[R][C], norm[R];
      const T* const* now = rows + start + row;
      dots<R, C, false>(now, now + kAheadSecond, mean_grad, ldw, dim, acc, norm);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const float* weights = r + start + row + i;
        vf total = splat(weights[0]) * acc[i][0];
#pragma GCC unroll 12
        for (int c = 1; c < C; ++c) total += splat(weights[c * kTileRows]) * acc[i][c];
        weighted[row + i] = total;
      }
    }
    for (int i = 0; i < kGroup; i += VL) {
      float* to = sums + start + i;
      store(to, load(to) + sum_each(weighted + i));
    }
  }
}

template <class T>
struct FewClasses {
  using Dot = void (*)(const T* const*, int64_t, const float*, int64_t, int64_t, float*, float*);
  using Outer = void (*)(const T* const*, const T* const*, int64_t, int64_t, const float*, float*,
                         int64_t);
  using Weigh = void (*)(const T* const*, int64_t, const float*, int64_t, int64_t, const float*,
                         float*);
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
  const int64_t width, dim, ldw;
  Buffer weight;
  std::vector<T> zero_row;

  explicit FewClasses(const Problem& problem)
      : p(problem),
        width(p.heads * p.classes),
        dim(p.dim),
        ldw((p.dim + VL - 1) / VL * VL),
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
    const T* rows[kTileRows + kAheadFirst];  // and the next rows, only to be asked for
    bool counted[kTileRows];
    int32_t label[kTileRows];
    float weight[kTileRows];
    float norms[kTileRows];
    float sums[kTileRows];
    Buffer residual;  // (width, kTileRows): logits, then residuals
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
    for (int64_t i = kTileRows; i < kTileRows + kAheadFirst; ++i)
      t->rows[i] = first + i < p.rows ? feature_row<T>(p, first + i) : zero_row.data();
  }

  void logits(Tile* t, int64_t count) const {
    const int64_t group = even_group(width);
    for (int64_t c = 0; c < width; c += group) {
      const auto n = size_t(std::min(group, width - c));
      (c == 0 ? kDotFirst : kDotNext)[n - 1](t->rows, count, weight.get() + c * ldw, ldw, dim,
                                             t->residual.get() + c * kTileRows, t->norms);
    }
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
    const int64_t slab = slab_rows(p.rows, kTileRows), slabs = (p.rows + slab - 1) / slab;
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
      for (int64_t first = index * slab; first < end; first += kTileRows) {
        const int64_t count = std::min<int64_t>(kTileRows, end - first);
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
      kOuter[size_t(std::min(group, width - c) - 1)](t.rows, c == 0 ? t.rows + kTileRows : nullptr,
                                                     count, dim, t.residual.get() + c * kTileRows,
                                                     grad + c * dim, dim);
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
    const int64_t slab = slab_rows(p.rows, kTileRows), slabs = (p.rows + slab - 1) / slab;
    const int threads = int(std::min<int64_t>(p.threads.count, slabs));
    std::vector<Tile> tiles(static_cast<size_t>(threads));
    for (Tile& t : tiles) t.residual.reserve(size_t(width * kTileRows));
    run_tasks(p.threads, slabs, [&](int64_t index, int worker) {
      Tile* t = &tiles[size_t(worker)];
      const int64_t end = std::min(p.rows, (index + 1) * slab);
      for (int64_t first = index * slab; first < end; first += kTileRows) {
        const int64_t count = std::min<int64_t>(kTileRows, end - first);
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
    for (int64_t head = 0; head < p.heads; ++head) {
      clear(t->sums, kTileRows);
      for (int64_t in_head = 0; in_head < p.classes; in_head += group) {
        const int64_t c = head * p.classes + in_head;
        const auto n = size_t(std::min(group, p.classes - in_head));
        const float* r = t->residual.get() + c * kTileRows;
        kWeigh[n - 1](t->rows, count, mean_grad + c * ldw, ldw, dim, r, t->sums);
        if (!job.mean_bias_grad) continue;
        for (size_t m = 0; m < n; ++m)
          for (int64_t i = 0; i < count; ++i)
            t->sums[i] += r[m * kTileRows + size_t(i)] * job.mean_bias_grad[c + int64_t(m)];
      }
      std::memcpy(job.alignment + head * job.alignment_stride + first, t->sums, size_t(count) * 4);
    }
  }

  // Even groups of at most kDotClasses classes.
  static int64_t even_group(int64_t classes) {
    const int64_t groups = (classes + kDotClasses - 1) / kDotClasses;
    return (classes + groups - 1) / groups;
  }
};
