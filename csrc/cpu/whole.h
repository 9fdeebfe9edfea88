// A whole job whose rows are one range and each a sample: both passes, what lies between them and
// what comes behind. One call from Python: for a small job the operations of a framework for the
// mean gradient, the results of rows, the self-check and the scores take longer than the kernels.
#pragma once

#include "../formulas.h"
#include "jobs.h"
#include "variant.h"

namespace moso_fast {

// What is said of a head: |G|^2, the sums over its samples of the alignments and of |g|, and of its
// weights, its bias and the sample weights. Sums that are not finite say that a term is not.
constexpr int kHeadFacts = 6;

// Results are (heads, rows), one head after the other, NaN where a row does not count.
struct Whole {
  Problem problem;
  float* loss;
  float* el2n;
  float* margin;
  float* entropy;
  float* alignment;
  float* grad_sqnorm;
  float* score;              // or null
  uint8_t* counted;          // (rows)
  double* mean_grad_sqnorm;  // (heads)
  int64_t* count;            // samples that count
  double* facts;             // the status word, the count, kHeadFacts a head
  bool keep_residual;        // between the passes; else the second computes them again
  Formula formula;
  double scale;
};

// Parameters that are not finite or an offending row end the job: the results are free then, and
// the facts say which.
void run_whole(const Variant& variant, const Whole& job);

}  // namespace moso_fast
