// Python face of the CUDA module moso_fast._cuda. Free of torch: one binary serves every version.
#include <pybind11/pybind11.h>

#include "device_query.h"

namespace py = pybind11;

namespace moso_fast::few_classes {
void bind(py::module_& m);  // few_classes_bindings.cpp
}

namespace {

py::dict device_query() {
  moso_fast::DeviceReport report;
  {
    // The first CUDA call of a process may load the driver, which takes up to seconds.
    py::gil_scoped_release release;
    report = moso_fast::query_devices();
  }
  py::list devices;
  for (const auto& device : report.devices) {
    py::dict entry;
    entry["index"] = device.index;
    entry["name"] = device.name;
    entry["capability"] = py::make_tuple(device.major, device.minor);
    entry["total_memory"] = device.total_memory;
    entry["multiprocessors"] = device.multiprocessors;
    devices.append(entry);
  }
  py::dict result;
  result["count"] = report.devices.size();
  result["devices"] = devices;
  result["driver_version"] = report.driver_version;
  result["runtime_version"] = report.runtime_version;
  result["error"] = report.error;
  return result;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA side of moso_fast.";
  // The architectures that setup.py chose, e.g. "sm_80 sm_90a sm_100 compute_100".
  m.attr("architectures") = MOSO_FAST_CUDA_ARCHITECTURES;
  m.def("device_query", &device_query,
        "Devices as a dict: count, devices (index, name, capability, total_memory in bytes, "
        "multiprocessors), driver_version and runtime_version (13000 = 13.0; driver 0 = none) and "
        "error (empty, or why no device can be used). Never raises on a machine without a GPU.");
  m.def(
      "device_limits",
      [](int device) {
        moso_fast::DeviceLimits limits;
        {
          py::gil_scoped_release release;
          limits = moso_fast::device_limits(device);
        }
        return py::make_tuple(limits.shared_memory, limits.multiprocessors);
      },
      py::arg("device"),
      "Bytes of shared memory that one block may have, and multiprocessors, of a device (index).");
  m.def("check_launch", &moso_fast::check_launch, py::arg("device"),
        py::call_guard<py::gil_scoped_release>(),
        "Runs a small kernel on the device (index); returns '' or the CUDA error as text.");
  moso_fast::few_classes::bind(m);
}
