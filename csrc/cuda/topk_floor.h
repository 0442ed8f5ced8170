// The floor that batch_topk takes from a sample, and the survivors of a stretch of scores: those that come before it.
#pragma once
#include "cuda/topk.h"

namespace fastapd::cuda {

// Scores come before it if their key is above the floor's, or equal and their flat index at most the floor's.
template <class K>
struct Floor {
  K key;
  unsigned flat;

  __device__ bool keeps(K other, unsigned at) const { return other > key || (other == key && at <= flat); }
};

// The place of sample i in its stretch is as good as random: at equal distances all might be one component's.
__device__ inline unsigned place_of_sample(unsigned i, unsigned n_samples, unsigned n_scores) {
  const unsigned begin = static_cast<unsigned>(uint64_t{i} * n_scores / n_samples),
                 end = static_cast<unsigned>((uint64_t{i} + 1) * n_scores / n_samples);
  unsigned noise = i * 0x45d9f3bu;
  noise = (noise ^ noise >> 16) * 0x45d9f3bu;
  noise ^= noise >> 16;
  return begin + static_cast<unsigned>(uint64_t{noise} * (end - begin) >> 32);
}

// What is expected of the sample: how many of it are selected, and how many come before the floor, by six standard
// deviations more.
struct Ranks {
  float expected;
  unsigned floor;
};

__device__ inline Ranks ranks_of(unsigned wanted, unsigned n_samples, unsigned n_scores) {
  const float expected = static_cast<float>(wanted) * (static_cast<float>(n_samples) / static_cast<float>(n_scores));
  return {expected, static_cast<unsigned>(expected + 6 * sqrtf(expected) + 4)};
}

// The sample's keys, in shared memory, and its floor; no floor if all of the sample came before it.
template <class T>
__device__ inline Floor<Key<T>> floor_of(BlockTeam& team, const T* scores, unsigned n_scores, unsigned n_samples,
                                         unsigned rank, Key<T>* keys) {
  using K = Key<T>;
  for (unsigned i = team.rank(); i < n_samples; i += team.size())
    keys[i] = key_of(scores[place_of_sample(i, n_samples, n_scores)]);
  __syncthreads();
  Floor<K> floor{0, ~0u};
  if (rank >= n_samples) return floor;
  const auto get = [&](unsigned i) { return keys[i]; };
  floor.key = threshold_of<K>(team, n_samples, get, rank);
  Three n{};
  for (unsigned i = team.rank(); i < n_samples; i += team.size()) {
    n.a += keys[i] > floor.key;
    n.b += keys[i] == floor.key;
  }
  n = team.sums(n);
  if (n.a + n.b > rank) {  // of equal scores the first
    const auto first = [&](unsigned i) { return keys[i] == floor.key ? ~i : 0; };
    const unsigned last = ~threshold_of<unsigned>(team, n_samples, first, rank - n.a);
    floor.flat = place_of_sample(last < n_samples ? last : n_samples - 1, n_samples, n_scores);
  }
  return floor;
}

// Survivors of scores [begin, end) in flat order, by a warp: keep(place, key, flat), place from 0 on. Returns how many.
template <class T, class Keep>
__device__ inline unsigned keep_survivors(const T* scores, unsigned begin, unsigned end, Floor<Key<T>> floor,
                                          const Keep& keep) {
  constexpr unsigned kLoads = 8;  // that are on their way at once
  const unsigned lane = threadIdx.x % kWarp;
  const Acc<T> under = value_of<T>(floor.key == 0 ? key_of(narrowed<T>(-INFINITY)) : floor.key);
  unsigned n = 0;
  for (unsigned at = begin; at < end; at += kLoads * kWarp) {
    T x[kLoads];
#pragma unroll
    for (unsigned j = 0; j < kLoads; ++j) {
      const unsigned i = at + j * kWarp + lane;
      x[j] = i < end ? scores[i] : T{};
    }
#pragma unroll
    for (unsigned j = 0; j < kLoads; ++j) {
      const unsigned i = at + j * kWarp + lane;
      // NaN is not below; what is is no survivor, and that is nearly all
      const bool maybe = i < end && !(widened(x[j]) < under);
      const Key<T> key = key_of(x[j]);
      const bool kept = maybe && floor.keeps(key, i);
      const unsigned lanes = __ballot_sync(kAllLanes, kept);
      if (kept) keep(n + static_cast<unsigned>(__popc(lanes & lanes_below())), key, i);
      n += static_cast<unsigned>(__popc(lanes));
    }
  }
  return n;
}

// Zeroed memory, then the rest; of no memory, how much is needed of both.
template <class Work>
struct Carved {
  Work work;
  int64_t zeroed, used;

  template <class Carve>
  Carved(void* memory, const Carve& carve) : work() {
    Carver nothing(nullptr), none(nullptr);
    carve(nothing, none);
    zeroed = nothing.used();
    Carver first(memory), second(memory == nullptr ? nullptr : static_cast<char*>(memory) + zeroed);
    work = carve(first, second);
    used = zeroed + second.used();
  }
};

// Many survivors, in topk_many.cu.
template <class T>
void batch_topk_many(const char* op, Stream stream, const T* scores, const int64_t* counts, T* thresholds,
                     const TopkLists& lists, void* workspace, const TopkSizes& sizes, const TopkPlan& plan);
template <class T>
int64_t topk_many_workspace(const TopkSizes& sizes, const TopkPlan& plan);

}  // namespace fastapd::cuda
