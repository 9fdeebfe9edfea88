// Few classes, the kernels: dot products of rows with all classes, the gradient of a tile, and the
// weighted sum of the second pass.
//
// The R rows at work lie far apart in the tile, so that each is in a page of its own: hardware
// prefetchers follow one stream a page, and lose two rows that they meet there in turn. All groups
// of classes take a row while it is in the first-level cache.
#pragma once

#include "matrix-inl.h"
#include "scalar-inl.h"
#include "vectors-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

constexpr int kFewClasses = 2 * kTileM;
constexpr int kDotClasses = VL == 16 ? 12 : 5;
constexpr int kTileRows = 96;  // at most; divisible by kRowStep
constexpr int kRowStep = 24;   // divisible by every count of rows below

// Rows whose sums fit the registers beside C classes.
constexpr int dot_rows(int classes) {
  if (VL == 16) {
    constexpr int rows[] = {8, 6, 6, 4, 4, 3, 3, 3, 2, 2, 2, 2};
    return rows[classes - 1];
  }
  constexpr int rows[] = {4, 3, 2, 2, 2};
  return rows[classes - 1];
}

// Classes of a group where W does not stay in the first-level cache: more rows at a time read it
// less often, as long as the rows that all groups share stay there.
constexpr int kFarDotClasses = VL == 16 ? 6 : kDotClasses;
constexpr int64_t kNearBytes = 48 * 1024, kFarRows = 4;

// Classes of the groups that `classes` are cut into: even ones of at most `limit`.
constexpr int64_t even_group(int64_t classes, int limit) {
  const int64_t groups = (classes + limit - 1) / limit;
  return (classes + groups - 1) / groups;
}

// Rows that go through all groups together.
constexpr int64_t shared_rows(int64_t classes, int64_t group) {
  return least_common_multiple(dot_rows(int(group)), dot_rows(int((classes - 1) % group + 1)));
}

// Classes that go over a row together; W has `elements` in all.
inline int64_t dot_group(int64_t classes, int64_t elements) {
  const int64_t far = even_group(classes, kFarDotClasses);
  const bool use_far = elements * 4 > kNearBytes && shared_rows(classes, far) <= kFarRows;
  return use_far ? far : even_group(classes, kDotClasses);
}

constexpr bool rows_fit_groups() {
  const int limits[] = {kDotClasses, kFarDotClasses};
  for (int limit : limits)
    for (int classes = 1; classes <= kFewClasses; ++classes)
      if (kRowStep % shared_rows(classes, even_group(classes, limit))) return false;
  return kTileRows % kRowStep == 0 && kTileRows % VL == 0;
}
static_assert(rows_fit_groups());

// Of features: they stay in the second-level cache.
constexpr int64_t kFewTileBytes = (VL == 16 ? 384 : 192) * 1024;

// How far ahead in a row (and then in the next) memory is prefetched while the arithmetic of three
// classes or more goes on; fewer classes wait for memory anyway.
constexpr int64_t kPrefetchBytes = VL == 16 ? 2048 : 1024;

// Rows of a tile.
template <class T>
int64_t rows_of_few_classes(int64_t dim) {
  const int64_t rows = kFewTileBytes / (dim * int64_t(sizeof(T))) / kRowStep * kRowStep;
  return clamp<int64_t>(rows, kRowStep, kTileRows);
}

// visit(column, place) for all columns of a row of W, G or its sums: they lie in the order that
// reads of T give, with zeros up to a whole read.
template <class T, class Visit>
MOSO_INLINE void for_places(int64_t dim, const Visit& visit) {
  constexpr int P = kParts<T>, kRead = P * VL;
  int64_t d = 0;
  for (; d + kRead <= dim; d += kRead)
    for (int i = 0; i < kRead; ++i) visit(d + i, d + i % P * VL + i / P);
  for (int i = 0; d + i < dim; ++i) visit(d + i, d + i % P * VL + i / P);
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
  constexpr int P = kParts<T>;
  vf h[R];
  int64_t d = 0;
  for (; d + P * VL <= dim; d += P * VL) {
#pragma GCC unroll 2
    for (int part = 0; part < P; ++part) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        if (C > 2 && part == 0) __builtin_prefetch(rows[r] + d + kPrefetchBytes / sizeof(T));
        h[r] = load_part(rows[r] + d, part);
      }
      step(h, d + part * VL);
    }
  }
  if (d < dim) {
#pragma GCC unroll 2
    for (int part = 0; part < P; ++part) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) h[r] = load_first_part(rows[r] + d, int(dim - d), part);
      step(h, d + part * VL);
    }
  }
}

// lanes[c * R + r] = sum of the lanes of acc[r][c]; with Norm those of norm after them.
template <bool Norm, int R, int C>
MOSO_INLINE void sum_lanes(const vf (&acc)[R][C], const vf (&norm)[R], float* lanes) {
  constexpr int sums = R * C + (Norm ? R : 0);
#pragma GCC unroll 8
  for (int i = 0; i < sums; i += VL) {
    vf each[VL];
#pragma GCC unroll 16
    for (int j = 0; j < VL; ++j) {
      const int at = i + j;
      each[j] = at < R * C ? acc[at % R][at / R] : at < sums ? norm[at % R] : vf{};
    }
    store(lanes + i, sum_each(each));
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
    sum_lanes<First>(acc, norm, lanes);
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

// g[m * ldg + v * VL] += sum over rows of r[m * kTileRows + row] * rows[row][d...], where V vectors
// begin at column d; but for Whole only the first `columns` exist.
template <int M, int V, bool Whole, class T>
inline void add_outer_block(const T* const* rows, int64_t count, int64_t d, const float* r,
                            float* g, int64_t ldg, int columns) {
  constexpr int P = kParts<T>;
  vf acc[M][V];
#pragma GCC unroll 14
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[m][v] = load(g + m * ldg + v * VL);
  for (int64_t k = 0; k < count; ++k) {
    vf h[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const T* at = rows[k] + d + v / P * P * VL;
      h[v] = Whole ? load_part(at, v % P) : load_first_part(at, columns, v % P);
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
    for (int v = 0; v < V; ++v) store(g + m * ldg + v * VL, acc[m][v]);
}

// The same for all dim columns of g (M, ldg).
template <int M, class T>
inline void add_outer_rows(const T* const* rows, int64_t count, int64_t dim, const float* r,
                           float* g, int64_t ldg) {
  constexpr int P = kParts<T>, V = outer_vectors(M) / P * P;
  int64_t d = 0;
  for (; d + V * VL <= dim; d += V * VL)
    add_outer_block<M, V, true>(rows, count, d, r, g + d, ldg, V * VL);
  for (; d + P * VL <= dim; d += P * VL)
    add_outer_block<M, P, true>(rows, count, d, r, g + d, ldg, P * VL);
  if (d < dim) add_outer_block<M, P, false>(rows, count, d, r, g + d, ldg, int(dim - d));
}

// Adds a block's share of the sum over C classes of r <h, G>, lane by lane: VL elements a row of
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

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
