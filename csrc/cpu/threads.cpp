// Where threads come from.
//
// PyTorch's own pool (libgomp) where it is loaded: its idle workers keep spinning for milliseconds
// after every PyTorch operation, so threads beside them would share their cores. It is never
// loaded by us, hence never a second runtime. Otherwise, and in forked children, where a pool of
// the parent is unusable: threads that live for one call.

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "parallel.h"

namespace moso_fast {
namespace {

// libgomp's stable entry point for `#pragma omp parallel`.
using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

const pid_t kLoadedIn = getpid();

GompParallel loaded_pool() {
#if defined(RTLD_NOLOAD)
  if (void* library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD))
    return reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
#endif
  return nullptr;
}

}  // namespace

bool shares_pool() { return kLoadedIn == getpid() && loaded_pool() != nullptr; }

void run_team(int threads, bool own_threads, void (*body)(void*), void* data) {
  if (threads <= 1) return body(data);
  if (!own_threads && kLoadedIn == getpid()) {
    static const GompParallel pool = loaded_pool();
    if (pool) return pool(body, data, unsigned(threads), 0);
  }
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) {
    try {
      helpers.emplace_back(body, data);
    } catch (const std::system_error&) {
      break;  // the system is out of threads: those that run share the work
    }
  }
  body(data);
  for (auto& helper : helpers) helper.join();
}

void share_out(Threads threads, int64_t count, void (*task)(const void*, int64_t, int),
               const void* data) {
  struct Shared {
    void (*task)(const void*, int64_t, int);
    const void* data;
    int64_t count;
    Threads threads;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};
  } shared{task, data, count, threads, {}, {}};
  const auto body = [](void* argument) {
    Shared& s = *static_cast<Shared*>(argument);
    const int worker = s.workers++;
    // Asked before a task is taken: one that was taken is run, or those behind it would wait at
    // the turnstile for it.
    while (!interrupted(s.threads)) {
      const int64_t index = s.next++;
      if (index >= s.count) return;
      s.task(s.data, index, worker);
    }
  };
  run_team(int(std::min<int64_t>(threads.count, count)), threads.own, body, &shared);
}

namespace {
// Often enough for whoever waits, seldom enough for Python's lock not to be taken all the time.
constexpr std::chrono::milliseconds kAskEvery{50};
}  // namespace

Interrupt::Interrupt(bool (*asked)())
    : asked_(asked), caller_(std::this_thread::get_id()), last_(std::chrono::steady_clock::now()) {}

bool Interrupt::requested() {
  if (happened()) return true;
  if (std::this_thread::get_id() != caller_) return false;
  const auto now = std::chrono::steady_clock::now();
  if (now - last_ < kAskEvery) return false;
  last_ = now;
  if (asked_()) happened_ = true;
  return happened();
}

bool Interrupt::happened() const { return happened_.load(std::memory_order_relaxed); }

bool interrupted(const Threads& threads) {
  return threads.interrupt && threads.interrupt->requested();
}

Turnstile::Turnstile() = default;
Turnstile::~Turnstile() = default;

void Turnstile::enter(int64_t index) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return turn_ == index; });
}

void Turnstile::leave() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++turn_;
  }
  changed_.notify_all();
}

}  // namespace moso_fast
