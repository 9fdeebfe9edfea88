// Staging of the first pass: tiles of whole rows from memory to shared memory, by bulk copies or by
// 16 bytes at a time. The picture is in few_classes_first.cuh.
#pragma once

#include "operands.cuh"

namespace moso_fast::few_classes {

// What the bulk copies need once: their barriers, and zeros after the columns. All threads.
MOSO_DEVICE void prepare_bulk(const FirstLayout& layout, int filled) {
  if (device::thread_index() == 0) {
    for (int stage = 0; stage < layout.stages; ++stage)
      device::init_barrier(bulk_barrier(layout, stage));
  }
  const int empty = (layout.row_bytes - filled) / 16;
  for (int i = device::thread_index(); i < empty * layout.tile_rows * layout.stages; i += kThreads)
    device::shared_store(feature_offset(i / empty, filled / 16 + i % empty, layout.pitch),
                         Words4{{0, 0, 0, 0}});
  device::fence_bulk();
  device::sync_block();
}

// As stage_tile, a whole row a lane; the stage's barrier counts their bytes. Called by the second
// half of the warps, which share the rows because a warp requests one after another.
template <int Item>
MOSO_DEVICE void stage_tile_bulk(const FirstPass& p, int stage, int first, int count) {
  const FirstLayout& layout = p.layout;
  const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
  constexpr int kAsking = kWarps / 2, kFirst = kThreads / 2;
  const int bytes = p.dim * Item, row = warp - kAsking + kAsking * lane;
  const uint32_t tile = uint32_t(stage) * layout.stage_bytes, barrier = bulk_barrier(layout, stage);
  // Bytes may arrive before they are announced: the phase ends with the announcement at the least.
  if (device::thread_index() == kFirst) device::announce_bulk(barrier, count * bytes);
  if (row < count)
    device::copy_bulk(
        tile + feature_offset(row, 0, layout.pitch),
        static_cast<const unsigned char*>(p.features) + (first + row) * (p.row_stride * Item),
        bytes, barrier);
  // Only the last of all tiles has rows that do not exist, and nothing is copied there after it.
  const int chunks = layout.row_bytes / 16;
  if (count == layout.tile_rows) return;
  MOSO_NO_UNROLL
  for (int i = device::thread_index() - kFirst; i < (layout.tile_rows - count) * chunks;
       i += kThreads - kFirst)
    device::shared_store(tile + feature_offset(count + i / chunks, i % chunks, layout.pitch),
                         Words4{{0, 0, 0, 0}});
}

// Requests rows [first, first + count) of the features; rows and columns that do not exist become
// zeros. All threads take part.
template <int Item>
MOSO_DEVICE void stage_tile(const FirstPass& p, uint32_t stage, int first, int count) {
  constexpr int kNumbers = vector_numbers(Item);
  const int pitch = p.layout.pitch, chunks = p.layout.row_bytes / 16;
  const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
  // A warp copies one row at a time, or as many as it has lanes for.
  const int rows_at_once = chunks < kLanes ? kLanes / chunks : 1;
  const int sub = chunks < kLanes ? lane / chunks : 0;
  const int begin = chunks < kLanes ? lane % chunks : lane;
  if (sub >= rows_at_once) return;
  const auto* base = static_cast<const unsigned char*>(p.features);
  for (int row = warp * rows_at_once + sub; row < p.layout.tile_rows;
       row += kWarps * rows_at_once) {
    const unsigned char* from = base + (first + row) * (p.row_stride * Item);
    for (int chunk = begin; chunk < chunks; chunk += kLanes) {
      const int column = chunk * kNumbers;
      const uint32_t to = stage + feature_offset(row, chunk, pitch);
      const int left = row < count ? (p.dim - column) * Item : 0;
      if (p.aligned) {
        const int copied = left < 0 ? 0 : left > 16 ? 16 : left;
        device::copy_async(to, copied > 0 ? from + chunk * 16 : base, copied);
      } else {
        const int dim = left > 0 ? p.dim : 0;
        device::shared_store(to, load_features<Item>(from, column, dim, false));
      }
    }
  }
}

// The tiles of a block on their way to shared memory, as many ahead of the arithmetic as there are
// stages less one.
template <int Item>
struct Stages {
  const FirstPass& p;
  TileCursor next;  // to request

  // Read from the parameter each time: a variable would keep a register from the sums.
  MOSO_DEVICE bool bulk() const { return device::kBulkCopies && p.bulk != 0; }

  // Requests the next tile. Bulk copies are requested by the second half of the warps, which has no
  // softmax to do if tiles are of 32 rows or less; the others do not know how far they are.
  MOSO_DEVICE void request(int stage) {
    if (bulk() && device::thread_index() < kThreads / 2) return;
    if (!past_last(p.walk, next)) {
      const int count = rows_of(p.walk, next);
      if (bulk())
        stage_tile_bulk<Item>(p, stage, next.row, count);
      else
        stage_tile<Item>(p, uint32_t(stage) * p.layout.stage_bytes, next.row, count);
      advance(p.walk, next);
    }
    if (!bulk()) device::copy_commit();
  }

  MOSO_DEVICE void wait(int stage, int parity) const {
    if (bulk())
      device::wait_bulk(bulk_barrier(p.layout, stage), parity);
    else
      device::copy_wait(p.layout.stages - 2);
  }

  // Returns when the tile of this stage is there and everybody is done with the one before it,
  // whose stage is requested anew; by bulk copies only once the logits are done.
  MOSO_DEVICE void begin_tile(int stage, int previous, int parity) {
    if (bulk()) {
      device::sync_block();
      wait(stage, parity);
    } else if (p.layout.stages > 1) {
      wait(stage, parity);
      device::sync_block();
      request(previous);
    } else {
      device::sync_block();
      request(0);
      wait(stage, parity);
      device::sync_block();
    }
  }
};

}  // namespace moso_fast::few_classes
