// The component-major list of top-k and both lists' offsets, from a bit for each score and the sample-major list.
//
//     words    a block owns a tile of the words of bits and counts, for each, the bits before it in the tile; the last
//              of an instance sums up the tiles
//     assign   a thread owns a pair, a component and a sample: the pair's place in the component-major list is the
//              number of bits before its own, a component's offset that before its first word, and a sample's is found
//              in the sample-major list by bisection
//
// Nothing is sorted, so the time is that of N / 32 words and of K pairs whatever their number. Where pairs are fewer
// than words by far, a sort of the pairs would touch less memory. Integers alone; bits repeat.
#include "cuda/topk.h"

namespace fastapd::cuda {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kRounds = 16, kTile = kRounds * kThreads;

__global__ void __launch_bounds__(kThreads) words_kernel(TopkGroup group, int64_t n_words, unsigned n_tiles) {
  FASTAPD_SHARED(uint64_t, exchange, kExchange);
  BlockTeam team(exchange);
  const int64_t instance = blockIdx.x / n_tiles;
  const unsigned tile = blockIdx.x % n_tiles, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = int64_t{tile} * kTile + warp * (kRounds * kWarp) + lane;
  unsigned before[kRounds], n = 0, total;
#pragma unroll
  for (unsigned j = 0; j < kRounds; ++j) {
    const int64_t i = first + j * kWarp;
    unsigned in_round;
    const unsigned word = i < n_words ? group.words[instance * n_words + i] : 0;
    before[j] = n + warp_exclusive(static_cast<unsigned>(__popc(word)), &in_round);
    n += in_round;
  }
  const unsigned start = __shfl_sync(kAllLanes, team.exclusive(lane == 0 ? n : 0, &total), 0);
#pragma unroll
  for (unsigned j = 0; j < kRounds; ++j) {
    const int64_t i = first + j * kWarp;
    if (i < n_words) group.before[instance * n_words + i] = start + before[j];
  }
  unsigned* const tiles = group.tiles + instance * n_tiles;
  if (threadIdx.x == 0) tiles[tile] = total;
  if (!is_last_block(&group.done[instance], n_tiles)) return;
  unsigned in_tiles = 0;
  for (unsigned at = 0; at < n_tiles; at += kThreads) {
    const unsigned i = at + threadIdx.x;
    const unsigned upto = in_tiles + team.exclusive(i < n_tiles ? tiles[i] : 0, &total);
    if (i < n_tiles) tiles[i] = upto;
    in_tiles += total;
  }
}

__global__ void __launch_bounds__(kThreads)
    assign_kernel(const int64_t* counts, TopkLists all_lists, TopkGroup group, TopkSizes s, int64_t n_words,
                  unsigned n_tiles, int64_t blocks_each) {
  const int64_t instance = blockIdx.x / blocks_each, i = blockIdx.x % blocks_each * kThreads + threadIdx.x;
  const TopkLists lists = all_lists.of(instance, s);
  const int* const row = group.row + instance * s.n_pairs;
  const int64_t row_words = words_of_component(s);
  const unsigned wanted = wanted_of(counts, instance, s);
  const auto before = [&](int64_t word) {
    return group.tiles[instance * n_tiles + word / kTile] + group.before[instance * n_words + word];
  };
  if (i < wanted) {
    const unsigned b = static_cast<unsigned>(row[i]);
    const int64_t word = lists.component[i] * row_words + b / 32;
    const unsigned below = group.words[instance * n_words + word] & ((1u << b % 32) - 1);
    const unsigned place = before(word) + static_cast<unsigned>(__popc(below));
    lists.position[i] = static_cast<int>(place);
    lists.sample[place] = static_cast<int>(b);
  } else if (i < s.n_pairs) {
    lists.component[i] = lists.position[i] = lists.sample[i] = 0;
  }
  if (i <= s.n_components) lists.offsets[i] = i < s.n_components ? before(i * row_words) : wanted;
  if (i <= s.batch)
    lists.sample_offsets[i] = first_not_below(
        wanted, [&](unsigned j) { return static_cast<unsigned>(row[j]); }, static_cast<unsigned>(i));
}

}  // namespace

int64_t topk_tiles(const TopkSizes& sizes) {
  return ceil_div(topk_words(sizes), kTile);
}

void group_topk(const char* op, Stream stream, const int64_t* counts, const TopkLists& lists, const TopkGroup& group,
                const TopkSizes& s) {
  const int64_t n_words = topk_words(s), n_tiles = topk_tiles(s);
  launch(op, words_kernel, s.n_instances * n_tiles, kThreads, 0, stream, group, n_words, n_tiles);
  int64_t most = s.n_pairs > s.n_components + 1 ? s.n_pairs : s.n_components + 1;
  most = most > s.batch + 1 ? most : s.batch + 1;
  const int64_t blocks_each = ceil_div(most, kThreads);
  launch(op, assign_kernel, s.n_instances * blocks_each, kThreads, 0, stream, counts, lists, group, s, n_words, n_tiles,
         blocks_each);
}

}  // namespace fastapd::cuda
