// Memory, and how much of it is near. In a file of their own (memory.cpp), without vector
// instructions, like everything that several instruction sets share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moso_fast {

// Memory that starts at a cache line, and its return. Throws std::bad_alloc.
void* allocate(size_t bytes);
void release(void* memory);

// Of one core. Tiles are cut by it, hence float32 sums: the same on every call.
int64_t second_level_cache_bytes();

}  // namespace moso_fast
