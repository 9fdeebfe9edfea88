// Runs a block: its threads are fibers, switched where they wait for each other.
#include "block.h"

namespace moso_fast::emulator {

Block* block = nullptr;
int64_t counts[kCounts];

namespace {

constexpr size_t kStackBytes = 32 * 1024;
const char* const kNames[kCounts] = {"ldmatrix", "mma",          "shuffle", "warp barrier",
                                     "barrier",  "cp.async",     "shared",  "global 16 bytes",
                                     "global",   "bulk 16 bytes"};

[[noreturn]] void leave_for_good() {
  block->fiber().done = true;
  _longjmp(block->scheduler, 1);  // for good: nothing enters a finished fiber
}

void enter(Fiber& fiber) {
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

void entry() {
  block->body(block->argument);
  leave_for_good();
}

void run_block(int threads) {
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block->fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
  }
  const int warps = threads / kWarpSize;
  for (bool moved = true; moved && block->error.empty();) {
    moved = false;
    for (int w = 0; w < warps; ++w) {
      const int warp = block->options.reverse_warps ? warps - 1 - w : w;
      for (bool again = true; again;) {  // this warp as far as it gets
        again = false;
        for (int lane = 0; lane < kWarpSize && block->error.empty(); ++lane) {
          Fiber& fiber = block->fibers[warp * kWarpSize + lane];
          if (fiber.done || (fiber.waits_for && *fiber.waits_for == fiber.seen)) continue;
          fiber.waits_for = nullptr;
          block->current = warp * kWarpSize + lane;
          enter(fiber);
          again = moved = true;
        }
      }
    }
  }
  if (!block->error.empty()) return;
  for (int i = 0; i < threads; ++i) {
    if (!block->fibers[i].done) {
      block->error = "block " + std::to_string(block->index) + ", thread " + std::to_string(i) +
                     ": waits for threads that never come";
      return;
    }
    for (const auto& [at, transaction] : block->transactions)
      if (!transaction.parts.empty()) block->error = "the block ended with copies under way";
    if (!block->fibers[i].groups.empty())
      for (const auto& group : block->fibers[i].groups)
        if (!group.empty()) block->error = "the block ended with copies under way";
  }
}

}  // namespace

void fail(const std::string& what) {
  if (block->error.empty())
    block->error = "block " + std::to_string(block->index) + ", thread " +
                   std::to_string(block->current) + ": " + what;
  leave_for_good();
}

void wait_for(const uint64_t* generation, uint64_t seen) {
  Fiber& fiber = block->fiber();
  fiber.waits_for = generation;
  fiber.seen = seen;
  if (_setjmp(fiber.place) == 0) _longjmp(block->scheduler, 1);
}

std::string run(void (*body)(void*), void* argument, int64_t blocks, int threads,
                int64_t shared_bytes, const Options& options) {
  // Every block uses the same stacks: fresh pages would cost more than the kernels.
  static std::vector<unsigned char> stacks;
  stacks.resize(size_t(threads) * kStackBytes);
  forget_wide_loads();
  for (int64_t index = 0; index < blocks; ++index) {
    Block state;
    state.options = options;
    state.body = body;
    state.argument = argument;
    state.index = index;
    state.count = blocks;
    state.fibers.resize(size_t(threads));
    for (int i = 0; i < threads; ++i)
      state.fibers[size_t(i)].stack = &stacks[size_t(i) * kStackBytes];
    state.warps.resize(size_t(threads / kWarpSize));
    state.shared.assign(size_t(shared_bytes), 0xff);  // NaN as float32, bfloat16 and float16
    state.cells.resize(size_t(shared_bytes) / 2 + 8);
    block = &state;
    run_block(threads);
    block = nullptr;
    if (!state.error.empty()) return state.error;
  }
  return "";
}

std::vector<std::pair<std::string, int64_t>> take_counts() {
  std::vector<std::pair<std::string, int64_t>> taken;
  for (int i = 0; i < kCounts; ++i) {
    taken.emplace_back(kNames[i], counts[i]);
    counts[i] = 0;
  }
  return taken;
}

int thread_index() { return block->current; }
int64_t block_index() { return block->index; }
int64_t block_count() { return block->count; }

}  // namespace moso_fast::emulator
