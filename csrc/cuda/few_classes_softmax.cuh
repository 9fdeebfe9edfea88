// Softmax cross-entropy of a tile whose logits lie in shared memory: residuals and statistics.
//
// For logits z of one (row, head), label y, m = max_c z_c, S = sum of e^(z_c - m), p_c = e^(z_c -
// m) / S, smoothing eps and sample weight w:
//
//   loss = w [(1 - eps) (log S + m - z_y) + eps (log S + mean_c(m - z_c))]
//   r_c  = w (p_c - eps / C)   c != y;   r_y = w (-(sum_{c != y} e^(z_c - m)) / S + eps - eps / C)
//
// Nothing small is a difference of things that are not: 1 - p_y is a sum over the other classes,
// log S is log1p of S without its largest term. `lanes` neighbouring threads share an item
// (row, head), take its classes in turn and meet by shuffles:
//
//   item 0: lanes 0 .. L-1 | item 1: lanes L .. 2L-1 | ..      L = 4 .. 32, all 256 threads busy
#pragma once

#include "operands.cuh"

namespace moso_fast::few_classes {

MOSO_DEVICE bool any_lane(bool value, int lanes) {
  return combine_lanes(value ? 1.0f : 0.0f, lanes, Max{}) != 0.0f;
}

MOSO_DEVICE int lanes_per_item(int items) {
  int lanes = 4;
  while (lanes < kLanes && items * lanes * 2 <= kThreads) lanes *= 2;
  return lanes;
}

// What a (row, head) needs besides its logits.
struct Item {
  bool live;    // takes part: counts, and no check failed so far
  int classes;  // 0 where the item does not exist and its lanes only keep their warp company
  int label;
  float weight;
};

struct RowStats {
  float loss, residual_sqnorm, margin, entropy;
};

// What makes probabilities of a row's logits. Of the exponentials the largest one, e^0 = 1, is left
// out of every sum and added last: the digits of small sums would be lost beside it.
struct Softmax {
  float top;          // the largest logit
  float scale;        // e^(rival - top)
  float label_power;  // e^(label - top)
  float log_sum;      // logarithm of the sum of all e^(z - top)
  float inverse;      // 1 / that sum
  float not_label;    // 1 - the label's probability, as the sum of the others'
};

// `rival`: the largest logit that is not the label's; `neither`: sum of e^(z - rival) over the
// classes that are neither of the two.
MOSO_DEVICE Softmax softmax_of(float label_logit, float rival, float neither) {
  const bool wins = label_logit >= rival;
  Softmax s;
  s.top = wins ? label_logit : rival;
  const float step = device::exponential((wins ? rival : label_logit) - s.top);
  s.scale = wins ? step : 1.0f;
  s.label_power = wins ? 1.0f : step;
  const float others = (1.0f + neither) * s.scale;
  const float but_one = wins ? others : neither + step;
  s.log_sum = device::logarithm1p(but_one);
  s.inverse = 1.0f / (1.0f + but_one);
  s.not_label = others * s.inverse;
  return s;
}

// Takes over a rival of another lane; of equal ones the first class stays.
MOSO_DEVICE void combine_rivals(float& rival, int& rival_at, int mask) {
  const float other = device::shuffle_xor(rival, mask);
  const int other_at = device::shuffle_xor(rival_at, mask);
  if (other > rival || (other == rival && other_at < rival_at)) {
    rival = other;
    rival_at = other_at;
  }
}

// Whether a staged row has an element that is not finite, as far as lanes `begin`, `begin` +
// `step`,
// .. of its 16 bytes show.
template <Feature F>
MOSO_DEVICE bool has_hole(const FirstLayout& layout, uint32_t features, int row, int begin,
                          int step) {
  bool hole = false;
  MOSO_NO_UNROLL
  for (int c = begin; c < layout.row_bytes / 16; c += step)
    hole = hole || !all_finite<F>(device::shared_load<Words4>(
                       features + feature_offset(row, c, layout.pitch)));
  return hole;
}

// Names a row with a label out of range, or with a hole, in the status word.
MOSO_DEVICE void report_row(const FirstPass& p, int at, bool label_fits, bool hole) {
  if (!label_fits) device::atomic_min(p.status + kStatusLabel, p.first_row + at);
  if (hole) device::atomic_min(p.status + kStatusFeature, p.first_row + at);
}

// Statistics of a row for one head; where they overflow, in the status word.
MOSO_DEVICE void store_stats(const FirstPass& p, int head, int at, const RowStats& stats, bool live,
                             float norm) {
  if (live && !is_finite(stats.loss + stats.residual_sqnorm * norm))
    device::atomic_min(p.status + kStatusLogits, p.first_row + at);
  const int64_t to = head * p.stat_stride + at;
  device::global_store(p.loss + to, stats.loss);
  device::global_store(p.residual_sqnorm + to, stats.residual_sqnorm);
  device::global_store(p.margin + to, stats.margin);
  device::global_store(p.entropy + to, stats.entropy);
}
// What all heads share of it.
MOSO_DEVICE void store_row(const FirstPass& p, int at, bool counted, float norm) {
  device::global_store(p.feature_sqnorm + at, counted ? norm : 0.0f);
  device::global_store(p.counted + at, uint8_t(counted));
}

// Logits of lanes c = lane, lane + lanes, .. of one item at `logits` (bytes) become residuals.
// Terms of the residuals go to `residuals`. All lanes return the same statistics.
template <int Terms>
MOSO_DEVICE RowStats softmax_item(const FirstPass& p, int tiles, const Item& item, int row,
                                  int head, int lane, int lanes) {
  const FirstLayout& layout = p.layout;
  const int classes = item.classes;
  const uint32_t line = layout.logits + 4 * uint32_t(row * layout.logit_stride + head * classes);

  // Sum of the slices; the label's logit, the largest other one and the first class that has it.
  float label_logit = -kInfinity, rival = -kInfinity;
  int rival_at = classes;
  bool finite = true;
  for (int c = lane; c < classes; c += lanes) {
    float z = p.bias ? device::global_load(p.bias + head * classes + c) : 0.0f;
    for (int s = 0; s < layout.slices; ++s)
      z += device::shared_load<float>(line + s * layout.slice_bytes + 4 * c);
    device::shared_store(line + 4 * c, z);
    finite = finite && is_finite(z);
    if (c == item.label) {
      label_logit = z;
    } else if (z > rival) {
      rival = z;
      rival_at = c;
    }
  }
  for (int mask = lanes / 2; mask > 0; mask /= 2) combine_rivals(rival, rival_at, mask);
  label_logit = combine_lanes(label_logit, lanes, Max{});
  finite = !any_lane(!finite, lanes);

  // Sum over the classes that are neither the label nor that one.
  float neither = 0.0f;
  for (int c = lane; c < classes; c += lanes)
    if (c != item.label && c != rival_at)
      neither += device::exponential(device::shared_load<float>(line + 4 * c) - rival);
  neither = combine_lanes(neither, lanes, Add{});
  const Softmax s = softmax_of(label_logit, rival, neither);
  const float spread = p.smoothing / float(p.classes);
  const bool sane = item.live && finite;

  float squares = 0.0f, heat = 0.0f, cost = 0.0f;
  for (int c = lane; c < classes; c += lanes) {
    const float below = s.top - device::shared_load<float>(line + 4 * c);
    const float e = device::exponential(-below);
    float r = c == item.label ? -s.not_label : e * s.inverse;
    if (p.smoothing != 0.0f) r += c == item.label ? p.smoothing - spread : -spread;
    r = sane ? r * item.weight : 0.0f;
    squares += r * r;
    heat += e == 0.0f ? 0.0f : e * below;  // 0 * inf is no entropy
    cost += below;
    device::shared_store(line + 4 * c, r);
    uint32_t terms[Terms];
    split_pair<Terms>(r, 0.0f, terms);
    MOSO_UNROLL
    for (int i = 0; i < Terms; ++i)
      device::shared_store(
          layout.residuals + 2 * residual_half(Terms, tiles, row, head * classes + c, i),
          uint16_t(terms[i]));
  }
  squares = combine_lanes(squares, lanes, Add{});
  heat = combine_lanes(heat, lanes, Add{});
  cost = combine_lanes(cost, lanes, Add{});

  const float nan = device::bits_float(0x7fc00000u);
  float loss = s.log_sum + (s.top - label_logit);
  if (p.smoothing != 0.0f)
    loss = (1.0f - p.smoothing) * loss + p.smoothing * (s.log_sum + cost / float(p.classes));
  if (!sane) return {nan, nan, nan, nan};
  return {loss * item.weight, squares, label_logit - rival, s.log_sum + heat * s.inverse};
}

// One tile after its logits: residuals, statistics and status of rows first .. first + count.
// `writes`: another block may write the same rows. Returns whether this thread met a row whose
// features must not enter the mean gradient.
template <Feature F, int Terms>
MOSO_DEVICE bool softmax_tile(const FirstPass& p, int tiles, uint32_t features, int first,
                              int count, bool writes) {
  const FirstLayout& layout = p.layout;
  const int items = layout.tile_rows * p.heads, lanes = lanes_per_item(items);
  const int lane = device::thread_index() % lanes;
  bool dirty = false;
  MOSO_NO_UNROLL
  for (int start = 0; start < items; start += kThreads / lanes) {
    const int index = start + device::thread_index() / lanes;
    const bool exists = index < items;
    const int row = exists ? index % layout.tile_rows : 0;
    const int head = exists ? index / layout.tile_rows : 0;
    const int at = first + row;
    const bool inside = exists && row < count;
    const int64_t label = inside ? device::global_load(p.labels + at) : 0;
    bool counted = inside && label != p.ignore_index;

    float norm = 0.0f;
    for (int s = 0; s < layout.slices; ++s)
      norm += device::shared_load<float>(layout.norms + 4 * (s * layout.tile_rows + row));
    // A norm may overflow although every number of the row is finite: look at them.
    bool hole = false;
    if (!is_finite(norm)) {
      dirty = true;
      hole = has_hole<F>(layout, features, row, lane, lanes);
    }
    hole = any_lane(hole, lanes);
    const bool exclude = p.exclude_nonfinite != 0, first_lane = lane == 0;
    if (exclude && hole) counted = false;
    const bool label_fits = label >= 0 && label < p.classes;
    if (first_lane && counted && p.status) report_row(p, at, label_fits, hole);
    Item item{counted && label_fits && !hole, exists ? p.classes : 0, 0, 1.0f};
    if (item.live) item.label = int(label);
    if (item.live && p.sample_weight) item.weight = device::global_load(p.sample_weight + at);

    const RowStats stats = softmax_item<Terms>(p, tiles, item, row, head, lane, lanes);
    if (!first_lane || !inside || !writes || !p.loss) continue;
    store_stats(p, head, at, stats, item.live, norm);
    if (head == 0) store_row(p, at, counted, norm);
  }
  return dirty;
}

}  // namespace moso_fast::few_classes
