// Python module of the emulator: the same jobs as moso_fast._cuda, on arrays in main memory, and
// the index functions by name. For tests only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "closing.cuh"
#include "faults.h"
#include "few_classes_first.cuh"
#include "few_classes_second.cuh"
#include "gradient_reduce.cuh"
#include "instances.h"
#include "plan_dict.h"
#include "read_jobs.h"

namespace py = pybind11;
using namespace moso_fast;
using namespace moso_fast::few_classes;

namespace {

emulator::Options options;

void launch(void (*body)(void*), void* argument, int64_t blocks, int threads, int64_t shared) {
  const std::string error = emulator::run(body, argument, blocks, threads, shared, options);
  if (!error.empty()) throw std::runtime_error(error);
}

void first_pass_job(const py::dict& job) {
  FirstPass p = read_first_pass(job);
  const Launch l = read_launch(job);
  launch(first_body(l.feature, l.exact, l.tiles, l.narrow), &p, l.blocks, kThreads, l.shared_bytes);
}
void second_pass_job(const py::dict& job) {
  SecondPass p = read_second_pass(job);
  const Launch l = read_launch(job);
  launch(second_body(l.feature, l.exact, l.tiles), &p, l.blocks, kThreads, l.shared_bytes);
}
void reduce_job(const py::dict& job) {
  Reduce p = read_reduce(job);
  launch([](void* a) { reduce_partials(*static_cast<Reduce*>(a)); }, &p, reduce_blocks(p),
         kReduceThreads, kReduceBytes);
}
void finish_job(const py::dict& job) {
  closing::Finish p = closing::read_finish(job);
  launch([](void* a) { closing::finish(*static_cast<closing::Finish*>(a)); }, &p,
         p.heads * p.blocks_a_head, closing::kThreads, closing::kFinishBytes);
}
void judge_job(const py::dict& job) {
  closing::Judge p = closing::read_judge(job);
  launch([](void* a) { closing::judge(*static_cast<closing::Judge*>(a)); }, &p, p.heads,
         closing::kJudgeThreads, closing::kJudgeBytes);
}
void score_job(const py::dict& job) {
  closing::Score p = closing::read_score(job);
  launch([](void* a) { closing::score(*static_cast<closing::Score*>(a)); }, &p,
         ceil_div(p.heads * p.rows, closing::kThreads), closing::kThreads, 0);
}

// [(slab, row, count, last of its slab), ..] that a block works through.
std::vector<py::tuple> walk_of(int block, int blocks, int rows, int slab_rows, int tile_rows) {
  const TileWalk walk{rows, slab_rows, int(ceil_div(rows, slab_rows)), blocks, tile_rows};
  std::vector<py::tuple> tiles;
  for (TileCursor at = first_tile(walk, block); !past_last(walk, at); advance(walk, at))
    tiles.push_back(py::make_tuple(at.slab, at.row, rows_of(walk, at), last_of_slab(walk, at)));
  return tiles;
}

}  // namespace

PYBIND11_MODULE(_cuda_emulator, m) {
  m.def("few_classes_first", &first_pass_job);
  m.def("few_classes_second", &second_pass_job);
  m.def("few_classes_reduce", &reduce_job);
  m.def("closing_finish", &finish_job);
  m.def("closing_judge", &judge_job);
  m.def("closing_score", &score_job);
  // On a GPU one call; here its parts are launched one by one (cuda_emulator.py).
  m.def("few_classes_whole", [](const py::dict&) {});
  m.attr("closing_count_blocks") = closing::kCountBlocks;
  m.attr("closing_row_sums") = closing::kRowSums;
  m.attr("closing_head_facts") = closing::kHeadFacts;
  m.attr("closing_threads") = closing::kThreads;
  m.def("few_classes_plan", &plan_dict);
  m.def("few_classes_slab_rows", &slab_rows_for);
  m.def("few_classes_partial_columns", &partial_columns);
  m.def("set_options",
        [](bool reverse_warps, bool cut_sums) { options = {reverse_warps, cut_sums}; });
  m.def("register_array", [](uintptr_t base, int64_t bytes, bool writable) {
    emulator::register_array(reinterpret_cast<void*>(base), bytes, writable);
  });
  m.def("forget_arrays", &emulator::forget_arrays);
  // What the emulator says about a kernel with this mistake; "" when it finds nothing.
  m.def("run_fault", [](const std::string& name, uintptr_t numbers) {
    emulator::Fault fault{name, reinterpret_cast<const float*>(numbers)};
    return emulator::run(&emulator::faulty, &fault, 1, 64, 1024, options);
  });
  m.def("take_counts", [] {
    py::dict found;
    for (const auto& [name, count] : emulator::take_counts()) found[name.c_str()] = count;
    return found;
  });

  m.def("last_wide_loads", &emulator::last_wide_loads);

  m.def("feature_offset", &feature_offset);
  m.def("row_pitch", &row_pitch);
  m.def("logit_row", &logit_row);
  m.def("row_bytes", &row_bytes);
  m.def("groups_of", &groups_of);
  m.def("tiles_for", &tiles_for);
  m.def("parts_of", &parts_of);
  m.def("class_tiles_of", &class_tiles_of);
  m.def("most_columns", &most_columns);
  m.def("operand_class", &operand_class);
  m.def("operand_column", &operand_column);
  m.def("natural_column", &natural_column);
  m.def("operand_offset", &operand_offset);
  m.def("operand_blocks", &operand_blocks);
  m.def("operand_lane_bytes", &operand_lane_bytes);
  m.def("operand_words", &operand_words);
  m.def("gradient_pair_bytes", &gradient_pair_bytes);
  m.def("operand_bytes", &operand_bytes);
  m.def("gradient_row", &gradient_row);
  m.def("gradient_lane", &gradient_lane);
  m.def("gradient_slot", &gradient_slot);
  m.def("residual_half", &residual_half);
  m.def("residual_slot_bytes", &residual_slot_bytes);
  m.def("residual_bytes", &residual_bytes);
  m.def("accumulator_row", &accumulator_row);
  m.def("accumulator_column", &accumulator_column);
  m.def("gradient_column", &gradient_column);
  m.def("reduce_partner", &reduce_partner);
  m.def("tile_walk", &walk_of);
  m.def("first_layout",
        [](int item, int terms, int tiles, int classes, int dim, int rows, int stages) {
          const FirstLayout l = first_layout(item, terms, tiles, classes, dim, rows, stages);
          py::dict d;
          d["weights"] = l.weights;
          d["logits"] = l.logits;
          d["residuals"] = l.residuals;
          d["norms"] = l.norms;
          d["bias_sums"] = l.bias_sums;
          d["barriers"] = py::make_tuple(bulk_barrier(l, 0), bulk_barrier(l, stages - 1));
          d["slice_bytes"] = l.slice_bytes;
          d["bytes"] = l.bytes;
          d["slices"] = l.slices;
          d["logit_stride"] = l.logit_stride;
          d["split"] = l.split;
          return d;
        });
}
