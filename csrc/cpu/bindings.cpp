// Python module moso_fast._cpu: addresses and sizes in, results written in place. Shapes, dtypes
// and lifetimes are checked by moso_fast/backends/cpu.py, the only caller.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace py = pybind11;
using namespace moso_fast;

namespace {

Variant variant_named(const std::string& name) {
  for (const Variant& variant : variants())
    if (name == variant.name) return variant;
  throw std::invalid_argument("this processor has no instruction set '" + name + "'");
}

template <class T>
T* address(const py::dict& job, const char* key) {
  return reinterpret_cast<T*>(job[key].cast<uintptr_t>());  // 0 for "not given"
}

Problem read_problem(const py::dict& job) {
  Problem p{};
  p.features = address<void>(job, "features");
  p.dtype = DType(job["dtype"].cast<int>());
  p.row_stride = job["row_stride"].cast<int64_t>();
  p.first_row = job["first_row"].cast<int64_t>();
  p.rows = job["rows"].cast<int64_t>();
  p.dim = job["dim"].cast<int64_t>();
  p.heads = job["heads"].cast<int64_t>();
  p.classes = job["classes"].cast<int64_t>();
  p.weight = address<float>(job, "weight");
  p.bias = address<float>(job, "bias");
  p.labels = address<int64_t>(job, "labels");
  p.targets = address<float>(job, "targets");
  p.sample_weight = address<float>(job, "sample_weight");
  p.loss = Loss(job["loss"].cast<int>());
  p.label_smoothing = job["label_smoothing"].cast<float>();
  p.target_tolerance = job["target_tolerance"].cast<float>();
  p.ignore_index = job["ignore_index"].cast<int64_t>();
  p.exclude_nonfinite = job["exclude_nonfinite"].cast<bool>();
  p.threads = {job["threads"].cast<int>(), job["own_threads"].cast<bool>()};
  p.few_classes = job["few_classes"].cast<bool>();
  p.bf16_products = job["bf16_products"].cast<bool>();
  p.split_grad = job["split_grad"].cast<bool>();
  return p;
}

void first_pass(const std::string& variant, const py::dict& job) {
  FirstPass pass{};
  pass.problem = read_problem(job);
  pass.loss = address<float>(job, "loss_out");
  pass.residual_sqnorm = address<float>(job, "residual_sqnorm");
  pass.margin = address<float>(job, "margin");
  pass.entropy = address<float>(job, "entropy");
  pass.stat_stride = job["stat_stride"].cast<int64_t>();
  pass.feature_sqnorm = address<float>(job, "feature_sqnorm");
  pass.counted = address<uint8_t>(job, "counted");
  pass.status = address<int64_t>(job, "status");
  pass.residual = address<float>(job, "residual");
  pass.grad_sum = address<double>(job, "grad_sum");
  pass.bias_grad_sum = address<double>(job, "bias_grad_sum");
  const Variant chosen = variant_named(variant);
  py::gil_scoped_release release;
  chosen.first_pass(pass);
}

void second_pass(const std::string& variant, const py::dict& job) {
  SecondPass pass{};
  pass.problem = read_problem(job);
  pass.counted = address<uint8_t>(job, "counted");
  pass.residual = address<float>(job, "residual");
  pass.mean_grad = address<float>(job, "mean_grad");
  pass.mean_bias_grad = address<float>(job, "mean_bias_grad");
  pass.self_term_scale = job["self_term_scale"].cast<double>();
  pass.alignment = address<float>(job, "alignment");
  pass.alignment_stride = job["alignment_stride"].cast<int64_t>();
  const Variant chosen = variant_named(variant);
  py::gil_scoped_release release;
  chosen.second_pass(pass);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Scoring kernels for CPUs; called by moso_fast.backends.cpu.";
  m.def(
      "variants",
      [] {
        std::vector<std::string> names;
        for (const Variant& variant : variants()) names.emplace_back(variant.name);
        return py::tuple(py::cast(names));
      },
      "Instruction sets this processor can run, best first.");
  m.def(
      "few_classes",
      [](const std::string& name, int features, bool rounded) {
        return variant_named(name).few_classes(DType(features), rounded);
      },
      py::arg("variant"), py::arg("features"), py::arg("rounded"),
      "Classes of all heads together that the few-classes kernels take.");
  m.def(
      "runs_bf16_products",
      [](const std::string& name) { return runs_bf16_products(variant_named(name)); },
      py::arg("variant"), "Whether there are instructions for products of bfloat16 operands.");
  m.def(
      "prefers_bf16_products",
      [](const std::string& name) { return prefers_bf16_products(variant_named(name)); },
      py::arg("variant"), "Whether those are faster than float32 ones.");
  m.def("shares_pool", &shares_pool, "Whether the thread pool that PyTorch loaded is used.");
  m.def("first_pass", &first_pass, py::arg("variant"), py::arg("job"));
  m.def("second_pass", &second_pass, py::arg("variant"), py::arg("job"));
}
