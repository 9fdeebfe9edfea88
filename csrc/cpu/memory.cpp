#include "memory.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <new>

namespace moso_fast {

namespace {

constexpr size_t kLine = 64;

// Before the memory that is handed out.
struct alignas(kLine) Header {
  size_t bytes;  // that the caller may use
  Header* next;  // of those that are kept
};

void* memory_of(Header* header) { return header + 1; }
Header* header_of(void* memory) { return static_cast<Header*>(memory) - 1; }

class Kept {
 public:
  ~Kept() {
    while (first_) std::free(remove(&first_));
  }

  // The smallest piece that is large enough and not twice as large, or null.
  Header* take(size_t bytes) {
    Header** best = nullptr;
    for (Header** at = &first_; *at; at = &(*at)->next)
      if ((*at)->bytes >= bytes && (*at)->bytes < 2 * bytes + kLine)
        if (!best || (*at)->bytes < (*best)->bytes) best = at;
    return best ? remove(best) : nullptr;
  }

  // Whether there is room for a piece once the oldest have gone; it is the thread's own then.
  bool keep(Header* piece) {
    if (piece->bytes > kMostKeptBytes) return false;
    piece->next = first_;
    first_ = piece;
    bytes_ += piece->bytes;
    while (bytes_ > kMostKeptBytes) {
      Header** last = &first_;
      while ((*last)->next) last = &(*last)->next;
      std::free(remove(last));
    }
    return true;
  }

  size_t bytes() const { return bytes_; }

 private:
  Header* remove(Header** at) {
    Header* piece = *at;
    *at = piece->next;
    bytes_ -= piece->bytes;
    return piece;
  }

  Header* first_ = nullptr;  // the one that came last
  size_t bytes_ = 0;
};

thread_local Kept kept;

}  // namespace

void* allocate(size_t bytes) {
  const size_t lines = std::max<size_t>((bytes + kLine - 1) / kLine, 1);
  Header* header = kept.take(lines * kLine);
  if (!header) {
    void* memory = std::aligned_alloc(kLine, sizeof(Header) + lines * kLine);
    if (!memory) throw std::bad_alloc();
    header = new (memory) Header{lines * kLine, nullptr};
  }
  return memory_of(header);
}

void release(void* memory) {
  if (!memory) return;
  Header* header = header_of(memory);
#if defined(__SANITIZE_ADDRESS__)
  std::free(header);  // so that the sanitizer sees whoever still uses it
#else
  if (!kept.keep(header)) std::free(header);
#endif
}

size_t kept_bytes() { return kept.bytes(); }

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
