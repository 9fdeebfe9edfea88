// The fields of a job, which Python hands over as a dict of addresses and sizes. A table names each
// field once; reading a job and checking its names both go by the table.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>

namespace moso_fast {

// A name in the dict and the place of its value: a member of the job, or a function that returns a
// reference into it.
template <class Place>
struct Field {
  const char* name;
  Place place;
};

template <class Place>
constexpr Field<Place> field(const char* name, Place place) {
  return {name, place};
}

template <class... Places>
constexpr std::tuple<Field<Places>...> table(Field<Places>... fields) {
  return {fields...};
}

// Addresses are integers, 0 for "not given".
template <class T>
T value_of(const pybind11::handle& value) {
  if constexpr (std::is_pointer_v<T>)
    return reinterpret_cast<T>(value.cast<uintptr_t>());
  else if constexpr (std::is_enum_v<T>)
    return T(value.cast<std::underlying_type_t<T>>());
  else
    return value.cast<T>();
}

template <class T>
T value_at(const pybind11::dict& job, const pybind11::handle& name) {
  PyObject* value = PyDict_GetItemWithError(job.ptr(), name.ptr());
  if (!value && PyErr_Occurred()) throw pybind11::error_already_set();
  if (!value)
    throw pybind11::key_error("the job lacks the field " +
                              pybind11::repr(name).cast<std::string>());
  return value_of<T>(value);
}

template <const auto& kTable>
inline constexpr size_t fields_in = std::tuple_size_v<std::decay_t<decltype(kTable)>>;

// The names of a table as Python strings, made once: for a small job it would show.
template <const auto& kTable>
const pybind11::tuple& names_in() {
  PYBIND11_CONSTINIT static pybind11::gil_safe_call_once_and_store<pybind11::tuple> names;
  const auto make = [] {
    return std::apply([](const auto&... field) { return pybind11::make_tuple(field.name...); },
                      kTable);
  };
  return names.call_once_and_store_result(make).get_stored();
}

// Sets every field of the table.
template <const auto& kTable, class Job>
void read_fields(const pybind11::dict& job, Job* to) {
  PyObject* names = names_in<kTable>().ptr();
  Py_ssize_t at = 0;
  const auto read = [&](const auto& field) {
    auto& place = std::invoke(field.place, *to);
    place = value_at<std::decay_t<decltype(place)>>(job, PyTuple_GET_ITEM(names, at++));
  };
  std::apply([&](const auto&... field) { (read(field), ...); }, kTable);
}

// The names of some tables, as a Python set.
template <const auto&... kTables>
const pybind11::set& known_names() {
  PYBIND11_CONSTINIT static pybind11::gil_safe_call_once_and_store<pybind11::set> known;
  const auto collect = [] {
    pybind11::set names;
    const auto add = [&](const pybind11::tuple& table) {
      for (const auto& name : table) names.add(name);
    };
    (add(names_in<kTables>()), ...);
    return names;
  };
  return known.call_once_and_store_result(collect).get_stored();
}

// Refuses a job with a name that is not known: most likely a misspelt one. All names of a module
// are known to all of its jobs, because one dict may serve several of them.
inline void check_names(const pybind11::dict& job, const pybind11::set& known) {
  for (const auto& item : job) {
    const int found = PySet_Contains(known.ptr(), item.first.ptr());
    if (found < 0) throw pybind11::error_already_set();
    if (found == 0)
      throw pybind11::value_error("the job has a field " +
                                  pybind11::repr(item.first).cast<std::string>() +
                                  " that no kernel takes");
  }
}

}  // namespace moso_fast
