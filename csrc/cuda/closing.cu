// The end of a job: kernels and launches.
#include "closing.cuh"
#include "launch.cuh"

namespace moso_fast::closing {
namespace {

__global__ void __launch_bounds__(kThreads) finish_kernel(const Finish p) { finish(p); }
__global__ void __launch_bounds__(kJudgeThreads) judge_kernel(const Judge p) { judge(p); }
__global__ void __launch_bounds__(kThreads) score_kernel(const Score p) { score(p); }

cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

}  // namespace

void launch_finish(const Finish& p, int device, uintptr_t stream) {
  use_device(device);
  finish_kernel<<<unsigned(p.heads * p.blocks_a_head), kThreads, kFinishBytes, stream_of(stream)>>>(
      p);
  require(cudaGetLastError(), "results of rows");
}

void launch_judge(const Judge& p, int device, uintptr_t stream) {
  use_device(device);
  judge_kernel<<<unsigned(p.heads), kJudgeThreads, kJudgeBytes, stream_of(stream)>>>(p);
  require(cudaGetLastError(), "numbers to judge a job by");
}

void launch_score(const Score& p, int device, uintptr_t stream) {
  use_device(device);
  const int64_t blocks = (p.heads * p.rows + kThreads - 1) / kThreads;
  if (blocks == 0) return;
  score_kernel<<<unsigned(blocks), kThreads, 0, stream_of(stream)>>>(p);
  require(cudaGetLastError(), "scores");
}

void reset_status(int64_t* status, int device, uintptr_t stream) {
  use_device(device);
  require(cudaMemsetAsync(status, kUnset, kStatusSlots * sizeof *status, stream_of(stream)),
          "status word");
}

void wait_for(int device, uintptr_t stream) {
  use_device(device);
  require(cudaStreamSynchronize(stream_of(stream)), "kernels of a job");
}

}  // namespace moso_fast::closing
