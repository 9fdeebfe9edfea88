// Jobs of few_classes.h and closing.h from the dicts that Python hands over. Shapes, dtypes and
// lifetimes are checked by the Python backend "cuda", the only caller.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "../job_fields.h"
#include "closing.h"
#include "few_classes_launch.h"

namespace moso_fast::few_classes {

// How the rows of a first pass are cut.
struct Cut {
  int64_t slab_rows;
  int tile_rows, stages;
};

inline constexpr auto kLaunchFields =
    table(field("feature", &Launch::feature), field("exact", &Launch::exact),
          field("tiles", &Launch::tiles), field("narrow", &Launch::narrow),
          field("blocks", &Launch::blocks), field("shared_bytes", &Launch::shared_bytes),
          field("device", &Launch::device), field("stream", &Launch::stream));

inline constexpr auto kCutFields =
    table(field("slab_rows", &Cut::slab_rows), field("tile_rows", &Cut::tile_rows),
          field("stages", &Cut::stages));

inline constexpr auto kFirstPassFields = table(
    field("features", &FirstPass::features), field("row_stride", &FirstPass::row_stride),
    field("rows", &FirstPass::rows), field("first_row", &FirstPass::first_row),
    field("weight", &FirstPass::weight), field("bias", &FirstPass::bias),
    field("labels", &FirstPass::labels), field("sample_weight", &FirstPass::sample_weight),
    field("ignore_index", &FirstPass::ignore_index), field("smoothing", &FirstPass::smoothing),
    field("dim", &FirstPass::dim), field("heads", &FirstPass::heads),
    field("classes", &FirstPass::classes),
    field("exclude_nonfinite", &FirstPass::exclude_nonfinite),
    field("aligned", &FirstPass::aligned), field("bulk", &FirstPass::bulk),
    field("loss", &FirstPass::loss), field("residual_sqnorm", &FirstPass::residual_sqnorm),
    field("margin", &FirstPass::margin), field("entropy", &FirstPass::entropy),
    field("stat_stride", &FirstPass::stat_stride),
    field("feature_sqnorm", &FirstPass::feature_sqnorm), field("counted", &FirstPass::counted),
    field("status", &FirstPass::status), field("residual", &FirstPass::residual),
    field("partial", &FirstPass::partial), field("bias_partial", &FirstPass::bias_partial));

inline constexpr auto kReduceFields =
    table(field("partial", &Reduce::partial), field("bias_partial", &Reduce::bias_partial),
          field("slabs", &Reduce::slabs), field("classes", &Reduce::classes),
          field("dim", &Reduce::dim), field("grad_sum", &Reduce::grad_sum),
          field("bias_grad_sum", &Reduce::bias_grad_sum), field("mean", &Reduce::mean),
          field("bias_mean", &Reduce::bias_mean), field("counted", &Reduce::counted),
          field("rows", &Reduce::rows), field("counts", &Reduce::counts));

inline constexpr auto kSecondPassFields =
    table(field("features", &SecondPass::features), field("row_stride", &SecondPass::row_stride),
          field("rows", &SecondPass::rows), field("residual", &SecondPass::residual),
          field("mean_grad", &SecondPass::mean_grad),
          field("mean_bias_grad", &SecondPass::mean_bias_grad),
          field("feature_sqnorm", &SecondPass::feature_sqnorm),
          field("counted", &SecondPass::counted), field("count", &SecondPass::count),
          field("behind", &SecondPass::mean_rows), field("alignment", &SecondPass::alignment),
          field("alignment_stride", &SecondPass::alignment_stride), field("dim", &SecondPass::dim),
          field("heads", &SecondPass::heads), field("classes", &SecondPass::classes),
          field("aligned", &SecondPass::aligned));

}  // namespace moso_fast::few_classes

namespace moso_fast::closing {

inline constexpr auto kFinishFields = table(
    field("alignment", &Finish::alignment), field("residual_sqnorm", &Finish::residual_sqnorm),
    field("grad_sqnorm", &Finish::grad_sqnorm), field("loss", &Finish::loss),
    field("margin", &Finish::margin), field("entropy", &Finish::entropy),
    field("feature_sqnorm", &Finish::feature_sqnorm), field("counted", &Finish::counted),
    field("sample_weight", &Finish::sample_weight), field("counts", &Finish::counts),
    field("rows", &Finish::rows), field("heads", &Finish::heads),
    field("blocks_a_head", &Finish::blocks_a_head), field("squared_one", &Finish::squared_one),
    field("rescale", &Finish::rescale), field("sums", &Finish::sums));

inline constexpr auto kJudgeFields =
    table(field("sums", &Judge::sums), field("heads", &Judge::heads),
          field("blocks_a_head", &Judge::blocks_a_head), field("classes", &Judge::classes),
          field("dim", &Judge::dim), field("grad_sum", &Judge::grad_sum),
          field("bias_grad_sum", &Judge::bias_grad_sum), field("weight", &Judge::weight),
          field("bias", &Judge::bias), field("counts", &Judge::counts),
          field("status", &Judge::status), field("facts", &Judge::facts),
          field("mean_grad_sqnorm", &Judge::mean_grad_sqnorm), field("count", &Judge::count));

inline constexpr auto kScoreFields = table(
    field("alignment", &Score::alignment), field("grad_sqnorm", &Score::grad_sqnorm),
    field("mean_grad_sqnorm", &Score::mean_grad_sqnorm), field("count", &Score::count),
    field("rows", &Score::rows), field("heads", &Score::heads), field("formula", &Score::formula),
    field("scale", &Score::scale), field("score", &Score::score));

}  // namespace moso_fast::closing

namespace moso_fast {

template <const auto& kTable, class Job>
Job read_job(const pybind11::dict& job) {
  Job p{};
  read_fields<kTable>(job, &p);
  check_names(job, known_names<few_classes::kLaunchFields, few_classes::kCutFields,
                               few_classes::kFirstPassFields, few_classes::kReduceFields,
                               few_classes::kSecondPassFields, closing::kFinishFields,
                               closing::kJudgeFields, closing::kScoreFields>());
  return p;
}

}  // namespace moso_fast

namespace moso_fast::few_classes {

inline Launch read_launch(const pybind11::dict& job) {
  return read_job<kLaunchFields, Launch>(job);
}

inline FirstPass read_first_pass(const pybind11::dict& job) {
  auto p = read_job<kFirstPassFields, FirstPass>(job);
  const auto launch = read_job<kLaunchFields, Launch>(job);
  const auto cut = read_job<kCutFields, Cut>(job);
  if (cut.stages <= 1) p.bulk = 0;
  if (p.rows > kMostRows) throw std::invalid_argument("more than 2^30 rows at a time");
  p.walk = {int(p.rows), int(cut.slab_rows), int(ceil_div(p.rows, cut.slab_rows)),
            int(launch.blocks / parts_of(launch.tiles)), cut.tile_rows};
  p.layout = first_layout(launch.feature == Feature::kFloat32 ? 4 : 2,
                          terms_of(launch.feature, launch.exact).first, launch.tiles,
                          p.heads * p.classes, p.dim, cut.tile_rows, cut.stages);
  return p;
}
inline SecondPass read_second_pass(const pybind11::dict& job) {
  return read_job<kSecondPassFields, SecondPass>(job);
}
inline Reduce read_reduce(const pybind11::dict& job) {
  return read_job<kReduceFields, Reduce>(job);
}

}  // namespace moso_fast::few_classes

namespace moso_fast::closing {

inline Finish read_finish(const pybind11::dict& job) {
  return read_job<kFinishFields, Finish>(job);
}
inline Judge read_judge(const pybind11::dict& job) { return read_job<kJudgeFields, Judge>(job); }
inline Score read_score(const pybind11::dict& job) { return read_job<kScoreFields, Score>(job); }

}  // namespace moso_fast::closing
