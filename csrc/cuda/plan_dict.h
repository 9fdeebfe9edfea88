// Plan of few_classes.h as a Python dict.
#pragma once

#include <pybind11/pybind11.h>

#include "few_classes.h"

namespace moso_fast::few_classes {

inline pybind11::dict plan_dict(int feature, bool exact, int classes, int dim,
                                int64_t shared_limit) {
  const Plan plan = make_plan(Feature(feature), exact, classes, dim, shared_limit);
  pybind11::dict d;
  d["ok"] = plan.ok;
  d["reason"] = plan.reason;
  d["tiles"] = plan.tiles;
  d["narrow"] = plan.narrow;
  d["parts"] = plan.parts;
  d["together"] = plan.together;
  d["tile_rows"] = plan.tile_rows;
  d["stages"] = plan.stages;
  d["first_bytes"] = plan.first_bytes;
  d["second_bytes"] = plan.second_bytes;
  d["slab_limit"] = plan.slab_limit;
  return d;
}

}  // namespace moso_fast::few_classes
