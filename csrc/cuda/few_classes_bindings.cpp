// Python face of the few-classes kernels.
#include <stdexcept>

#include "few_classes_job.h"

namespace py = pybind11;

namespace moso_fast::few_classes {
namespace {

template <class P>
using Launcher = void (*)(const P&, const Launch&);

template <class P>
void dispatch(const P& p, const Launch& l, Launcher<P> float32, Launcher<P> bfloat16,
              Launcher<P> float16) {
  py::gil_scoped_release release;
  switch (l.feature) {
    case Feature::kFloat32:
      return float32(p, l);
    case Feature::kBfloat16:
      return bfloat16(p, l);
    case Feature::kFloat16:
      return float16(p, l);
  }
  throw std::invalid_argument("unknown dtype of features");
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
        dispatch(read_first_pass(job), read_launch(job), &launch_first<Feature::kFloat32>,
                 &launch_first<Feature::kBfloat16>, &launch_first<Feature::kFloat16>);
      },
      py::arg("job"));
  m.def(
      "few_classes_second",
      [](const py::dict& job) {
        dispatch(read_second_pass(job), read_launch(job), &launch_second<Feature::kFloat32>,
                 &launch_second<Feature::kBfloat16>, &launch_second<Feature::kFloat16>);
      },
      py::arg("job"));
  m.def(
      "few_classes_reduce",
      [](const py::dict& job) {
        const Reduce p = read_reduce(job);
        const int device = number<int>(job, "device");
        const auto stream = number<uintptr_t>(job, "stream");
        py::gil_scoped_release release;
        launch_reduce(p, device, stream);
      },
      py::arg("job"));
}

}  // namespace moso_fast::few_classes
