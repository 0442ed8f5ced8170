// Rows of unit length: a /= |a|, and the part of a gradient along its row removed: g -= (g . a) a.
//
// A warp owns a row. It reads the row twice, the second time from a cache, and writes it once; bytes are all that
// counts, and lanes read neighbouring numbers. Sums are in float, in double for double; a row whose squared length
// leaves the range is done again in double (row_length.h), which costs two more reads. Where there are few rows of many
// thousand numbers each, most of a card has nothing to do: rows of factors are as long as a layer is wide.
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/reduce.h"
#include "row_length.h"

namespace fastapd::cuda {
namespace {

constexpr int kThreads = 128;

template <class T>
__device__ inline Acc<T> dot_of_warp(const T* a, const T* b, int64_t d) {
  Acc<T> sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp; i < d; i += kWarp) sum += widened(a[i]) * widened(b[i]);
  return warp_sum(sum);
}

template <class T>
__device__ inline void unit_norm_of_any_size(T* a, int64_t d) {
  double largest = 0, square = 0;
  bool nan = false;
#pragma unroll 1  // rarely run: no registers for it
  for (int64_t i = threadIdx.x % kWarp; i < d; i += kWarp) {
    const double size = fabs(static_cast<double>(widened(a[i])));
    nan |= size != size;
    largest = size > largest ? size : largest;
  }
  largest = warp_max(largest);
  if (stays(largest, __any_sync(kAllLanes, nan))) return;
  double rest = 1;
  if (is_finite(largest)) {
#pragma unroll 1
    for (int64_t i = threadIdx.x % kWarp; i < d; i += kWarp) {
      const double part = widened(a[i]) / largest;
      square += part * part;
    }
    rest = sqrt(warp_sum(square));
  }
#pragma unroll 1
  for (int64_t i = threadIdx.x % kWarp; i < d; i += kWarp)
    a[i] = narrowed<T>(static_cast<Acc<T>>(divided(widened(a[i]), largest, rest)));
}

template <class T>
__global__ void __launch_bounds__(kThreads) unit_norm_kernel(T* rows, int64_t n, int64_t d) {
  const int64_t row = warp_of_grid();
  if (row >= n) return;
  T* a = rows + row * d;
  const Acc<T> square = dot_of_warp(a, a, d);
  if (!in_range(square)) {
    unit_norm_of_any_size(a, d);
    return;
  }
  const Acc<T> norm = sqrt(square);
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp; i < d; i += kWarp) a[i] = narrowed<T>(widened(a[i]) / norm);
}

template <class T>
__global__ void __launch_bounds__(kThreads) remove_along_kernel(T* grad, const T* rows, int64_t n, int64_t d) {
  const int64_t row = warp_of_grid();
  if (row >= n) return;
  T* g = grad + row * d;
  const T* a = rows + row * d;
  const Acc<T> along = dot_of_warp(g, a, d);
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp; i < d; i += kWarp) g[i] = narrowed<T>(widened(g[i]) - along * widened(a[i]));
}

}  // namespace

template <class T>
void unit_norm(Stream stream, T* rows, int64_t n, int64_t d) {
  if (d == 0) return;
  launch("unit_norm", unit_norm_kernel<T>, ceil_div(n, kThreads / kWarp), kThreads, 0, stream, rows, n, d);
}

template <class T>
void remove_along(Stream stream, T* grad, const T* rows, int64_t n, int64_t d) {
  if (d == 0) return;
  launch("remove_along", remove_along_kernel<T>, ceil_div(n, kThreads / kWarp), kThreads, 0, stream, grad, rows, n, d);
}

#define FASTAPD_INSTANTIATE(T)                              \
  template void unit_norm<T>(Stream, T*, int64_t, int64_t); \
  template void remove_along<T>(Stream, T*, const T*, int64_t, int64_t);
FASTAPD_INSTANTIATE(float)
FASTAPD_INSTANTIATE(double)
FASTAPD_INSTANTIATE(Half)
FASTAPD_INSTANTIATE(BFloat16)

}  // namespace fastapd::cuda
