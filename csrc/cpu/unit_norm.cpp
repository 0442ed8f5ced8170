// Rows of unit length: a /= |a|, and the part of a gradient along its row removed: g -= (g . a) a. One pass over memory
// each, the second read of a row comes from the cache; a thread owns whole rows. Sums are in T; a row whose squared
// length leaves the range of T is done again in double (row_length.h).
#include "../ops.h"
#include "../row_length.h"
#include "parallel.h"

namespace fastapd {
namespace FASTAPD_LEVEL {
namespace {

constexpr int64_t kGrain = 64;  // rows

template <class T>
inline T dot(const T* a, const T* b, int64_t d) {
  vec<T> acc[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes<T> <= d; i += 2 * kLanes<T>)
    for (int v = 0; v < 2; ++v) acc[v] += load(a + i + v * kLanes<T>) * load(b + i + v * kLanes<T>);
  T total = sum_lanes<T>(acc[0] + acc[1]);
  for (; i < d; ++i) total += a[i] * b[i];
  return total;
}

template <class T>
void unit_norm_of_any_size(T* a, int64_t d) {
  double largest = 0, square = 0;
  bool nan = false;
  for (int64_t i = 0; i < d; ++i) {
    const double size = __builtin_fabs(static_cast<double>(a[i]));
    nan |= size != size;
    if (size > largest) largest = size;
  }
  if (stays(largest, nan)) return;
  double rest = 1;
  if (is_finite(largest)) {
    for (int64_t i = 0; i < d; ++i) square += (a[i] / largest) * (a[i] / largest);
    rest = __builtin_sqrt(square);
  }
  for (int64_t i = 0; i < d; ++i) a[i] = static_cast<T>(divided(a[i], largest, rest));
}

}  // namespace

template <class T>
void unit_norm(T* rows, int64_t n, int64_t d, int threads) {
  parallel_for(n, kGrain, worth(n * d, threads), [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* a = rows + r * d;
      const T square = dot(a, a, d);
      if (!in_range(square)) {
        unit_norm_of_any_size(a, d);
        continue;
      }
      const T norm = __builtin_sqrt(square);
      int64_t i = 0;
      for (; i + kLanes<T> <= d; i += kLanes<T>) store(a + i, load(a + i) / norm);
      for (; i < d; ++i) a[i] /= norm;
    }
  });
}

template <class T>
void remove_along(T* grad, const T* rows, int64_t n, int64_t d, int threads) {
  parallel_for(n, kGrain, worth(n * d, threads), [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* g = grad + r * d;
      const T* a = rows + r * d;
      const T along = dot(g, a, d);
      int64_t i = 0;
      for (; i + kLanes<T> <= d; i += kLanes<T>) store(g + i, load(g + i) - along * load(a + i));
      for (; i < d; ++i) g[i] -= along * a[i];
    }
  });
}

#define FASTAPD_INSTANTIATE(T)                           \
  template void unit_norm<T>(T*, int64_t, int64_t, int); \
  template void remove_along<T>(T*, const T*, int64_t, int64_t, int);
FASTAPD_INSTANTIATE(float)
FASTAPD_INSTANTIATE(double)

}  // namespace FASTAPD_LEVEL
}  // namespace fastapd
