// The largest of batch * n_components scores of each instance, exactly, as a grouped selection, with one read of them.
//
// A selection is a threshold and a quota: every score above the threshold, and of those equal to it the first so many,
// in flat order. Most scores are out of the question: whoever reads scores takes a sample of them, one of each of some
// thousand stretches, and from it a floor, a place in the order of (score, flat index) that at least K scores come
// before, not many more. All blocks take the same sample and get the same floor, so no launch is needed for it, and a
// hint would save nothing. Scores before the floor, the survivors, are kept in flat order.
//
//     few       a block owns a part of an instance and keeps its survivors; the last to be done has all of them in shared
//               memory, bisects them and writes all lists: one launch. Without a floor up to some thousand scores
//     collect   (many survivors) a warp owns a part and keeps its survivors in a segment; they are counted in bins
//     narrow    a warp puts those of its survivors that are in the threshold's bin in the instance's list; the last block
//               bisects that, if its keys are not all equal, and knows then how many pairs each part has
//     emit      a warp writes its part's pairs, the sample-major list, and a bit for each
//     group     two launches turn bits into the component-major list (topk_group.cu)
//
// Counts are integers and nothing is taken from the order of a list that has none, so a selection repeats to the bit.
// Fewer than K survive, or more than there is memory for, once in about 1e8 calls, six standard deviations: then one
// block bisects the scores themselves, exactly and slowly. A segment that overflows, as that of a part with all the
// large scores, has its part read again. No two scores have the same place, so ties change none of this.
//
// Memory beyond the lists is a quarter byte for each score, and for each survivor a key and a flat index with some room.
// Where K is a large part of the scores there are no segments and scores are read three times; where it is above a half,
// a mask would be the better selection.
#include "cuda/topk.h"

namespace fastapd::cuda {
namespace {

// ------------------------------------------------------------------------------------------------------------- survivors

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

// ------------------------------------------------------------------------------------------------------------------ few

template <class T>
struct Few {
  unsigned* done;       // [I], zeroed, if there are several parts
  unsigned* survivors;  // [I, parts]
  Key<T>* keys;         // [I, parts, part_scores]
  unsigned* flats;      // [I, parts, part_scores]
};

template <class T>
Few<T> carve_few(Carver& zeroed, Carver& rest, const TopkSizes& s, const TopkPlan& plan) {
  const int64_t n_parts = plan.samples == 0 ? 0 : s.n_instances * plan.n_parts;
  Few<T> few{};
  few.done = zeroed.take<unsigned>(s.n_instances);
  few.survivors = rest.take<unsigned>(n_parts);
  few.keys = rest.take<Key<T>>(n_parts * plan.part_scores);
  few.flats = rest.take<unsigned>(n_parts * plan.part_scores);
  return few;
}

constexpr int kMostFewThreads = 1024;
constexpr unsigned kMostFewParts = 256;

// Of shared memory: [room] keys and flat indices of survivors, [K] of pairs, [words] bits and how many come before.
template <class T>
__global__ void __launch_bounds__(kMostFewThreads)
    few_kernel(const T* all_scores, const int64_t* counts, T* thresholds, TopkLists lists, Few<T> w, TopkSizes s,
               TopkPlan plan) {
  using K = Key<T>;
  FASTAPD_SHARED(uint64_t, exchange, kExchange);
  FASTAPD_SHARED(unsigned, starts, kMostFewParts + 1);
  FASTAPD_DYNAMIC_SHARED(unsigned char, memory);
  K* const keys = reinterpret_cast<K*>(memory);
  unsigned* const flats = reinterpret_cast<unsigned*>(keys + plan.room);
  unsigned* const chosen = flats + (plan.samples == 0 ? 0 : plan.room);
  unsigned* const words = chosen + s.n_pairs;
  unsigned* const before = words + topk_words(s);
  BlockTeam team(exchange);
  const unsigned n_parts = static_cast<unsigned>(plan.n_parts), part = blockIdx.x % n_parts,
                 n_scores = static_cast<unsigned>(s.batch * s.n_components), rank = team.rank(), size = team.size();
  const int64_t instance = blockIdx.x / n_parts;
  const T* const scores = all_scores + instance * n_scores;
  const unsigned wanted = wanted_of(counts, instance, s);
  unsigned n = n_scores;
  if (plan.samples == 0) {
    for (unsigned i = rank; i < n; i += size) keys[i] = key_of(scores[i]);
  } else {
    const unsigned n_samples = static_cast<unsigned>(plan.samples),
                   part_scores = static_cast<unsigned>(plan.part_scores), room = static_cast<unsigned>(plan.room);
    const Floor<K> floor =
        floor_of(team, scores, n_scores, n_samples, ranks_of(wanted, n_samples, n_scores).floor, keys);
    __syncthreads();
    // each warp's survivors, then, next to each other, the block's
    const unsigned share = part_scores / (size / kWarp), mine = rank / kWarp * share;
    const unsigned begin = part * part_scores + mine < n_scores ? part * part_scores + mine : n_scores,
                   end = n_scores - begin < share ? n_scores : begin + share;
    const unsigned n_mine = keep_survivors(scores, begin, end, floor, [&](unsigned place, K key, unsigned flat) {
      keys[mine + place] = key;
      flats[mine + place] = flat;
    });
    __syncwarp();
    unsigned n_block;
    const unsigned first = team.exclusive(rank % kWarp == 0 ? n_mine : 0, &n_block);
    const int64_t place = (instance * n_parts + part) * part_scores + __shfl_sync(kAllLanes, first, 0);
    for (unsigned i = rank % kWarp; i < n_mine; i += kWarp) {
      w.keys[place + i] = keys[mine + i];
      w.flats[place + i] = flats[mine + i];
    }
    if (rank == 0) w.survivors[instance * n_parts + part] = n_block;
    if (!is_last_block(&w.done[instance], n_parts)) return;
    const unsigned start = team.exclusive(rank < n_parts ? w.survivors[instance * n_parts + rank] : 0, &n);
    if (rank < n_parts) starts[rank] = start;
    if (rank == 0) starts[n_parts] = n;
    __syncthreads();
    if (n > room) n = 0;  // too many
    for (unsigned i = rank; i < n; i += size) {
      const unsigned of = first_not_below(n_parts, [&](unsigned p) { return starts[p + 1]; }, i + 1);
      const int64_t at = (instance * n_parts + of) * part_scores + (i - starts[of]);
      keys[i] = w.keys[at];
      flats[i] = w.flats[at];
    }
  }
  __syncthreads();
  const auto select = [&](unsigned n, const auto& get, const auto& flat_of) {
    const Limit<K> limit = limit_of<K>(team, n, get, wanted);
    if (thresholds != nullptr) {
      const K least = least_of<K>(team, n, get, limit.threshold);
      if (rank == 0) thresholds[instance] = narrowed<T>(value_of<T>(least));
    }
    take_in_order<K>(team, n, get, limit, [&](unsigned i, unsigned place) { chosen[place] = flat_of(i); });
  };
  const auto kept = [&](unsigned i) { return keys[i]; };
  if (n >= wanted)
    select(n, kept, [&](unsigned i) { return plan.samples == 0 ? i : flats[i]; });
  else
    select(n_scores, [&](unsigned i) { return key_of(scores[i]); }, [&](unsigned i) { return i; });
  group_in_block(team, lists.of(instance, s), s, chosen, wanted, words, before);
}

// ----------------------------------------------------------------------------------------------------------------- many

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

// visit(key, flat, there) by all lanes of a warp for all survivors of its part, from its segment if they fit into it; if
// survivors are not sound, for all scores.
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
    emit_kernel(const T* all_scores, const int64_t* counts, TopkLists all_lists, Many<T> w, TopkSizes s, TopkPlan plan) {
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

// What is zeroed, then the rest.
template <class T>
struct Carved {
  Few<T> few{};
  Many<T> many{};
  int64_t zeroed, used;

  Carved(void* memory, const TopkSizes& s, const TopkPlan& plan) {
    Carver nothing(nullptr), none(nullptr);
    carve(nothing, none, s, plan);
    zeroed = nothing.used();
    Carver first(memory), second(memory == nullptr ? nullptr : static_cast<char*>(memory) + zeroed);
    carve(first, second, s, plan);
    used = zeroed + second.used();
  }

 private:
  void carve(Carver& first, Carver& second, const TopkSizes& s, const TopkPlan& plan) {
    if (plan.few)
      few = carve_few<T>(first, second, s, plan);
    else
      many = carve_many<T>(first, second, s, plan);
  }
};

}  // namespace

template <class T>
int64_t topk_workspace(TopkSizes sizes, TopkPlan plan) {
  return Carved<T>(nullptr, sizes, plan).used;
}

template <class T>
void batch_topk(Stream stream, const T* scores, const int64_t* counts, T* thresholds, int* sample, int64_t* offsets,
                int* component, int64_t* sample_offsets, int* position, void* workspace, TopkSizes s, TopkPlan plan) {
  const char* op = "batch_topk";
  const TopkLists lists{sample, offsets, component, sample_offsets, position};
  const size_t zeroed = static_cast<size_t>(Carved<T>(nullptr, s, plan).zeroed);
  if (!plan.few || plan.samples != 0)
    check(cudaMemsetAsync(workspace, 0, zeroed, static_cast<cudaStream_t>(stream)), op);
  const Carved<T> w(workspace, s, plan);
  if (plan.few) {
    const size_t bytes = (sizeof(Key<T>) + (plan.samples == 0 ? 0 : sizeof(unsigned))) * plan.room +
                         sizeof(unsigned) * (s.n_pairs + 2 * topk_words(s));
    launch(op, few_kernel<T>, s.n_instances * plan.n_parts, static_cast<int>(plan.threads), bytes, stream, scores, counts,
           thresholds, lists, w.few, s, plan);
    return;
  }
  const int64_t warps = s.n_instances * plan.n_parts;  // parts are a multiple of the warps of a narrow block
  launch(op, collect_kernel<T>, warps * kWarp / kThreads, kThreads, sizeof(Key<T>) * plan.samples, stream,
         scores, counts, w.many, s, plan);
  launch(op, narrow_kernel<T>, warps * kWarp / kThreads, kThreads, 0, stream, scores, counts, thresholds,
         w.many, s, plan);
  launch(op, emit_kernel<T>, warps * kWarp / kThreads, kThreads, 0, stream, scores, counts, lists, w.many, s,
         plan);
  group_topk(op, stream, counts, lists, w.many.group, s);
}

#define FASTAPD_INSTANTIATE(T)                                                                                         \
  template void batch_topk<T>(Stream, const T*, const int64_t*, T*, int*, int64_t*, int*, int64_t*, int*, void*,       \
                              TopkSizes, TopkPlan);                                                                    \
  template int64_t topk_workspace<T>(TopkSizes, TopkPlan);
FASTAPD_INSTANTIATE(float)
FASTAPD_INSTANTIATE(double)
FASTAPD_INSTANTIATE(Half)
FASTAPD_INSTANTIATE(BFloat16)

}  // namespace fastapd::cuda
