#include "whole.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "memory.h"
#include "parallel.h"

namespace moso_fast {
namespace {

// Numbers that a task takes. Every sum is one of blocks, in their order, each in the order below:
// the same for any number of threads.
constexpr int64_t kBlock = 4096;
// Numbers below which a sweep starts no threads: waking them would take longer.
constexpr int64_t kLeastShared = int64_t{1} << 16;

struct Release {
  void operator()(void* memory) const { release(memory); }
};
template <class T>
using Memory = std::unique_ptr<T, Release>;

template <class T>
Memory<T> memory_for(int64_t elements) {
  return Memory<T>(static_cast<T*>(allocate(size_t(elements) * sizeof(T))));
}

int64_t blocks_of(int64_t elements, int64_t size = kBlock) { return (elements + size - 1) / size; }

// body(block, its first element, the one past its last) for all blocks of so many elements.
template <class Body>
void for_blocks(Threads threads, int64_t elements, const Body& body) {
  const auto task = [&](int64_t block) {
    body(block, block * kBlock, std::min(elements, (block + 1) * kBlock));
  };
  if (elements < kLeastShared) threads.count = 1;
  const auto call = [](const void* data, int64_t block, int) {
    (*static_cast<const decltype(task)*>(data))(block);
  };
  share_out(threads, blocks_of(elements), call, &task);
}

// Sum of value(i) over [first, last), in eight sums that the processor adds up side by side.
template <class Value>
double sum_over(int64_t first, int64_t last, const Value& value) {
  double sums[8] = {};
  int64_t i = first;
  for (; i + 8 <= last; i += 8)
    for (int lane = 0; lane < 8; ++lane) sums[lane] += value(i + lane);
  for (; i < last; ++i) sums[0] += value(i);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// The same over all blocks of so many elements.
template <class Value>
double sum_of(Threads threads, int64_t elements, const Value& value) {
  std::vector<double> sums(size_t(blocks_of(elements)));
  for_blocks(threads, elements, [&](int64_t block, int64_t first, int64_t last) {
    sums[size_t(block)] = sum_over(first, last, value);
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total;
}

double sum_of(Threads threads, int64_t elements, const float* values) {
  return sum_of(threads, elements, [=](int64_t i) { return double(values[i]); });
}

class Job {
 public:
  Job(const Variant& variant, const Whole& job)
      : variant_(variant), job_(job), p_(job.problem), elements_(p_.classes * p_.dim) {}

  void run() {
    if (!finite_parameters() || !first_pass() || interrupted(p_.threads)) return;
    mean_gradient();
    second_pass();
    for (int64_t head = 0; head < p_.heads; ++head) finish(head);
  }

 private:
  double* facts_of(int64_t head) const { return job_.facts + kStatusSlots + 1 + head * kHeadFacts; }

  // Writes the sums of weights, biases and sample weights, and all other facts as they are where
  // the job ends here: nothing offends, nothing counts.
  bool finite_parameters() const {
    std::fill_n(job_.facts, kStatusSlots, double(p_.rows));
    std::fill_n(job_.facts + kStatusSlots, 1 + kHeadFacts * p_.heads, 0.0);
    const double samples = p_.sample_weight ? sum_of(p_.threads, p_.rows, p_.sample_weight) : 0.0;
    bool finite = std::isfinite(samples);
    for (int64_t head = 0; head < p_.heads; ++head) {
      double* facts = facts_of(head);
      facts[3] = sum_of(p_.threads, elements_, p_.weight + head * elements_);
      if (p_.bias) facts[4] = sum_of(p_.threads, p_.classes, p_.bias + head * p_.classes);
      facts[5] = samples;
      finite = finite && std::isfinite(facts[3]) && std::isfinite(facts[4]);
    }
    return finite;
  }

  // Returns whether no row offends.
  bool first_pass() {
    const int64_t width = p_.heads * p_.classes;
    feature_sqnorm_ = memory_for<float>(p_.rows);
    if (job_.keep_residual) residual_ = memory_for<float>(p_.rows * width);
    // Sums of the weights' part, where the pass does not make means of them; those of the biases.
    const int64_t sums = p_.split_grad ? 0 : width * p_.dim;
    grad_sum_ = memory_for<double>(sums + width);
    std::fill_n(grad_sum_.get(), sums + width, 0.0);
    mean_ = memory_for<float>(width * (p_.dim + 1));
    if (p_.split_grad) squares_ = memory_for<double>(width * blocks_of(p_.dim, kSquareColumns));
    int64_t status[kStatusSlots];
    std::fill_n(status, kStatusSlots, p_.rows);
    FirstPass pass{};
    pass.problem = p_;
    pass.loss = job_.loss;
    pass.residual_sqnorm = job_.el2n;  // until its root is taken
    pass.margin = job_.margin;
    pass.entropy = job_.entropy;
    pass.stat_stride = p_.rows;
    pass.feature_sqnorm = feature_sqnorm_.get();
    pass.counted = job_.counted;
    pass.status = status;
    pass.residual = residual_.get();
    pass.grad_sum = p_.split_grad ? nullptr : grad_sum_.get();
    pass.bias_grad_sum = grad_sum_.get() + sums;
    pass.mean_grad = mean_.get();
    pass.mean_squares = squares_.get();
    variant_.first_pass(pass);
    std::copy_n(status, kStatusSlots, job_.facts);
    *job_.count = 0;
    for (int64_t row = 0; row < p_.rows; ++row) *job_.count += job_.counted[row] != 0;
    job_.facts[kStatusSlots] = double(*job_.count);
    return std::all_of(status, status + kStatusSlots, [&](int64_t row) { return row >= p_.rows; });
  }

  // G, and |G|^2 before it is rounded to float32.
  void mean_gradient() {
    const int64_t weights = p_.heads * elements_,
                  blocks = p_.classes * blocks_of(p_.dim, kSquareColumns);
    const double* bias_sum = grad_sum_.get() + (p_.split_grad ? 0 : weights);
    for (int64_t head = 0; head < p_.heads; ++head) {
      const int64_t at = head * elements_, bias_at = head * p_.classes;
      double squares = p_.split_grad
                           ? sum_of(p_.threads, blocks,
                                    [&](int64_t i) { return squares_.get()[head * blocks + i]; })
                           : mean_of(grad_sum_.get() + at, mean_.get() + at, elements_);
      if (p_.bias)
        squares += mean_of(bias_sum + bias_at, mean_.get() + weights + bias_at, p_.classes);
      job_.mean_grad_sqnorm[head] = facts_of(head)[0] = squares;
    }
    grad_sum_.reset();
    squares_.reset();
  }

  // Writes the means of sums; returns the sum of their squares.
  double mean_of(const double* sums, float* means, int64_t elements) const {
    const double count = double(std::max<int64_t>(*job_.count, 1));
    return sum_of(p_.threads, elements, [=](int64_t i) {
      const double mean = sums[i] / count;
      means[i] = float(mean);
      return mean * mean;
    });
  }

  void second_pass() const {
    SecondPass pass{};
    pass.problem = p_;
    pass.counted = job_.counted;
    pass.residual = residual_.get();
    pass.mean_grad = mean_.get();
    pass.mean_bias_grad = p_.bias ? mean_.get() + p_.heads * elements_ : nullptr;
    if (p_.bf16_products) pass.self_term_scale = 1.0 / double(std::max<int64_t>(*job_.count, 1));
    pass.alignment = job_.alignment;
    pass.alignment_stride = p_.rows;
    variant_.second_pass(pass);
  }

  // What the results of a head's rows still lack, and the sums of the self-check.
  void finish(int64_t head) const {
    double* facts = facts_of(head);
    const double squared = facts[0];
    struct Sums {
      double alignment = 0.0, norm = 0.0;
    };
    std::vector<Sums> sums(size_t(blocks_of(p_.rows)));
    for_blocks(p_.threads, p_.rows, [&](int64_t block, int64_t first, int64_t last) {
      Sums found;
      for (int64_t row = first; row < last; ++row) {
        const int64_t at = head * p_.rows + row;
        if (!job_.counted[row]) {
          leave_out(at);
          continue;
        }
        const float features = feature_sqnorm_.get()[row];
        const float norm = job_.el2n[at] * (p_.bias ? features + 1.0f : features);
        job_.grad_sqnorm[at] = norm;
        job_.el2n[at] = std::sqrt(job_.el2n[at]);
        found.alignment += double(job_.alignment[at]);
        found.norm += std::sqrt(double(norm));
        if (job_.score) job_.score[at] = score_at(at, squared);
      }
      sums[size_t(block)] = found;
    });
    for (const Sums& found : sums) {
      facts[1] += found.alignment;
      facts[2] += found.norm;
    }
  }

  float score_at(int64_t at, double mean_grad_sqnorm) const {
    const auto root = [](double x) { return std::sqrt(x); };
    const double score =
        score_of(job_.formula, double(job_.alignment[at]), double(job_.grad_sqnorm[at]),
                 mean_grad_sqnorm, double(*job_.count), root);
    return float(score * job_.scale);
  }

  void leave_out(int64_t at) const {
    for (float* values : {job_.loss, job_.el2n, job_.margin, job_.entropy, job_.alignment,
                          job_.grad_sqnorm, job_.score})
      if (values) values[at] = std::numeric_limits<float>::quiet_NaN();
  }

  const Variant& variant_;
  const Whole& job_;
  const Problem& p_;
  const int64_t elements_;  // of a head
  Memory<float> feature_sqnorm_, residual_, mean_;
  Memory<double> grad_sum_, squares_;
};

}  // namespace

void run_whole(const Variant& variant, const Whole& job) { Job(variant, job).run(); }

}  // namespace moso_fast
