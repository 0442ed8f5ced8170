// Which instruction-set level runs: the best that the processor has, unless the user asks for a lower one.
#include <atomic>

#include "../ops.h"

namespace fastapd {

Level best_level() {
#if FASTAPD_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Level::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Level::kAvx2;
#endif
  return Level::kBaseline;
}

static std::atomic<int>& level_in_use() {
  static std::atomic<int> level{static_cast<int>(best_level())};
  return level;
}

Level current_level() {
  return static_cast<Level>(level_in_use().load(std::memory_order_relaxed));
}

void set_level(Level level) {
  level_in_use().store(static_cast<int>(level), std::memory_order_relaxed);
}

}  // namespace fastapd
