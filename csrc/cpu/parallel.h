// Threads for one call: started, joined, gone. Nothing survives the call, so fork is safe, and
// several callers do not share state.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace moso_fast {

// Runs task(index, worker) for every index in [0, count), handed out in ascending order.
template <class Task>
void run_tasks(int threads, int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int worker) {
    for (int64_t index = next++; index < count; index = next++) task(index, worker);
  };
  std::vector<std::thread> helpers;
  for (int worker = 1; worker < threads && worker < count; ++worker) {
    try {
      helpers.emplace_back(work, worker);
    } catch (const std::system_error&) {
      break;  // the system is out of threads: those that run share the work
    }
  }
  work(0);
  for (auto& helper : helpers) helper.join();
}

// Lets task 0, 1, 2, ... through in that order: sums come out the same for any thread count.
class Turnstile {
 public:
  template <class Commit>
  void pass(int64_t index, const Commit& commit) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return turn_ == index; });
    commit();
    ++turn_;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t turn_ = 0;
};

}  // namespace moso_fast
