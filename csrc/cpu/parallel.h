// One loop over independent pieces of work, on as many threads as the caller allows; no result depends on how many.
//
// OpenMP where the compiler has it (torch's own runtime, when torch was imported first), one thread where it has not.
// With FASTAPD_STD_THREADS it is std::thread, for the thread sanitizer, which does not understand OpenMP's barriers;
// that build has the baseline level alone, as std::thread is a library template.
#pragma once
#include <cstddef>
#include <cstdint>
#if FASTAPD_STD_THREADS
#include <atomic>
#include <thread>
#include <vector>
#endif

#include "simd.h"

namespace fastapd {
namespace FASTAPD_LEVEL {
namespace {

// body(begin, end) over [0, n) in pieces of at most `grain`; in one piece when there is one thread, so that a workspace
// that the body allocates is allocated once.
template <class Body>
inline void parallel_for(int64_t n, int64_t grain, int threads, const Body& body) {
  if (n <= 0) return;
  const int64_t pieces = (n + grain - 1) / grain;
#if FASTAPD_STD_THREADS
  if (threads > 1 && pieces > 1) {
    std::atomic<int64_t> next{0};
    std::vector<std::thread> team;
    for (int t = 0; t < threads; ++t)
      team.emplace_back([&] {
        for (int64_t p = next++; p < pieces; p = next++) body(p * grain, p * grain + grain < n ? p * grain + grain : n);
      });
    for (std::thread& member : team) member.join();
    return;
  }
#elif defined(_OPENMP)
  if (threads > 1 && pieces > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t p = 0; p < pieces; ++p) body(p * grain, p * grain + grain < n ? p * grain + grain : n);
    return;
  }
#endif
  (void)threads;
  (void)pieces;
  body(0, n);
}

// Threads worth starting for so much work: starting them costs about as much as a hundred thousand multiplications.
inline int worth(int64_t work, int threads) {
  return work > 200000 ? threads : 1;
}

// A workspace of n values, freed with its owner; null when there is no memory, and only then. Exactly n, so that the
// address sanitizer sees a step beyond them.
template <class T>
struct Workspace {
  explicit Workspace(int64_t n)
      : data(static_cast<T*>(__builtin_malloc(n > 0 ? sizeof(T) * static_cast<std::size_t>(n) : 1))) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { __builtin_free(data); }
  T* const data;
};

// Set by any thread that could not allocate.
struct Failure {
  bool happened = false;
  void set() { __atomic_store_n(&happened, true, __ATOMIC_RELAXED); }
  bool none() const { return !__atomic_load_n(&happened, __ATOMIC_RELAXED); }
};

}  // namespace
}  // namespace FASTAPD_LEVEL
}  // namespace fastapd
