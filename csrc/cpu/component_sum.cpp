// The epilogue of component_sum_loss: the residual and its squared sum in one pass over the library GEMM's result.
//
// The sum W = At^T B is one GEMM over the concatenated ranks, which a BLAS does best; torch runs it. What is left,
// residual = W - target and loss = sum residual^2, touches memory only, and is fused here: one read of both, one write.
// Lanes are summed in T over blocks of 4096 entries and the blocks in float64, in order, so threads do not matter.
#include "../ops.h"
#include "parallel.h"

namespace fastapd {
namespace FASTAPD_LEVEL {
namespace {

constexpr int64_t kBlock = 4096;

template <class T>
double residual_block(T* residual, const T* target, int64_t n) {
  vec<T> acc = {};
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    const vec<T> r = load(residual + i) - load(target + i);
    store(residual + i, r);
    acc += r * r;
  }
  double total = sum_lanes<T>(acc);
  for (; i < n; ++i) {
    residual[i] -= target[i];
    total += static_cast<double>(residual[i]) * static_cast<double>(residual[i]);
  }
  return total;
}

}  // namespace

template <class T>
void component_sum_loss(T* residual, const T* target, T* loss, int64_t n_instances, int64_t n, int threads) {
  parallel_for(n_instances, 1, worth(n_instances * n, threads), [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double total = 0;
      for (int64_t at = 0; at < n; at += kBlock)
        total += residual_block(residual + i * n + at, target + i * n + at, n - at < kBlock ? n - at : kBlock);
      loss[i] = static_cast<T>(total);
    }
  });
}

template void component_sum_loss<float>(float*, const float*, float*, int64_t, int64_t, int);
template void component_sum_loss<double>(double*, const double*, double*, int64_t, int64_t, int);

}  // namespace FASTAPD_LEVEL
}  // namespace fastapd
