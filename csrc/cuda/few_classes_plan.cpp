// Which problems the few-classes kernels take, and how they are cut. Runs without a GPU.
#include "few_classes.h"

namespace moso_fast::few_classes {
namespace {

constexpr int64_t kReservedBytes = 1024;  // of shared memory that every block leaves to the system

}  // namespace

// As Mode in operands.cuh.
Terms terms_of(Feature feature, bool exact) {
  if (exact) return {3, 3};
  return feature == Feature::kFloat32 ? Terms{2, 2} : Terms{1, 2};
}

Plan make_plan(Feature feature, bool exact, int classes, int dim, int64_t shared_limit) {
  Plan plan{};
  // Exact sums leave the tensor cores, which cut off, after every 16 rows and are rounded: equal
  // rows lose 4e-6 at most. Others stay there for the slab and lose less than their operands did.
  plan.slab_limit = exact ? 2048 : 8192;
  plan.tiles = tiles_for(classes);
  plan.parts = parts_of(plan.tiles);
  if (plan.tiles == 0) {
    plan.reason = "more than 112 classes of all heads together";
    return plan;
  }
  if (dim > most_columns(plan.tiles)) {
    plan.reason = plan.tiles == 1   ? "more than 2048 columns"
                  : plan.tiles == 2 ? "more than 1024 columns with more than 16 classes"
                                    : "more than 512 columns with more than 32 classes";
    return plan;
  }
  const int item = feature == Feature::kFloat32 ? 4 : 2;
  const Terms terms = terms_of(feature, exact);
  plan.second_bytes = operand_bytes(item, terms.second, classes, dim);
  plan.narrow = has_narrow(item, exact, plan.tiles) && dim <= kNarrowColumns;
  // Two blocks a multiprocessor where tiles of 32 rows leave room; then deep staging before tall
  // tiles once there are 32 rows: loads in flight hide the arithmetic.
  const int64_t half = (shared_limit + kReservedBytes) / 2 - kReservedBytes;
  constexpr int kChoices[][2] = {{64, 3}, {64, 2}, {32, 3}, {32, 2}, {16, 3}, {16, 2}, {16, 1}};
  for (int together = plan.narrow ? 2 : 1; together > 0 && plan.tile_rows == 0; --together) {
    for (const auto& choice : kChoices) {
      const FirstLayout layout =
          first_layout(item, terms.first, plan.tiles, classes, dim, choice[0], choice[1]);
      if (layout.bytes > (together == 2 ? half : shared_limit)) continue;
      if (together == 2 && choice[0] < 32) continue;
      plan.together = together;
      plan.tile_rows = choice[0];
      plan.stages = choice[1];
      plan.first_bytes = layout.bytes;
      break;
    }
  }
  if (plan.tile_rows == 0 || plan.second_bytes > shared_limit) {
    plan.reason = "weights and one tile of rows exceed the shared memory of a block";
    return plan;
  }
  plan.ok = true;
  plan.reason = "";
  return plan;
}

}  // namespace moso_fast::few_classes
