// The largest of batch * n_components scores of each instance, exactly, as a grouped selection, with one read of them.
//
// A selection is a threshold and a quota: every score above the threshold, and of those equal to it the first so many,
// in flat order. Most scores are out of the question: whoever reads scores takes a sample of them, one of each of some
// thousand stretches, and from it a floor, a place in the order of (score, flat index) that at least K scores come
// before, not many more. All blocks take the same sample and get the same floor, so no launch is needed for it, and a
// hint would save nothing. Scores before the floor, the survivors, are kept in flat order.
//
//     few     (here) a block owns a part of an instance and keeps its survivors; the last to be done has all of them in
//             shared memory, bisects them and writes all lists: one launch. Without a floor up to some thousand scores
//     many    (topk_many.cu) three launches, and two that group pairs by component
//
// Counts are integers and nothing is taken from the order of a list that has none, so a selection repeats to the bit.
// Fewer than K survive, or more than there is memory for, once in about 1e8 calls, six standard deviations: then one
// block bisects the scores themselves, exactly and slowly. No two scores have the same place, so ties change none of
// this.
//
// Memory beyond the lists: for `few`, a key and a flat index for each score; for `many`, the same for each survivor, with
// room for some more, and two bits for each score, of batches that are not much smaller than 32. Where K is above a half of the scores, a mask would be the better selection.
#include "cuda/topk_floor.h"

namespace fastapd::cuda {
namespace {

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

template <class T>
Carved<Few<T>> carved(void* memory, const TopkSizes& s, const TopkPlan& plan) {
  return {memory, [&](Carver& zeroed, Carver& rest) { return carve_few<T>(zeroed, rest, s, plan); }};
}

}  // namespace

template <class T>
int64_t topk_workspace(TopkSizes sizes, TopkPlan plan) {
  return plan.few ? carved<T>(nullptr, sizes, plan).used : topk_many_workspace<T>(sizes, plan);
}

template <class T>
void batch_topk(Stream stream, const T* scores, const int64_t* counts, T* thresholds, int* sample, int64_t* offsets,
                int* component, int64_t* sample_offsets, int* position, void* workspace, TopkSizes s, TopkPlan plan) {
  const char* op = "batch_topk";
  const TopkLists lists{sample, offsets, component, sample_offsets, position};
  if (!plan.few) {
    batch_topk_many(op, stream, scores, counts, thresholds, lists, workspace, s, plan);
    return;
  }
  const size_t zeroed = static_cast<size_t>(carved<T>(nullptr, s, plan).zeroed);
  if (plan.samples != 0) check(cudaMemsetAsync(workspace, 0, zeroed, static_cast<cudaStream_t>(stream)), op);
  const size_t bytes = (sizeof(Key<T>) + (plan.samples == 0 ? 0 : sizeof(unsigned))) * plan.room +
                       sizeof(unsigned) * (s.n_pairs + 2 * topk_words(s));
  launch(op, few_kernel<T>, s.n_instances * plan.n_parts, static_cast<int>(plan.threads), bytes, stream, scores,
         counts, thresholds, lists, carved<T>(workspace, s, plan).work, s, plan);
}

#define FASTAPD_INSTANTIATE(T)                                                                                   \
  template void batch_topk<T>(Stream, const T*, const int64_t*, T*, int*, int64_t*, int*, int64_t*, int*, void*, \
                              TopkSizes, TopkPlan);                                                              \
  template int64_t topk_workspace<T>(TopkSizes, TopkPlan);
FASTAPD_INSTANTIATE(float)
FASTAPD_INSTANTIATE(double)
FASTAPD_INSTANTIATE(Half)
FASTAPD_INSTANTIATE(BFloat16)

}  // namespace fastapd::cuda
