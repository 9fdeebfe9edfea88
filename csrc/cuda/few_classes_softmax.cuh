// Softmax cross-entropy of a tile whose logits lie in shared memory: residuals and statistics.
//
// For logits z of one (row, head), label y, m = max_c z_c, p_c = e^(z_c - m) / S, S = sum e^(z_c -
// m), smoothing eps and sample weight w:
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
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    const float other = device::shuffle_xor(rival, mask);
    const int other_at = device::shuffle_xor(rival_at, mask);
    if (other > rival || (other == rival && other_at < rival_at)) {
      rival = other;
      rival_at = other_at;
    }
  }
  label_logit = combine_lanes(label_logit, lanes, Max{});
  finite = !any_lane(!finite, lanes);

  // Sum over the classes that are neither the label nor that one.
  float rest = 0.0f;
  for (int c = lane; c < classes; c += lanes)
    if (c != item.label && c != rival_at)
      rest += device::exponential(device::shared_load<float>(line + 4 * c) - rival);
  rest = combine_lanes(rest, lanes, Add{});

  const float top = rival > label_logit ? rival : label_logit;
  const float others = (1.0f + rest) * device::exponential(rival - top);
  const float but_one =
      label_logit >= rival ? others : rest + device::exponential(label_logit - top);
  const float log_sum = device::logarithm1p(but_one);
  const float inverse = 1.0f / (1.0f + but_one);
  const float not_label = others * inverse;
  const float spread = p.smoothing / float(p.classes);
  const bool sane = item.live && finite;

  float squares = 0.0f, heat = 0.0f, cost = 0.0f;
  for (int c = lane; c < classes; c += lanes) {
    const float below = top - device::shared_load<float>(line + 4 * c);
    const float e = device::exponential(-below);
    float r = c == item.label ? -not_label : e * inverse;
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
  float loss = log_sum + (top - label_logit);
  if (p.smoothing != 0.0f)
    loss = (1.0f - p.smoothing) * loss + p.smoothing * (log_sum + cost / float(p.classes));
  if (!sane) return {nan, nan, nan, nan};
  return {loss * item.weight, squares, label_logit - rival, log_sum + heat * inverse};
}

// One tile after its logits: residuals, statistics and status of rows first .. first + count.
// `writes`: another block may write the same rows. Returns whether this thread met a row whose
// features must not enter the mean gradient.
template <Feature F, int Terms>
MOSO_DEVICE bool softmax_tile(const FirstPass& p, int tiles, uint32_t features, int first,
                              int count, bool writes) {
  const FirstLayout& layout = p.layout;
  const int items = layout.tile_rows * p.heads, lanes = lanes_per_item(items);
  const int lane = device::thread_index() % lanes, chunks = layout.row_bytes / 16;
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
      for (int c = lane; c < chunks; c += lanes)
        hole = hole || !all_finite<F>(device::shared_load<Words4>(
                           features + feature_offset(row, c, layout.pitch)));
    }
    hole = any_lane(hole, lanes);
    const bool exclude = p.exclude_nonfinite != 0, first_lane = lane == 0;
    if (exclude && hole) counted = false;
    const bool label_fits = label >= 0 && label < p.classes;
    if (first_lane && counted && p.status) {
      if (!label_fits) device::atomic_min(p.status + kStatusLabel, p.first_row + at);
      if (hole) device::atomic_min(p.status + kStatusFeature, p.first_row + at);
    }
    Item item{counted && label_fits && !hole, exists ? p.classes : 0, 0, 1.0f};
    if (item.live) item.label = int(label);
    if (item.live && p.sample_weight) item.weight = device::global_load(p.sample_weight + at);

    const RowStats stats = softmax_item<Terms>(p, tiles, item, row, head, lane, lanes);
    if (!first_lane || !inside || !writes || !p.loss) continue;
    if (item.live && !is_finite(stats.loss + stats.residual_sqnorm * norm))
      device::atomic_min(p.status + kStatusLogits, p.first_row + at);
    const int64_t to = head * p.stat_stride + at;
    device::global_store(p.loss + to, stats.loss);
    device::global_store(p.residual_sqnorm + to, stats.residual_sqnorm);
    device::global_store(p.margin + to, stats.margin);
    device::global_store(p.entropy + to, stats.entropy);
    if (head != 0) continue;
    device::global_store(p.feature_sqnorm + at, counted ? norm : 0.0f);
    device::global_store(p.counted + at, uint8_t(counted));
  }
  return dirty;
}

// --- one head of few classes: four lanes a row, everything in registers ---
//
//   row 0: lanes 0 1 2 3 | row 1: lanes 4 5 6 7 | ..     lane t has classes t, t + 4, t + 8, ..
//
// A warp has eight rows, so that the first half of the warps suffices for a tile of 32 rows.

// What a row's lanes ask for before the logits are multiplied, to have it when they are there.
struct RowInput {
  int64_t label;
  float weight;
};

MOSO_DEVICE RowInput load_row(const FirstPass& p, int first, int count) {
  const int row = device::thread_index() / 4;
  RowInput in{0, 1.0f};
  if (row < count) {
    in.label = device::global_load(p.labels + first + row);
    if (p.sample_weight) in.weight = device::global_load(p.sample_weight + first + row);
  }
  return in;
}

// The lane's classes of the bias, zeros without one.
template <int Slots>
MOSO_DEVICE void load_bias(const FirstPass& p, float (&bias)[Slots]) {
  MOSO_UNROLL
  for (int i = 0; i < Slots; ++i) {
    const int c = device::thread_index() % 4 + 4 * i;
    bias[i] = p.bias && c < p.heads * p.classes ? device::global_load(p.bias + c) : 0.0f;
  }
}

// As softmax_tile, for one head and at most 4 Slots classes; also writes the residuals of the rows
// and adds them to `bias_sums`. `Smooth`: with label smoothing.
template <Feature F, int Terms, int Slots, bool Smooth>
MOSO_DEVICE bool softmax_rows(const FirstPass& p, int tiles, uint32_t features, int first,
                              int count, const RowInput& in, const float (&bias)[Slots],
                              float (&bias_sums)[Slots]) {
  const FirstLayout& layout = p.layout;
  const int row = device::thread_index() / 4, t = device::thread_index() % 4;
  const int classes = p.classes;
  if (row >= layout.tile_rows) return false;  // whole warps
  const int at = first + row;

  // Sums of the slices. Behind the last class there is what belongs to no class, up to a multiple
  // of 8: numbers that are finite where those of the last class are.
  float norm = 0.0f, z[Slots];
  MOSO_UNROLL
  for (int i = 0; i < Slots; ++i) z[i] = bias[i];
  uint32_t line = layout.logits + 4 * uint32_t(row * layout.logit_stride + t);
  uint32_t norm_at = layout.norms + 4 * uint32_t(row);
  MOSO_UNROLL_TWICE
  for (int s = 0; s < layout.slices; ++s) {
    norm += device::shared_load<float>(norm_at);
    MOSO_UNROLL
    for (int i = 0; i < Slots; ++i)
      if (4 * i < classes) z[i] += device::shared_load<float>(line + 16 * i);
    line += layout.slice_bytes;
    norm_at += 4 * uint32_t(layout.tile_rows);
  }

  // A norm may overflow although every number of the row is finite: look at them.
  const bool inside = row < count, dirty = !is_finite(norm);
  bool counted = inside && in.label != p.ignore_index, hole = false;
  if (dirty) {
    MOSO_NO_UNROLL
    for (int c = 0; c < layout.row_bytes / 16; ++c)
      hole = hole || !all_finite<F>(device::shared_load<Words4>(
                         features + feature_offset(row, c, layout.pitch)));
  }
  if (p.exclude_nonfinite != 0 && hole) counted = false;
  const bool label_fits = uint64_t(in.label) < uint64_t(classes);
  if (t == 0 && counted && p.status && (hole || !label_fits)) {
    if (!label_fits) device::atomic_min(p.status + kStatusLabel, p.first_row + at);
    if (hole) device::atomic_min(p.status + kStatusFeature, p.first_row + at);
  }
  const bool live = counted && label_fits && !hole;
  const int label = live ? int(in.label) : 0;

  // The label's logit, the largest other one and the first class that has it.
  device::sync_warp();
  float label_logit = -kInfinity, rival = -kInfinity;
  float nothing = 0.0f;  // or NaN: a logit is not finite
  int rival_at = classes;
  MOSO_UNROLL
  for (int i = 0; i < Slots; ++i) {
    const int c = t + 4 * i;
    if (4 * i >= classes) continue;
    nothing += z[i] * 0.0f;
    const bool there = c < classes, mine = c == label;
    if (mine) label_logit = z[i];
    if (there && !mine && z[i] > rival) {
      rival = z[i];
      rival_at = c;
    }
  }
  MOSO_UNROLL
  for (int mask = 2; mask > 0; mask /= 2) {
    const float other = device::shuffle_xor(rival, mask);
    const int other_at = device::shuffle_xor(rival_at, mask);
    if (other > rival || (other == rival && other_at < rival_at)) {
      rival = other;
      rival_at = other_at;
    }
    label_logit = Max{}(label_logit, device::shuffle_xor(label_logit, mask));
    nothing += device::shuffle_xor(nothing, mask);
  }
  const bool sane = live && nothing == 0.0f;

  // Exponentials below the rival, and their sum over the classes that are neither.
  float rest = 0.0f, e[Slots];
  MOSO_UNROLL
  for (int i = 0; i < Slots; ++i) {
    const int c = t + 4 * i;
    e[i] = 0.0f;
    if (4 * i >= classes) continue;
    e[i] = device::exponential(c < classes && c != label ? z[i] - rival : -kInfinity);
    rest += c == rival_at ? 0.0f : e[i];
  }
  rest = combine_lanes(rest, 4, Add{});

  const bool ahead = label_logit >= rival;
  const float top = ahead ? label_logit : rival;
  const float step = device::exponential((ahead ? rival : label_logit) - top);
  const float scale = ahead ? step : 1.0f;  // of exponentials below the rival
  const float others = (1.0f + rest) * scale;
  const float but_one = ahead ? others : rest + step;
  const float log_sum = device::logarithm1p(but_one);
  const float inverse = 1.0f / (1.0f + but_one);

  const float not_label = others * inverse, share = scale * inverse;
  const float label_power = ahead ? 1.0f : step;
  const float label_heat = label_power * (top - label_logit);  // no row is sane without a label
  const bool writes = p.residual && inside;
  float* residual = p.residual;
  if (writes) residual = device::kept(residual + (int64_t(at) * classes + t));
  const uint32_t packed =
      device::kept(layout.residuals + 2 * residual_half(Terms, tiles, row, t, 0));
  const float spread = Smooth ? p.smoothing / float(classes) : 0.0f;
  float squares = 0.0f, heat = 0.0f, cost = 0.0f;
  MOSO_UNROLL
  for (int i = 0; i < Slots; ++i) {
    const int c = t + 4 * i;
    if (4 * i >= classes) continue;
    const bool there = c < classes, mine = c == label;
    const float below = top - z[i];
    // e is 0 for the label, behind the last class, and where 0 * inf would be no entropy.
    if (e[i] != 0.0f) heat += e[i] * below;
    float r = mine ? -not_label : e[i] * share;
    if (Smooth) {
      r += mine ? p.smoothing - spread : there ? -spread : 0.0f;
      cost += there ? below : 0.0f;
    }
    r = sane ? r * in.weight : 0.0f;
    squares += r * r;
    bias_sums[i] += r;
    if (there && writes) device::global_store(residual + 4 * i, r);
    uint32_t terms[Terms];
    split_pair<Terms>(r, 0.0f, terms);
    MOSO_UNROLL
    for (int k = 0; k < Terms; ++k)
      device::shared_store(packed + residual_slot_bytes(Terms, tiles, i, k), uint16_t(terms[k]));
  }
  device::sync_warp();
  squares = combine_lanes(squares, 4, Add{});
  heat = combine_lanes(heat, 4, Add{}) * scale;
  if (label_power != 0.0f) heat += label_heat;

  const float fall = top - label_logit;
  float loss = log_sum + fall;
  if (Smooth) {
    cost = combine_lanes(cost, 4, Add{});
    loss = (1.0f - p.smoothing) * loss + p.smoothing * (log_sum + cost / float(classes));
  }
  if (t != 0 || !inside || !p.loss) return dirty;
  const float nan = device::bits_float(0x7fc00000u);
  loss = sane ? loss * in.weight : nan;
  squares = sane ? squares : nan;
  if (live && !is_finite(loss + squares * norm))
    device::atomic_min(p.status + kStatusLogits, p.first_row + at);
  device::global_store(p.loss + at, loss);
  device::global_store(p.residual_sqnorm + at, squares);
  device::global_store(p.margin + at, sane ? label_logit - rival : nan);
  device::global_store(p.entropy + at, sane ? log_sum + heat * inverse : nan);
  device::global_store(p.feature_sqnorm + at, counted ? norm : 0.0f);
  device::global_store(p.counted + at, uint8_t(counted));
  return dirty;
}

}  // namespace moso_fast::few_classes
