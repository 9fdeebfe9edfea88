// Sharing out tasks among threads, and taking results in a fixed order.
//
// Nothing here is inline: the kernels include this file once per instruction set, and the linker
// would keep one copy of an inline function, perhaps one that this processor cannot run.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace moso_fast {

// Runs body(data) once on each of `threads` threads, the caller's among them.
void run_team(int threads, bool own_threads, void (*body)(void*), void* data);

// Whether run_team uses the pool that PyTorch has loaded.
bool shares_pool();

// Lets a call end early. Tasks that have begun are done, no other one begins, and what the call
// writes is free then.
class Interrupt {
 public:
  // `asked` says whether somebody wants the call to end. It is called now and then, and on this
  // thread alone: that is where Python handles signals.
  explicit Interrupt(bool (*asked)());
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  bool requested();
  bool happened() const;

 private:
  bool (*const asked_)();
  const std::thread::id caller_;
  std::chrono::steady_clock::time_point last_;
  std::atomic<bool> happened_{false};
};

struct Threads {
  int count;
  bool own;              // never the loaded pool
  Interrupt* interrupt;  // or null
};

// Whether the call is to end: for tasks that take long.
bool interrupted(const Threads& threads);

// Calls task(data, index, worker) for every index in [0, count), handed out in ascending order;
// worker < min(threads.count, count) says which of the threads it is.
void share_out(Threads threads, int64_t count, void (*task)(const void*, int64_t, int),
               const void* data);

// Lets task 0, 1, 2, ... through in that order: sums come out the same for any thread count.
class Turnstile {
 public:
  Turnstile();
  ~Turnstile();
  Turnstile(const Turnstile&) = delete;
  Turnstile& operator=(const Turnstile&) = delete;

  // Returns when all tasks before this one have left; leave() lets the next one in.
  void enter(int64_t index);
  void leave();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t turn_ = 0;
};

}  // namespace moso_fast
