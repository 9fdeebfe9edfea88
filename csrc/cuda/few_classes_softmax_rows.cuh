// Softmax of one head of few classes: four lanes a row, everything in registers. Does what
// few_classes_softmax.cuh does for any number of heads.
//
//   row 0: lanes 0 1 2 3 | row 1: lanes 4 5 6 7 | ..     lane t has classes t, t + 4, t + 8, ..
//
// A warp has eight rows, so that the first half of the warps suffices for a tile of 32 rows.
#pragma once

#include "few_classes_softmax.cuh"

namespace moso_fast::few_classes {

// What a row's lanes load before the logits are multiplied, to have it when they are there.
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

// Where a lane is: its row of the tile, whether that exists, and its classes t, t + 4, ..
struct RowPlace {
  int row, t, at;  // at: among all rows
  bool inside;
};

// Sums of the slices of the logits, from the bias on; returns the row's squared norm. Past the last
// class there is what belongs to no class, up to a multiple of 8: values that are finite where
// those of the last class are.
template <int Slots>
MOSO_DEVICE float row_logits(const FirstPass& p, const RowPlace& place, const float (&bias)[Slots],
                             float (&z)[Slots]) {
  const FirstLayout& layout = p.layout;
  float norm = 0.0f;
  MOSO_UNROLL
  for (int i = 0; i < Slots; ++i) z[i] = bias[i];
  uint32_t line = layout.logits + 4 * uint32_t(place.row * layout.logit_stride + place.t);
  uint32_t norm_at = layout.norms + 4 * uint32_t(place.row);
  MOSO_UNROLL_TWICE
  for (int s = 0; s < layout.slices; ++s) {
    norm += device::shared_load<float>(norm_at);
    MOSO_UNROLL
    for (int i = 0; i < Slots; ++i)
      if (4 * i < p.classes) z[i] += device::shared_load<float>(line + 16 * i);
    line += layout.slice_bytes;
    norm_at += 4 * uint32_t(layout.tile_rows);
  }
  return norm;
}

// The label's logit, the largest other one and the first class that has it; whether all are finite.
struct Leaders {
  float label_logit, rival;
  int rival_at;
  bool finite;
};

template <int Slots>
MOSO_DEVICE Leaders row_leaders(int classes, int t, int label, const float (&z)[Slots]) {
  Leaders found{-kInfinity, -kInfinity, classes, true};
  float nothing = 0.0f;  // or NaN: a logit is not finite
  device::sync_warp();
  MOSO_UNROLL
  for (int i = 0; i < Slots; ++i) {
    const int c = t + 4 * i;
    if (4 * i >= classes) continue;
    nothing += z[i] * 0.0f;
    const bool there = c < classes, mine = c == label;
    if (mine) found.label_logit = z[i];
    if (there && !mine && z[i] > found.rival) {
      found.rival = z[i];
      found.rival_at = c;
    }
  }
  MOSO_UNROLL
  for (int mask = 2; mask > 0; mask /= 2) {
    combine_rivals(found.rival, found.rival_at, mask);
    found.label_logit = Max{}(found.label_logit, device::shuffle_xor(found.label_logit, mask));
    nothing += device::shuffle_xor(nothing, mask);
  }
  found.finite = nothing == 0.0f;
  return found;
}

// e[i] = e^(z - rival), 0 for the label and past the last class; returns their sum without the
// rival's own.
template <int Slots>
MOSO_DEVICE float row_exponentials(int classes, int t, int label, const Leaders& leaders,
                                   const float (&z)[Slots], float (&e)[Slots]) {
  float neither = 0.0f;
  MOSO_UNROLL
  for (int i = 0; i < Slots; ++i) {
    const int c = t + 4 * i;
    e[i] = 0.0f;
    if (4 * i >= classes) continue;
    e[i] = device::exponential(c < classes && c != label ? z[i] - leaders.rival : -kInfinity);
    neither += c == leaders.rival_at ? 0.0f : e[i];
  }
  return combine_lanes(neither, 4, Add{});
}

// Sums over the classes of a row: of r^2, of e^(z - top) (top - z), and of top - z.
struct RowSums {
  float squares, heat, cost;
};

// Residuals of a row, 0 where it is not sane: to memory, to the packed fragments, and added to
// `bias_sums`.
template <int Terms, int Slots, bool Smooth>
MOSO_DEVICE RowSums row_residuals(const FirstPass& p, int tiles, const RowPlace& place, int label,
                                  bool sane, float weight, const Softmax& s,
                                  const float (&z)[Slots], const float (&e)[Slots],
                                  float (&bias_sums)[Slots]) {
  const FirstLayout& layout = p.layout;
  const int classes = p.classes;
  const float share = s.scale * s.inverse;
  const bool writes = p.residual && place.inside;
  float* residual = p.residual;
  if (writes) residual = device::kept(residual + (int64_t(place.at) * classes + place.t));
  const uint32_t packed =
      device::kept(layout.residuals + 2 * residual_half(Terms, tiles, place.row, place.t, 0));
  const float spread = Smooth ? p.smoothing / float(classes) : 0.0f;
  RowSums sums{0.0f, 0.0f, 0.0f};
  MOSO_UNROLL
  for (int i = 0; i < Slots; ++i) {
    const int c = place.t + 4 * i;
    if (4 * i >= classes) continue;
    const bool there = c < classes, mine = c == label;
    const float below = s.top - z[i];
    // e is 0 for the label, past the last class, and where 0 * inf would be no entropy.
    if (e[i] != 0.0f) sums.heat += e[i] * below;
    float r = mine ? -s.not_label : e[i] * share;
    if (Smooth) {
      r += mine ? p.smoothing - spread : there ? -spread : 0.0f;
      sums.cost += there ? below : 0.0f;
    }
    r = sane ? r * weight : 0.0f;
    sums.squares += r * r;
    bias_sums[i] += r;
    if (there && writes) device::global_store(residual + 4 * i, r);
    uint32_t terms[Terms];
    split_pair<Terms>(r, 0.0f, terms);
    MOSO_UNROLL
    for (int k = 0; k < Terms; ++k)
      device::shared_store(packed + residual_slot_bytes(Terms, tiles, i, k), uint16_t(terms[k]));
  }
  return sums;
}

// As softmax_tile, for one head and at most 4 Slots classes; also writes the residuals of the rows
// and adds them to `bias_sums`. `Smooth`: with label smoothing.
template <Feature F, int Terms, int Slots, bool Smooth>
MOSO_DEVICE bool softmax_rows(const FirstPass& p, int tiles, uint32_t features, int first,
                              int count, const RowInput& in, const float (&bias)[Slots],
                              float (&bias_sums)[Slots]) {
  const int row = device::thread_index() / 4, t = device::thread_index() % 4;
  if (row >= p.layout.tile_rows) return false;  // whole warps
  const RowPlace place{row, t, first + row, row < count};
  float z[Slots], e[Slots];
  const float norm = row_logits(p, place, bias, z);

  // A norm may overflow although every element of the row is finite: look at them.
  const bool dirty = !is_finite(norm);
  const bool hole = dirty && has_hole<F>(p.layout, features, row, 0, 1);
  bool counted = place.inside && in.label != p.ignore_index;
  if (p.exclude_nonfinite != 0 && hole) counted = false;
  const bool label_fits = uint64_t(in.label) < uint64_t(p.classes);
  if (t == 0 && counted && p.status && (hole || !label_fits))
    report_row(p, place.at, label_fits, hole);
  const bool live = counted && label_fits && !hole;
  const int label = live ? int(in.label) : 0;

  const Leaders leaders = row_leaders(p.classes, t, label, z);
  const bool sane = live && leaders.finite;
  const float neither = row_exponentials(p.classes, t, label, leaders, z, e);
  const Softmax s = softmax_of(leaders.label_logit, leaders.rival, neither);
  const float fall = s.top - leaders.label_logit;
  const float label_heat = s.label_power * fall;  // no row is sane without a label

  RowSums sums = row_residuals<Terms, Slots, Smooth>(p, tiles, place, label, sane, in.weight, s, z,
                                                     e, bias_sums);
  device::sync_warp();
  sums.squares = combine_lanes(sums.squares, 4, Add{});
  float heat = combine_lanes(sums.heat, 4, Add{}) * s.scale;
  if (s.label_power != 0.0f) heat += label_heat;
  float loss = s.log_sum + fall;
  if (Smooth) {
    const float cost = combine_lanes(sums.cost, 4, Add{});
    loss = (1.0f - p.smoothing) * loss + p.smoothing * (s.log_sum + cost / float(p.classes));
  }
  if (t != 0 || !place.inside || !p.loss) return dirty;
  const float nan = device::bits_float(0x7fc00000u);
  const RowStats stats{sane ? loss * in.weight : nan, sane ? sums.squares : nan,
                       sane ? leaders.label_logit - leaders.rival : nan,
                       sane ? s.log_sum + heat * s.inverse : nan};
  store_stats(p, 0, place.at, stats, live, norm);
  store_row(p, place.at, counted, norm);
  return dirty;
}

}  // namespace moso_fast::few_classes
