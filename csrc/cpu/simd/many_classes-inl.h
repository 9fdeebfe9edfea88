// Any number of classes: tiles of rows are copied (and widened) once into cache-sized blocks, and
// the products run as register tiles on packed operands.
//
// First pass: pack tile, Z = H W^T, residual rows in place, G += R^T H from the same tile.
// Matrix units wait for large W, and so does every core whose tile has few rows because they are
// long: where nothing but Z needs the rows, a tile is then of kBlockD columns at a time and of more
// rows, past which W goes each time it is read.
// Each slab of rows has a float32 partial of G; a large G (split_grad) is made afterwards from the
// stored residuals (gradient_blocks-inl.h).
// Second pass: pack tile, S = H G^T, a = row sums of R o S.
//
// With pairs of bfloat16 as words (Op) features, weights, residuals and G are rounded as operands
// alone: sums, logits and residuals are float32. Rounding would change what G holds of a row's own
// gradient, the largest term of N a - q where a class has few rows; a is put right by exactly that.
//
// FLOPs: 4 N C D and 2 N C D; bytes: H once a pass (twice with split_grad).
#pragma once

#include "buffers-inl.h"
#include "gradient_blocks-inl.h"
#include "memory.h"
#include "packing-inl.h"
#include "prefetch-inl.h"
#include "products-inl.h"
#include "rows-inl.h"
#include "softmax-inl.h"
#include "softmax_tiles-inl.h"
#include "tasks-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

constexpr int64_t kLeastRows = 4 * kTileM;  // and kRowsMax at most

// Rows of a tile. Short vectors have small register tiles, whose sums must be long to be worth
// loading and storing: their copy stays within a share of the third-level cache. With AVX-512 it
// takes a quarter of the second, and the next tile, which is prefetched, another one: the other
// half is for W, G and residuals.
inline int64_t tile_bytes() { return VL == 16 ? second_level_cache_bytes() / 4 : int64_t{1} << 22; }
inline int64_t rows_that_fit(int64_t dim) { return tile_bytes() / (4 * dim); }
inline int64_t rows_of_tile(int64_t dim) {
  return clamp<int64_t>(rows_that_fit(dim) / kTileM * kTileM, kLeastRows, kRowsMax);
}

// Rows of a tile that has a block of columns at a time, from so many elements of W on: few enough
// to share out, and for their products not to take more than so many bytes a thread.
constexpr int64_t kStreamedElements = int64_t{1} << 18;
constexpr int64_t kStreamedBytes = int64_t{1} << 24;
inline int64_t rows_of_streamed_tile(int64_t rows, int64_t width) {
  const int64_t aim = min(min((rows + 15) / 16, kStreamedBytes / (4 * width)), kRowsMax);
  return clamp<int64_t>(aim / kTileM * kTileM, kLeastRows, kRowsMax);
}

inline int64_t rows_a_thread(const Problem& p) {
  return (p.rows + p.threads.count - 1) / p.threads.count;
}

template <class T, class Op>
struct ManyClasses {
  const Problem& p;
  const int64_t width, dim;
  Panels<Op> weight;
  Buffer bias;
  // Of a worker's tile; set by cut.
  bool whole_rows = true;
  int64_t tile_rows = 0;

  explicit ManyClasses(const Problem& problem)
      : p(problem), width(p.heads * p.classes), dim(p.dim) {}

  void cut(bool keep_rows) {
    const bool wants_rows = Op::kMatrixUnits || rows_that_fit(dim) < kLeastRows;
    whole_rows = keep_rows || !wants_rows || width * dim < kStreamedElements;
    tile_rows = whole_rows ? rows_of_tile(dim) : rows_of_streamed_tile(p.rows, width);
    // Few rows: a tile for every thread. What a row gets does not depend on the others of its tile,
    // so that this may go by the number of threads.
    if (!keep_rows) tile_rows = min(tile_rows, round_up(rows_a_thread(p), kTileM));
  }

  // Bias padded to whole panels, zeros without one.
  static void pack_bias(const float* source, const Panels<Op>& panels, Buffer* to) {
    const int64_t padded = panels.padded() + panels.tail();
    to->reserve(size_t(padded));
    clear(to->get(), padded);
    if (source) std::memcpy(to->get(), source, size_t(panels.width) * 4);
  }

  struct Worker {
    Buffer tile, residual, product, scratch, grad;
    Array<float> norms, packed_norms;
    Array<uint8_t> counted;
    StatusWord status;
  };

  Tile<Op> tile_of(const Worker& w) const {
    return {tile_rows, whole_rows ? dim : min(dim, kBlockD), w.tile.get()};
  }
  // One block of columns, where the worker has it.
  Tile<Op> block_of(const Worker& w, int64_t block) const {
    const int64_t before = whole_rows ? block * Tile<Op>::block_words(tile_rows) : 0;
    return {tile_rows, min(kBlockD, dim - block * kBlockD), w.tile.get() + before};
  }

  void equip(const Array<Worker>& workers, bool residual, bool product) const {
    for (Worker& w : workers) {
      w.tile.reserve(Tile<Op>::words(tile_rows, tile_of(w).dim));
      if (residual) w.residual.reserve(size_t(tile_rows * width));
      w.scratch.reserve(Products<Op>::outer_words(tile_rows));
      if (product) w.product.reserve(size_t(tile_rows * width));
      w.norms.reset(tile_rows);
      w.packed_norms.reset(tile_rows);
      w.counted.reset(tile_rows);
    }
  }

  void choose_rows(Worker* w, int64_t first, int64_t count, const uint8_t* counted) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = first + i;
      w->counted[i] = counted ? counted[row] : takes_part(p, row, &w->status);
      w->norms[i] = w->packed_norms[i] = 0.0f;
    }
  }

  ChosenRows chosen(Worker* w, int64_t first, int64_t count) const {
    return {p, first, count, w->counted.get(), w->norms.get(), &w->status};
  }

  // Copies the columns from `column` on that the tile has; rows that do not count become zeros.
  void pack(Worker* w, int64_t first, int64_t count, const Tile<Op>& tile, int64_t column) const {
    for (int64_t i = 0; i < count; ++i) {
      if (!w->counted[i]) {
        tile.clear_row(i);
        continue;
      }
      const Norms norms = pack_row(tile, i, feature_row<T>(p, first + i) + column);
      w->norms[i] += norms.exact;
      w->packed_norms[i] += norms.packed;
    }
  }

  // Once all columns have been seen: logits of left out rows become zeros.
  void leave_out_nonfinite(Worker* w, int64_t first, int64_t count, float* z) const {
    for (int64_t i = 0; i < count; ++i) {
      if (!w->counted[i] || finite(w->norms[i])) continue;
      if (!has_nonfinite(p, first + i, feature_row<T>(p, first + i), &w->status)) continue;
      w->counted[i] = false;
      w->norms[i] = w->packed_norms[i] = 0.0f;
      tile_of(*w).clear_row(i);
      clear(z + i * width, width);
    }
  }

  // out (count, width) = H panels^T + bias.
  struct Factor {
    const Panels<Op>* panels;
    const float* bias;
    float* out;
  };

  // Products of the chosen rows with N matrices, block by block of columns. A tile of whole rows
  // takes steps of `prefetch`; others prefetch their own next block, and at last the first one of
  // the rows at `next` and `also`.
  template <int N>
  void multiply_rows(Worker* w, int64_t first, int64_t count, const Factor (&factors)[N],
                     int64_t next, const RowBytes& also, Prefetch* prefetch) const {
    const int64_t blocks = (dim + kBlockD - 1) / kBlockD;
    if (whole_rows) pack(w, first, count, tile_of(*w), 0);
    for (int64_t block = 0; block < blocks; ++block) {
      Prefetch next_block;
      if (!whole_rows) {
        pack(w, first, count, block_of(*w, block), block * kBlockD);
        const bool last = block + 1 == blocks;
        const int64_t column = last ? 0 : (block + 1) * kBlockD;
        next_block = {
            N * Products<Op>::steps(count, *factors[0].panels) / blocks,
            features_of<T>(p, last ? next : first, tile_rows, column, min(kBlockD, dim - column)),
            last ? also : RowBytes{}};
        prefetch = &next_block;
      }
      for (const Factor& f : factors)
        Products<Op>::times_panels(block_of(*w, block), count, *f.panels, block, f.bias, f.out,
                                   width, prefetch);
    }
  }

  void first_pass(const FirstPass& job) {
    cut(!p.split_grad);
    weight.pack(p.weight, width, dim, p.threads);
    pack_bias(p.bias, weight, &bias);
    const int64_t slab = p.split_grad ? tile_rows : slab_rows(p.rows, tile_rows);
    const int64_t slabs = (p.rows + slab - 1) / slab;
    const Array<Worker> workers(worker_count(p.threads, slabs));
    equip(workers, !job.residual, false);
    if (!p.split_grad)
      for (Worker& w : workers) w.grad.reserve(size_t(width * (dim + 1)));
    Turnstile order;
    run_tasks(p.threads, slabs, [&](int64_t index, int id) {
      Worker* w = &workers[id];
      float* grad = w->grad.get();
      if (!p.split_grad) clear(grad, width * (dim + 1));
      const int64_t end = min(p.rows, (index + 1) * slab);
      for (int64_t first = index * slab; first < end; first += tile_rows) {
        const int64_t count = min(tile_rows, end - first);
        int64_t steps = Products<Op>::steps(count, weight);
        if (!p.split_grad) steps += Products<Op>::outer_steps(count, width, dim);
        // Most likely the worker's next.
        const int64_t next =
            first + tile_rows < end ? first + tile_rows : (index + p.threads.count) * slab;
        Prefetch prefetch(steps, features_of<T>(p, next, tile_rows, 0, dim));
        float* residual = job.residual ? job.residual + first * width : w->residual.get();
        choose_rows(w, first, count, nullptr);
        multiply_rows(w, first, count, {Factor{&weight, bias.get(), residual}}, next, {},
                      &prefetch);
        leave_out_nonfinite(w, first, count, residual);
        tile_residuals(chosen(w, first, count), residual, &job);
        std::memcpy(job.feature_sqnorm + first, w->norms.get(), size_t(count) * 4);
        std::memcpy(job.counted + first, w->counted.get(), size_t(count));
        if (p.split_grad) continue;
        const Tile<Op> tile = tile_of(*w);
        prepare_outer(tile, count);
        Products<Op>::add_outer(tile, count, residual, width, width, dim, grad, dim,
                                w->scratch.get(), &prefetch);
        add_bias(residual, count, grad + width * dim);
      }
      if (p.split_grad) return;
      in_turn(&order, index, [&] {
        add_to_total(job.grad_sum, grad, width * dim);
        add_to_total(job.bias_grad_sum, grad + width * dim, width);
      });
    });
    for (const Worker& w : workers) w.status.merge_into(job.status);
    if (p.split_grad) GradientBlocks<T, Op>(p).add(job);
  }

  // sums[c] += column sums of the residual rows.
  void add_bias(const float* residual, int64_t count, float* sums) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < width; ++c) sums[c] += residual[i * width + c];
  }

  void second_pass(const SecondPass& job) {
    cut(false);
    if (!job.residual) {
      weight.pack(p.weight, width, dim, p.threads);
      pack_bias(p.bias, weight, &bias);
    }
    Panels<Op> mean_grad;
    Buffer mean_bias;
    mean_grad.pack(job.mean_grad, width, dim, p.threads);
    pack_bias(job.mean_bias_grad, mean_grad, &mean_bias);
    const int64_t tiles = (p.rows + tile_rows - 1) / tile_rows;
    const Array<Worker> workers(worker_count(p.threads, tiles));
    equip(workers, !job.residual, true);
    run_tasks(p.threads, tiles, [&](int64_t index, int id) {
      Worker* w = &workers[id];
      const int64_t first = index * tile_rows, count = min(tile_rows, p.rows - first);
      const int64_t next = first + p.threads.count * tile_rows;
      const Factor alignments{&mean_grad, mean_bias.get(), w->product.get()};
      Prefetch prefetch(Products<Op>::steps(count, mean_grad),
                        features_of<T>(p, next, tile_rows, 0, dim));
      choose_rows(w, first, count, job.counted);
      const float* residual = job.residual + first * width;
      if (job.residual) {
        multiply_rows(w, first, count, {alignments}, next,
                      residuals_of(p, job.residual, first, count, 0, width), &prefetch);
      } else {
        const Factor logits{&weight, bias.get(), w->residual.get()};
        multiply_rows(w, first, count, {alignments, logits}, next, {}, &prefetch);
        tile_residuals(chosen(w, first, count), w->residual.get(), nullptr);
        residual = w->residual.get();
      }
      for (int64_t i = 0; i < count; ++i)
        for (int64_t head = 0; head < p.heads; ++head) {
          const int64_t at = i * width + head * p.classes;
          float* alignment = job.alignment + head * job.alignment_stride + first + i;
          *alignment = dot(residual + at, w->product.get() + at, p.classes);
          if (job.self_term_scale != 0.0)
            *alignment +=
                float(job.self_term_scale *
                      lost_self_term(Op{}, residual + at, w->norms[i], w->packed_norms[i]));
        }
    });
  }

  // |r|^2 |h|^2 less what the rounded operands of the gradient made of it.
  double lost_self_term(const Single&, const float*, float, float) const { return 0.0; }
#ifdef MOSO_FAST_BF16_UNITS
  double lost_self_term(const Pair&, const float* residual, float exact, float packed) const {
    double of_residual = 0.0, of_features = 0.0;
    for (int64_t start = 0; start < p.classes; start += kSumBlock) {
      vf lost{}, squares{};
      for_lanes(min(kSumBlock, p.classes - start), [&](int64_t i, int lanes) {
        const vf r = load_n(residual + start + i, lanes);
        lost += r * (r - round_to_bf16(r));
        squares += r * r;
      });
      of_residual += sum(lost);
      of_features += sum(squares);
    }
    return of_residual * packed + of_features * (double(exact) - packed);
  }
#endif

  static float dot(const float* x, const float* y, int64_t n) {
    double total = 0.0;
    for (int64_t start = 0; start < n; start += kSumBlock) {
      vf part{};
      for_lanes(min(kSumBlock, n - start), [&](int64_t i, int lanes) {
        part += load_n(x + start + i, lanes) * load_n(y + start + i, lanes);
      });
      total += sum(part);
    }
    return float(total);
  }
};

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
