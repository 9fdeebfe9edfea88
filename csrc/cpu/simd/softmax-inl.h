// Residual dl/dz in place of the logits, and the statistics of a row. Two layouts:
// one row with lanes along its classes (any loss), and VL rows at once with lanes along the rows
// (class ids, few classes). The losses of the Python package define both.
//
// The label's residual is -(sum of the other exponentials) / S, never p - 1, and the loss of a
// label that wins is log1p(sum of the others): exact for losses far below 1e-8.
#pragma once

#include <cmath>

#include "math-inl.h"
#include "rows-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

struct RowStats {
  float loss, residual_sqnorm, margin, entropy;
};

// Sums of long rows go through double every so often: float32 lanes alone drift with C.
constexpr int64_t kSumBlock = 4096;

// The logit of the label, the largest of the others and of all; poison is NaN where any logit is
// not finite, which a maximum and e^-inf = 0 would hide.
struct RowMax {
  float label, rival, top, poison;
};
inline RowMax row_max(float* z, int64_t n, int64_t label) {
  RowMax result{z[label], 0.0f, 0.0f, 0.0f};
  vf poison{}, top = splat(-kInfinity);
  for_lanes(n, [&](int64_t i, int lanes) { poison += load_n(z + i, lanes) * splat(0.0f); });
  z[label] = -kInfinity;
  for_lanes(n, [&](int64_t i, int lanes) { top = max(top, load_n(z + i, lanes, -kInfinity)); });
  z[label] = result.label;
  result.rival = max(top);
  result.top = max(result.rival, result.label);
  result.poison = sum(poison);
  return result;
}

// Sums over a row of e = exp(z - top): over those below the top, of e (z - top), and how many are
// at the top. Kept apart from the
// top's own 1, in which the digits of a small sum would be lost.
struct Exponentials {
  double below = 0.0, weighted = 0.0, ties = 0.0;
};

// exp(z - top) in place.
inline Exponentials exponentials(float* z, int64_t n, float top) {
  Exponentials result;
  for (int64_t start = 0; start < n; start += kSumBlock) {
    vf e_sum{}, ex_sum{}, tie_sum{};
    for_lanes(min(kSumBlock, n - start), [&](int64_t i, int lanes) {
      const vf x = load_n(z + start + i, lanes, -kInfinity) - splat(top);
      const vf e = exp(x);
      store_n(z + start + i, e, lanes);
      const vi tie = x == vf{};
      e_sum += select(tie, vf{}, e);
      tie_sum += select(tie, splat(1.0f), vf{});
      ex_sum += e * max(x, splat(-100.0f));  // 0 * -inf must stay 0
    });
    result.below += sum(e_sum);
    result.ties += sum(tie_sum);
    result.weighted += sum(ex_sum);
  }
  return result;
}

inline double row_sum(const float* z, int64_t n, float less) {
  double total = 0.0;
  for (int64_t start = 0; start < n; start += kSumBlock) {
    vf part{};
    for_lanes(min(kSumBlock, n - start), [&](int64_t i, int lanes) {
      part += load_n(z + start + i, lanes, less) - splat(less);
    });
    total += sum(part);
  }
  return total;
}

// z <- z * factor - offset; returns the sum of squares.
inline double scale_shift(float* z, int64_t n, float factor, float offset) {
  double total = 0.0;
  for (int64_t start = 0; start < n; start += kSumBlock) {
    vf part{};
    for_lanes(min(kSumBlock, n - start), [&](int64_t i, int lanes) {
      vf r = load_n(z + start + i, lanes) * splat(factor) - splat(offset);
      store_n(z + start + i, r, lanes);
      if (lanes < VL) r = load_n(z + start + i, lanes);  // zeros past the end
      part += r * r;
    });
    total += sum(part);
  }
  return total;
}

inline RowStats cross_entropy_id(float* z, int64_t classes, int64_t label, float smoothing,
                                 float weight) {
  const auto [label_logit, rival, top, poison] = row_max(z, classes, label);
  const float shift = label_logit - top;
  const double mean_shift = smoothing != 0.0f ? row_sum(z, classes, top) / double(classes) : 0.0;
  z[label] = -kInfinity;
  const auto [below, weighted, ties] = exponentials(z, classes, top);
  const double label_exp = std::exp(double(shift)), others = below + ties;
  const double but_one = shift == 0.0f ? others : below + (ties - 1.0) + label_exp;
  const double total = 1.0 + but_one, log_total = std::log1p(but_one);
  RowStats stats;
  double loss = log_total - shift;
  stats.entropy = float(max(0.0, log_total - (weighted + label_exp * double(shift)) / total));
  stats.margin = label_logit - rival;
  if (smoothing != 0.0f) loss = (1.0 - smoothing) * loss + smoothing * (log_total - mean_shift);
  stats.loss = float(loss * weight) + poison;
  const float offset = smoothing / float(classes) * weight;
  z[label] = 0.0f;
  double squares = scale_shift(z, classes, float(weight / total), offset);
  const float label_residual = float((-others / total + smoothing) * weight) - offset;
  squares += double(label_residual) * label_residual - double(offset) * offset;
  z[label] = label_residual;
  stats.residual_sqnorm = float(squares);
  return stats;
}

inline RowStats cross_entropy_soft(float* z, const float* target, int64_t classes, float smoothing,
                                   float weight) {
  const int64_t label = index_of_largest(target, classes);
  const auto [label_logit, rival, top, poison] = row_max(z, classes, label);
  const float keep = 1.0f - smoothing, spread = smoothing / float(classes);
  const int64_t winner = index_of_largest(z, classes);
  double dot = 0.0, other_targets = 0.0;  // of all but the winner
  for (int64_t c = 0; c < classes; ++c) {
    const float t = keep * target[c] + spread;
    dot += double(t) * (z[c] - top);
    if (c != winner) other_targets += t;
  }
  const double winner_target = keep * target[winner] + spread, mass = other_targets + winner_target;
  z[winner] = -kInfinity;
  const auto [below, weighted, ties] = exponentials(z, classes, top);
  const double others = below + ties, total = 1.0 + others, log_total = std::log1p(others);
  double squares = 0.0;
  const float factor = float(mass / total);
  for (int64_t c = 0; c < classes; ++c) {
    z[c] = weight * (z[c] * factor - (keep * target[c] + spread));
    if (c != winner) squares += double(z[c]) * z[c];
  }
  // Of the winner p may round to 1: (other targets) p - t (1 - p) loses nothing.
  z[winner] = weight * float(other_targets / total - winner_target * (others / total));
  squares += double(z[winner]) * z[winner];
  return {float(weight * (mass * log_total - dot)) + poison, float(squares), label_logit - rival,
          float(max(0.0, log_total - weighted / total))};
}

inline RowStats binary_cross_entropy(float* z, const float* target, int64_t classes, float weight) {
  double loss = 0.0, squares = 0.0, entropy = 0.0;
  float margin = kInfinity;
  for (int64_t c = 0; c < classes; ++c) {
    const float x = z[c], t = target[c], e = exp(-absolute(x)), log_sum = log1p(e);
    const float small = e / (1.0f + e), large = 1.0f / (1.0f + e);
    const float p = x >= 0.0f ? large : small, not_p = x >= 0.0f ? small : large;
    const float if_off = max(x, 0.0f) + log_sum, if_on = max(-x, 0.0f) + log_sum;
    margin = min(margin, t >= 0.5f ? x : -x);
    loss += (1.0 - t) * if_off + double(t) * if_on;
    entropy += double(p) * if_on + double(not_p) * if_off;
    z[c] = weight * ((1.0f - t) * p - t * not_p);
    squares += double(z[c]) * z[c];
  }
  return {float(loss * weight), float(squares), margin, float(entropy)};
}

inline RowStats mean_squared_error(float* z, const float* target, int64_t classes, float weight) {
  double loss = 0.0;
  for (int64_t c = 0; c < classes; ++c) {
    const float error = z[c] - target[c];
    loss += double(error) * error;
    z[c] = 2.0f * weight * error;
  }
  const double squares = 4.0 * double(weight) * weight * loss;
  return {float(loss * weight), float(squares), kNaN, kNaN};
}

inline RowStats row_stats(const Problem& p, int64_t row, float* z) {
  const float weight = p.sample_weight ? p.sample_weight[row] : 1.0f;
  if (!p.targets) return cross_entropy_id(z, p.classes, p.labels[row], p.label_smoothing, weight);
  const float* target = p.targets + row * p.classes;
  if (p.loss == Loss::kCrossEntropy)
    return cross_entropy_soft(z, target, p.classes, p.label_smoothing, weight);
  if (p.loss == Loss::kBinaryCrossEntropy)
    return binary_cross_entropy(z, target, p.classes, weight);
  return mean_squared_error(z, target, p.classes, weight);
}

// VL rows at once: z[c * stride + lane] is the logit of class c in row `lane`, overwritten by the
// residual; labels and weights of the rows in label[], weight.
struct LaneStats {
  vf loss, residual_sqnorm, margin, entropy;
};

inline LaneStats cross_entropy_lanes(float* z, int64_t stride, int64_t classes, vi label,
                                     float smoothing, vf weight) {
  vf label_logit{}, rival = splat(-kInfinity), raw_sum{}, poison{};
  for (int64_t c = 0; c < classes; ++c) {
    const vf x = load(z + c * stride);
    const vi mine = label == splat_int(int32_t(c));
    label_logit = select(mine, x, label_logit);
    rival = select(mine, rival, max(rival, x));
    raw_sum += x;
    poison += x * splat(0.0f);  // NaN where a logit is not finite: max and exp would hide it
  }
  const vf top = max(rival, label_logit), shift = label_logit - top;
  vf below{}, ties{}, weighted{};
  for (int64_t c = 0; c < classes; ++c) {
    const vf x = load(z + c * stride) - top, e_all = exp(x);
    const vf e = select(label == splat_int(int32_t(c)), vf{}, e_all);
    store(z + c * stride, e);
    const vi tie = e == splat(1.0f);
    below += select(tie, vf{}, e);
    ties += select(tie, splat(1.0f), vf{});
    weighted += e * max(x, splat(-100.0f));
  }
  const vf one = splat(1.0f), others = below + ties, label_exp = exp(shift);
  const vf but_one = select(shift == vf{}, others, below + (ties - one) + label_exp);
  const vf total = one + but_one, log_total = log1p(but_one);
  LaneStats stats;
  vf loss = log_total - shift;
  stats.entropy =
      max(vf{}, log_total - (weighted + label_exp * max(shift, splat(-100.0f))) / total);
  stats.margin = label_logit - rival;
  const float spread = smoothing / float(classes);
  if (smoothing != 0.0f) {
    const vf mean_shift = raw_sum / splat(float(classes)) - top;
    loss = splat(1.0f - smoothing) * loss + splat(smoothing) * (log_total - mean_shift);
  }
  stats.loss = loss * weight + poison;
  const vf factor = weight / total, offset = weight * splat(spread);
  const vf label_residual = (splat(smoothing) - others / total) * weight - offset;
  vf squares{};
  for (int64_t c = 0; c < classes; ++c) {
    const vf other = load(z + c * stride) * factor - offset;
    const vf r = select(label == splat_int(int32_t(c)), label_residual, other);
    store(z + c * stride, r);
    squares += r * r;
  }
  stats.residual_sqnorm = squares;
  return stats;
}

// Statistics of rows [row, row + lanes) of one head to out; overflows of |r|^2 (|h|^2 + 1) and of
// the loss to the status word.
inline void store_lanes(const FirstPass& out, int64_t head, int64_t row, int lanes,
                        const LaneStats& stats, const float* feature_sqnorm, StatusWord* status) {
  const int64_t at = head * out.stat_stride + row;
  store_n(out.loss + at, stats.loss, lanes);
  store_n(out.residual_sqnorm + at, stats.residual_sqnorm, lanes);
  store_n(out.margin + at, stats.margin, lanes);
  store_n(out.entropy + at, stats.entropy, lanes);
  const vf ones = splat(out.problem.bias ? 1.0f : 0.0f);
  const vf size = stats.residual_sqnorm * (load_n(feature_sqnorm, lanes) + ones) + stats.loss;
  if (finite(sum(size * splat(0.0f)))) return;
  for (int lane = 0; lane < lanes; ++lane)
    if (!finite(size[lane])) status->note(kStatusLogits, out.problem.first_row + row + lane);
}

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
