// Fields of a job, which is a Python dict of addresses and sizes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace moso_fast {

template <class T>
T* address(const pybind11::dict& job, const char* key) {
  return reinterpret_cast<T*>(job[key].cast<uintptr_t>());  // 0 for "not given"
}
template <class T>
T number(const pybind11::dict& job, const char* key) {
  return job[key].cast<T>();
}

}  // namespace moso_fast
