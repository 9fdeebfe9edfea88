// The block and its fibers; see device_emulator.h.
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <map>

#include "../device.cuh"
#include "instructions.h"

namespace moso_fast::emulator {
namespace {

constexpr size_t kStackBytes = 32 * 1024;
constexpr int16_t kMany = -2, kNobody = -1;

struct CopyPart {
  uint32_t offset;
  unsigned char bytes[16];
};

struct BulkPart {
  uint32_t offset;
  std::vector<unsigned char> bytes;
};

// A barrier of bulk copies with one arrival a phase. Copies land as late as they may: when a thread
// waits and everything announced has been asked for.
struct Transaction {
  int maker = 0;
  uint32_t epoch = 0;
  int64_t announced = 0, asked = 0;
  bool arrived = false;
  int waiting = 0;
  uint64_t phase = 0, landing = 0;
  std::vector<BulkPart> parts;
};

// A fiber starts by setcontext and from then on is left and entered by setjmp and longjmp, which
// make no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool started = false;
  unsigned char* stack = nullptr;
  bool done = false;
  const uint64_t* waits_for = nullptr;  // resumes once this is no longer `seen`
  uint64_t seen = 0;
  uint64_t fence = 0;                   // stores up to this one are fenced
  std::vector<uint64_t> seen_landings;  // since the last barrier
  std::vector<CopyPart> open_group;
  std::vector<std::vector<CopyPart>> groups;
};

struct Warp {
  int arrived = 0;
  uint64_t generation = 0;
  Collective kind{};
  WarpData data;
};

// State of two shared bytes.
struct Cell {
  int16_t writer = kNobody, reader = kNobody;
  uint32_t write_epoch = 0, read_epoch = 0;
  bool written = false, under_way = false, bulk_under_way = false;
  uint64_t store = 0, landing = 0;  // numbers of the last ordinary store and bulk copy, or 0
};

struct Block {
  Options options;
  void (*body)(void*);
  void* argument;
  int64_t index, count;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  jmp_buf scheduler;
  int current = 0;
  std::string error;
  uint64_t barrier_generation = 0;
  int barrier_arrived = 0;
  bool barrier_value = false, barrier_result = false;
  uint32_t epoch = 1;
  uint64_t stores = 0, landings = 0, published = 0;
  std::map<uint32_t, Transaction> transactions;
  std::vector<unsigned char> shared;
  std::vector<Cell> cells;
};

struct Range {
  int64_t bytes;
  bool writable;
};

Block* block = nullptr;
std::map<uintptr_t, Range> arrays;
constexpr int kCounts = 10;
int64_t counts[kCounts];
std::vector<uintptr_t> wide_loads;
const char* const kNames[kCounts] = {"ldmatrix", "mma",          "shuffle", "warp barrier",
                                     "barrier",  "cp.async",     "shared",  "global 16 bytes",
                                     "global",   "bulk 16 bytes"};

[[noreturn]] void leave_for_good() {
  block->fibers[block->current].done = true;
  _longjmp(block->scheduler, 1);  // for good: nothing enters a finished fiber
}

[[noreturn]] void fail(const std::string& what) {
  if (block->error.empty())
    block->error = "block " + std::to_string(block->index) + ", thread " +
                   std::to_string(block->current) + ": " + what;
  leave_for_good();
}

void wait_for(const uint64_t* generation, uint64_t seen) {
  Fiber& fiber = block->fibers[block->current];
  fiber.waits_for = generation;
  fiber.seen = seen;
  if (_setjmp(fiber.place) == 0) _longjmp(block->scheduler, 1);
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

void cells_of(uint32_t offset, int bytes, bool write) {
  if (int64_t(offset) + bytes > int64_t(block->shared.size()))
    fail("shared memory: " + std::to_string(offset) + " + " + std::to_string(bytes) +
         " is beyond " + std::to_string(block->shared.size()));
  if (offset % uint32_t(bytes) != 0) fail("shared memory: misaligned access");
  const auto me = int16_t(block->current);
  for (uint32_t i = offset / 2; i < (offset + uint32_t(bytes) + 1) / 2; ++i) {
    Cell& cell = block->cells[i];
    const auto where = [i] { return " at shared byte " + std::to_string(2 * i); };
    if (cell.write_epoch == block->epoch && cell.writer != me)
      fail(std::string("race: ") + (write ? "write" : "read") + " after a write of thread " +
           std::to_string(cell.writer) + where());
    if (cell.bulk_under_way) fail("access to where a bulk copy is under way" + where());
    const auto& seen = block->fibers[size_t(me)].seen_landings;
    if (cell.landing > block->published &&
        std::find(seen.begin(), seen.end(), cell.landing) == seen.end())
      fail("bulk copy that this thread did not wait for" + where());
    if (write) {
      if (cell.read_epoch == block->epoch && cell.reader != me)
        fail("race: write after a read of another thread" + where());
      cell.writer = me;
      cell.write_epoch = block->epoch;
      cell.written = true;
      cell.under_way = false;
      cell.store = ++block->stores;
      cell.landing = 0;
    } else {
      if (cell.under_way) fail("read of a copy that is under way" + where());
      if (!cell.written) fail("read of what nobody wrote" + where());
      cell.reader = cell.read_epoch == block->epoch && cell.reader != me ? kMany : me;
      cell.read_epoch = block->epoch;
    }
  }
}

void apply(const std::vector<CopyPart>& group) {
  for (const CopyPart& part : group) {
    cells_of(part.offset, 16, true);
    std::memcpy(&block->shared[part.offset], part.bytes, 16);
  }
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

std::string run(void (*body)(void*), void* argument, int64_t blocks, int threads,
                int64_t shared_bytes, const Options& options) {
  // Every block uses the same stacks: fresh pages would cost more than the kernels.
  static std::vector<unsigned char> stacks;
  stacks.resize(size_t(threads) * kStackBytes);
  wide_loads.clear();
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

void register_array(const void* base, int64_t bytes, bool writable) {
  arrays[reinterpret_cast<uintptr_t>(base)] = {bytes, writable};
}
void forget_arrays() { arrays.clear(); }

std::vector<std::pair<std::string, int64_t>> take_counts() {
  std::vector<std::pair<std::string, int64_t>> taken;
  for (int i = 0; i < kCounts; ++i) {
    taken.emplace_back(kNames[i], counts[i]);
    counts[i] = 0;
  }
  return taken;
}

const std::vector<uintptr_t>& last_wide_loads() { return wide_loads; }

int thread_index() { return block->current; }
int64_t block_index() { return block->index; }
int64_t block_count() { return block->count; }

bool barrier_or(bool value) {
  block->barrier_value = block->barrier_value || value;
  const uint64_t seen = block->barrier_generation;
  if (++block->barrier_arrived == int(block->fibers.size())) {
    ++counts[4];
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

const unsigned char* shared_read(uint32_t offset, int bytes) {
  ++counts[6];
  cells_of(offset, bytes, false);
  return &block->shared[offset];
}
unsigned char* shared_write(uint32_t offset, int bytes) {
  ++counts[6];
  cells_of(offset, bytes, true);
  return &block->shared[offset];
}

void check_global(const void* at, int bytes, bool write) {
  ++counts[bytes == 16 ? 7 : 8];
  const auto address = reinterpret_cast<uintptr_t>(at);
  if (bytes == 16) wide_loads.push_back(address);
  if (address % uintptr_t(bytes) != 0) fail("global memory: misaligned access");
  auto next = arrays.upper_bound(address);
  if (next != arrays.begin()) {
    const auto& [base, range] = *--next;
    if (address + uintptr_t(bytes) <= base + uintptr_t(range.bytes) && (range.writable || !write))
      return;
  }
  fail(std::string("global memory: ") + (write ? "write to" : "read from") +
       " an address that is not part of any array");
}

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
    cells_of(offset, 16, false);
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

void copy_async(uint32_t offset, const void* from, int bytes) {
  ++counts[5];
  CopyPart part{offset, {}};
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("cp.async: misaligned source");
  if (bytes < 0 || bytes > 16) fail("cp.async: size");
  if (bytes > 0) {
    const auto* source = static_cast<const unsigned char*>(from);
    // cp.async needs no alignment of its size: checked byte by byte at both ends.
    check_global(source, 1, false);
    check_global(source + bytes - 1, 1, false);
    std::memcpy(part.bytes, from, size_t(bytes));
  }
  cells_of(offset, 16, true);  // now and when it lands, nobody else may touch these bytes
  std::memset(&block->shared[offset], 0xff, 16);
  for (uint32_t i = offset / 2; i < offset / 2 + 8; ++i) block->cells[i].under_way = true;
  block->fibers[block->current].open_group.push_back(part);
}

void copy_commit() {
  Fiber& fiber = block->fibers[block->current];
  fiber.groups.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}

void copy_wait(int pending) {
  Fiber& fiber = block->fibers[block->current];
  while (int(fiber.groups.size()) > pending) {
    apply(fiber.groups.front());
    fiber.groups.erase(fiber.groups.begin());
  }
}

namespace {

Transaction& transaction_at(uint32_t barrier) {
  const auto found = block->transactions.find(barrier);
  if (found == block->transactions.end()) fail("bulk copy: no barrier at this offset");
  Transaction& t = found->second;
  if (t.epoch == block->epoch && t.maker != block->current)
    fail("bulk copy: its barrier is not yet known to this thread");
  return t;
}

void land_if_complete(Transaction& t) {
  if (!t.arrived || t.asked != t.announced || t.waiting == 0) return;
  t.landing = ++block->landings;
  for (const BulkPart& part : t.parts) {
    std::memcpy(&block->shared[part.offset], part.bytes.data(), part.bytes.size());
    for (uint32_t i = part.offset / 2; i < (part.offset + part.bytes.size()) / 2; ++i) {
      Cell fresh;
      fresh.written = true;
      fresh.landing = t.landing;
      block->cells[i] = fresh;
    }
  }
  t.parts.clear();
  t.announced = t.asked = 0;
  t.arrived = false;
  ++t.phase;
}

}  // namespace

void init_barrier(uint32_t barrier) {
  cells_of(barrier, 8, true);
  Transaction t;
  t.maker = block->current;
  t.epoch = block->epoch;
  block->transactions[barrier] = t;
}

void fence_bulk() { block->fibers[block->current].fence = block->stores; }

void announce_bulk(uint32_t barrier, int bytes) {
  Transaction& t = transaction_at(barrier);
  if (t.arrived) fail("bulk copy: announced twice in a phase");
  t.arrived = true;
  t.announced = bytes;
  land_if_complete(t);
}

void copy_bulk(uint32_t offset, const void* from, int bytes, uint32_t barrier) {
  Transaction& t = transaction_at(barrier);
  const auto* source = static_cast<const unsigned char*>(from);
  if (offset % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    fail("bulk copy: misaligned");
  if (bytes <= 0 || int64_t(offset) + bytes > int64_t(block->shared.size()))
    fail("bulk copy: beyond shared memory");
  for (int at = 0; at < bytes; at += 16) {
    check_global(source + at, 16, false);
    --counts[7];
    ++counts[9];
  }
  const auto fenced = [](const Cell& cell) {
    return cell.store == 0 || cell.store <= block->fibers[size_t(cell.writer)].fence;
  };
  if (!fenced(block->cells[barrier / 2])) fail("bulk copy: its barrier is not fenced");
  for (uint32_t at = offset; at < offset + uint32_t(bytes); at += 16) {
    for (uint32_t i = at / 2; i < at / 2 + 8; ++i)
      if (!fenced(block->cells[i])) fail("bulk copy over a store that is not fenced");
    cells_of(at, 16, true);
    for (uint32_t i = at / 2; i < at / 2 + 8; ++i) block->cells[i].bulk_under_way = true;
  }
  std::memset(&block->shared[offset], 0xff, size_t(bytes));
  t.parts.push_back({offset, {source, source + bytes}});
  t.asked += bytes;
  land_if_complete(t);
}

void wait_bulk(uint32_t barrier, int parity) {
  Transaction& t = transaction_at(barrier);
  if (int(t.phase & 1) == parity) {
    ++t.waiting;
    land_if_complete(t);
    while (int(t.phase & 1) == parity) wait_for(&t.phase, t.phase);
    --t.waiting;
  }
  block->fibers[block->current].seen_landings.push_back(t.landing);
}

}  // namespace moso_fast::emulator
