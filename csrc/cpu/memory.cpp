#include "memory.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <new>

namespace moso_fast {

void* allocate(size_t bytes) {
  constexpr size_t kLine = 64;
  const size_t lines = std::max<size_t>((bytes + kLine - 1) / kLine, 1);
  void* memory = std::aligned_alloc(kLine, lines * kLine);
  if (!memory) throw std::bad_alloc();
  return memory;
}

void release(void* memory) { std::free(memory); }

int64_t second_level_cache_bytes() {
  // Tiles were measured with one and two megabytes.
  constexpr int64_t kLeast = int64_t{1} << 19, kUsual = int64_t{1} << 20, kMost = int64_t{1} << 21;
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  constexpr int64_t found = 0;
#endif
  return found > 0 ? std::clamp(found, kLeast, kMost) : kUsual;
}

}  // namespace moso_fast
