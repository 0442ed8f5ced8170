// Schatten sums of S_cm = |a_cm|^2 |b_cm|^2 with their gradients, by counts or by a float mask, and what adds up parts.
//
// With counts a warp owns a row a_cm and a row b_cm: it reads them for their lengths, computes the power, and reads
// them again, from a cache, to write or add its gradients. With a mask lengths come first; then a thread owns a
// component and kSamples samples, whose powers it sums, writes the gradient of their mask, and leaves their share in
// the gradient of S; then a warp a row, as before. All sums are in double, of fixed parts in a fixed order. Bytes count
// where rows are long; in rows of a few numbers most lanes have nothing to do, and powers count.
#include "cuda/reduce.h"
#include "cuda/svd.h"

namespace fastapd::cuda {
namespace {

constexpr int kRowThreads = 128, kTotalThreads = 512;
constexpr int kPowerThreads = 64, kSamples = 16;

template <class T>
__device__ inline double square_of_warp(const T* a, int64_t d) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp; i < d; i += kWarp) {
    const double x = widened(a[i]);
    sum += x * x;
  }
  return warp_sum(sum);
}

// grad = factor a, or added to it.
template <class T>
__device__ inline void scale_of_warp(const T* a, double factor, int64_t d, bool accumulate, T* grad) {
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp; i < d; i += kWarp)
    put(grad + i, factor * static_cast<double>(widened(a[i])), accumulate);
}

template <class T>
__device__ inline void clear_of_warp(int64_t d, T* grad) {
  for (int64_t i = threadIdx.x % kWarp; i < d; i += kWarp) grad[i] = narrowed<T>(0);
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, 1)
    factored_kernel(const T* At, const T* B, const int64_t* counts, Exponent exponent, int64_t batch, double scale,
                    bool accumulate, bool gradient, T* grad_At, T* grad_B, double* partials, int64_t n_rows, int m,
                    int64_t d_in, int64_t d_out) {
  const int64_t row = warp_of_grid();
  if (row >= n_rows) return;
  const int64_t count = counts[row / m];
  const bool first = threadIdx.x % kWarp == 0;
  if (count == 0) {  // an unused component contributes nothing, whatever it holds
    if (gradient && !accumulate) {
      clear_of_warp(d_in, grad_At + row * d_in);
      clear_of_warp(d_out, grad_B + row * d_out);
    }
    if (first) partials[row] = unused_term(count, batch, exponent);
    return;
  }
  const T *a = At + row * d_in, *b = B + row * d_out;
  const double norm_a = square_of_warp(a, d_in), norm_b = square_of_warp(b, d_out), weight = static_cast<double>(count);
  const Power power = power_of(norm_a * norm_b, exponent);
  if (first) partials[row] = weight * power.value + unused_term(count, batch, exponent);
  if (!gradient) return;
  const double step = 2 * scale * weight * power.slope;
  scale_of_warp(a, step * norm_b, d_in, accumulate, grad_At + row * d_in);
  scale_of_warp(b, step * norm_a, d_out, accumulate, grad_B + row * d_out);
}

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    norms_kernel(const T* At, const T* B, double* norms, int64_t n_rows, int64_t d_in, int64_t d_out) {
  const int64_t row = warp_of_grid();
  if (row >= n_rows) return;
  const double norm_a = square_of_warp(At + row * d_in, d_in), norm_b = square_of_warp(B + row * d_out, d_out);
  if (threadIdx.x % kWarp != 0) return;
  norms[row] = norm_a;
  norms[n_rows + row] = norm_b;
}

template <class T>
__global__ void __launch_bounds__(kPowerThreads)
    powers_kernel(const double* norms, const T* mask, Exponent exponent, bool gradient, T* grad_mask, double* to_S,
                  double* partials, int64_t n_rows, int64_t n_components, int m, int64_t batch, int64_t n_batch,
                  int64_t n_across) {
  FASTAPD_SHARED(double, to_mask, kSamples* kPowerThreads);  // a column a thread
  const int64_t across = blockIdx.x % n_across, tile = blockIdx.x / n_across % n_batch;
  const int64_t instance = blockIdx.x / n_across / n_batch, component = across * kPowerThreads + threadIdx.x;
  const int64_t start = tile * kSamples, end = start + kSamples < batch ? start + kSamples : batch;
  const int n = component < n_components ? static_cast<int>(end - start) : 0;
  const int64_t at = (instance * batch + start) * n_components + component;
  double total = 0;
  for (int s = 0; s < n; ++s) to_mask[s * kPowerThreads + threadIdx.x] = 0;
  for (int r = 0; n > 0 && r < m; ++r) {
    const int64_t row = (instance * n_components + component) * m + r;
    const double S = norms[row] * norms[n_rows + row];
    double step_S = 0;
#pragma unroll 1
    for (int s = 0; s < n; ++s) {
      const double weight = widened(mask[at + s * n_components]);
      const Power power = power_of(weight * S, exponent);
      total += power.value;
      if (!gradient) continue;
      step_S += weight * power.slope;
      to_mask[s * kPowerThreads + threadIdx.x] += S * power.slope;
    }
    if (gradient) to_S[tile * n_rows + row] = step_S;
  }
  for (int s = 0; gradient && s < n; ++s)
    grad_mask[at + s * n_components] = narrowed_from<T>(to_mask[s * kPowerThreads + threadIdx.x]);
  total = block_sum<kPowerThreads>(total);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    spread_kernel(const T* At, const T* B, const double* norms, const double* to_S, T* grad_At, T* grad_B,
                  int64_t n_rows, int64_t d_in, int64_t d_out, int64_t n_batch) {
  const int64_t row = warp_of_grid();
  if (row >= n_rows) return;
  double step = 0;
  for (int64_t tile = 0; tile < n_batch; ++tile) step += to_S[tile * n_rows + row];
  step *= 2;
  scale_of_warp(At + row * d_in, step * norms[n_rows + row], d_in, false, grad_At + row * d_in);
  scale_of_warp(B + row * d_out, step * norms[row], d_out, false, grad_B + row * d_out);
}

template <class T>
__global__ void __launch_bounds__(kTotalThreads) total_kernel(const double* partials, T* loss, int64_t n) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < n; i += kTotalThreads) sum += partials[blockIdx.x * n + i];
  sum = block_sum<kTotalThreads>(sum);
  if (threadIdx.x == 0) loss[blockIdx.x] = narrowed_from<T>(sum);
}

}  // namespace

template <class T>
void schatten_total(const char* op, Stream stream, const double* partials, T* loss, int64_t n_instances, int64_t n) {
  launch(op, total_kernel<T>, n_instances, kTotalThreads, 0, stream, partials, loss, n);
}

template <class T>
void schatten_factored(const char* op, Stream stream, const T* At, const T* B, const int64_t* counts, double p,
                       double eps, int64_t batch, double scale, bool accumulate, T* loss, T* grad_At, T* grad_B,
                       double* partials, SchattenSizes n) {
  const int64_t of_instance = n.n_components * n.rank, n_rows = n.n_instances * of_instance;
  const bool gradient = grad_At != nullptr || grad_B != nullptr;  // one is null when it has no entries
  launch(op, factored_kernel<T>, ceil_div(n_rows, kRowThreads / kWarp), kRowThreads, 0, stream, At, B, counts,
         exponent_of(p, eps), batch, scale, accumulate, gradient, grad_At, grad_B, partials, n_rows, n.rank, n.d_in,
         n.d_out);
  schatten_total(op, stream, partials, loss, n.n_instances, of_instance);
}

MaskedParts schatten_masked_parts(int64_t n_components, int64_t batch) {
  return {ceil_div(batch, kSamples), ceil_div(n_components, kPowerThreads)};
}

template <class T>
void schatten_masked(const char* op, Stream stream, const T* At, const T* B, const T* mask, double p, double eps,
                     int64_t batch, T* loss, T* grad_At, T* grad_B, T* grad_mask, double* norms, double* to_S,
                     double* partials, SchattenSizes n) {
  const int64_t n_rows = n.n_instances * n.n_components * n.rank;
  const bool gradient = grad_At != nullptr || grad_B != nullptr || grad_mask != nullptr;
  const MaskedParts parts = schatten_masked_parts(n.n_components, batch);
  const int64_t row_blocks = ceil_div(n_rows, kRowThreads / kWarp), tiles = parts.batch * parts.across;
  launch(op, norms_kernel<T>, row_blocks, kRowThreads, 0, stream, At, B, norms, n_rows, n.d_in, n.d_out);
  launch(op, powers_kernel<T>, n.n_instances * tiles, kPowerThreads, 0, stream, norms, mask,
         exponent_of(p, eps), gradient, grad_mask, to_S, partials, n_rows, n.n_components, n.rank, batch, parts.batch,
         parts.across);
  if (gradient)
    launch(op, spread_kernel<T>, row_blocks, kRowThreads, 0, stream, At, B, norms, to_S, grad_At, grad_B, n_rows,
           n.d_in, n.d_out, parts.batch);
  schatten_total(op, stream, partials, loss, n.n_instances, tiles);
}

#define FASTAPD_INSTANTIATE(T)                                                                                     \
  template void schatten_total<T>(const char*, Stream, const double*, T*, int64_t, int64_t);                       \
  template void schatten_factored<T>(const char*, Stream, const T*, const T*, const int64_t*, double, double,      \
                                     int64_t, double, bool, T*, T*, T*, double*, SchattenSizes);                   \
  template void schatten_masked<T>(const char*, Stream, const T*, const T*, const T*, double, double, int64_t, T*, \
                                   T*, T*, T*, double*, double*, double*, SchattenSizes);
FASTAPD_INSTANTIATE(float)
FASTAPD_INSTANTIATE(double)
FASTAPD_INSTANTIATE(Half)
FASTAPD_INSTANTIATE(BFloat16)

}  // namespace fastapd::cuda
