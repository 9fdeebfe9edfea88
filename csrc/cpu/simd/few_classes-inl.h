// Few classes (all heads together up to kFewClasses): the features are read directly from
// where they lie, once per pass.
//
//   first pass, a tile of rows at a time:
//     z(row, class) = <h, w>   lanes along D; R rows x C classes of sums in registers
//     softmax, residual        lanes along rows
//     G(class, d) += r h       classes x 2 vectors of columns in registers, tile from L2
//   second pass: a(row) = sum over classes of r <h, G>, one lane sum per row
//
// Bytes: each pass reads H once. FLOPs: 4 N C D and 2 N C D. With D columns of 4 bytes a row and
// C classes the first pass does C FLOPs a byte: beyond 8 or so it is bound by arithmetic.
#pragma once

#include <utility>

#include "buffers-inl.h"
#include "few_classes_kernels-inl.h"
#include "matrix-inl.h"
#include "rows-inl.h"
#include "softmax-inl.h"
#include "tasks-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

template <class T>
struct FewClasses {
  using Dot = void (*)(const Block<T>&, const float*, int64_t, int64_t, float*, float*);
  using Outer = void (*)(const T* const*, int64_t, int64_t, const float*, float*, int64_t);
  using Weigh = void (*)(const Block<T>&, const float*, int64_t, int64_t, const float*, float*);
  template <bool First, int... I>
  static constexpr Table<Dot, sizeof...(I)> dot_table(std::integer_sequence<int, I...>) {
    return {&dot_classes<I + 1, First, T>...};
  }
  template <int... I>
  static constexpr Table<Outer, sizeof...(I)> outer_table(std::integer_sequence<int, I...>) {
    return {&add_outer_rows<I + 1, T>...};
  }
  template <int... I>
  static constexpr Table<Weigh, sizeof...(I)> weigh_table(std::integer_sequence<int, I...>) {
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
  const Array<T> zero_row;

  explicit FewClasses(const Problem& problem)
      : p(problem),
        width(p.heads * p.classes),
        dim(p.dim),
        ldw(round_up(p.dim, kParts<T> * VL)),
        tile_rows(rows_of_few_classes<T>(p.dim)),
        zero_row(p.dim + VL) {}

  // Rows in the order of reads.
  void pack(const float* source, Buffer* to) const {
    to->reserve(size_t(width * ldw));
    clear(to->get(), width * ldw);
    for (int64_t c = 0; c < width; ++c)
      for_places<T>(dim, [&](int64_t column, int64_t place) {
        to->get()[c * ldw + place] = source[c * dim + column];
      });
  }

  // Adds sums in the order of reads to the total.
  void add_in_order(const float* sums, double* total) const {
    for (int64_t c = 0; c < width; ++c)
      for_places<T>(dim, [&](int64_t column, int64_t place) {
        total[c * dim + column] += double(sums[c * ldw + place]);
      });
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
    Buffer grad;      // (width, ldw + 1): sums of a slab, those of the bias last
    Buffer lanes;     // (heads, kTileRows, VL): alignments of the second pass
    StatusWord status;
  };

  // Pointers, labels and weights of rows [first, first + count); rows that do not count, and
  // those past the end, read zeros.
  void choose_rows(Tile* t, int64_t first, int64_t count, const uint8_t* counted) const {
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t row = first + i;
      const bool used = i < count && (counted ? counted[row] : takes_part(p, row, &t->status));
      t->counted[i] = used;
      t->rows[i] = used ? feature_row<T>(p, row) : zero_row.get();
      t->label[i] = used ? int32_t(p.labels[row]) : 0;
      t->weight[i] = !used ? 0.0f : p.sample_weight ? p.sample_weight[row] : 1.0f;
    }
  }

  // body(block, its first row) for all rows of a tile, where groups of `classes` go over them.
  template <class Body>
  void for_blocks(const Tile& t, int64_t count, int64_t classes, const Body& body) const {
    const int64_t rows = shared_rows(classes, dot_group(classes, width * dim));
    const int64_t apart = (count + rows - 1) / rows;
    for (int64_t row = 0; row < apart; ++row) body(Block<T>{t.rows + row, rows, apart}, row);
  }

  void logits(Tile* t, int64_t count) const {
    const int64_t group = dot_group(width, width * dim);
    for_blocks(*t, count, width, [&](const Block<T>& block, int64_t row) {
      for (int64_t c = 0; c < width; c += group) {
        const auto n = size_t(min(group, width - c));
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
      t->rows[i] = zero_row.get();
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
        const int lanes = int(min<int64_t>(VL, count - i));
        store_lanes(*out, head, first + i, lanes, stats, t->norms + i, &t->status);
      }
    }
  }

  void first_pass(const FirstPass& job) {
    pack(p.weight, &weight);
    const int64_t slab = slab_rows(p.rows, tile_rows), slabs = (p.rows + slab - 1) / slab;
    const Array<Tile> tiles(worker_count(p.threads, slabs));
    for (Tile& t : tiles) {
      t.residual.reserve(size_t(width * kTileRows));
      t.grad.reserve(size_t(width * (ldw + 1)));
    }
    Turnstile order;
    run_tasks(p.threads, slabs, [&](int64_t index, int worker) {
      Tile* t = &tiles[worker];
      float* grad = t->grad.get();
      clear(grad, width * (ldw + 1));
      const int64_t end = min(p.rows, (index + 1) * slab);
      for (int64_t first = index * slab; first < end; first += tile_rows) {
        const int64_t count = min(tile_rows, end - first);
        choose_rows(t, first, count, nullptr);
        logits(t, count);
        leave_out_nonfinite(t, first, count);
        residuals(t, first, count, &job);
        finish_tile(job, *t, first, count);
        add_gradients(*t, count, grad);
      }
      in_turn(&order, index, [&] {
        add_in_order(grad, job.grad_sum);
        add_to_total(job.bias_grad_sum, grad + width * ldw, width);
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
      kOuter[size_t(min(group, width - c) - 1)](
          t.rows, count, dim, t.residual.get() + c * kTileRows, grad + c * ldw, ldw);
    }
    for (int64_t c = 0; c < width; ++c) {
      vf total{};
      for_lanes(count, [&](int64_t i, int lanes) {
        total += load_n(t.residual.get() + c * kTileRows + i, lanes);
      });
      grad[width * ldw + c] += sum(total);
    }
  }

  void second_pass(const SecondPass& job) {
    if (!job.residual) pack(p.weight, &weight);
    Buffer mean_grad;
    pack(job.mean_grad, &mean_grad);
    const int64_t slab = slab_rows(p.rows, tile_rows), slabs = (p.rows + slab - 1) / slab;
    const Array<Tile> tiles(worker_count(p.threads, slabs));
    for (Tile& t : tiles) {
      t.residual.reserve(size_t(width * kTileRows));
      t.lanes.reserve(size_t(p.heads * kTileRows * VL));
    }
    run_tasks(p.threads, slabs, [&](int64_t index, int worker) {
      Tile* t = &tiles[worker];
      const int64_t end = min(p.rows, (index + 1) * slab);
      for (int64_t first = index * slab; first < end; first += tile_rows) {
        const int64_t count = min(tile_rows, end - first);
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
    const int64_t group = dot_group(p.classes, width * dim);
    float* lanes = t->lanes.get();
    clear(lanes, p.heads * kTileRows * VL);
    for_blocks(*t, count, p.classes, [&](const Block<T>& block, int64_t row) {
      for (int64_t head = 0; head < p.heads; ++head) {
        for (int64_t in_head = 0; in_head < p.classes; in_head += group) {
          const int64_t c = head * p.classes + in_head;
          kWeigh[size_t(min(group, p.classes - in_head) - 1)](
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
};

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
