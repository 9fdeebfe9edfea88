// Jobs as Python dicts of addresses and sizes. Shapes, dtypes and lifetimes are checked by
// moso_fast/backends/cuda/backend.py, the only caller.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "few_classes_launch.h"
#include "job_fields.h"

namespace moso_fast::few_classes {

inline Launch read_launch(const pybind11::dict& job) {
  return {Feature(number<int>(job, "feature")),
          number<bool>(job, "exact"),
          number<int>(job, "tiles"),
          number<bool>(job, "narrow"),
          number<int64_t>(job, "blocks"),
          number<int64_t>(job, "shared_bytes"),
          number<int>(job, "device"),
          number<uintptr_t>(job, "stream")};
}

inline FirstPass read_first_pass(const pybind11::dict& job) {
  FirstPass p{};
  p.features = address<void>(job, "features");
  p.row_stride = number<int64_t>(job, "row_stride");
  p.rows = number<int64_t>(job, "rows");
  p.first_row = number<int64_t>(job, "first_row");
  p.weight = address<float>(job, "weight");
  p.bias = address<float>(job, "bias");
  p.labels = address<int64_t>(job, "labels");
  p.sample_weight = address<float>(job, "sample_weight");
  p.ignore_index = number<int64_t>(job, "ignore_index");
  p.smoothing = number<float>(job, "smoothing");
  p.dim = number<int>(job, "dim");
  p.heads = number<int>(job, "heads");
  p.classes = number<int>(job, "classes");
  p.exclude_nonfinite = number<int>(job, "exclude_nonfinite");
  p.aligned = number<int>(job, "aligned");
  p.bulk = number<int>(job, "bulk") != 0 && number<int>(job, "stages") > 1;
  p.loss = address<float>(job, "loss");
  p.residual_sqnorm = address<float>(job, "residual_sqnorm");
  p.margin = address<float>(job, "margin");
  p.entropy = address<float>(job, "entropy");
  p.stat_stride = number<int64_t>(job, "stat_stride");
  p.feature_sqnorm = address<float>(job, "feature_sqnorm");
  p.counted = address<uint8_t>(job, "counted");
  p.status = address<int64_t>(job, "status");
  p.residual = address<float>(job, "residual");
  p.partial = address<float>(job, "partial");
  p.bias_partial = address<float>(job, "bias_partial");
  const Launch launch = read_launch(job);
  const int64_t slab_rows = number<int64_t>(job, "slab_rows");
  const int tile_rows = number<int>(job, "tile_rows");
  if (p.rows > kMostRows) throw std::invalid_argument("more than 2^30 rows at a time");
  p.walk = {int(p.rows), int(slab_rows), int(ceil_div(p.rows, slab_rows)),
            int(launch.blocks / parts_of(launch.tiles)), tile_rows};
  p.layout = first_layout(launch.feature == Feature::kFloat32 ? 4 : 2,
                          terms_of(launch.feature, launch.exact).first, launch.tiles,
                          p.heads * p.classes, p.dim, tile_rows, number<int>(job, "stages"));
  return p;
}

inline Reduce read_reduce(const pybind11::dict& job) {
  Reduce p{};
  p.partial = address<float>(job, "partial");
  p.bias_partial = address<float>(job, "bias_partial");
  p.slabs = number<int64_t>(job, "slabs");
  p.classes = number<int>(job, "classes");
  p.dim = number<int>(job, "dim");
  p.grad_sum = address<double>(job, "grad_sum");
  p.bias_grad_sum = address<double>(job, "bias_grad_sum");
  p.mean = address<float>(job, "mean");
  p.bias_mean = address<float>(job, "bias_mean");
  p.counted = address<uint8_t>(job, "counted");
  p.rows = number<int64_t>(job, "rows");
  p.counts = address<int64_t>(job, "counts");
  return p;
}

inline SecondPass read_second_pass(const pybind11::dict& job) {
  SecondPass p{};
  p.features = address<void>(job, "features");
  p.row_stride = number<int64_t>(job, "row_stride");
  p.rows = number<int64_t>(job, "rows");
  p.residual = address<float>(job, "residual");
  p.mean_grad = address<float>(job, "mean_grad");
  p.mean_bias_grad = address<float>(job, "mean_bias_grad");
  p.feature_sqnorm = address<float>(job, "feature_sqnorm");
  p.counted = address<uint8_t>(job, "counted");
  p.count = address<int64_t>(job, "count");
  p.behind = number<int64_t>(job, "behind");
  p.alignment = address<float>(job, "alignment");
  p.alignment_stride = number<int64_t>(job, "alignment_stride");
  p.dim = number<int>(job, "dim");
  p.heads = number<int>(job, "heads");
  p.classes = number<int>(job, "classes");
  p.aligned = number<int>(job, "aligned");
  return p;
}

inline pybind11::dict plan_dict(int feature, bool exact, int classes, int dim,
                                int64_t shared_limit) {
  const Plan plan = make_plan(Feature(feature), exact, classes, dim, shared_limit);
  pybind11::dict d;
  d["ok"] = plan.ok;
  d["reason"] = plan.reason;
  d["tiles"] = plan.tiles;
  d["narrow"] = plan.narrow;
  d["parts"] = plan.parts;
  d["together"] = plan.together;
  d["tile_rows"] = plan.tile_rows;
  d["stages"] = plan.stages;
  d["first_bytes"] = plan.first_bytes;
  d["second_bytes"] = plan.second_bytes;
  d["slab_limit"] = plan.slab_limit;
  return d;
}

}  // namespace moso_fast::few_classes
