// Memory of the kernels: vectors of float32 that start at a cache line, and arrays of anything.
#pragma once

#include "memory.h"
#include "scalar-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

// Uninitialised float32 elements.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { release(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void reserve(size_t elements) {
    release(data_);
    data_ = nullptr;
    data_ = static_cast<float*>(allocate(elements * sizeof(float)));
  }
  float* get() const { return data_; }

 private:
  float* data_ = nullptr;
};

inline void clear(float* p, int64_t elements) { std::memset(p, 0, size_t(elements) * 4); }

// Value-initialised items, as many as it was made with.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(int64_t size) : items_(new T[size_t(size)]()), size_(size) {}
  ~Array() { delete[] items_; }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  void reset(int64_t size) {
    delete[] items_;
    items_ = nullptr;
    items_ = new T[size_t(size)]();
    size_ = size;
  }
  T* get() const { return items_; }
  T& operator[](int64_t i) const { return items_[i]; }
  T* begin() const { return items_; }
  T* end() const { return items_ + size_; }

 private:
  T* items_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
