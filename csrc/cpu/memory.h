// Memory, and how much of it is near. In a file of their own (memory.cpp), without vector
// instructions, like everything that several instruction sets share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moso_fast {

// Memory that starts at a cache line, and its return. Throws std::bad_alloc.
//
// A thread keeps what it has returned, up to a limit, for its next call: the system would take the
// pages of a small job back every time, and to be given new ones takes as long as the job.
void* allocate(size_t bytes);
void release(void* memory);

// Bytes that the calling thread keeps, and the most that it ever does.
size_t kept_bytes();
constexpr size_t kMostKeptBytes = size_t{1} << 24;

// Of one core. Tiles are cut by it, hence float32 sums: the same on every call.
int64_t second_level_cache_bytes();

}  // namespace moso_fast
