// The largest scores of each sample, exactly, as a grouped selection.
//
//     small    a block owns an instance: its warps take its samples in turn, and it writes all lists; one launch
//     rows     a warp owns a sample of up to kTopkRow scores, its keys in shared memory, or a block a longer one, read
//              again in each round, from a cache; it writes the sample's pairs, k of them, at a place that is known
//     group    two launches turn bits into the component-major list (topk_group.cu)
//
// Keys are bisected and counted, in integers, so bits repeat. Samples of a hundred thousand scores are read some ten
// times, from L2 then: a floor as in batch_topk.cu would be worth it.
#include "cuda/topk.h"

namespace fastapd::cuda {
namespace {

constexpr int kRowThreads = 256, kMostSmallThreads = 1024;

template <class T, class Take>
__device__ inline void take_row(WarpTeam& team, const T* row, unsigned n, unsigned k, Key<T>* keys, const Take& take) {
  for (unsigned i = team.rank(); i < n; i += kWarp) keys[i] = key_of(row[i]);
  team.meet();
  const auto get = [&](unsigned i) { return keys[i]; };
  take_in_order<Key<T>>(team, n, get, limit_of<Key<T>>(team, n, get, k), take);
  team.meet();  // before these keys are others
}

// Of shared memory: [warps, C] keys, [K] pairs, [words] bits and how many come before.
template <class T>
__global__ void __launch_bounds__(kMostSmallThreads)
    small_samples_kernel(const T* all_scores, TopkLists lists, TopkSizes s, unsigned k) {
  FASTAPD_SHARED(uint64_t, exchange, kExchange);
  FASTAPD_DYNAMIC_SHARED(Key<T>, keys);
  BlockTeam block(exchange);
  WarpTeam team;
  const unsigned n_components = static_cast<unsigned>(s.n_components), n_warps = blockDim.x / kWarp,
                 warp = threadIdx.x / kWarp;
  const T* const scores = all_scores + blockIdx.x * (s.batch * s.n_components);
  unsigned* const chosen = reinterpret_cast<unsigned*>(keys + n_warps * n_components);
  unsigned* const words = chosen + s.n_pairs;
  for (unsigned b = warp; b < s.batch; b += n_warps)
    take_row(team, scores + int64_t{b} * n_components, n_components, k, keys + warp * n_components,
             [&](unsigned c, unsigned place) { chosen[b * k + place] = b * n_components + c; });
  group_in_block(block, lists.of(blockIdx.x, s), s, chosen, static_cast<unsigned>(s.n_pairs), words,
                 words + topk_words(s));
}

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    rows_kernel(const T* scores, TopkLists lists, TopkGroup group, TopkSizes s, unsigned k) {
  FASTAPD_DYNAMIC_SHARED(Key<T>, keys);  // [warps, C]
  WarpTeam team;
  const int64_t row = warp_of_grid();
  if (row >= s.n_instances * s.batch) return;
  const int64_t instance = row / s.batch;
  const unsigned n = static_cast<unsigned>(s.n_components), b = static_cast<unsigned>(row % s.batch);
  const TopkLists own = lists.of(instance, s);
  take_row(team, scores + row * n, n, k, keys + threadIdx.x / kWarp * n, [&](unsigned c, unsigned place) {
    put_pair(own, group, s, instance, b * k + place, b * n + c);
  });
}

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    long_rows_kernel(const T* scores, TopkLists lists, TopkGroup group, TopkSizes s, unsigned k) {
  FASTAPD_SHARED(uint64_t, exchange, kExchange);
  BlockTeam team(exchange);
  const int64_t row = blockIdx.x, instance = row / s.batch;
  const unsigned n = static_cast<unsigned>(s.n_components), b = static_cast<unsigned>(row % s.batch);
  const TopkLists own = lists.of(instance, s);
  const auto get = [&](unsigned i) { return key_of(scores[row * n + i]); };
  const Limit<Key<T>> limit = limit_of<Key<T>>(team, n, get, k);
  take_in_order<Key<T>>(team, n, get, limit, [&](unsigned c, unsigned place) {
    put_pair(own, group, s, instance, b * k + place, b * n + c);
  });
}

int64_t zeroed_bytes(const TopkSizes& s) {
  Carver zeroed(nullptr), rest(nullptr);
  carve_group(zeroed, rest, s);
  return zeroed.used();
}

}  // namespace

int64_t sample_topk_workspace(TopkSizes s, int64_t small) {
  if (small) return 0;
  Carver zeroed(nullptr), rest(nullptr);
  carve_group(zeroed, rest, s);
  return zeroed.used() + rest.used();
}

template <class T>
void sample_topk(Stream stream, const T* scores, int* sample, int64_t* offsets, int* component, int64_t* sample_offsets,
                 int* position, void* workspace, TopkSizes s, int64_t k, int64_t small, int64_t threads) {
  const char* op = "sample_topk";
  const TopkLists lists{sample, offsets, component, sample_offsets, position};
  if (small) {
    const size_t bytes = sizeof(Key<T>) * (threads / kWarp) * s.n_components +
                         sizeof(unsigned) * (s.n_pairs + 2 * topk_words(s));
    launch(op, small_samples_kernel<T>, s.n_instances, static_cast<int>(threads), bytes, stream, scores, lists, s, k);
    return;
  }
  const int64_t zeroed = zeroed_bytes(s);
  check(cudaMemsetAsync(workspace, 0, static_cast<size_t>(zeroed), static_cast<cudaStream_t>(stream)), op);
  Carver first(workspace), second(static_cast<char*>(workspace) + zeroed);
  const TopkGroup group = carve_group(first, second, s);
  const int64_t n_rows = s.n_instances * s.batch, n_warps = kRowThreads / kWarp;
  if (s.n_components <= kTopkRow)
    launch(op, rows_kernel<T>, ceil_div(n_rows, n_warps), kRowThreads, sizeof(Key<T>) * n_warps * s.n_components,
           stream, scores, lists, group, s, k);
  else
    launch(op, long_rows_kernel<T>, n_rows, kRowThreads, 0, stream, scores, lists, group, s, k);
  group_topk(op, stream, nullptr, lists, group, s);
}

#define FASTAPD_INSTANTIATE(T)                                                                                    \
  template void sample_topk<T>(Stream, const T*, int*, int64_t*, int*, int64_t*, int*, void*, TopkSizes, int64_t, \
                               int64_t, int64_t);
FASTAPD_INSTANTIATE(float)
FASTAPD_INSTANTIATE(double)
FASTAPD_INSTANTIATE(Half)
FASTAPD_INSTANTIATE(BFloat16)

}  // namespace fastapd::cuda
