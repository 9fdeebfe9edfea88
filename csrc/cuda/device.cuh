// The instructions that the kernels use, one function each: nothing else in them is CUDA.
//
// On the host the same names come from the tests' device_emulator.h, which runs a block's threads
// as fibers with these instructions' documented meaning. Shared memory is addressed by byte offset
// from the block's dynamic allocation, so that the emulator can watch every access.
#pragma once

#include <cstdint>

namespace moso_fast {

struct alignas(16) Words4 {
  uint32_t w[4];
};
struct alignas(8) Words2 {
  uint32_t w[2];
};
struct alignas(8) Floats2 {
  float x, y;
};

}  // namespace moso_fast

#ifndef __CUDACC__
#include "device_emulator.h"
#else

#define MOSO_DEVICE __device__ __forceinline__
#define MOSO_UNROLL _Pragma("unroll")
#define MOSO_NO_UNROLL _Pragma("unroll 1")
#define MOSO_UNROLL_TWICE _Pragma("unroll 2")

namespace moso_fast::device {

extern __shared__ __align__(128) unsigned char shared_memory[];

MOSO_DEVICE int thread_index() { return int(threadIdx.x); }
MOSO_DEVICE int64_t block_index() { return blockIdx.x; }
MOSO_DEVICE int64_t block_count() { return gridDim.x; }

MOSO_DEVICE void sync_block() { __syncthreads(); }
// Brings the lanes of a warp together again: matrix instructions want all of them at once.
MOSO_DEVICE void sync_warp() { __syncwarp(); }
MOSO_DEVICE bool sync_block_or(bool value) { return __syncthreads_or(value) != 0; }

template <class T>
MOSO_DEVICE T shared_load(uint32_t offset) {
  return *reinterpret_cast<const T*>(shared_memory + offset);
}
template <class T>
MOSO_DEVICE void shared_store(uint32_t offset, T value) {
  *reinterpret_cast<T*>(shared_memory + offset) = value;
}
template <class T>
MOSO_DEVICE T global_load(const T* from) {
  return *from;
}
template <class T>
MOSO_DEVICE void global_store(T* to, T value) {
  *to = value;
}

// 16 bytes that nothing on this multiprocessor reads again.
MOSO_DEVICE Words4 global_load_once(const void* from) {
  Words4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(from));
  return v;
}

MOSO_DEVICE void atomic_min(int64_t* to, int64_t value) {
  atomicMin(reinterpret_cast<long long*>(to), static_cast<long long>(value));
}

// `bytes` (0..16) from global memory, zeros after them. `from` is not read where bytes == 0, but
// must be a valid address.
MOSO_DEVICE void copy_async(uint32_t offset, const void* from, int bytes) {
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared_memory)) + offset;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
MOSO_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` (0, 1 or 2) of this thread's newest groups are under way. Other
// threads see the data after the next barrier.
MOSO_DEVICE void copy_wait(int pending) {
  if (pending <= 0) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  } else if (pending == 1) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  }
}

// Bulk copies, from sm_90 on: a thread requests many bytes at once, and a *transaction barrier* in
// shared memory (8 bytes) ends its phase when the announced bytes are there. Ordinary stores to
// where a bulk copy will write need fence_bulk by their thread and a barrier in between.
#if __CUDA_ARCH__ >= 900
constexpr bool kBulkCopies = true;
MOSO_DEVICE uint32_t shared_address(uint32_t offset) {
  return uint32_t(__cvta_generic_to_shared(shared_memory)) + offset;
}
// One arrival a phase: announce_bulk. Others may use it after fence_bulk and a barrier.
MOSO_DEVICE void init_barrier(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
MOSO_DEVICE void fence_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
MOSO_DEVICE void announce_bulk(uint32_t barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// `from`, `offset` and `bytes` are multiples of 16.
MOSO_DEVICE void copy_bulk(uint32_t offset, const void* from, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(offset)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// Waits for the end of phase 0, 2, .. (parity 0) or 1, 3, .. (parity 1); the caller is at most one
// phase late. This thread sees the bytes then.
#ifdef MOSO_FAST_BOUNDED_WAITS
// Debug builds: a wait that never ends becomes a launch failure. The limit is far above what a
// copy takes under a profiler.
MOSO_DEVICE uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}
MOSO_DEVICE void wait_bulk(uint32_t barrier, int parity) {
  constexpr uint64_t kLongest = 5'000'000'000;
  const uint64_t start = nanoseconds();
  for (uint32_t done = 0; done == 0;) {
    asm volatile(
        "{.reg .pred done;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, done;}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    if (done == 0 && nanoseconds() - start > kLongest) asm volatile("trap;");
  }
}
#else
MOSO_DEVICE void wait_bulk(uint32_t barrier, int parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
#endif
#else
constexpr bool kBulkCopies = false;
MOSO_DEVICE void init_barrier(uint32_t) {}
MOSO_DEVICE void fence_bulk() {}
MOSO_DEVICE void announce_bulk(uint32_t, int) {}
MOSO_DEVICE void copy_bulk(uint32_t, const void*, int, uint32_t) {}
MOSO_DEVICE void wait_bulk(uint32_t, int) {}
#endif

// Four 8 x 8 matrices of 16-bit elements, transposed: lane i names row i % 8 of matrix i / 8.
MOSO_DEVICE void load_matrices_transposed(uint32_t (&words)[4], uint32_t offset) {
  const uint32_t from = uint32_t(__cvta_generic_to_shared(shared_memory)) + offset;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
}

// As they lie.
MOSO_DEVICE void load_matrices(uint32_t (&words)[4], uint32_t offset) {
  const uint32_t from = uint32_t(__cvta_generic_to_shared(shared_memory)) + offset;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
}

// sums += A B; bfloat16 operands.
MOSO_DEVICE void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same with half the depth (m16n8k8), which words 0 and 1 of A and word 0 of B are; bfloat16
// or float16 operands.
template <bool Float16>
MOSO_DEVICE void multiply_add_short(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  if constexpr (Float16)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(b));
  else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(b));
}

// The value of lane ^ mask; every lane of the warp takes part.
template <class T>
MOSO_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The same number, which the compiler must keep: it cannot work it out again where it is used.
MOSO_DEVICE uint32_t kept(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
MOSO_DEVICE float* kept(float* x) {
  asm volatile("" : "+l"(x));
  return x;
}

MOSO_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
MOSO_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }
// Rounded to nearest even, x in the low half.
MOSO_DEVICE uint32_t round_bfloat16(float x, float y) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(y), "f"(x));
  return packed;
}
MOSO_DEVICE Floats2 expand_float16(uint32_t packed) {
  Floats2 v;
  asm("{.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\t"
      "cvt.f32.f16 %0, low;\n\tcvt.f32.f16 %1, high;}"
      : "=f"(v.x), "=f"(v.y)
      : "r"(packed));
  return v;
}
MOSO_DEVICE float exponential(float x) { return expf(x); }
MOSO_DEVICE float square_root(float x) { return sqrtf(x); }
MOSO_DEVICE double square_root(double x) { return sqrt(x); }
MOSO_DEVICE float logarithm1p(float x) { return log1pf(x); }

}  // namespace moso_fast::device
#endif
