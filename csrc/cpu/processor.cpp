// What this processor and its operating system can run.

#ifdef MOSO_FAST_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#endif
#include <unistd.h>

#include <cstring>

#include "processor.h"

namespace moso_fast {

#ifdef MOSO_FAST_X86
namespace {

#ifndef MOSO_FAST_NO_AMX
// Linux gives a process the registers for matrices once it has asked for them (Linux 5.16). The
// number is that of their data in the saved state of a thread.
bool asked_for_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d & kBf16) && (d & kTile) && __builtin_cpu_supports("avx512bf16") && asked_for_amx();
}
#endif

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace
#endif

namespace {
std::vector<Variant> find_variants() {
  std::vector<Variant> found;
#ifdef MOSO_FAST_X86
  __builtin_cpu_init();
#ifndef MOSO_FAST_NO_AMX
  if (has_avx512() && has_avx2() && has_amx()) found.push_back(variant_amx());
#endif
  if (has_avx512() && has_avx2()) found.push_back(variant_avx512());
  if (has_avx2()) found.push_back(variant_avx2());
#endif
  found.push_back(variant_baseline());
  return found;
}
}  // namespace

const std::vector<Variant>& variants() {
  // Once: to ask a processor is a trap of some 20 us on a virtual machine.
  static const std::vector<Variant> found = find_variants();
  return found;
}

bool runs_bf16_products(const Variant& variant) {
#ifdef MOSO_FAST_X86
  __builtin_cpu_init();
  return variant.bf16_products && __builtin_cpu_supports("avx512bf16");
#else
  return variant.bf16_products;
#endif
}

bool prefers_bf16_products(const Variant& variant) {
  if (!runs_bf16_products(variant)) return false;
#ifdef MOSO_FAST_X86
  // Intel's vectors take as long for a pair of bfloat16 as for two of float32; matrix units do not.
  return !__builtin_cpu_is("intel") || std::strcmp(variant.name, "amx") == 0;
#else
  return true;
#endif
}

}  // namespace moso_fast
