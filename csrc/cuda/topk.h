// What top-k kernels share: scores as integers in the contract's order, the threshold among them, and lists by
// component.
//
// A key is unsigned, of 32 bits, of 64 for double; NaN, however its bits are, is the highest and zeros of both signs
// are one; 0 is below the key of every score. A team is a block or a warp: all of its threads call what takes one.
// Counts are integers, so nothing depends on the order of threads.
#pragma once
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/reduce.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace fastapd::cuda {

// ---------------------------------------------------------------------------------------------------------------- keys

template <class T>
using Key = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;

template <class K>
constexpr K kHighest = static_cast<K>(~K{0});  // the key of NaN

template <class T>
__device__ inline Key<T> key_of(T score) {
  using K = Key<T>;
  constexpr K kSign = K{1} << (8 * sizeof(K) - 1);
  const Acc<T> x = widened(score);
  K bits;
  if constexpr (std::is_same_v<T, double>)
    bits = static_cast<K>(__double_as_longlong(x));
  else
    bits = __float_as_uint(x);
  if (x == 0) bits = 0;
  const K key = bits & kSign ? static_cast<K>(~bits) : bits | kSign;
  return x != x ? kHighest<K> : key;
}

template <class T>
__device__ inline Acc<T> value_of(Key<T> key) {
  using K = Key<T>;
  constexpr K kSign = K{1} << (8 * sizeof(K) - 1);
  const K bits = key == kHighest<K> ? key & ~kSign : key & kSign ? key ^ kSign : static_cast<K>(~key);
  if constexpr (std::is_same_v<T, double>)
    return __longlong_as_double(static_cast<long long>(bits));
  else
    return __uint_as_float(bits);
}

// --------------------------------------------------------------------------------------------------------------- teams

struct Three {
  unsigned a, b, c;
};

__device__ inline unsigned lanes_below() {
  return (1u << threadIdx.x % kWarp) - 1;
}

// How many of a warp's lanes before this one gave x, summed up, and of all.
__device__ inline unsigned warp_exclusive(unsigned x, unsigned* total) {
  const unsigned lane = threadIdx.x % kWarp;
  unsigned upto = x;
  for (unsigned by = 1; by < kWarp; by *= 2) {
    const unsigned other = __shfl_up_sync(kAllLanes, upto, by);
    if (lane >= by) upto += other;
  }
  *total = __shfl_sync(kAllLanes, upto, kWarp - 1);
  return upto - x;
}

struct WarpTeam {
  __device__ unsigned rank() const { return threadIdx.x % kWarp; }
  __device__ unsigned size() const { return kWarp; }
  __device__ void meet() const { __syncwarp(); }
  __device__ Three sums(Three x) {
    return {__reduce_add_sync(kAllLanes, x.a), __reduce_add_sync(kAllLanes, x.b), __reduce_add_sync(kAllLanes, x.c)};
  }
  template <class K>
  __device__ K most(K x) {
    return warp_max(x);
  }
  __device__ unsigned exclusive(unsigned x, unsigned* total) { return warp_exclusive(x, total); }
};

// Numbers of warps that a BlockTeam has for two exchanges: one may still be read while the next is written.
constexpr unsigned kExchange = 2 * 3 * kWarp;

class BlockTeam {
 public:
  __device__ explicit BlockTeam(uint64_t* exchange) : memory_(exchange) {}
  __device__ unsigned rank() const { return threadIdx.x; }
  __device__ unsigned size() const { return blockDim.x; }
  __device__ void meet() const { __syncthreads(); }
  __device__ Three sums(Three x) {
    uint64_t* of_warps = turn();
    x = {__reduce_add_sync(kAllLanes, x.a), __reduce_add_sync(kAllLanes, x.b), __reduce_add_sync(kAllLanes, x.c)};
    if (lane() == 0) {
      of_warps[warp()] = x.a;
      of_warps[kWarp + warp()] = x.b;
      of_warps[2 * kWarp + warp()] = x.c;
    }
    __syncthreads();
    return {sum_of_warps(of_warps), sum_of_warps(of_warps + kWarp), sum_of_warps(of_warps + 2 * kWarp)};
  }
  template <class K>
  __device__ K most(K x) {
    uint64_t* of_warps = turn();
    x = warp_max(x);
    if (lane() == 0) of_warps[warp()] = x;
    __syncthreads();
    return warp_max(lane() < n_warps() ? static_cast<K>(of_warps[lane()]) : K{0});
  }
  __device__ unsigned exclusive(unsigned x, unsigned* total) {
    uint64_t* of_warps = turn();
    unsigned in_warp;
    const unsigned before = warp_exclusive(x, &in_warp);
    if (lane() == 0) of_warps[warp()] = in_warp;
    __syncthreads();
    const unsigned warps_before =
        warp_exclusive(lane() < n_warps() ? static_cast<unsigned>(of_warps[lane()]) : 0, total);
    return before + __shfl_sync(kAllLanes, warps_before, static_cast<int>(warp()));
  }

 private:
  __device__ unsigned lane() const { return threadIdx.x % kWarp; }
  __device__ unsigned warp() const { return threadIdx.x / kWarp; }
  __device__ unsigned n_warps() const { return blockDim.x / kWarp; }
  __device__ unsigned sum_of_warps(const uint64_t* of_warps) const {
    return __reduce_add_sync(kAllLanes, lane() < n_warps() ? static_cast<unsigned>(of_warps[lane()]) : 0);
  }
  __device__ uint64_t* turn() {
    second_ = !second_;
    return memory_ + (second_ ? kExchange / 2 : 0);
  }
  uint64_t* memory_;
  bool second_ = false;
};

template <class Team>
__device__ inline unsigned sum_of(Team& team, unsigned x) {
  return team.sums({x, 0, 0}).a;
}

// ----------------------------------------------------------------------------------------------------------- threshold

// A key that `need` of n keys reach or, where keys tie, the highest that at least so many reach. It need not be one of
// them. Two bits a round: barriers cost more than comparisons.
template <class K, class Team, class Get>
__device__ inline K threshold_of(Team& team, unsigned n, const Get& get, unsigned need) {
  K low = kHighest<K>, high = 0;
  for (unsigned i = team.rank(); i < n; i += team.size()) {
    const K key = get(i);
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  low = static_cast<K>(~team.most(static_cast<K>(~low)));
  high = team.most(high);
  if (need >= n) return low;
  while (low < high) {
    const K width = high - low, quarter = width / 4 + (width % 4 != 0);
    const K first = low + quarter, second = 2 * quarter <= width ? low + 2 * quarter : high,
            third = 3 * quarter <= width ? low + 3 * quarter : high;
    Three reach{};
#pragma unroll 4
    for (unsigned i = team.rank(); i < n; i += team.size()) {
      const K key = get(i);
      reach.a += key >= first;
      reach.b += key >= second;
      reach.c += key >= third;
    }
    reach = team.sums(reach);
    if (reach.a == need) return first;
    if (reach.b == need) return second;
    if (reach.c == need) return third;
    if (reach.c > need) {
      low = third;
    } else if (reach.b > need) {
      low = second;
      high = third - 1;
    } else if (reach.a > need) {
      low = first;
      high = second - 1;
    } else {
      high = first - 1;
    }
  }
  return low;
}

// The `wanted` largest of n keys: those above the threshold, and of those equal to it the first `quota`.
template <class K>
struct Limit {
  K threshold;
  unsigned quota;
};

template <class K, class Team, class Get>
__device__ inline Limit<K> limit_of(Team& team, unsigned n, const Get& get, unsigned wanted) {
  if (wanted == 0) return {kHighest<K>, 0};
  const K threshold = threshold_of<K>(team, n, get, wanted);
  unsigned above = 0;
  for (unsigned i = team.rank(); i < n; i += team.size()) above += get(i) > threshold;
  return {threshold, wanted - sum_of(team, above)};
}

// The smallest of n keys that reaches a threshold.
template <class K, class Team, class Get>
__device__ inline K least_of(Team& team, unsigned n, const Get& get, K threshold) {
  K least = kHighest<K>;
  for (unsigned i = team.rank(); i < n; i += team.size()) {
    const K key = get(i);
    least = key >= threshold && key < least ? key : least;
  }
  return static_cast<K>(~team.most(static_cast<K>(~least)));
}

// take(i, place) for each selected of n keys, place counting them in order. Each thread has a stretch of the keys, of
// an odd length: in shared memory the threads of a warp then read from different banks.
template <class K, class Team, class Get, class Take>
__device__ inline void take_in_order(Team& team, unsigned n, const Get& get, Limit<K> limit, const Take& take) {
  const unsigned stretch = ((n + team.size() - 1) / team.size()) | 1;
  const uint64_t at = uint64_t{team.rank()} * stretch;
  const unsigned begin = at < n ? static_cast<unsigned>(at) : n, end = n - begin < stretch ? n : begin + stretch;
  unsigned above = 0, ties = 0, total;
  for (unsigned i = begin; i < end; ++i) {
    const K key = get(i);
    above += key > limit.threshold;
    ties += key == limit.threshold;
  }
  above = team.exclusive(above, &total);
  ties = team.exclusive(ties, &total);
  for (unsigned i = begin; i < end; ++i) {
    const K key = get(i);
    const bool tie = key == limit.threshold;
    if (key > limit.threshold || (tie && ties < limit.quota))
      take(i, above + (ties < limit.quota ? ties : limit.quota));
    above += key > limit.threshold;
    ties += tie;
  }
}

// ------------------------------------------------------------------------------------------------------------ grouping

// An instance's lists.
struct TopkLists {
  int* sample;
  int64_t* offsets;
  int* component;
  int64_t* sample_offsets;
  int* position;

  __device__ TopkLists of(int64_t instance, const TopkSizes& s) const {
    return {sample + instance * s.n_pairs, offsets + instance * (s.n_components + 1), component + instance * s.n_pairs,
            sample_offsets + instance * (s.batch + 1), position + instance * s.n_pairs};
  }
};

// An instance's K. Never more than the lists have room for, whatever the counts hold.
__device__ inline unsigned wanted_of(const int64_t* counts, int64_t instance, const TopkSizes& s) {
  const int64_t wanted = counts == nullptr ? s.n_pairs : counts[instance];
  return static_cast<unsigned>(wanted < 0 ? 0 : wanted < s.n_pairs ? wanted : s.n_pairs);
}

// A bit for each score, the samples of a component next to each other, 32 to a word: pairs in the component-major order
// are the bits that are set, and the bits before one are its place.
FASTAPD_BOTH int64_t words_of_component(const TopkSizes& s) {
  return (s.batch + 31) / 32;
}
FASTAPD_BOTH int64_t topk_words(const TopkSizes& s) {
  return s.n_components * words_of_component(s);
}

// The first of `chosen` [n], ascending, that is not below a value.
template <class Get>
__device__ inline unsigned first_not_below(unsigned n, const Get& get, unsigned value) {
  unsigned low = 0, high = n;
  while (low < high) {
    const unsigned middle = low + (high - low) / 2;
    if (get(middle) < value)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Fills an instance's lists from the flat indices of its pairs, ascending, in shared memory, where `words` and `before`
// have room for a number of each word. What is `chosen` may have been written just before: a barrier comes first.
__device__ inline void group_in_block(BlockTeam& team, const TopkLists& lists, const TopkSizes& s,
                                      const unsigned* chosen, unsigned wanted, unsigned* words, unsigned* before) {
  const unsigned n_components = static_cast<unsigned>(s.n_components), batch = static_cast<unsigned>(s.batch),
                 n_pairs = static_cast<unsigned>(s.n_pairs), row_words = static_cast<unsigned>(words_of_component(s)),
                 n_words = static_cast<unsigned>(topk_words(s)), size = team.size(), rank = team.rank();
  for (unsigned i = rank; i < n_words; i += size) words[i] = 0;
  __syncthreads();
  for (unsigned i = rank; i < wanted; i += size) {
    const unsigned row = chosen[i] / n_components, c = chosen[i] % n_components;
    lists.component[i] = static_cast<int>(c);
    atomicOr(&words[c * row_words + row / 32], 1u << row % 32);
  }
  __syncthreads();
  const unsigned stretch = ((n_words + size - 1) / size) | 1;
  const unsigned begin = rank * stretch < n_words ? rank * stretch : n_words,
                 end = n_words - begin < stretch ? n_words : begin + stretch;
  unsigned n = 0, total;
  for (unsigned i = begin; i < end; ++i) n += static_cast<unsigned>(__popc(words[i]));
  n = team.exclusive(n, &total);
  for (unsigned i = begin; i < end; ++i) {
    before[i] = n;
    n += static_cast<unsigned>(__popc(words[i]));
  }
  __syncthreads();
  for (unsigned i = rank; i < wanted; i += size) {
    const unsigned row = chosen[i] / n_components, word = chosen[i] % n_components * row_words + row / 32;
    const unsigned place = before[word] + static_cast<unsigned>(__popc(words[word] & ((1u << row % 32) - 1)));
    lists.position[i] = static_cast<int>(place);
    lists.sample[place] = static_cast<int>(row);
  }
  for (unsigned i = wanted + rank; i < n_pairs; i += size) lists.component[i] = lists.position[i] = lists.sample[i] = 0;
  for (unsigned c = rank; c <= n_components; c += size)
    lists.offsets[c] = c < n_components ? before[c * row_words] : wanted;
  for (unsigned b = rank; b <= batch; b += size)
    lists.sample_offsets[b] =
        b < batch ? first_not_below(wanted, [&](unsigned i) { return chosen[i]; }, b * n_components) : wanted;
}

// Whether this block is the last of an instance's n_blocks to come here; `done` was 0 at first. What others wrote
// before they came is then there to read.
__device__ inline bool is_last_block(unsigned* done, unsigned n_blocks) {
  FASTAPD_SHARED(unsigned, came, 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *came = atomicAdd(done, 1u);
  __syncthreads();
  __threadfence();
  return *came == n_blocks - 1;
}

// From here on for lists that are grouped by several blocks, in topk_group.cu: bits are set by whoever writes the
// sample-major list, which has the component in its place in the list and the sample in `row`.
struct TopkGroup {
  int* row;          // [I, K]
  unsigned* words;   // [I, words], zeroed before bits are set
  unsigned* before;  // [I, words]: bits before, in the tile
  unsigned* tiles;   // [I, tiles]: bits before
  unsigned* done;    // [I], zeroed
};

__device__ inline void put_pair(const TopkLists& lists, const TopkGroup& group, const TopkSizes& s, int64_t instance,
                                unsigned place, unsigned flat) {
  const unsigned n_components = static_cast<unsigned>(s.n_components), row = flat / n_components,
                 c = flat % n_components;
  lists.component[place] = static_cast<int>(c);
  group.row[instance * s.n_pairs + place] = static_cast<int>(row);
  const int64_t word = c * words_of_component(s) + row / 32;
  atomicOr(&group.words[instance * topk_words(s) + word], 1u << row % 32);
}

int64_t topk_tiles(const TopkSizes& sizes);
void group_topk(const char* op, Stream stream, const int64_t* counts, const TopkLists& lists, const TopkGroup& group,
                const TopkSizes& sizes);

// ----------------------------------------------------------------------------------------------------------- workspace

// Gives out one piece of memory after another; of no memory, says how much is needed. For the address sanitizer of
// tests pieces end where they end.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t n) {
    char* at = memory_ == nullptr ? nullptr : memory_ + used_;
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    used_ += (bytes + 15) / 16 * 16;
#ifdef __SANITIZE_ADDRESS__
    used_ += 64;
    if (at != nullptr) __asan_poison_memory_region(at + bytes, static_cast<size_t>(memory_ + used_ - at - bytes));
#endif
    return reinterpret_cast<T*>(at);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

inline TopkGroup carve_group(Carver& zeroed, Carver& rest, const TopkSizes& s) {
  TopkGroup group{};
  group.words = zeroed.take<unsigned>(s.n_instances * topk_words(s));
  group.done = zeroed.take<unsigned>(s.n_instances);
  group.row = rest.take<int>(s.n_instances * s.n_pairs);
  group.before = rest.take<unsigned>(s.n_instances * topk_words(s));
  group.tiles = rest.take<unsigned>(s.n_instances * topk_tiles(s));
  return group;
}

}  // namespace fastapd::cuda
