// cp.async.bulk: copies of whole rows, counted by a barrier in shared memory.
#include "block.h"

namespace moso_fast::emulator {
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
  check_shared(barrier, 8, true);
  Transaction t;
  t.maker = block->current;
  t.epoch = block->epoch;
  block->transactions[barrier] = t;
}

void fence_bulk() { block->fiber().fence = block->stores; }

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
    --counts[kCountWide];
    ++counts[kCountBulk];
  }
  const auto fenced = [](const Cell& cell) {
    return cell.store == 0 || cell.store <= block->fibers[size_t(cell.writer)].fence;
  };
  if (!fenced(block->cells[barrier / 2])) fail("bulk copy: its barrier is not fenced");
  for (uint32_t at = offset; at < offset + uint32_t(bytes); at += 16) {
    for (uint32_t i = at / 2; i < at / 2 + 8; ++i)
      if (!fenced(block->cells[i])) fail("bulk copy over a store that is not fenced");
    check_shared(at, 16, true);
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
  block->fiber().seen_landings.push_back(t.landing);
}

}  // namespace moso_fast::emulator
