// Jobs of jobs.h from the dicts that Python hands over. Shapes, dtypes and lifetimes are checked by
// the Python backend "cpu", the only caller.
#pragma once

#include "../job_fields.h"
#include "jobs.h"
#include "whole.h"

namespace moso_fast {

inline constexpr auto kProblemFields = table(
    field("features", &Problem::features), field("dtype", &Problem::dtype),
    field("row_stride", &Problem::row_stride), field("first_row", &Problem::first_row),
    field("rows", &Problem::rows), field("dim", &Problem::dim), field("heads", &Problem::heads),
    field("classes", &Problem::classes), field("weight", &Problem::weight),
    field("bias", &Problem::bias), field("labels", &Problem::labels),
    field("targets", &Problem::targets), field("sample_weight", &Problem::sample_weight),
    field("loss", &Problem::loss), field("label_smoothing", &Problem::label_smoothing),
    field("target_tolerance", &Problem::target_tolerance),
    field("ignore_index", &Problem::ignore_index),
    field("exclude_nonfinite", &Problem::exclude_nonfinite),
    field("threads", [](Problem& p) -> int& { return p.threads.count; }),
    field("own_threads", [](Problem& p) -> bool& { return p.threads.own; }),
    field("few_classes", &Problem::few_classes), field("bf16_products", &Problem::bf16_products),
    field("split_grad", &Problem::split_grad));

inline constexpr auto kFirstPassFields = table(
    field("loss_out", &FirstPass::loss),  // "loss" names the loss function
    field("residual_sqnorm", &FirstPass::residual_sqnorm), field("margin", &FirstPass::margin),
    field("entropy", &FirstPass::entropy), field("stat_stride", &FirstPass::stat_stride),
    field("feature_sqnorm", &FirstPass::feature_sqnorm), field("counted", &FirstPass::counted),
    field("status", &FirstPass::status), field("residual", &FirstPass::residual),
    field("grad_sum", &FirstPass::grad_sum), field("bias_grad_sum", &FirstPass::bias_grad_sum));

inline constexpr auto kSecondPassFields =
    table(field("counted", &SecondPass::counted), field("residual", &SecondPass::residual),
          field("mean_grad", &SecondPass::mean_grad),
          field("mean_bias_grad", &SecondPass::mean_bias_grad),
          field("self_term_scale", &SecondPass::self_term_scale),
          field("alignment", &SecondPass::alignment),
          field("alignment_stride", &SecondPass::alignment_stride));

inline constexpr auto kWholeFields =
    table(field("loss_out", &Whole::loss), field("el2n", &Whole::el2n),
          field("margin", &Whole::margin), field("entropy", &Whole::entropy),
          field("alignment", &Whole::alignment), field("grad_sqnorm", &Whole::grad_sqnorm),
          field("score", &Whole::score), field("counted", &Whole::counted),
          field("mean_grad_sqnorm", &Whole::mean_grad_sqnorm), field("count", &Whole::count),
          field("facts", &Whole::facts), field("keep_residual", &Whole::keep_residual),
          field("formula", &Whole::formula), field("scale", &Whole::scale));

template <const auto& kTable, class Pass>
Pass read_pass(const pybind11::dict& job) {
  Pass pass{};
  read_fields<kProblemFields>(job, &pass.problem);
  read_fields<kTable>(job, &pass);
  // It has all its own names, or reading it has failed: no more than these are known ones.
  constexpr size_t own = fields_in<kProblemFields> + fields_in<kTable>;
  if (job.size() > own)
    check_names(job,
                known_names<kProblemFields, kFirstPassFields, kSecondPassFields, kWholeFields>());
  return pass;
}

inline FirstPass read_first_pass(const pybind11::dict& job) {
  return read_pass<kFirstPassFields, FirstPass>(job);
}
inline SecondPass read_second_pass(const pybind11::dict& job) {
  return read_pass<kSecondPassFields, SecondPass>(job);
}
inline Whole read_whole(const pybind11::dict& job) { return read_pass<kWholeFields, Whole>(job); }

}  // namespace moso_fast
