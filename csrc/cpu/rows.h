// What both kernel families share: scratch memory, which rows take part, where results go.

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t numbers) { reserve(numbers); }
  void reserve(size_t numbers) {
    const size_t bytes = (std::max<size_t>(numbers, 1) * 4 + 63) / 64 * 64;
    data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
  }
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
};

inline void clear(float* p, int64_t numbers) { std::memset(p, 0, size_t(numbers) * 4); }

// The smallest offending row of each kind, kept by every worker and merged at the end.
struct StatusWord {
  int64_t first[kStatusSlots];
  StatusWord() { std::fill(first, first + kStatusSlots, std::numeric_limits<int64_t>::max()); }
  void note(Status slot, int64_t row) { first[slot] = std::min(first[slot], row); }
  void merge_into(int64_t* status) const {
    for (int slot = 0; slot < kStatusSlots; ++slot)
      status[slot] = std::min(status[slot], first[slot]);
  }
};

inline bool good_target(const Problem& p, const float* target);

// Whether the label (or target) lets a row take part.
inline bool takes_part(const Problem& p, int64_t row, StatusWord* status) {
  if (p.targets) {
    if (good_target(p, p.targets + row * p.classes)) return true;
    status->note(kStatusTarget, p.first_row + row);
    return false;
  }
  const int64_t label = p.labels[row];
  if (label == p.ignore_index) return false;
  if (label >= 0 && label < p.classes) return true;
  status->note(kStatusLabel, p.first_row + row);
  return false;
}

// Whether a row whose squared norm is not finite must be left out (its norm may just overflow).
template <class T>
inline bool has_nonfinite(const Problem& p, int64_t row, const T* features, StatusWord* status) {
  if (all_finite(features, p.dim)) return false;
  if (!p.exclude_nonfinite) status->note(kStatusFeature, p.first_row + row);
  return true;
}

template <class T>
inline const T* feature_row(const Problem& p, int64_t row) {
  return static_cast<const T*>(p.features) + row * p.row_stride;
}

// Rows of one slab: enough slabs to share out, few enough that adding their partials is cheap,
// and never more rows than float32 sums stand. The same whatever the number of threads.
inline int64_t slab_rows(int64_t rows, int64_t tile) {
  const int64_t wanted = std::clamp<int64_t>((rows + 63) / 64, 2 * tile, 4096);
  return (wanted + tile - 1) / tile * tile;
}

// Adds a slab's float32 partial to the float64 total.
inline void add_to_total(double* total, const float* part, int64_t numbers) {
  for (int64_t i = 0; i < numbers; ++i) total[i] += double(part[i]);
}
