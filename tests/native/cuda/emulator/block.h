// The block that runs, for the files of the emulator: its fibers, its shared memory, and what is
// under way. What the checks are is said in device_emulator.h.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <map>
#include <string>
#include <vector>

#include "device.cuh"
#include "instructions.h"

namespace moso_fast::emulator {

constexpr int16_t kMany = -2, kNobody = -1;

// Instructions that are counted; names in block.cpp. Those of a warp are numbered as Collective.
enum Count : int {
  kCountBarrier = 4,
  kCountAsyncCopy,
  kCountShared,
  kCountWide,
  kCountGlobal,
  kCountBulk,
  kCounts
};

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

  Fiber& fiber() { return fibers[size_t(current)]; }
};

// The one that runs.
extern Block* block;
extern int64_t counts[kCounts];

// block.cpp. Ends this thread and the block with what is wrong.
[[noreturn]] void fail(const std::string& what);
// Lets other threads run until *generation is no longer `seen`.
void wait_for(const uint64_t* generation, uint64_t seen);

// memory.cpp. An access of this thread to shared memory, against those of the others.
void check_shared(uint32_t offset, int bytes, bool write);
// Addresses of the 16-byte loads of a run are forgotten when the next one starts.
void forget_wide_loads();

}  // namespace moso_fast::emulator
