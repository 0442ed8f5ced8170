// Kernels that are right and wrong on purpose, which show that the emulation finds what it is there to find.
#include "cuda/launch.h"
#include "cuda/reduce.h"

namespace {

using fastapd::cuda::kAllLanes;

__global__ void sums_of_blocks(const float* x, float* out) {
  const float total = fastapd::cuda::block_sum<64>(x[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x == 0) out[blockIdx.x] = total;
}

// What every lane gets from each collective, 9 numbers a lane.
__global__ void collectives(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int* of_lane = out + 9 * lane;
  of_lane[0] = __shfl_sync(kAllLanes, lane, 5);
  of_lane[1] = __shfl_sync(kAllLanes, lane, 3, 8);
  of_lane[2] = __shfl_xor_sync(kAllLanes, lane, 6);
  of_lane[3] = __shfl_down_sync(kAllLanes, lane, 2);
  of_lane[4] = __shfl_down_sync(kAllLanes, lane, 2, 16);
  of_lane[5] = __shfl_up_sync(kAllLanes, lane, 3);
  of_lane[6] = static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0));
  of_lane[7] = __any_sync(kAllLanes, lane == 31) + 2 * __all_sync(kAllLanes, lane < 31);
  of_lane[8] = __popc(static_cast<unsigned>(of_lane[6])) + __clz(lane) + __ffs(lane);
}

__global__ void counts(unsigned* out) {
  atomicAdd(&out[0], 1u);
  atomicMax(&out[1], threadIdx.x);
  atomicMin(&out[2], threadIdx.x);
  atomicOr(&out[3], 1u << (threadIdx.x % 32));
}

// Reverses 64 numbers through dynamic shared memory; `beyond` numbers more than there are.
__global__ void reversed(float* x, int beyond) {
  FASTAPD_DYNAMIC_SHARED(float, all);
  all[threadIdx.x + beyond] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = all[blockDim.x - 1 - threadIdx.x + beyond];
}

__global__ void shared_is_fresh(float* out) {
  FASTAPD_SHARED(float, mine, 64);
  out[blockIdx.x * blockDim.x + threadIdx.x] = mine[threadIdx.x];
  mine[threadIdx.x] = 1;
}

__global__ void half_of_the_block_at_a_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void some_lanes_leave() {
  if (threadIdx.x % 2 == 0) __syncwarp();
}

__global__ void two_collectives_at_once(int* out) {
  if (threadIdx.x % 2 == 0)
    out[threadIdx.x] = static_cast<int>(__ballot_sync(kAllLanes, 1));
  else
    out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);
}

__global__ void part_of_a_warp(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1, 0);
}

__global__ void too_much_shared_memory() {
  FASTAPD_SHARED(double, all, 32768);
  all[threadIdx.x] = 0;
}

// Lane 0 writes what its warp reads: `ordered` says whether somebody waits in between.
__global__ void handed_over(int* out, bool ordered) {
  FASTAPD_SHARED(int, one, 1);
  if (threadIdx.x == 0) one[0] = 3;
  if (ordered)
    __syncwarp();
  else
    __shfl_sync(kAllLanes, 1, 0);  // which orders nothing
  out[threadIdx.x] = one[0];
}

// Every block writes out[0] behind a barrier, which says nothing to other blocks; or, apart, one number each.
__global__ void from_all_blocks(int* out, bool apart) {
  __syncthreads();
  if (threadIdx.x == 0) out[apart ? blockIdx.x : 0] = 1;
}

// Twice through the same shared number: without the second barrier a fast thread overwrites what a slow one still
// reads.
__global__ void used_twice(int* out, bool ordered) {
  FASTAPD_SHARED(int, one, 1);
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x == 0) one[0] = i;
    __syncthreads();
    out[threadIdx.x] = one[0];
    if (ordered) __syncthreads();
  }
}

thread_local std::string said;

template <class... P, class... A>
const char* start(void (*kernel)(P...), int blocks, int threads, size_t shared, A... arguments) {
  try {
    fastapd::cuda::launch("misuse", kernel, blocks, threads, shared, nullptr, arguments...);
    return "";
  } catch (const std::runtime_error& error) {
    said = error.what();
    return said.c_str();
  }
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default"))) const char*

// Starts a kernel by name; the error, or an empty text. x: what it reads or writes; flag: its last argument.
EXPORTED run_misuse(const char* name, void* x, void* out, int flag) {
  const std::string kernel = name;
  int* ints = static_cast<int*>(out);
  float* floats = static_cast<float*>(out);
  if (kernel == "sums_of_blocks") return start(sums_of_blocks, 3, 64, 0, static_cast<const float*>(x), floats);
  if (kernel == "collectives") return start(collectives, 1, 32, 0, ints);
  if (kernel == "counts") return start(counts, 3, 64, 0, static_cast<unsigned*>(out));
  if (kernel == "reversed") return start(reversed, 1, 64, 64 * sizeof(float), floats, flag);
  if (kernel == "shared_is_fresh") return start(shared_is_fresh, 2, 64, 0, floats);
  if (kernel == "half_of_the_block_at_a_barrier") return start(half_of_the_block_at_a_barrier, 1, 64, 0);
  if (kernel == "some_lanes_leave") return start(some_lanes_leave, 2, 32, 0);
  if (kernel == "two_collectives_at_once") return start(two_collectives_at_once, 1, 32, 0, ints);
  if (kernel == "part_of_a_warp") return start(part_of_a_warp, 1, 32, 0, ints);
  if (kernel == "too_much_shared_memory") return start(too_much_shared_memory, 1, 32, 0);
  if (kernel == "half_a_warp") return start(some_lanes_leave, 1, 16, 0);
  if (kernel == "handed_over") return start(handed_over, 1, 32, 0, ints, flag != 0);
  if (kernel == "from_all_blocks") return start(from_all_blocks, 2, 64, 0, ints, flag != 0);
  if (kernel == "used_twice") return start(used_twice, 1, 64, 0, ints, flag != 0);
  return "no such kernel";
}
