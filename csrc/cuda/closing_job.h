// Jobs of closing.h as Python dicts of addresses and sizes. Shapes, dtypes and lifetimes are
// checked by moso_fast/backends/cuda/whole.py, the only caller.
#pragma once

#include "closing.h"
#include "job_fields.h"

namespace moso_fast::closing {

inline Finish read_finish(const pybind11::dict& job) {
  Finish p{};
  p.alignment = address<float>(job, "alignment");
  p.residual_sqnorm = address<float>(job, "residual_sqnorm");
  p.grad_sqnorm = address<float>(job, "grad_sqnorm");
  p.loss = address<float>(job, "loss");
  p.margin = address<float>(job, "margin");
  p.entropy = address<float>(job, "entropy");
  p.feature_sqnorm = address<float>(job, "feature_sqnorm");
  p.counted = address<uint8_t>(job, "counted");
  p.sample_weight = address<float>(job, "sample_weight");
  p.counts = address<int64_t>(job, "counts");
  p.rows = number<int64_t>(job, "rows");
  p.heads = number<int>(job, "heads");
  p.blocks_a_head = number<int>(job, "blocks_a_head");
  p.squared_one = number<float>(job, "squared_one");
  p.rescale = number<int>(job, "rescale");
  p.sums = address<double>(job, "sums");
  return p;
}

inline Judge read_judge(const pybind11::dict& job) {
  Judge p{};
  p.sums = address<double>(job, "sums");
  p.heads = number<int>(job, "heads");
  p.blocks_a_head = number<int>(job, "blocks_a_head");
  p.classes = number<int>(job, "classes");
  p.dim = number<int>(job, "dim");
  p.grad_sum = address<double>(job, "grad_sum");
  p.bias_grad_sum = address<double>(job, "bias_grad_sum");
  p.weight = address<float>(job, "weight");
  p.bias = address<float>(job, "bias");
  p.counts = address<int64_t>(job, "counts");
  p.status = address<int64_t>(job, "status");
  p.facts = address<double>(job, "facts");
  p.mean_grad_sqnorm = address<double>(job, "mean_grad_sqnorm");
  p.count = address<int64_t>(job, "count");
  return p;
}

inline Score read_score(const pybind11::dict& job) {
  Score p{};
  p.alignment = address<float>(job, "alignment");
  p.grad_sqnorm = address<float>(job, "grad_sqnorm");
  p.mean_grad_sqnorm = address<double>(job, "mean_grad_sqnorm");
  p.count = address<int64_t>(job, "count");
  p.rows = number<int64_t>(job, "rows");
  p.heads = number<int>(job, "heads");
  p.formula = Formula(number<int>(job, "formula"));
  p.scale = number<double>(job, "scale");
  p.score = address<float>(job, "score");
  return p;
}

}  // namespace moso_fast::closing
