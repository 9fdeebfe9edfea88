// Sharing out tasks among threads, and taking results in a fixed order.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace moso_fast {

// Runs body(data) once on each of `threads` threads, the caller's among them (threads.cpp).
void run_team(int threads, bool own_threads, void (*body)(void*), void* data);

// Whether run_team uses the pool that PyTorch has loaded.
bool shares_pool();

struct Threads {
  int count;
  bool own;  // never the loaded pool
};

// Runs task(index, worker) for every index in [0, count), handed out in ascending order.
template <class Task>
void run_tasks(Threads threads, int64_t count, const Task& task) {
  struct Shared {
    const Task& task;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};
  } shared{task, count, {}, {}};
  const auto body = [](void* data) {
    Shared& s = *static_cast<Shared*>(data);
    const int worker = s.workers++;
    for (int64_t index = s.next++; index < s.count; index = s.next++) s.task(index, worker);
  };
  run_team(int(std::min<int64_t>(threads.count, count)), threads.own, body, &shared);
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
