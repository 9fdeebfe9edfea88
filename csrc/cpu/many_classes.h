// Any number of classes: tiles of rows are copied (and widened) once into cache-sized blocks, and
// the products run as register tiles on packed operands.
//
// First pass: pack tile, Z = H W^T, residual rows in place, G += R^T H from the same tile.
// Each slab of rows has a float32 partial of G. Where G is large (split_grad), that would cost a
// sweep over C x D numbers a slab, so G is made afterwards from the stored residuals, in blocks of
// classes x columns that are shared out instead of rows.
// Second pass: pack tile, S = H G^T, a = row sums of R o S.
//
// FLOPs: 4 N C D and 2 N C D; bytes: H once a pass (twice with split_grad).

constexpr int64_t kRowsMax = 18 * 14;  // a multiple of kTileM for every vector length

// Rows of a tile: its copy stays within the second-level cache.
inline int64_t rows_of_tile(int64_t dim) {
  const int64_t rows = (int64_t{1} << 19) / (4 * dim);
  return std::clamp<int64_t>(rows / kTileM * kTileM, 4 * kTileM, kRowsMax);
}

constexpr int64_t kGradClasses = 18 * kTileM;
constexpr int64_t kGradColumns = kBlockD;
constexpr int64_t kGradRows = 4096;  // rows that a float32 partial sums

template <class T>
struct ManyClasses {
  const Problem& p;
  const int64_t width, dim, tile_rows;
  Panels weight;
  Buffer bias;

  explicit ManyClasses(const Problem& problem)
      : p(problem), width(p.heads * p.classes), dim(p.dim), tile_rows(rows_of_tile(p.dim)) {}

  // Bias padded to whole panels, zeros without one.
  static void pack_bias(const float* source, const Panels& panels, Buffer* to) {
    to->reserve(size_t(panels.padded()));
    clear(to->get(), panels.padded());
    if (source) std::memcpy(to->get(), source, size_t(panels.width) * 4);
  }

  struct Worker {
    Buffer tile, residual, product, scratch, grad;
    std::vector<float> norms;
    std::vector<uint8_t> counted;
    StatusWord status;
  };

  Tile tile_of(const Worker& w) const { return {tile_rows, dim, w.tile.get()}; }

  std::vector<Worker> make_workers(int64_t tasks, bool product) const {
    std::vector<Worker> workers(size_t(std::min<int64_t>(p.threads.count, tasks)));
    for (Worker& w : workers) {
      w.tile.reserve(tile_numbers(tile_rows, dim));
      w.residual.reserve(size_t(tile_rows * width));
      w.scratch.reserve(size_t(tile_rows * kTileM));
      if (product) w.product.reserve(size_t(tile_rows * width));
      w.norms.resize(size_t(tile_rows));
      w.counted.resize(size_t(tile_rows));
    }
    return workers;
  }

  // Copies rows into the tile; those that do not count become zeros.
  void pack_tile(Worker* w, int64_t first, int64_t count, const uint8_t* counted) const {
    const Tile tile = tile_of(*w);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = first + i;
      const T* source = feature_row<T>(p, row);
      float norm = 0.0f;
      bool used = counted ? counted[row] : takes_part(p, row, &w->status);
      if (used) {
        norm = pack_row(tile, i, source);
        if (!finite(norm) && has_nonfinite(p, row, source, &w->status)) used = false;
      }
      if (!used) clear_row(tile, i);
      w->norms[size_t(i)] = used ? norm : 0.0f;
      w->counted[size_t(i)] = used;
    }
  }

  // Residuals of the packed rows; statistics to out where it is given.
  void residuals(Worker* w, int64_t first, int64_t count, const FirstPass* out) const {
    float* z = w->residual.get();
    tile_times_panels(tile_of(*w), count, weight, bias.get(), z, width);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t head = 0; head < p.heads; ++head) {
        float* row = z + i * width + head * p.classes;
        if (!w->counted[size_t(i)]) {
          clear(row, p.classes);
          continue;
        }
        const RowStats stats = row_stats(p, first + i, row);
        if (!out) continue;
        const int64_t at = head * out->stat_stride + first + i;
        out->loss[at] = stats.loss;
        out->residual_sqnorm[at] = stats.residual_sqnorm;
        out->margin[at] = stats.margin;
        out->entropy[at] = stats.entropy;
        const float ones = p.bias ? 1.0f : 0.0f;
        if (!finite(stats.residual_sqnorm * (w->norms[size_t(i)] + ones) + stats.loss))
          w->status.note(kStatusLogits, p.first_row + first + i);
      }
    }
  }

  void first_pass(const FirstPass& job) {
    weight.pack(p.weight, width, dim, p.threads);
    pack_bias(p.bias, weight, &bias);
    const int64_t slab = p.split_grad ? tile_rows : slab_rows(p.rows, tile_rows);
    const int64_t slabs = (p.rows + slab - 1) / slab;
    std::vector<Worker> workers = make_workers(slabs, false);
    if (!p.split_grad)
      for (Worker& w : workers) w.grad.reserve(size_t(width * (dim + 1)));
    Turnstile order;
    run_tasks(p.threads, slabs, [&](int64_t index, int id) {
      Worker* w = &workers[size_t(id)];
      float* grad = w->grad.get();
      if (!p.split_grad) clear(grad, width * (dim + 1));
      const int64_t end = std::min(p.rows, (index + 1) * slab);
      for (int64_t first = index * slab; first < end; first += tile_rows) {
        const int64_t count = std::min(tile_rows, end - first);
        pack_tile(w, first, count, nullptr);
        residuals(w, first, count, &job);
        std::memcpy(job.feature_sqnorm + first, w->norms.data(), size_t(count) * 4);
        std::memcpy(job.counted + first, w->counted.data(), size_t(count));
        if (job.residual)
          std::memcpy(job.residual + first * width, w->residual.get(), size_t(count * width) * 4);
        if (p.split_grad) continue;
        add_outer(tile_of(*w), count, w->residual.get(), width, width, 0, dim, grad, dim,
                  w->scratch.get());
        add_bias(w->residual.get(), count, grad + width * dim);
      }
      if (p.split_grad) return;
      order.pass(index, [&] {
        add_to_total(job.grad_sum, grad, width * dim);
        add_to_total(job.bias_grad_sum, grad + width * dim, width);
      });
    });
    for (const Worker& w : workers) w.status.merge_into(job.status);
    if (p.split_grad) split_gradient(job);
  }

  // sums[c] += column sums of the residual rows.
  void add_bias(const float* residual, int64_t count, float* sums) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < width; ++c) sums[c] += residual[i * width + c];
  }

  // G in blocks of classes x columns, each summed over all rows by one worker.
  void split_gradient(const FirstPass& job) {
    const int64_t class_blocks = (width + kGradClasses - 1) / kGradClasses;
    const int64_t per_block = (width + class_blocks - 1) / class_blocks;
    const int64_t column_blocks = (dim + kGradColumns - 1) / kGradColumns;
    const int64_t tasks = class_blocks * column_blocks;
    struct Scratch {
      Buffer tile, outer, grad;
    };
    std::vector<Scratch> scratch(size_t(std::min<int64_t>(p.threads.count, tasks)));
    for (Scratch& s : scratch) {
      s.tile.reserve(tile_numbers(kRowsMax, kGradColumns));
      s.outer.reserve(size_t(kRowsMax * kTileM));
      s.grad.reserve(size_t(per_block * kGradColumns + per_block));
    }
    run_tasks(p.threads, tasks, [&](int64_t index, int id) {
      const Scratch& s = scratch[size_t(id)];
      const int64_t c = index % class_blocks * per_block, d = index / class_blocks * kGradColumns;
      const int64_t classes = std::min(per_block, width - c);
      const int64_t columns = std::min(kGradColumns, dim - d);
      const Tile tile{kRowsMax, columns, s.tile.get()};
      float* bias_part = s.grad.get() + classes * columns;
      for (int64_t start = 0; start < p.rows; start += kGradRows) {
        const int64_t end = std::min(p.rows, start + kGradRows);
        clear(s.grad.get(), classes * (columns + 1));
        for (int64_t first = start; first < end; first += kRowsMax) {
          const int64_t count = std::min(kRowsMax, end - first);
          for (int64_t i = 0; i < count; ++i) {
            if (job.counted[first + i])
              pack_row(tile, i, feature_row<T>(p, first + i) + d);
            else
              clear_row(tile, i);
          }
          const float* residual = job.residual + first * width + c;
          add_outer(tile, count, residual, width, classes, 0, columns, s.grad.get(), columns,
                    s.outer.get());
          if (d == 0)
            for (int64_t i = 0; i < count; ++i)
              for (int64_t m = 0; m < classes; ++m) bias_part[m] += residual[i * width + m];
        }
        for (int64_t m = 0; m < classes; ++m)
          add_to_total(job.grad_sum + (c + m) * dim + d, s.grad.get() + m * columns, columns);
        if (d == 0) add_to_total(job.bias_grad_sum + c, bias_part, classes);
      }
    });
  }

  void second_pass(const SecondPass& job) {
    if (!job.residual) {
      weight.pack(p.weight, width, dim, p.threads);
      pack_bias(p.bias, weight, &bias);
    }
    Panels mean_grad;
    Buffer mean_bias;
    mean_grad.pack(job.mean_grad, width, dim, p.threads);
    pack_bias(job.mean_bias_grad, mean_grad, &mean_bias);
    const int64_t tiles = (p.rows + tile_rows - 1) / tile_rows;
    std::vector<Worker> workers = make_workers(tiles, true);
    run_tasks(p.threads, tiles, [&](int64_t index, int id) {
      Worker* w = &workers[size_t(id)];
      const int64_t first = index * tile_rows, count = std::min(tile_rows, p.rows - first);
      pack_tile(w, first, count, job.counted);
      const float* residual = job.residual + first * width;
      if (!job.residual) {
        residuals(w, first, count, nullptr);
        residual = w->residual.get();
      }
      tile_times_panels(tile_of(*w), count, mean_grad, mean_bias.get(), w->product.get(), width);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t head = 0; head < p.heads; ++head) {
          const int64_t at = i * width + head * p.classes;
          job.alignment[head * job.alignment_stride + first + i] =
              dot(residual + at, w->product.get() + at, p.classes);
        }
    });
  }

  static float dot(const float* x, const float* y, int64_t n) {
    double total = 0.0;
    for (int64_t start = 0; start < n; start += kSumBlock) {
      vf part{};
      for_lanes(std::min(kSumBlock, n - start), [&](int64_t i, int lanes) {
        part += load_n(x + start + i, lanes) * load_n(y + start + i, lanes);
      });
      total += sum(part);
    }
    return float(total);
  }
};
