// Where every number lies: fragments, permuted columns, swizzles, slabs and shared memory.
//
// All functions run on the host as well: tests call them for every supported shape and hold the
// kernels' reads and writes against each other without a GPU.
//
// Matrix instruction (mma.sync m16n8k16, 16-bit operands, float32 sums), lane = 4 g + t:
//
//   A (16 x 16)  word w of 4: row g + 8 (w & 1),  k = 2 t + 8 (w >> 1) + {0, 1}
//   B (16 x  8)  word w of 2: column g,           k = 2 t + 8 w + {0, 1}
//   C (16 x  8)  number i of 4: row g + 8 (i >> 1), column 2 t + (i & 1)
//
// The order of k is free as long as A and B agree. Features are therefore taken 16 bytes a lane
// from where they lie (E = 8 elements of 2 bytes or 4 of 4; a *group* is the 4 E columns of the
// four lanes of a row), and the other operand is packed to match:
//
//   lane t, word w of E / 2  <->  columns 4 E group + E t + 2 w + {0, 1}
//
// Only where the first pass loads features of 2 bytes for the logits, ldmatrix hands them out in
// their natural order: word w of lane t is columns 32 group + 8 w + 2 t + {0, 1}.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MOSO_HD __host__ __device__ __forceinline__
#else
#define MOSO_HD inline
#endif

namespace moso_fast::few_classes {

constexpr int kWarps = 8;
constexpr int kLanes = 32;
constexpr int kThreads = kWarps * kLanes;
constexpr int kBankLine = 128;  // bytes that shared memory serves at once

MOSO_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MOSO_HD constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// --- features ---

MOSO_HD constexpr int vector_numbers(int item) { return 16 / item; }  // E
MOSO_HD constexpr int group_columns(int item) { return 4 * vector_numbers(item); }
MOSO_HD constexpr int groups_of(int item, int dim) {
  return int(ceil_div(dim, group_columns(item)));
}
MOSO_HD constexpr int row_bytes(int item, int dim) {
  return int(round_up(int64_t(dim) * item, kBankLine));
}

// Bytes between staged rows. Rows stay whole, as a bulk copy leaves them; 16 bytes more than whole
// bank lines put a column of 16-byte chunks over eight rows into different banks.
MOSO_HD constexpr int row_pitch(int item, int dim) { return row_bytes(item, dim) + 16; }

// Byte offset of a 16-byte chunk in a staged tile.
MOSO_HD constexpr uint32_t feature_offset(int row, int chunk, int pitch) {
  return uint32_t(row * pitch + 16 * chunk);
}

// Row of 8 that lanes 4 g .. 4 g + 3 multiply as row g of an A operand. Rows of g = 2 i and
// 2 i + 1 are four apart, so that four neighbouring chunks of both lie in different banks.
MOSO_HD constexpr int logit_row(int g) { return ((g & 1) << 2) | (g >> 1); }

// --- weights and mean gradient, packed as the B operand ---

// One or two terms are split when they are packed. Three would need 6 bytes a number: it stays
// float32 and is split by every reader. A *block* holds, for each class, what its four lanes read
// at once: one term of a group's columns, or the float32 elements of one step (16 columns).
MOSO_HD constexpr int group_steps(int item) { return item == 2 ? 2 : 1; }
MOSO_HD constexpr int operand_blocks(int item, int terms) {
  return terms <= 2 ? terms : group_steps(item);
}
MOSO_HD constexpr int operand_lane_bytes(int item, int terms) {
  return terms <= 2 && item == 4 ? 8 : 16;
}
MOSO_HD constexpr int operand_words(int item) { return vector_numbers(item) / 2; }
MOSO_HD constexpr int operand_class(int tile, int lane) { return 8 * tile + lane / 4; }
MOSO_HD constexpr int operand_column(int item, int group, int lane, int word) {
  return group * group_columns(item) + (lane % 4) * vector_numbers(item) + 2 * word;
}
// The same for operands of two bytes a number that lie in their natural order, 16 columns a step.
MOSO_HD constexpr int natural_column(int group, int lane, int word) {
  return 32 * group + 8 * word + 2 * (lane % 4);
}
// Byte offset of what lane t reads of a class.
MOSO_HD constexpr uint32_t operand_offset(int item, int terms, int classes, int group, int block,
                                          int cls, int t) {
  return uint32_t((((group * operand_blocks(item, terms) + block) * classes + cls) * 4 + t) *
                  operand_lane_bytes(item, terms));
}
// Bytes of a block: from one to the next, and as many times from one group to the next.
MOSO_HD constexpr uint32_t operand_block_bytes(int item, int terms, int classes) {
  return uint32_t(classes * 4 * operand_lane_bytes(item, terms));
}
MOSO_HD constexpr int64_t operand_bytes(int item, int terms, int classes, int dim) {
  return int64_t(groups_of(item, dim)) * operand_blocks(item, terms) * classes * 4 *
         operand_lane_bytes(item, terms);
}

// --- residuals, packed as the A operand R^T (classes x rows) ---

// Row of a block of 16 that is k-number j (0..3: k = 2 t, 2 t + 1, 2 t + 8, 2 t + 9) of lane t.
MOSO_HD constexpr int gradient_row(int lane, int j) {
  return 2 * (lane % 4) + (j & 1) + 8 * (j >> 1);
}
MOSO_HD constexpr int gradient_lane(int row) { return (row >> 1) & 3; }  // t of its inverse
MOSO_HD constexpr int gradient_slot(int row) { return (row & 1) | (((row >> 3) & 1) << 1); }  // j
// Index in 16-bit elements of one term of the residual of (row of the tile, class).
MOSO_HD constexpr uint32_t residual_half(int terms, int tiles, int row, int cls, int term) {
  const int lane = (cls % 8) * 4 + gradient_lane(row % 16);
  const int slot = gradient_slot(row % 16);
  const int word = ((cls >> 3) & 1) + 2 * (slot >> 1);
  const int block = ((row / 16) * terms + term) * tiles + cls / 16;
  return uint32_t(((block * kLanes + lane) * 4 + word) * 2 + (slot & 1));
}
// Bytes from the first term of class c < 4 of a row to term `term` of class c + 4 slot.
MOSO_HD constexpr uint32_t residual_slot_bytes(int terms, int tiles, int slot, int term) {
  return 2 *
         (residual_half(terms, tiles, 0, 4 * slot, term) - residual_half(terms, tiles, 0, 0, 0));
}
MOSO_HD constexpr int64_t residual_bytes(int terms, int tiles, int tile_rows) {
  return int64_t(tile_rows / 16) * terms * tiles * kLanes * 16;
}

// --- instantiations ---

// By tiles of 16 classes of all heads: 1, 2, 5 or 7. What a thread sums of the mean gradient must
// fit its registers: class_tiles_of(tiles) x most_columns(tiles) / 64 x 4 sums, at most 160.
// With 7 tiles two blocks work on the same rows, each for half of the classes.
MOSO_HD constexpr int tiles_for(int classes) {
  return classes <= 16 ? 1 : classes <= 32 ? 2 : classes <= 80 ? 5 : classes <= 112 ? 7 : 0;
}
MOSO_HD constexpr int parts_of(int tiles) { return tiles == 7 ? 2 : 1; }
MOSO_HD constexpr int class_tiles_of(int tiles) {
  return (tiles + parts_of(tiles) - 1) / parts_of(tiles);
}
MOSO_HD constexpr int most_columns(int tiles) {
  return tiles == 1 ? 2048 : tiles == 2 ? 1024 : 512;
}

// With 16-bit elements that meet one term of the weights there is one more of 1 tile, for so few
// columns that the registers of a multiprocessor hold two blocks: one multiplies while the other
// waits for its barriers, exponentials and labels.
constexpr int kNarrowColumns = 512;
MOSO_HD constexpr bool has_narrow(int item, bool exact, int tiles) {
  return item == 2 && !exact && tiles == 1;
}

// --- accumulators ---

MOSO_HD constexpr int accumulator_row(int lane, int i) { return lane / 4 + 8 * (i >> 1); }
MOSO_HD constexpr int accumulator_column(int lane, int i) { return 2 * (lane % 4) + (i & 1); }
// First of the 16 columns of the mean gradient that this warp sums in its pair of tiles.
MOSO_HD constexpr int gradient_column(int warp, int pair) { return (pair * kWarps + warp) * 16; }
// Bytes between the same place of two neighbouring pairs in a staged row.
MOSO_HD constexpr int gradient_pair_bytes(int item) { return kWarps * 16 * item; }
MOSO_HD constexpr int partial_columns(int dim) { return int(round_up(dim, 16)); }

// --- row slabs: one partial sum each, whatever the number of multiprocessors ---

constexpr int64_t kSlabs = 528;  // rounds of 132 multiprocessors, four or two of two blocks each
constexpr int64_t kSmallestSlab = 64;

// Rows of a slab; `limit` bounds the rounding of one float32 partial sum.
MOSO_HD constexpr int64_t slab_rows_for(int64_t rows, int64_t limit) {
  const int64_t even = round_up(ceil_div(rows, kSlabs), kSmallestSlab);
  return even < kSmallestSlab ? kSmallestSlab : even > limit ? limit : even;
}

// The tiles that one block works through: slabs block, block + blocks, .., tile after tile. 32 bits
// bear kMostRows and as many slabs after them as there are blocks.
constexpr int64_t kMostRows = int64_t(1) << 30;

struct TileWalk {
  int rows, slab_rows, slabs, blocks, tile_rows;

  MOSO_HD int slab_end(int slab) const {
    return (slab + 1) * slab_rows < rows ? (slab + 1) * slab_rows : rows;
  }
};
struct TileCursor {
  int slab, row, end;  // this tile's first row, the end of its slab
};
MOSO_HD TileCursor first_tile(const TileWalk& walk, int block) {
  return {block, block * walk.slab_rows, walk.slab_end(block)};
}
MOSO_HD bool past_last(const TileWalk& walk, const TileCursor& at) { return at.slab >= walk.slabs; }
MOSO_HD int rows_of(const TileWalk& walk, const TileCursor& at) {  // that exist in this tile
  const int left = at.end - at.row;
  return left < walk.tile_rows ? left : walk.tile_rows;
}
MOSO_HD bool last_of_slab(const TileWalk& walk, const TileCursor& at) {
  return at.row + walk.tile_rows >= at.end;
}
MOSO_HD void advance(const TileWalk& walk, TileCursor& at) {
  if (last_of_slab(walk, at)) {
    at.slab += walk.blocks;
    at.row = at.slab * walk.slab_rows;
    at.end = walk.slab_end(at.slab);
  } else {
    at.row += walk.tile_rows;
  }
}

// --- order of the sum over slabs ---

constexpr int kReduceColumns = 32;  // neighbouring elements a block
constexpr int kReduceStrands = 16;  // strand s adds slabs s, s + 16, ...; then a tree over strands

// Strand that strand s adds to itself in the step of this width (8, 4, 2, 1), or -1.
MOSO_HD constexpr int reduce_partner(int strand, int width) {
  return strand < width ? strand + width : -1;
}

// --- shared memory ---

// Byte offsets of what the first pass keeps in shared memory. Worked out on the host: as kernel
// parameters they cost no registers.
struct FirstLayout {
  int tile_rows, stages, slices, logit_stride, row_bytes, pitch, groups;
  int split;  // log2 of the row groups of 16 that a tile has; the 8 warps make slices of what is
              // left
  uint32_t stage_bytes, weights, logits, slice_bytes, residuals, norms, bias_sums;
  int64_t bytes;
};

// Byte offset of the barrier of a stage's bulk copies: in the gap after its first row.
MOSO_HD uint32_t bulk_barrier(const FirstLayout& l, int stage) {
  return uint32_t(stage) * l.stage_bytes + uint32_t(l.row_bytes);
}

// `terms` of weights and residuals, `tiles` of 16 classes, `classes` of all heads.
inline FirstLayout first_layout(int item, int terms, int tiles, int classes, int dim, int tile_rows,
                                int stages) {
  FirstLayout l{};
  l.tile_rows = tile_rows;
  l.stages = stages;
  l.split = tile_rows == 64 ? 2 : tile_rows == 32 ? 1 : 0;
  l.slices = kWarps >> l.split;
  l.logit_stride = int(round_up(classes, 8)) + 4;  // 4 mod 8: eight rows, eight bank quads
  l.row_bytes = row_bytes(item, dim);
  l.groups = groups_of(item, dim);
  l.pitch = row_pitch(item, dim);
  l.stage_bytes = uint32_t(tile_rows * l.pitch);
  l.slice_bytes = uint32_t(tile_rows * l.logit_stride * 4);
  int64_t at = int64_t(stages) * l.stage_bytes;
  l.weights = uint32_t(at);
  at += round_up(operand_bytes(item, terms, classes, dim), 16);
  l.logits = uint32_t(at);
  l.bias_sums = l.logits + l.slice_bytes;  // the second slice is free after the softmax
  at += int64_t(l.slices) * l.slice_bytes;
  l.residuals = uint32_t(at);
  at += residual_bytes(terms, tiles, tile_rows);
  l.norms = uint32_t(at);
  at += int64_t(l.slices) * tile_rows * 4;
  l.bytes = at;
  return l;
}

}  // namespace moso_fast::few_classes
