// CUDA on the CPU, for tests: what the kernels of csrc/cuda use of CUDA, so that g++ compiles the same files that nvcc
// does. The include path puts this file in the toolkit's place; launch.h is the one that includes it.
//
// Every CUDA thread of a block is a fiber, which runs until it waits for others: at a barrier, a shuffle, a ballot.
// Blocks run one by one, in an order that a test chooses. So a launch repeats to the bit, and waiting costs a switch of
// stacks instead of one of threads. What is checked on the way:
//
// - all threads of a block reach the same barrier, all lanes of a warp the same collective, and none leaves before;
// - shared memory holds NaN at the start of every block, and under the address sanitizer ends where it was asked to
// end;
// - under the thread sanitizer every fiber counts as a thread that nothing orders but __syncthreads, __syncwarp and the
//   beginning and end of a launch: not shuffles, nor the order of blocks. So a missing barrier is a data race.
//
// Not here, and so an error of the compiler: float atomics, which would make sums depend on the order; collectives of a
// part of a warp; tensor cores and asynchronous copies, which need #ifdef __CUDA_ARCH__ and the plain form beside it.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulation {

// The thread that runs now.
extern unsigned thread_index, block_index, block_size, grid_size;

void sync_threads();
void sync_warp();
void fence();
// Every lane of the warp gives 8 bytes; returns those that lane `from` gave.
uint64_t exchange(uint64_t mine, unsigned from);
unsigned ballot(bool mine);
// The sum of what all lanes of the warp give.
unsigned sum(unsigned mine);
// Refuses all masks but that of all lanes.
void whole_warp(unsigned mask);
// The block's memory for one array, named by its key; or all of its dynamic memory.
void* shared(const void* key, size_t bytes);
void* dynamic_shared();

extern int current_device;

// Runs `body(closure)` once for every thread of every block; throws std::runtime_error for a misuse.
void run(int64_t blocks, unsigned threads, size_t dynamic_bytes, void* stream, void (*body)(const void*),
         const void* closure);

template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, unsigned threads, size_t dynamic_bytes, void* stream,
            A... arguments) {
  using Call = std::pair<void (*)(P...), std::tuple<P...>>;
  const Call call(kernel, std::tuple<P...>(static_cast<P>(arguments)...));
  run(
      blocks, threads, dynamic_bytes, stream,
      [](const void* closure) {
        const Call& call = *static_cast<const Call*>(closure);
        std::apply(call.first, call.second);
      },
      &call);
}

template <class T>
T shuffled(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  whole_warp(mask);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, from);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned lane() {
  return thread_index % 32;
}

}  // namespace emulation

#define threadIdx (dim3{emulation::thread_index, 0, 0})
#define blockIdx (dim3{emulation::block_index, 0, 0})
#define blockDim (dim3{emulation::block_size, 1, 1})
#define gridDim (dim3{emulation::grid_size, 1, 1})

// ------------------------------------------------------------------------------------------ what threads say to others

inline void __syncthreads() {
  emulation::sync_threads();
}
inline void __syncwarp() {
  emulation::sync_warp();
}
inline void __threadfence() {
  emulation::fence();
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from, unsigned width = 32) {
  const unsigned lane = emulation::lane();
  return emulation::shuffled(mask, value, lane / width * width + static_cast<unsigned>(from) % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, unsigned width = 32) {
  const unsigned lane = emulation::lane(), other = lane ^ static_cast<unsigned>(with);
  return emulation::shuffled(mask, value, other / width > lane / width ? lane : other);  // from a later group: its own
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, unsigned width = 32) {
  const unsigned lane = emulation::lane(), other = lane + by;
  return emulation::shuffled(mask, value, other / width == lane / width ? other : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, unsigned width = 32) {
  const unsigned lane = emulation::lane();
  return emulation::shuffled(mask, value, lane % width >= by ? lane - by : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  emulation::whole_warp(mask);
  return emulation::ballot(predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == ~0u;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {  // from sm_80 on
  emulation::whole_warp(mask);
  return emulation::sum(value);
}

// Atomics order nothing but themselves, as on a card. Integers alone.
#define FASTAPD_ATOMIC(T)                                                                       \
  inline T atomicAdd(T* at, T value) {                                                          \
    return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);                                     \
  }                                                                                             \
  inline T atomicOr(T* at, T value) {                                                           \
    return __atomic_fetch_or(at, value, __ATOMIC_RELAXED);                                      \
  }                                                                                             \
  inline T atomicExch(T* at, T value) {                                                         \
    return __atomic_exchange_n(at, value, __ATOMIC_RELAXED);                                    \
  }                                                                                             \
  inline T atomicCAS(T* at, T before, T value) {                                                \
    __atomic_compare_exchange_n(at, &before, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED); \
    return before;                                                                              \
  }                                                                                             \
  inline T atomicMax(T* at, T value) {                                                          \
    T before = __atomic_load_n(at, __ATOMIC_RELAXED);                                           \
    while (before < value && atomicCAS(at, before, value) != before) before = *at;              \
    return before;                                                                              \
  }                                                                                             \
  inline T atomicMin(T* at, T value) {                                                          \
    T before = __atomic_load_n(at, __ATOMIC_RELAXED);                                           \
    while (value < before && atomicCAS(at, before, value) != before) before = *at;              \
    return before;                                                                              \
  }
FASTAPD_ATOMIC(int)
FASTAPD_ATOMIC(unsigned)
FASTAPD_ATOMIC(unsigned long long)
#undef FASTAPD_ATOMIC

// ---------------------------------------------------------------------------------------------------------- arithmetic

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x) {
  return __builtin_popcountll(x);
}
inline int __clz(int x) {
  return x ? __builtin_clz(static_cast<unsigned>(x)) : 32;
}
inline int __clzll(long long x) {
  return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class To, class From>
To emulated_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof(To));
  return bits;
}
inline unsigned __float_as_uint(float x) {
  return emulated_bits<unsigned>(x);
}
inline int __float_as_int(float x) {
  return emulated_bits<int>(x);
}
inline float __uint_as_float(unsigned x) {
  return emulated_bits<float>(x);
}
inline float __int_as_float(int x) {
  return emulated_bits<float>(x);
}
inline long long __double_as_longlong(double x) {
  return emulated_bits<long long>(x);
}
inline double __longlong_as_double(long long x) {
  return emulated_bits<double>(x);
}
inline int min(int a, int b) {
  return a < b ? a : b;
}
inline int max(int a, int b) {
  return a > b ? a : b;
}
inline long long min(long long a, long long b) {
  return a < b ? a : b;
}
inline long long max(long long a, long long b) {
  return a > b ? a : b;
}
inline long min(long a, long b) {
  return a < b ? a : b;
}
inline long max(long a, long b) {
  return a > b ? a : b;
}

// ------------------------------------------------------------------------------------------------- what the host asks

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorNoDevice = 100, cudaErrorInsufficientDriver = 35,
                      cudaErrorStubLibrary = 34, cudaErrorInvalidDevice = 101;

struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  size_t totalGlobalMem;
};

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 2;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  emulation::current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"emulated", 0, 0, 1, 0};
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorInvalidDevice ? "invalid device ordinal" : "an error of the emulation";
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
