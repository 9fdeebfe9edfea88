// Python module moso_fast._cpu: addresses and sizes in, results written in place.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"
#include "processor.h"
#include "read_jobs.h"
#include "whole.h"

namespace py = pybind11;
using namespace moso_fast;

namespace {

Variant variant_named(const std::string& name) {
  for (const Variant& variant : variants())
    if (name == variant.name) return variant;
  throw std::invalid_argument("this processor has no instruction set '" + name + "'");
}

// Lets Python handle signals; whether a handler has raised an exception, as that of Ctrl-C does.
bool handler_raised() {
  const py::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

// Runs work(variant, job) without holding Python's lock. Ends early, with its exception, where a
// signal handler raises one.
template <class Job, class Work>
void run(const std::string& name, Job job, const Work& work) {
  const Variant variant = variant_named(name);
  Interrupt interrupt(&handler_raised);
  job.problem.threads.interrupt = &interrupt;
  {
    const py::gil_scoped_release release;
    work(variant, job);
  }
  if (interrupt.happened()) throw py::error_already_set();
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
  m.def(
      "first_pass",
      [](const std::string& variant, const py::dict& job) {
        run(variant, read_first_pass(job),
            [](const Variant& chosen, const FirstPass& pass) { chosen.first_pass(pass); });
      },
      py::arg("variant"), py::arg("job"), "The first pass over a job's rows.");
  m.def(
      "second_pass",
      [](const std::string& variant, const py::dict& job) {
        run(variant, read_second_pass(job),
            [](const Variant& chosen, const SecondPass& pass) { chosen.second_pass(pass); });
      },
      py::arg("variant"), py::arg("job"), "The second pass over a job's rows.");
  m.def(
      "whole",
      [](const std::string& variant, const py::dict& job) {
        run(variant, read_whole(job), &run_whole);
      },
      py::arg("variant"), py::arg("job"), "All of a job whose rows are one range.");
  m.attr("head_facts") = kHeadFacts;
  m.def("kept_bytes", &kept_bytes,
        "Scratch memory that the calling thread keeps for its next job.");
  m.attr("most_kept_bytes") = kMostKeptBytes;
}
