// The epilogue of component_sum_loss: the residual and its squared sum in one pass over the library GEMM's result.
//
// The sum W = At^T B is one GEMM over the concatenated ranks, which cuBLAS does best. What is left, residual = W -
// target and loss = sum residual^2, touches memory only: one read of both, one write. A block owns kTile numbers of one
// instance and leaves one partial sum, in float (in double for double); a second kernel, of one block an instance, adds
// the partial sums in double, in order. An instance of one tile needs no second kernel. No atomics: bits repeat.
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/reduce.h"

namespace fastapd::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kTile = 16 * kThreads;

template <class T>
__global__ void __launch_bounds__(kThreads)
    residual_kernel(T* residual, const T* target, T* loss, Acc<T>* partials, int64_t n, int64_t n_tiles) {
  const int64_t instance = blockIdx.x / n_tiles, tile = blockIdx.x % n_tiles;
  const int64_t first = tile * kTile, end = first + kTile < n ? first + kTile : n;
  residual += instance * n;
  target += instance * n;
  Acc<T> sum = 0;
#pragma unroll 4
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
    const Acc<T> r = widened(residual[i]) - widened(target[i]);
    residual[i] = narrowed<T>(r);
    sum += r * r;
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x != 0) return;
  if (n_tiles == 1)
    loss[instance] = narrowed<T>(sum);
  else
    partials[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_partials_kernel(const Acc<T>* partials, T* loss, int64_t n_tiles) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n_tiles; i += kThreads) sum += partials[blockIdx.x * n_tiles + i];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) loss[blockIdx.x] = narrowed<T>(static_cast<Acc<T>>(sum));
}

}  // namespace

int64_t component_sum_loss_partials(int64_t n) {
  return n <= kTile ? 0 : ceil_div(n, kTile);
}

template <class T>
void component_sum_loss(Stream stream, T* residual, const T* target, T* loss, Acc<T>* partials, int64_t n_instances,
                        int64_t n) {
  const char* op = "component_sum_loss";
  const int64_t n_tiles = n <= kTile ? 1 : ceil_div(n, kTile);  // of nothing the loss is 0
  launch(op, residual_kernel<T>, n_instances * n_tiles, kThreads, 0, stream, residual, target, loss, partials, n,
         n_tiles);
  if (n_tiles > 1) launch(op, add_partials_kernel<T>, n_instances, kThreads, 0, stream, partials, loss, n_tiles);
}

#define FASTAPD_INSTANTIATE(T) template void component_sum_loss<T>(Stream, T*, const T*, T*, Acc<T>*, int64_t, int64_t);
FASTAPD_INSTANTIATE(float)
FASTAPD_INSTANTIATE(double)
FASTAPD_INSTANTIATE(Half)
FASTAPD_INSTANTIATE(BFloat16)

}  // namespace fastapd::cuda
