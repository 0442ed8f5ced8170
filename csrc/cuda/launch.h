// How every kernel is written and started, so that nvcc for a card and g++ for tests compile the same .cu file.
//
// A kernel is a plain __global__ function of numbers and addresses. What differs between the compilers is here: the
// toolkit's <cuda_runtime.h> is replaced by tests/cuda/emulation/cuda_runtime.h through the include path, shared memory
// is declared by the macros below, and kernels are started by `launch`. Blocks are rows of whole warps.
#pragma once
#include <cuda_runtime.h>

#include <climits>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/device.h"

#ifdef __CUDACC__
// T name[count], in the block's shared memory; holds anything at first.
#define FASTAPD_SHARED(T, name, count) __shared__ T name[count]
// T* name, the bytes that the launch asked for.
#define FASTAPD_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char fastapd_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(fastapd_dynamic_shared)
#else
#define FASTAPD_SHARED(T, name, count) \
  static char name##_key;              \
  T* const name = static_cast<T*>(emulation::shared(&name##_key, sizeof(T) * (count)))
#define FASTAPD_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(emulation::dynamic_shared())
#endif

namespace fastapd::cuda {

constexpr unsigned kWarp = 32, kAllLanes = 0xffffffffu;

// The place of this thread's warp among all warps of the launch.
__device__ inline int64_t warp_of_grid() {
  return int64_t{blockIdx.x} * (blockDim.x / kWarp) + threadIdx.x / kWarp;
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Starts a kernel of so many blocks, none for 0, on the stream of the current device. Throws std::runtime_error, with
// the op's name, for what CUDA says about the start; what goes wrong later is said by a later call.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
            Stream stream, Arguments... arguments) {
  if (blocks <= 0) return;
  if (blocks > INT_MAX)
    throw std::runtime_error(std::string(op) + ": the problem must fit into 2**31 - 1 blocks, got " +
                             std::to_string(blocks) + "; split the batch");
#ifdef __CUDACC__
  if (shared_bytes > 48 * 1024)  // more than that must be asked for
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          op);
  kernel<<<dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
  check(cudaGetLastError(), op);
#else
  try {
    emulation::launch(kernel, blocks, static_cast<unsigned>(threads), shared_bytes, stream, arguments...);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(op) + ": " + error.what());
  }
#endif
}

}  // namespace fastapd::cuda
