// Ordinary accesses to shared and global memory.
#include <algorithm>
#include <map>

#include "block.h"

namespace moso_fast::emulator {
namespace {

struct Range {
  int64_t bytes;
  bool writable;
};

std::map<uintptr_t, Range> arrays;
std::vector<uintptr_t> wide_loads;

}  // namespace

void check_shared(uint32_t offset, int bytes, bool write) {
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

const unsigned char* shared_read(uint32_t offset, int bytes) {
  ++counts[kCountShared];
  check_shared(offset, bytes, false);
  return &block->shared[offset];
}
unsigned char* shared_write(uint32_t offset, int bytes) {
  ++counts[kCountShared];
  check_shared(offset, bytes, true);
  return &block->shared[offset];
}

void register_array(const void* base, int64_t bytes, bool writable) {
  arrays[reinterpret_cast<uintptr_t>(base)] = {bytes, writable};
}
void forget_arrays() { arrays.clear(); }

void forget_wide_loads() { wide_loads.clear(); }
const std::vector<uintptr_t>& last_wide_loads() { return wide_loads; }

void check_global(const void* at, int bytes, bool write) {
  ++counts[bytes == 16 ? kCountWide : kCountGlobal];
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

}  // namespace moso_fast::emulator
