// Tasks as closures, for share_out and Turnstile.
#pragma once

#include "parallel.h"
#include "scalar-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

// Workers that so many tasks have: what each needs of its own is made before they start.
inline int64_t worker_count(Threads threads, int64_t tasks) {
  return min<int64_t>(threads.count, tasks);
}

// Runs task(index, worker) for every index in [0, count), handed out in ascending order.
template <class Task>
void run_tasks(Threads threads, int64_t count, const Task& task) {
  const auto call = [](const void* data, int64_t index, int worker) {
    (*static_cast<const Task*>(data))(index, worker);
  };
  share_out(threads, count, call, &task);
}

// Runs `commit` once all tasks before `index` have run theirs.
template <class Commit>
void in_turn(Turnstile* order, int64_t index, const Commit& commit) {
  order->enter(index);
  commit();
  order->leave();
}

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
