// batch_topk of many survivors; what they are, and the floor, is in batch_topk.cu.
//
//     collect   a warp owns a part of an instance and keeps its survivors in a segment; they are counted in bins
//     narrow    a warp puts those of its survivors that are in the threshold's bin in the instance's list; the last
//               block bisects that, if its keys are not all equal, and knows then how many pairs each part has
//     emit      a warp writes its part's pairs, the sample-major list, and a bit for each
//     group     two launches turn bits into the component-major list (topk_group.cu)
//
// All counts are integers, atomics too, and the list is only counted. A segment that overflows, as that of a part with
// all the large scores, has its part read again. Where K is above some percent of the scores there are no segments, and
// scores are read three times.
#include "cuda/topk_floor.h"

namespace fastapd::cuda {
namespace {

constexpr int kThreads = 1024;  // as many as can be: every block takes the sample
constexpr unsigned kBins = kThreads;

// What one kernel of an instance leaves for the next.
template <class K>
struct State {
  Floor<K> floor;
  K lower, upper;  // keys that the threshold is expected between: the bins' range
  Limit<K> limit;
  unsigned sound;  // whether survivors are as they should be; if not, scores are read again
};

template <class T>
struct Many {
  unsigned* bins;       // [I, bins], zeroed
  unsigned* n_listed;   // [I], zeroed
  unsigned* done;       // [I], zeroed
  Key<T>* ends;         // [I, 2], zeroed: the complement of the least key in the threshold's bin, and the largest
  TopkGroup group;
  State<Key<T>>* state;  // [I]
  unsigned* survivors;   // [I, parts]
  unsigned* above;       // [I, parts]: above the threshold's bin; then: selected for sure, in all parts before
  unsigned* ties;        // [I, parts]: in it; then: equal to the threshold, in all parts before
  Key<T>* keys;          // [I, parts, room]
  unsigned* flats;       // [I, parts, room]
  Key<T>* list_keys;     // [I, listed]
  unsigned* list_flats;  // [I, listed]
};

template <class T>
Many<T> carve_many(Carver& zeroed, Carver& rest, const TopkSizes& s, const TopkPlan& plan) {
  const int64_t n_parts = s.n_instances * plan.n_parts;
  Many<T> many{};
  many.bins = zeroed.take<unsigned>(s.n_instances * kBins);
  many.n_listed = zeroed.take<unsigned>(s.n_instances);
  many.done = zeroed.take<unsigned>(s.n_instances);
  many.ends = zeroed.take<Key<T>>(2 * s.n_instances);
  many.group = carve_group(zeroed, rest, s);
  many.state = rest.take<State<Key<T>>>(s.n_instances);
  many.survivors = rest.take<unsigned>(n_parts);
  many.above = rest.take<unsigned>(n_parts);
  many.ties = rest.take<unsigned>(n_parts);
  many.keys = rest.take<Key<T>>(n_parts * plan.room);
  many.flats = rest.take<unsigned>(n_parts * plan.room);
  many.list_keys = rest.take<Key<T>>(s.n_instances * plan.listed);
  many.list_flats = rest.take<unsigned>(s.n_instances * plan.listed);
  return many;
}

__device__ inline void raise(uint32_t* at, uint32_t key) {
  atomicMax(at, key);
}
__device__ inline void raise(uint64_t* at, uint64_t key) {
  atomicMax(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(key));
}

// 0 to kBins - 1, not falling in the key. The last is of what is above the range.
template <class K>
__device__ inline unsigned bin_of(K key, K lower, K upper) {
  constexpr int kBits = 8 * sizeof(K);
  const K width = upper - lower;
  const int used = kBits - (kBits == 64 ? __clzll(static_cast<long long>(width)) : __clz(static_cast<int>(width)));
  const int shift = used > 9 ? used - 9 : 0;  // width >> shift is below 512, which leaves room for what is beyond
  if (key > upper) return kBins - 1;
  return key < lower ? 0 : static_cast<unsigned>((key - lower) >> shift) + 1;
}

// The part of an instance that a warp owns.
struct Part {
  int64_t instance, of_all;
  unsigned part, begin, end;

  __device__ Part(const TopkSizes& s, const TopkPlan& plan) {
    const int64_t warp = warp_of_grid(), n_scores = s.batch * s.n_components;
    instance = warp / plan.n_parts;
    part = static_cast<unsigned>(warp % plan.n_parts);
    of_all = warp;
    const int64_t at = part * plan.part_scores;
    begin = static_cast<unsigned>(at < n_scores ? at : n_scores);
    end = static_cast<unsigned>(at + plan.part_scores < n_scores ? at + plan.part_scores : n_scores);
    end = end < begin ? begin : end;
  }
};

// visit(key, flat, there) by all lanes of a warp for all survivors of its part, from its segment if they fit into it;
// if survivors are not sound, for all scores.
template <class T, class Visit>
__device__ inline void visit_part(const T* scores, const Many<T>& w, const TopkPlan& plan, const Part& part,
                                  const State<Key<T>>& state, bool sound, const Visit& visit) {
  using K = Key<T>;
  const unsigned lane = threadIdx.x % kWarp, n = sound ? w.survivors[part.of_all] : 0;
  if (sound && n <= plan.room) {
    const K* keys = w.keys + part.of_all * plan.room;
    const unsigned* flats = w.flats + part.of_all * plan.room;
    for (unsigned at = 0; at < n; at += kWarp) {
      const bool there = at + lane < n;
      visit(there ? keys[at + lane] : K{0}, there ? flats[at + lane] : 0, there);
    }
    return;
  }
#pragma unroll 4
  for (unsigned at = part.begin; at < part.end; at += kWarp) {
    const unsigned i = at + lane;
    const K key = i < part.end ? key_of(scores[i]) : K{0};
    visit(key, i, i < part.end && (!sound || state.floor.keeps(key, i)));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    collect_kernel(const T* all_scores, const int64_t* counts, Many<T> w, TopkSizes s, TopkPlan plan) {
  using K = Key<T>;
  FASTAPD_SHARED(uint64_t, exchange, kExchange);
  FASTAPD_SHARED(unsigned, bins, kBins);
  FASTAPD_DYNAMIC_SHARED(K, sample);  // [samples]
  BlockTeam team(exchange);
  const Part part(s, plan);
  const unsigned n_scores = static_cast<unsigned>(s.batch * s.n_components),
                 n_samples = static_cast<unsigned>(plan.samples), rank = team.rank();
  const T* const scores = all_scores + part.instance * n_scores;
  for (unsigned i = rank; i < kBins; i += kThreads) bins[i] = 0;
  const Ranks ranks = ranks_of(wanted_of(counts, part.instance, s), n_samples, n_scores);
  const Floor<K> floor = floor_of(team, scores, n_scores, n_samples, ranks.floor, sample);
  const auto get = [&](unsigned i) { return sample[i]; };
  const float margin = 6 * sqrtf(ranks.expected) + 4;
  const unsigned most = ranks.expected > margin + 1 ? static_cast<unsigned>(ranks.expected - margin) : 1;
  const K upper = threshold_of<K>(team, n_samples, get, most);
  const K lower = floor.key != 0 ? floor.key : threshold_of<K>(team, n_samples, get, n_samples);
  if (part.part == 0 && rank == 0) w.state[part.instance] = {floor, lower, upper, {0, 0}, 0};
  const unsigned room = static_cast<unsigned>(plan.room);
  K* const keys = w.keys + part.of_all * room;
  unsigned* const flats = w.flats + part.of_all * room;
  const unsigned n =
      keep_survivors(scores, part.begin, part.end, floor, [&](unsigned place, K key, unsigned flat) {
        atomicAdd(&bins[bin_of(key, lower, upper)], 1u);
        if (place < room) {
          keys[place] = key;
          flats[place] = flat;
        }
      });
  if (rank % kWarp == 0) w.survivors[part.of_all] = n;
  __syncthreads();
  for (unsigned i = rank; i < kBins; i += kThreads)
    if (bins[i] != 0) atomicAdd(&w.bins[part.instance * kBins + i], bins[i]);
}

// The number of each part becomes that of all parts before it.
__device__ inline void sum_parts(BlockTeam& team, unsigned* of_parts, unsigned n_parts) {
  unsigned before = 0;
  for (unsigned at = 0; at < n_parts; at += kThreads) {
    const unsigned i = at + team.rank();
    unsigned total;
    const unsigned start = before + team.exclusive(i < n_parts ? of_parts[i] : 0, &total);
    if (i < n_parts) of_parts[i] = start;
    before += total;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    narrow_kernel(const T* all_scores, const int64_t* counts, T* thresholds, Many<T> w, TopkSizes s, TopkPlan plan) {
  using K = Key<T>;
  FASTAPD_SHARED(uint64_t, exchange, kExchange);
  FASTAPD_SHARED(unsigned, found, 2);  // the threshold's bin, and how many are above it
  BlockTeam team(exchange);
  const Part part(s, plan);
  const unsigned n_scores = static_cast<unsigned>(s.batch * s.n_components), rank = team.rank(), lane = rank % kWarp,
                 n_parts = static_cast<unsigned>(plan.n_parts), listed = static_cast<unsigned>(plan.listed);
  const T* const scores = all_scores + part.instance * n_scores;
  const unsigned wanted = wanted_of(counts, part.instance, s);
  const State<K> state = w.state[part.instance];
  const unsigned bin = kBins - 1 - rank, in_bin = w.bins[part.instance * kBins + bin];
  unsigned total;
  const unsigned over = team.exclusive(in_bin, &total);
  if (over < wanted && wanted <= over + in_bin) {
    found[0] = bin;
    found[1] = over;
  }
  __syncthreads();
  const bool enough = 0 < wanted && wanted <= total;
  const unsigned of_threshold = enough ? found[0] : kBins;

  unsigned n_above = 0, n_ties = 0;
  K least_in = kHighest<K>, most_in = 0;
  K* const keys = w.list_keys + part.instance * listed;
  unsigned* const flats = w.list_flats + part.instance * listed;
  if (enough)
    visit_part(scores, w, plan, part, state, true, [&](K key, unsigned flat, bool there) {
      const unsigned of = bin_of(key, state.lower, state.upper);
      n_above += static_cast<unsigned>(__popc(__ballot_sync(kAllLanes, there && of > of_threshold)));
      const bool in = there && of == of_threshold;
      const unsigned lanes = __ballot_sync(kAllLanes, in), n = static_cast<unsigned>(__popc(lanes));
      if (n == 0) return;
      unsigned place = lane == 0 ? atomicAdd(&w.n_listed[part.instance], n) : 0;
      place = __shfl_sync(kAllLanes, place, 0) + static_cast<unsigned>(__popc(lanes & lanes_below()));
      if (in && place < listed) {
        keys[place] = key;
        flats[place] = flat;
      }
      n_ties += n;
      if (in && key < least_in) least_in = key;
      if (in && key > most_in) most_in = key;
    });
  least_in = static_cast<K>(~warp_max(static_cast<K>(~least_in)));
  most_in = warp_max(most_in);
  K* const ends = w.ends + 2 * part.instance;
  if (lane == 0) {
    w.above[part.of_all] = n_above;
    w.ties[part.of_all] = n_ties;
    if (n_ties > 0) {
      raise(&ends[0], static_cast<K>(~least_in));
      raise(&ends[1], most_in);
    }
  }
  if (!is_last_block(&w.done[part.instance], n_parts / (kThreads / kWarp))) return;

  unsigned* const above = w.above + part.instance * n_parts;
  unsigned* const ties = w.ties + part.instance * n_parts;
  const unsigned n_listed = w.n_listed[part.instance];
  const auto in_list = [&](unsigned i) { return keys[i]; };
  const auto of_score = [&](unsigned i) { return key_of(scores[i]); };
  const bool all_tie = enough && static_cast<K>(~ends[0]) == ends[1], sound = all_tie || (enough && n_listed <= listed);
  Limit<K> limit{kHighest<K>, 0};
  K least = limit.threshold;
  // of what the last two ways count, where each part's numbers are not known yet
  const auto count = [&](K key, unsigned flat) {
    const unsigned p = static_cast<unsigned>(flat / plan.part_scores);
    if (key > limit.threshold) atomicAdd(&above[p], 1u);
    if (key == limit.threshold) atomicAdd(&ties[p], 1u);
  };
  if (all_tie) {
    least = ends[1];
    limit = {least, wanted - found[1]};
  } else if (sound) {
    limit = limit_of<K>(team, n_listed, in_list, wanted - found[1]);
    if (thresholds != nullptr) least = least_of<K>(team, n_listed, in_list, limit.threshold);
    for (unsigned p = rank; p < n_parts; p += kThreads) ties[p] = 0;
    __syncthreads();
    for (unsigned i = rank; i < n_listed; i += kThreads) count(keys[i], flats[i]);
  } else if (wanted > 0) {
    limit = limit_of<K>(team, n_scores, of_score, wanted);
    if (thresholds != nullptr) least = least_of<K>(team, n_scores, of_score, limit.threshold);
    for (unsigned p = rank; p < n_parts; p += kThreads) above[p] = ties[p] = 0;
    __syncthreads();
    for (unsigned i = rank; i < n_scores; i += kThreads) count(of_score(i), i);
  }
  __syncthreads();
  sum_parts(team, above, n_parts);
  sum_parts(team, ties, n_parts);
  if (rank == 0) {
    w.state[part.instance].limit = limit;
    w.state[part.instance].sound = sound;
    if (thresholds != nullptr) thresholds[part.instance] = narrowed<T>(value_of<T>(least));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    emit_kernel(const T* all_scores, const int64_t* counts, TopkLists all_lists, Many<T> w, TopkSizes s,
                TopkPlan plan) {
  using K = Key<T>;
  const Part part(s, plan);
  if (wanted_of(counts, part.instance, s) == 0) return;
  const State<K> state = w.state[part.instance];
  const Limit<K> limit = state.limit;
  const TopkLists lists = all_lists.of(part.instance, s);
  unsigned above = w.above[part.of_all], ties = w.ties[part.of_all];
  visit_part(all_scores + part.instance * (s.batch * s.n_components), w, plan, part, state, state.sound != 0,
             [&](K key, unsigned flat, bool there) {
               const bool over = there && key > limit.threshold, tie = there && key == limit.threshold;
               const unsigned overs = __ballot_sync(kAllLanes, over), tied = __ballot_sync(kAllLanes, tie);
               const unsigned my_ties = ties + static_cast<unsigned>(__popc(tied & lanes_below()));
               if (over || (tie && my_ties < limit.quota)) {
                 const unsigned place = above + static_cast<unsigned>(__popc(overs & lanes_below())) +
                                        (my_ties < limit.quota ? my_ties : limit.quota);
                 put_pair(lists, w.group, s, part.instance, place, flat);
               }
               above += static_cast<unsigned>(__popc(overs));
               ties += static_cast<unsigned>(__popc(tied));
             });
}

template <class T>
Carved<Many<T>> carved(void* memory, const TopkSizes& s, const TopkPlan& plan) {
  return {memory, [&](Carver& zeroed, Carver& rest) { return carve_many<T>(zeroed, rest, s, plan); }};
}

}  // namespace

template <class T>
int64_t topk_many_workspace(const TopkSizes& sizes, const TopkPlan& plan) {
  return carved<T>(nullptr, sizes, plan).used;
}

template <class T>
void batch_topk_many(const char* op, Stream stream, const T* scores, const int64_t* counts, T* thresholds,
                     const TopkLists& lists, void* workspace, const TopkSizes& s, const TopkPlan& plan) {
  const size_t zeroed = static_cast<size_t>(carved<T>(nullptr, s, plan).zeroed);
  check(cudaMemsetAsync(workspace, 0, zeroed, static_cast<cudaStream_t>(stream)), op);
  const Many<T> w = carved<T>(workspace, s, plan).work;
  const int64_t blocks = s.n_instances * plan.n_parts * kWarp / kThreads;  // parts are a multiple of a block's warps
  launch(op, collect_kernel<T>, blocks, kThreads, sizeof(Key<T>) * plan.samples, stream, scores, counts, w, s, plan);
  launch(op, narrow_kernel<T>, blocks, kThreads, 0, stream, scores, counts, thresholds, w, s, plan);
  launch(op, emit_kernel<T>, blocks, kThreads, 0, stream, scores, counts, lists, w, s, plan);
  group_topk(op, stream, counts, lists, w.group, s);
}

#define FASTAPD_INSTANTIATE(T)                                                                               \
  template void batch_topk_many<T>(const char*, Stream, const T*, const int64_t*, T*, const TopkLists&, void*, \
                                   const TopkSizes&, const TopkPlan&);                                       \
  template int64_t topk_many_workspace<T>(const TopkSizes&, const TopkPlan&);
FASTAPD_INSTANTIATE(float)
FASTAPD_INSTANTIATE(double)
FASTAPD_INSTANTIATE(Half)
FASTAPD_INSTANTIATE(BFloat16)

}  // namespace fastapd::cuda
