// Sums and maxima over a warp or a block, in an order that depends on nothing but the place of each thread.
#pragma once
#include "cuda/launch.h"

namespace fastapd::cuda {

// Every lane gets the sum, the same bits in each: an exchange adds the same two numbers on both sides.
template <class T>
__device__ inline T warp_sum(T x) {
  for (int with = kWarp / 2; with > 0; with /= 2) x += __shfl_xor_sync(kAllLanes, x, with);
  return x;
}

template <class T>
__device__ inline T warp_max(T x) {
  for (int with = kWarp / 2; with > 0; with /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, x, with);
    x = other > x ? other : x;
  }
  return x;
}

// The sum over a block of kThreads, in thread 0 alone. All threads of the block call it, once in a kernel: a second
// call would write what a slow thread of the first still reads.
template <int kThreads, class T>
__device__ inline T block_sum(T x) {
  constexpr int kWarps = kThreads / static_cast<int>(kWarp);
  FASTAPD_SHARED(T, of_warps, kWarps);
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  T total = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kWarps; ++w) total += of_warps[w];
  return total;
}

}  // namespace fastapd::cuda
