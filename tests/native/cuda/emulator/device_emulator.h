// One thread block on the host: its threads are fibers, and the instructions of device.cuh do what
// the PTX manual says they do.
//
// Beyond results it checks what a GPU does not report:
//   memory    every global access lies in a registered array, every shared one in the allocation
//   fresh     no shared byte is read before it was written; copies under way count as unwritten,
//             bulk copies also for threads that neither waited for them nor met one that did
//   proxies   no bulk copy follows ordinary stores that their thread did not fence
//   races     no shared byte is touched by two threads without a barrier between, if one writes
//   convoy    all 32 lanes of a warp arrive at the same warp-wide instruction
// Warps run one after another up to their next barrier, in an order that can be reversed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#define MOSO_DEVICE inline
#define MOSO_UNROLL
#define MOSO_NO_UNROLL
#define MOSO_UNROLL_TWICE

namespace moso_fast::emulator {

constexpr int kWarpSize = 32;

struct Options {
  bool reverse_warps = false;
  bool cut_sums = false;  // matrix sums cut off to 24 digits instead of rounded
};

// Kernel body run for blocks 0 .. blocks - 1, one after another. Returns "" or the first error.
std::string run(void (*body)(void*), void* argument, int64_t blocks, int threads,
                int64_t shared_bytes, const Options& options);

// Global memory that kernels may touch until forget_arrays().
void register_array(const void* base, int64_t bytes, bool writable);
void forget_arrays();

// What ran since the last call: number of times by name.
std::vector<std::pair<std::string, int64_t>> take_counts();
// Addresses of the 16-byte loads of the last run, in their order.
const std::vector<uintptr_t>& last_wide_loads();

enum class Collective { kMatrices, kMultiply, kShuffle, kSync };

int thread_index();
int64_t block_index();
int64_t block_count();
void barrier();
bool barrier_or(bool value);
const unsigned char* shared_read(uint32_t offset, int bytes);
unsigned char* shared_write(uint32_t offset, int bytes);
void check_global(const void* at, int bytes, bool write);
// Gives `input` and returns when all lanes of the warp have given theirs and the instruction is
// done; `output` receives this lane's part.
void collective(Collective kind, const void* input, int input_bytes, void* output,
                int output_bytes);
void copy_async(uint32_t offset, const void* from, int bytes);
void copy_commit();
void copy_wait(int pending);
void init_barrier(uint32_t barrier);
void fence_bulk();
void announce_bulk(uint32_t barrier, int bytes);
void copy_bulk(uint32_t offset, const void* from, int bytes, uint32_t barrier);
void wait_bulk(uint32_t barrier, int parity);
uint16_t round_bfloat16(float x);
float expand_float16(uint16_t x);

}  // namespace moso_fast::emulator

namespace moso_fast::device {

inline int thread_index() { return emulator::thread_index(); }
inline int64_t block_index() { return emulator::block_index(); }
inline int64_t block_count() { return emulator::block_count(); }
inline void sync_block() { emulator::barrier(); }
inline bool sync_block_or(bool value) { return emulator::barrier_or(value); }

template <class T>
T shared_load(uint32_t offset) {
  T value;
  std::memcpy(&value, emulator::shared_read(offset, sizeof(T)), sizeof(T));
  return value;
}
template <class T>
void shared_store(uint32_t offset, T value) {
  std::memcpy(emulator::shared_write(offset, sizeof(T)), &value, sizeof(T));
}
template <class T>
T global_load(const T* from) {
  emulator::check_global(from, sizeof(T), false);
  return *from;
}
template <class T>
void global_store(T* to, T value) {
  emulator::check_global(to, sizeof(T), true);
  *to = value;
}
inline Words4 global_load_once(const void* from) {
  emulator::check_global(from, 16, false);
  Words4 value;
  std::memcpy(&value, from, 16);
  return value;
}
inline void atomic_min(int64_t* to, int64_t value) {
  emulator::check_global(to, 8, true);
  if (value < *to) *to = value;
}
inline void copy_async(uint32_t offset, const void* from, int bytes) {
  emulator::copy_async(offset, from, bytes);
}
inline void copy_commit() { emulator::copy_commit(); }
inline void copy_wait(int pending) {
  emulator::copy_wait(pending < 0 ? 0 : pending > 2 ? 2 : pending);
}

constexpr bool kBulkCopies = true;
inline void init_barrier(uint32_t barrier) { emulator::init_barrier(barrier); }
inline void fence_bulk() { emulator::fence_bulk(); }
inline void announce_bulk(uint32_t barrier, int bytes) { emulator::announce_bulk(barrier, bytes); }
inline void copy_bulk(uint32_t offset, const void* from, int bytes, uint32_t barrier) {
  emulator::copy_bulk(offset, from, bytes, barrier);
}
inline void wait_bulk(uint32_t barrier, int parity) { emulator::wait_bulk(barrier, parity); }

inline void sync_warp() {
  emulator::collective(emulator::Collective::kSync, nullptr, 0, nullptr, 0);
}
struct MatricesInput {
  uint32_t offset, transposed;
};
inline void load_matrices_as(bool transposed, uint32_t (&words)[4], uint32_t offset) {
  const MatricesInput input{offset, transposed};
  emulator::collective(emulator::Collective::kMatrices, &input, sizeof input, words, sizeof words);
}
inline void load_matrices_transposed(uint32_t (&words)[4], uint32_t offset) {
  load_matrices_as(true, words, offset);
}
inline void load_matrices(uint32_t (&words)[4], uint32_t offset) {
  load_matrices_as(false, words, offset);
}
struct MultiplyInput {
  float sums[4];
  uint32_t a[4], b[2];
  bool float16;  // operands; else bfloat16
};
inline void multiply_add_of(bool float16, float (&sums)[4], const uint32_t (&a)[4],
                            const uint32_t (&b)[2]) {
  MultiplyInput input;
  input.float16 = float16;
  std::memcpy(input.sums, sums, sizeof input.sums);
  std::memcpy(input.a, a, sizeof input.a);
  std::memcpy(input.b, b, sizeof input.b);
  emulator::collective(emulator::Collective::kMultiply, &input, sizeof input, sums, sizeof sums);
}
inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_add_of(false, sums, a, b);
}
template <bool Float16>
void multiply_add_short(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  const uint32_t deep_a[4] = {a0, a1, 0, 0}, deep_b[2] = {b, 0};
  multiply_add_of(Float16, sums, deep_a, deep_b);
}
struct ShuffleInput {
  uint32_t bits;
  int32_t mask;
};
template <class T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4, "one register");
  ShuffleInput input{0, mask};
  std::memcpy(&input.bits, &value, 4);
  emulator::collective(emulator::Collective::kShuffle, &input, sizeof input, &value, 4);
  return value;
}
inline uint32_t kept(uint32_t x) { return x; }
inline float* kept(float* x) { return x; }
inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t round_bfloat16(float x, float y) {
  return emulator::round_bfloat16(x) | uint32_t(emulator::round_bfloat16(y)) << 16;
}
inline Floats2 expand_float16(uint32_t packed) {
  return {emulator::expand_float16(uint16_t(packed)),
          emulator::expand_float16(uint16_t(packed >> 16))};
}
inline float exponential(float x) { return std::exp(x); }
inline float square_root(float x) { return std::sqrt(x); }
inline double square_root(double x) { return std::sqrt(x); }
inline float logarithm1p(float x) { return std::log1p(x); }

}  // namespace moso_fast::device
