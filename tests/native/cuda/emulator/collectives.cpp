// What several threads do together: barriers of the block, instructions of a warp.
#include "block.h"

namespace moso_fast::emulator {

bool barrier_or(bool value) {
  block->barrier_value = block->barrier_value || value;
  const uint64_t seen = block->barrier_generation;
  if (++block->barrier_arrived == int(block->fibers.size())) {
    ++counts[kCountBarrier];
    block->barrier_arrived = 0;
    block->barrier_result = block->barrier_value;
    block->barrier_value = false;
    ++block->epoch;
    block->published = block->landings;
    for (Fiber& fiber : block->fibers) fiber.seen_landings.clear();
    ++block->barrier_generation;
  } else {
    wait_for(&block->barrier_generation, seen);
  }
  return block->barrier_result;
}
void barrier() { barrier_or(false); }

void collective(Collective kind, const void* input, int input_bytes, void* output,
                int output_bytes) {
  const int lane = block->current % kWarpSize;
  Warp& warp = block->warps[size_t(block->current / kWarpSize)];
  if (warp.arrived > 0 && warp.kind != kind) fail("lanes of a warp meet at different instructions");
  warp.kind = kind;
  if (input) std::memcpy(warp.data.input[lane], input, size_t(input_bytes));
  if (kind == Collective::kMatrices) {
    uint32_t offset;
    std::memcpy(&offset, input, 4);
    check_shared(offset, 16, false);
  }
  const uint64_t seen = warp.generation;
  if (++warp.arrived == kWarpSize) {
    ++counts[int(kind)];
    if (kind == Collective::kMultiply) multiply(warp.data, block->options.cut_sums);
    if (kind == Collective::kMatrices) load_matrices(warp.data, block->shared.data());
    if (kind == Collective::kShuffle && !shuffle(warp.data))
      fail("shuffle: lanes disagree in the mask");
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait_for(&warp.generation, seen);
  }
  if (output) std::memcpy(output, warp.data.output[lane], size_t(output_bytes));
}

}  // namespace moso_fast::emulator
