// Where threads come from.
//
// PyTorch's own pool (libgomp) where it is loaded: its idle workers keep spinning for milliseconds
// after every PyTorch operation, so threads beside them would share their cores. It is never
// loaded by us, hence never a second runtime. Otherwise, and in forked children, where a pool of
// the parent is unusable: threads that live for one call.

#include <dlfcn.h>
#include <unistd.h>

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

}  // namespace moso_fast
