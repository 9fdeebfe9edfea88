// The mean gradient of large heads, from stored residuals: in blocks of classes x columns, each
// summed over all rows by one worker. Slabs of rows would cost a sweep over C x D elements each.
#pragma once

#include "buffers-inl.h"
#include "packing-inl.h"
#include "prefetch-inl.h"
#include "products-inl.h"
#include "rows-inl.h"
#include "tasks-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

// Each block reads its columns of H and its classes of R once more, so they are as large as the
// order of add_outer lets the caches hold.
constexpr int64_t kGradClasses = (VL == 16 ? 18 : kOuterGroups) * kTileM;
constexpr int64_t kGradColumns = (VL == 16 ? 1 : 4) * kBlockD;
constexpr int64_t kGradRows = 4096;  // rows that a float32 partial sums

static_assert(kBlockD % kSquareColumns == 0, "a block of columns has whole sums of squares");

template <class T, class Op>
struct GradientBlocks {
  // Copied at a time. With AVX-512 a panel of columns and the packed residuals that it meets (46
  // words a row, or two rows) stay in a first-level cache of 32 KB.
  static constexpr int64_t kRows = VL == 16 && Op::kElements == 1 ? 12 * kTileM : kRowsMax;

  const Problem& p;
  const int64_t width, dim;

  explicit GradientBlocks(const Problem& problem)
      : p(problem), width(p.heads * p.classes), dim(p.dim) {}

  // After job.residual and job.counted are written.
  void add(const FirstPass& job) const {
    int64_t block_classes = kGradClasses, block_columns = kGradColumns;
    const auto class_blocks = [&] { return (width + block_classes - 1) / block_classes; };
    const auto column_blocks = [&] { return (dim + block_columns - 1) / block_columns; };
    // A block for every thread. Each number is summed over the rows in the same order whatever
    // block it lies in, so that this may go by the number of threads.
    while (class_blocks() * column_blocks() < p.threads.count) {
      if (block_columns > kBlockD)
        block_columns /= 2;
      else if (block_classes > kTileM)
        block_classes = round_up(block_classes / 2, kTileM);
      else
        break;
    }
    const int64_t classes_apart = class_blocks(), tasks = classes_apart * column_blocks();
    const int64_t per_block = (width + classes_apart - 1) / classes_apart;
    struct Scratch {
      Buffer tile, outer, grad;
      Array<double> total;
    };
    const Array<Scratch> scratch(worker_count(p.threads, tasks));
    for (Scratch& s : scratch) {
      s.tile.reserve(Tile<Op>::words(kRows, block_columns));
      s.outer.reserve(Products<Op>::outer_words(kRows));
      s.grad.reserve(size_t(per_block * block_columns + per_block));
      if (!job.grad_sum && p.rows > kGradRows) s.total.reset(per_block * block_columns);
    }
    const double inverse = job.grad_sum ? 0.0 : 1.0 / double(max<int64_t>(counted_rows(job), 1));
    run_tasks(p.threads, tasks, [&](int64_t index, int id) {
      const Scratch& s = scratch[id];
      const int64_t c = index % classes_apart * per_block;
      const int64_t d = index / classes_apart * block_columns;
      const int64_t classes = min(per_block, width - c);
      const int64_t columns = min(block_columns, dim - d);
      const Tile<Op> tile{kRows, columns, s.tile.get()};
      float* bias_part = s.grad.get() + classes * columns;
      for (int64_t start = 0; start < p.rows; start += kGradRows) {
        if (interrupted(p.threads)) return;
        const int64_t end = min(p.rows, start + kGradRows);
        clear(s.grad.get(), classes * (columns + 1));
        for (int64_t first = start; first < end; first += kRows) {
          const int64_t count = min(kRows, end - first);
          for (int64_t i = 0; i < count; ++i) {
            if (job.counted[first + i])
              pack_row(tile, i, feature_row<T>(p, first + i) + d);
            else
              tile.clear_row(i);
          }
          prepare_outer(tile, count);
          const float* residual = job.residual + first * width + c;
          const int64_t next = first + count;
          Prefetch prefetch(Products<Op>::outer_steps(count, classes, columns),
                            features_of<T>(p, next, kRows, d, columns),
                            residuals_of(p, job.residual, next, kRows, c, classes));
          Products<Op>::add_outer(tile, count, residual, width, classes, columns, s.grad.get(),
                                  columns, s.outer.get(), &prefetch);
          if (d == 0)
            for (int64_t i = 0; i < count; ++i)
              for (int64_t m = 0; m < classes; ++m) bias_part[m] += residual[i * width + m];
        }
        if (s.total.get()) add_to_total(s.total.get(), s.grad.get(), classes * columns);
        for (int64_t m = 0; job.grad_sum && m < classes; ++m)
          add_to_total(job.grad_sum + (c + m) * dim + d, s.grad.get() + m * columns, columns);
        if (d == 0) add_to_total(job.bias_grad_sum + c, bias_part, classes);
      }
      if (job.grad_sum) return;
      for (int64_t m = 0; m < classes; ++m)
        s.total.get() ? write_means(job, c + m, d, columns, s.total.get() + m * columns, inverse)
                      : write_means(job, c + m, d, columns, s.grad.get() + m * columns, inverse);
      if (s.total.get()) std::memset(s.total.get(), 0, size_t(classes * columns) * sizeof(double));
    });
  }

  int64_t counted_rows(const FirstPass& job) const {
    int64_t count = 0;
    for (int64_t row = 0; row < p.rows; ++row) count += job.counted[row] != 0;
    return count;
  }

  // Columns [first, first + columns) of a class: of G, and of the squares of its elements.
  template <class Sum>
  void write_means(const FirstPass& job, int64_t c, int64_t first, int64_t columns,
                   const Sum* total, double inverse) const {
    float* means = job.mean_grad + c * dim + first;
    const int64_t squares_a_class = (dim + kSquareColumns - 1) / kSquareColumns;
    for (int64_t start = 0; start < columns; start += kSquareColumns) {
      double squares[8] = {};
      const auto take = [&](int64_t d, int lane) {
        const double mean = double(total[d]) * inverse;
        means[d] = float(mean);
        squares[lane] += mean * mean;
      };
      const int64_t end = min(start + kSquareColumns, columns);
      int64_t d = start;
      for (; d + 8 <= end; d += 8)
        for (int lane = 0; lane < 8; ++lane) take(d + lane, lane);
      for (; d < end; ++d) take(d, 0);
      job.mean_squares[c * squares_a_class + (first + start) / kSquareColumns] =
          ((squares[0] + squares[1]) + (squares[2] + squares[3])) +
          ((squares[4] + squares[5]) + (squares[6] + squares[7]));
    }
  }
};

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
