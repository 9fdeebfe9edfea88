// Asking for memory while the arithmetic goes on.

// Memory that is wanted soon: `width` bytes of each row, `stride` bytes apart, asked for during the
// products, `step` bytes a step of a sum. With step 0 the same line again and again, at no cost.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const char* first, int64_t rows, int64_t width, int64_t stride, int64_t steps)
      : row_(first),
        at_(first),
        width_(width),
        stride_(stride),
        step_(std::min<int64_t>((rows * width + steps - 1) / steps, 64)),
        left_(width) {}

  MOSO_INLINE void take_step() {
    __builtin_prefetch(at_, 0, 2);
    at_ += step_;
    left_ -= step_;
    if (__builtin_expect(left_ <= 0, 0)) {
      row_ += stride_;
      at_ = row_;
      left_ = width_;
    }
  }

 private:
  static constexpr char kNothing[64] = {};
  const char* row_ = kNothing;
  const char* at_ = kNothing;
  int64_t width_ = 1, stride_ = 0, step_ = 0, left_ = 1;
};
constexpr bool kAsksAhead = VL == 16;
