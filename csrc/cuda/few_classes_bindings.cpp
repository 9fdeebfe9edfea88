// Python face of the few-classes kernels.
#include <stdexcept>

#include "plan_dict.h"
#include "read_jobs.h"

namespace py = pybind11;

namespace moso_fast::few_classes {
namespace {

template <class P>
using Launcher = void (*)(const P&, const Launch&);

template <class P>
Launcher<P> launcher(Feature feature, Launcher<P> float32, Launcher<P> bfloat16,
                     Launcher<P> float16) {
  switch (feature) {
    case Feature::kFloat32:
      return float32;
    case Feature::kBfloat16:
      return bfloat16;
    case Feature::kFloat16:
      return float16;
  }
  throw std::invalid_argument("unknown dtype of features");
}

using FirstLauncher = Launcher<FirstPass>;
using SecondLauncher = Launcher<SecondPass>;

FirstLauncher first_launcher(Feature feature) {
  return launcher<FirstPass>(feature, &launch_first<Feature::kFloat32>,
                             &launch_first<Feature::kBfloat16>, &launch_first<Feature::kFloat16>);
}
SecondLauncher second_launcher(Feature feature) {
  return launcher<SecondPass>(feature, &launch_second<Feature::kFloat32>,
                              &launch_second<Feature::kBfloat16>,
                              &launch_second<Feature::kFloat16>);
}

// Everything that a job of one chunk needs, launched one after the other. With "wait" it returns
// when all of it is done: what the kernels wrote to main memory can be read then.
void launch_whole(const py::dict& job) {
  const py::dict first_job = job["first"], second_job = job["second"];
  const FirstPass first = read_first_pass(first_job);
  const Launch first_launch = read_launch(first_job);
  const Reduce reduce = read_reduce(job["reduce"]);
  const SecondPass second = read_second_pass(second_job);
  const Launch second_launch = read_launch(second_job);
  const closing::Finish finish = closing::read_finish(job["finish"]);
  const closing::Judge judge = closing::read_judge(job["judge"]);
  const bool scores = !job["score"].is_none();
  const closing::Score score =
      scores ? closing::read_score(py::dict(job["score"])) : closing::Score{};
  const bool wait = value_of<bool>(job["wait"]);
  const auto device = first_launch.device;
  const auto stream = first_launch.stream;
  const FirstLauncher launch_first = first_launcher(first_launch.feature);
  const SecondLauncher launch_second = second_launcher(second_launch.feature);
  py::gil_scoped_release release;
  closing::reset_status(first.status, device, stream);
  launch_first(first, first_launch);
  launch_reduce(reduce, device, stream);
  launch_second(second, second_launch);
  closing::launch_finish(finish, device, stream);
  closing::launch_judge(judge, device, stream);
  if (scores) closing::launch_score(score, device, stream);
  if (wait) closing::wait_for(device, stream);
}

}  // namespace

void bind(py::module_& m) {
  m.def("few_classes_plan", &plan_dict, py::arg("feature"), py::arg("exact"), py::arg("classes"),
        py::arg("dim"), py::arg("shared_limit"),
        "How a problem is cut for a GPU with this much shared memory a block (bytes), or why it "
        "cannot be run: ok, reason, tiles, narrow, parts, together, tile_rows, stages, "
        "first_bytes, second_bytes, slab_limit. Needs no GPU.");
  m.attr("few_classes_first_registers") = kFirstRegisters;
  m.attr("few_classes_narrow_registers") = kNarrowRegisters;
  m.def("few_classes_second_registers", &second_registers, py::arg("tiles"),
        "Registers a thread that the kernels may use, by tiles of 16 classes.");
  m.def("few_classes_slab_rows", &slab_rows_for, py::arg("rows"), py::arg("limit"),
        "Rows of a slab, the unit of one partial sum of the mean gradient.");
  m.def("few_classes_partial_columns", &partial_columns, py::arg("dim"),
        "Columns of a partial sum in memory.");
  m.def(
      "few_classes_first",
      [](const py::dict& job) {
        const FirstPass p = read_first_pass(job);
        const Launch l = read_launch(job);
        const FirstLauncher launch = first_launcher(l.feature);
        py::gil_scoped_release release;
        launch(p, l);
      },
      py::arg("job"));
  m.def(
      "few_classes_second",
      [](const py::dict& job) {
        const SecondPass p = read_second_pass(job);
        const Launch l = read_launch(job);
        const SecondLauncher launch = second_launcher(l.feature);
        py::gil_scoped_release release;
        launch(p, l);
      },
      py::arg("job"));
  m.def(
      "few_classes_reduce",
      [](const py::dict& job) {
        const Reduce p = read_reduce(job);
        const int device = value_of<int>(job["device"]);
        const auto stream = value_of<uintptr_t>(job["stream"]);
        py::gil_scoped_release release;
        launch_reduce(p, device, stream);
      },
      py::arg("job"));
  m.def("few_classes_whole", &launch_whole, py::arg("job"),
        "Both passes over the one chunk of a job and its end, from dicts of the same names.");
  m.attr("closing_count_blocks") = closing::kCountBlocks;
  m.attr("closing_row_sums") = closing::kRowSums;
  m.attr("closing_head_facts") = closing::kHeadFacts;
  m.attr("closing_threads") = closing::kThreads;
}

}  // namespace moso_fast::few_classes
