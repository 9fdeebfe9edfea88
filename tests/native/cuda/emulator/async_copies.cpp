// cp.async: copies of 16 bytes that land when their thread waits for their group.
#include "block.h"

namespace moso_fast::emulator {
namespace {

void apply(const std::vector<CopyPart>& group) {
  for (const CopyPart& part : group) {
    check_shared(part.offset, 16, true);
    std::memcpy(&block->shared[part.offset], part.bytes, 16);
  }
}

}  // namespace

void copy_async(uint32_t offset, const void* from, int bytes) {
  ++counts[kCountAsyncCopy];
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
  check_shared(offset, 16, true);  // now and when it lands, nobody else may touch these bytes
  std::memset(&block->shared[offset], 0xff, 16);
  for (uint32_t i = offset / 2; i < offset / 2 + 8; ++i) block->cells[i].under_way = true;
  block->fiber().open_group.push_back(part);
}

void copy_commit() {
  Fiber& fiber = block->fiber();
  fiber.groups.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}

void copy_wait(int pending) {
  Fiber& fiber = block->fiber();
  while (int(fiber.groups.size()) > pending) {
    apply(fiber.groups.front());
    fiber.groups.erase(fiber.groups.begin());
  }
}

}  // namespace moso_fast::emulator
