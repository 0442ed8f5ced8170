// The largest of batch * n_components scores of each instance, or of each sample, exactly, as a grouped selection.
//
// Threshold select: one pass over the scores lists, in flat (sample-major) order, every score above a floor that lies
// somewhat below the threshold; the exact threshold is then found among the listed by counting. The floor comes from
// the caller's hint or from a sample. What does not come out is tried again: with too few listed, by the first scores
// equal to the floor (all that is missing when many scores tie), then with a floor from the sample, then with no floor.
// Every way ends with the same pairs, as the counts prove. Order: NaN largest, -0 = +0, denormals in order.
// The selected flat indices are ascending: division gives the sample-major lists, a counting sort the component-major.
// Work: one read of the scores, a small multiple of n_pairs, and batch + n_components. One thread owns one instance;
// the scores of a large one that is alone are listed in pieces.
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512VL__)
#include <immintrin.h>
#define FASTAPD_COMPRESS 1
#elif defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../ops.h"
#include "parallel.h"

namespace fastapd {
namespace FASTAPD_LEVEL {
namespace {

// Scores as integers of the same width whose order is the contract's.
template <class T>
struct KeyOf;
template <>
struct KeyOf<float> {
  typedef int32_t type;
  typedef uint32_t bits;
  static constexpr int32_t kInfinity = 0x7f800000;
};
template <>
struct KeyOf<double> {
  typedef int64_t type;
  typedef uint64_t bits;
  static constexpr int64_t kInfinity = 0x7ff0000000000000;
};
template <class T>
using Key = typename KeyOf<T>::type;

template <class T>
constexpr Key<T> kNaN = static_cast<Key<T>>(~typename KeyOf<T>::bits{0} >> 1);  // the largest key
template <class T>
constexpr Key<T> kBelowAll = -kNaN<T> - 1;

template <class T>
inline Key<T> raw_bits(T score) {
  Key<T> bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits;
}

// From the bits of a score: two's complement instead of sign and magnitude; no branches, so that loops of it vectorise.
template <class T>
inline Key<T> key_of_bits(Key<T> bits) {
  const Key<T> magnitude = bits & kNaN<T>;
  const Key<T> key = bits < 0 ? -magnitude : magnitude;
  return magnitude > KeyOf<T>::kInfinity ? kNaN<T> : key;
}

template <class T>
inline Key<T> key_of(T score) {
  return key_of_bits<T>(raw_bits(score));
}

template <class T>
inline T score_of(Key<T> key) {
  const Key<T> bits = key < 0 ? -key | kBelowAll<T> : key;
  T score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

// ------------------------------------------------------------------------------------------------------------- listing

enum Test { kAbove, kEqual, kIsNaN };

template <Test kTest, class T>
inline bool passes(T score, T limit) {
  if (kTest == kAbove) return !(score <= limit);  // NaN is above
  if (kTest == kEqual) return score == limit;
  return score != score;
}

constexpr int64_t kGroup = 64;

// Bit l: whether scores[l] passes, for a group of scores.
#if FASTAPD_COMPRESS
template <Test kTest>
inline uint64_t passing(const float* scores, float limit) {
  constexpr int kCompare = kTest == kAbove ? _CMP_NLE_UQ : kTest == kEqual ? _CMP_EQ_OQ : _CMP_UNORD_Q;
  const __m512 limits = _mm512_set1_ps(limit);
  uint64_t mask = 0;
  for (int v = 0; v < 4; ++v) {
    const __m512 x = _mm512_loadu_ps(scores + 16 * v);
    mask |= static_cast<uint64_t>(_mm512_cmp_ps_mask(x, kTest == kIsNaN ? x : limits, kCompare)) << (16 * v);
  }
  return mask;
}
template <Test kTest>
inline uint64_t passing(const double* scores, double limit) {
  constexpr int kCompare = kTest == kAbove ? _CMP_NLE_UQ : kTest == kEqual ? _CMP_EQ_OQ : _CMP_UNORD_Q;
  const __m512d limits = _mm512_set1_pd(limit);
  uint64_t mask = 0;
  for (int v = 0; v < 8; ++v) {
    const __m512d x = _mm512_loadu_pd(scores + 8 * v);
    mask |= static_cast<uint64_t>(_mm512_cmp_pd_mask(x, kTest == kIsNaN ? x : limits, kCompare)) << (8 * v);
  }
  return mask;
}
// Bit i: whether low < keys[i] <= high, for a group of keys.
inline uint64_t between(const int32_t* keys, int32_t low, int32_t high) {
  uint64_t mask = 0;
  for (int v = 0; v < 4; ++v) {
    const __m512i x = _mm512_loadu_si512(keys + 16 * v);
    const __mmask16 above = _mm512_cmpgt_epi32_mask(x, _mm512_set1_epi32(low));
    mask |= static_cast<uint64_t>(_mm512_mask_cmple_epi32_mask(above, x, _mm512_set1_epi32(high))) << (16 * v);
  }
  return mask;
}
inline uint64_t between(const int64_t* keys, int64_t low, int64_t high) {
  uint64_t mask = 0;
  for (int v = 0; v < 8; ++v) {
    const __m512i x = _mm512_loadu_si512(keys + 8 * v);
    const __mmask8 above = _mm512_cmpgt_epi64_mask(x, _mm512_set1_epi64(low));
    mask |= static_cast<uint64_t>(_mm512_mask_cmple_epi64_mask(above, x, _mm512_set1_epi64(high))) << (8 * v);
  }
  return mask;
}
#else
template <class V>
inline uint64_t sign_bits(V lanes) {  // of the result of a comparison, -1 or 0 in each lane
  constexpr int kLanesOfV = sizeof(V) / sizeof(lanes[0]);
#if defined(__AVX2__)
  if (sizeof(lanes[0]) == 4) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)lanes));
  return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)lanes));
#elif defined(__SSE2__)
  if (sizeof(lanes[0]) == 4) return static_cast<uint32_t>(_mm_movemask_ps((__m128)lanes));
  return static_cast<uint32_t>(_mm_movemask_pd((__m128d)lanes));
#endif
  uint64_t mask = 0;
  for (int lane = 0; lane < kLanesOfV; ++lane) mask |= static_cast<uint64_t>(lanes[lane] & 1) << lane;
  return mask;
}
template <Test kTest, class T>
inline uint64_t passing(const T* scores, T limit) {
  const vec<T> limits = vec<T>{} + limit;
  uint64_t mask = 0;
  for (int64_t at = 0; at < kGroup; at += kLanes<T>) {
    const vec<T> x = load(scores + at);
    const auto lanes = kTest == kAbove ? ~(x <= limits) : kTest == kEqual ? x == limits : x != x;
    mask |= sign_bits(lanes) << at;
  }
  return mask;
}
// Bit i: whether low < keys[i] <= high, for a group of keys.
template <class K>
inline uint64_t between(const K* keys, K low, K high) {
  uint64_t mask = 0;
  for (int64_t i = 0; i < kGroup; ++i) mask |= static_cast<uint64_t>((keys[i] > low) & (keys[i] <= high)) << i;
  return mask;
}
#endif

// Writes the places of the mask's bits, counted from first, without gaps, and up to two entries behind them. Returns
// how many they are. The first two are written whether they exist or not: most groups have no more, and a branch that
// is predicted wrong costs more than both.
inline int64_t pack(uint64_t mask, int32_t first, int32_t* index) {
  const int64_t n = __builtin_popcountll(mask);
  for (int64_t i = 0; i < 2; ++i) {
    index[i] = first + __builtin_ctzll(mask | uint64_t{1} << (kGroup - 1));
    mask &= mask - 1;
  }
  for (int64_t i = 2; i < n; ++i) {
    index[i] = first + __builtin_ctzll(mask);
    mask &= mask - 1;
  }
  return n;
}

// Lists what passes of scores[begin:end], in order: flat indices and keys. Stops, a block of scores at a time, when
// more than `most` are listed, and returns how many are: index and keys have room for most + kSlack. The keys of a
// block are gathered while its scores are in the nearest cache.
constexpr int64_t kBlock = 32 * kGroup, kSlack = kBlock + 2;

template <Test kTest, class T>
int64_t list(const T* scores, int64_t begin, int64_t end, T limit, int64_t most, int32_t* index, Key<T>* keys) {
  int64_t listed = 0;
  for (int64_t at = begin; at < end && listed <= most;) {
    const int64_t before = listed, stop = end - at < kBlock ? end : at + kBlock;
    for (; at + kGroup <= stop; at += kGroup)
      listed += pack(passing<kTest>(scores + at, limit), static_cast<int32_t>(at), index + listed);
    for (; at < stop; ++at) {
      index[listed] = static_cast<int32_t>(at);
      listed += passes<kTest>(scores[at], limit);
    }
    for (int64_t i = before; i < listed; ++i) keys[i] = key_of(scores[index[i]]);
  }
  return listed;
}

constexpr int kMostPieces = 64;

// How many threads list the scores of one instance.
inline int pieces_of(int64_t n, int threads) {
  const int64_t worthwhile = n / (1 << 17);
  const int64_t pieces = threads < worthwhile ? threads : worthwhile;
  return pieces < 1 ? 1 : pieces < kMostPieces ? static_cast<int>(pieces) : kMostPieces;
}

// The room that list_above needs for each of its pieces.
inline int64_t room_of(int64_t n, int64_t most, int pieces) {
  const int64_t length = (n + pieces - 1) / pieces;
  return (length < most ? length : most) + kSlack;
}

// The same of all scores[0:n] above the limit, in as many pieces.
template <class T>
int64_t list_above(const T* scores, int64_t n, T limit, int64_t most, int32_t* index, Key<T>* keys, int pieces) {
  if (pieces == 1) return list<kAbove>(scores, 0, n, limit, most, index, keys);
  const int64_t length = (n + pieces - 1) / pieces, room = room_of(n, most, pieces);
  int64_t counts[kMostPieces] = {};
  parallel_for(pieces, 1, pieces, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t begin = p * length < n ? p * length : n, end = begin + length < n ? begin + length : n;
      counts[p] = list<kAbove>(scores, begin, end, limit, most, index + p * room, keys + p * room);
    }
  });
  int64_t listed = counts[0];
  for (int64_t p = 1; p < pieces && listed <= most; listed += counts[p++]) {
    const int64_t kept = listed + counts[p] <= most ? counts[p] : 0;
    std::memmove(index + listed, index + p * room, sizeof(int32_t) * static_cast<size_t>(kept));
    std::memmove(keys + listed, keys + p * room, sizeof(Key<T>) * static_cast<size_t>(kept));
  }
  return listed;
}

// ----------------------------------------------------------------------------------------------------------- threshold

template <class K>
inline int64_t count_above(const K* keys, int64_t n, K limit) {
  K count = 0;  // as wide as a key, so that the loop vectorises; n < 2^31
  for (int64_t i = 0; i < n; ++i) count += keys[i] > limit;
  return count;
}

// The selected keys: all that are above the limit, and the first `ties` of those equal to it.
template <class T>
struct Limit {
  Key<T> above;
  int64_t ties;
};

// How many keys find_limit wants for itself: of n keys, those that are left when an eighth is.
inline int64_t spare_keys(int64_t n) {
  return n / 8 + 1;
}

constexpr int64_t kManyKeys = 1024, kStride = 16;

// Finds the limit of the wanted > 0 largest of keys[0:n], all of them above `low`, n >= wanted. Narrows (low, high] by
// interpolation and halving in turn, until as many as wanted are above one end or the ends are neighbours. When an
// eighth of the keys is left between the ends, only they are counted on. Many keys are first narrowed to where a
// regular sample of them has its limit, two standard deviations to either side.
template <class T>
Limit<T> find_limit(const Key<T>* keys, int64_t n, int64_t wanted, Key<T> low, Key<T>* spare) {
  typedef typename KeyOf<T>::bits U;
  Key<T> high = low;
  for (int64_t i = 0; i < n; ++i) high = keys[i] > high ? keys[i] : high;
  int64_t above_low = n, above_high = 0, left_out = 0;  // left_out: keys above `high` that are no longer in keys[0:n]
  Key<T> guesses[2];
  int n_guesses = 0;
  if (n >= kManyKeys) {
    const int64_t size = n / kStride;
    for (int64_t i = 0; i < size; ++i) spare[i] = keys[i * kStride];
    const double part = static_cast<double>(wanted) / static_cast<double>(n), expected = part * size;
    const double margin = 2 * __builtin_sqrt(expected * (1 - part)) + 1;
    const int64_t more = static_cast<int64_t>(expected + margin), fewer = static_cast<int64_t>(expected - margin);
    if (fewer > 0) guesses[n_guesses++] = find_limit<T>(spare, size, fewer, low, spare + size).above;
    if (more < size) guesses[n_guesses++] = find_limit<T>(spare, size, more, low, spare + size).above;
  }
  for (bool halve = false; above_low > wanted; halve = !halve) {
    const U width = static_cast<U>(high) - static_cast<U>(low);
    if (width <= 1) break;
    U step = width / 2;
    const U guess = n_guesses > 0 ? static_cast<U>(guesses[--n_guesses]) - static_cast<U>(low) : 0;
    if (guess > 0 && guess < width) {
      step = guess;
    } else if (!halve) {
      const double part = static_cast<double>(above_low - wanted) / static_cast<double>(above_low - above_high);
      const U there = static_cast<U>(part * static_cast<double>(width));
      if (there > 0 && there < width) step = there;
    }
    const Key<T> middle = static_cast<Key<T>>(static_cast<U>(low) + step);
    const int64_t above = left_out + count_above(keys, n, middle);
    if (above >= wanted) {
      low = middle;
      above_low = above;
    } else {
      high = middle;
      above_high = above;
    }
    if (above_low - above_high <= n / 8) {
      int64_t kept = 0, i = 0;
      for (; i + kGroup <= n; i += kGroup)
        for (uint64_t mask = between(keys + i, low, high); mask != 0; mask &= mask - 1)
          spare[kept++] = keys[i + __builtin_ctzll(mask)];
      for (; i < n; ++i)
        if (keys[i] > low && keys[i] <= high) spare[kept++] = keys[i];
      keys = spare;
      n = kept;
      left_out = above_high;
    }
  }
  return above_low == wanted ? Limit<T>{low, 0} : Limit<T>{high, wanted - above_high};
}

// Copies the indices whose keys are within the limit, in order, and up to kKept entries more.
constexpr int64_t kKept = 16;

template <class T>
void keep(const int32_t* index, const Key<T>* keys, int64_t n, Limit<T> limit, int32_t* selected) {
  int64_t kept = 0, i = 0;
#if FASTAPD_COMPRESS  // into a register and out as a whole: compressing stores are slow on some processors
  if (limit.ties == 0) {
    if (sizeof(T) == 4) {
      const __m512i above = _mm512_set1_epi32(static_cast<int32_t>(limit.above));
      for (; i + 16 <= n; i += 16) {
        const __mmask16 m = _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(keys + i), above);
        _mm512_storeu_si512(selected + kept, _mm512_maskz_compress_epi32(m, _mm512_loadu_si512(index + i)));
        kept += __builtin_popcount(m);
      }
    } else {
      const __m512i above = _mm512_set1_epi64(limit.above);
      for (; i + 8 <= n; i += 8) {
        const __mmask8 m = _mm512_cmpgt_epi64_mask(_mm512_loadu_si512(keys + i), above);
        const __m256i of = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + i));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(selected + kept), _mm256_maskz_compress_epi32(m, of));
        kept += __builtin_popcount(m);
      }
    }
  }
#endif
  for (; i < n; ++i) {
    const int tie = (keys[i] == limit.above) & (limit.ties > 0);
    selected[kept] = index[i];
    kept += (keys[i] > limit.above) | tie;
    limit.ties -= tie;
  }
}

// --------------------------------------------------------------------------------------------------------------- floor

// How much of n scores a floor is estimated from.
inline int64_t sample_size(int64_t n) {
  return n < (1 << 11) ? 0 : n < (1 << 15) ? 512 : n < (1 << 18) ? 1024 : n < (1 << 21) ? 2048 : 4096;
}
constexpr int64_t kLargestSample = 4096;

// A score somewhat below the wanted-th largest: of the sample, more are above it than can be expected of the wanted, by
// four standard deviations. -inf when that is the whole sample. One score of each stretch, at a place that no period
// of the scores follows.
template <class T>
T sampled_floor(const T* scores, int64_t n, int64_t wanted) {
  const int64_t size = sample_size(n);
  const T lowest = score_of<T>(key_of_bits<T>(KeyOf<T>::kInfinity | kBelowAll<T>));
  const double expected = static_cast<double>(wanted) * static_cast<double>(size) / static_cast<double>(n);
  const int64_t rank = static_cast<int64_t>(expected + 4 * __builtin_sqrt(expected)) + 4;
  if (rank >= size) return lowest;
  Key<T> keys[kLargestSample];
  const int64_t stretch = n / size;
  for (int64_t i = 0; i < size; ++i) {
    uint32_t hash = static_cast<uint32_t>(i) * 0x9e3779b1u;
    hash = (hash ^ (hash >> 15)) * 0x85ebca77u;
    hash ^= hash >> 13;
    const int64_t within = static_cast<int64_t>((static_cast<uint64_t>(hash) * static_cast<uint64_t>(stretch)) >> 32);
    keys[i] = raw_bits(scores[i * stretch + within]);
  }
  for (int64_t i = 0; i < size; ++i) keys[i] = key_of_bits<T>(keys[i]);
  Key<T> spare[kLargestSample / 8 + 1];
  return score_of<T>(find_limit<T>(keys, size, rank, kBelowAll<T>, spare).above);
}

// ----------------------------------------------------------------------------------------------------------- selection

// What one instance works on: its scores, how many of them are wanted, and by how many threads; and the smallest
// selected score if asked for.
template <class T>
struct Batch {
  const T* scores;
  int64_t n, wanted;
  int pieces;
  bool wants_threshold;
  T threshold;
};

enum class Outcome { kDone, kMissed, kNoMemory };

// Merges ascending left[0:n_left] and right[0:n_right] to out.
inline void merge(const int32_t* left, int64_t n_left, const int32_t* right, int64_t n_right, int32_t* out) {
  int64_t l = 0, r = 0;
  while (l < n_left && r < n_right) {
    const bool first = left[l] < right[r];
    out[l + r] = first ? left[l] : right[r];
    l += first;
    r += !first;
  }
  std::memcpy(out + l + r, left + l, sizeof(int32_t) * static_cast<size_t>(n_left - l));
  std::memcpy(out + n_left + r, right + r, sizeof(int32_t) * static_cast<size_t>(n_right - r));
}

// Selects through the list of the scores above a floor, if at most `most` >= wanted are. Missed when the floor is too
// low for that, or so high that there are too few even with those that are equal to it.
template <class T>
Outcome select_above(Batch<T>* batch, T floor, int64_t most, int32_t* selected) {
  const int64_t wanted = batch->wanted, room = batch->pieces * room_of(batch->n, most, batch->pieces);
  const Workspace<int32_t> indices(room);
  const Workspace<Key<T>> of_listed(room + spare_keys(most));
  int32_t* index = indices.data;
  Key<T>* keys = of_listed.data;
  if (index == nullptr || keys == nullptr) return Outcome::kNoMemory;
  const bool nan = floor != floor;  // above which there is nothing
  const int64_t n = nan ? 0 : list_above(batch->scores, batch->n, floor, most, index, keys, batch->pieces);
  if (n > most) return Outcome::kMissed;
  if (n < wanted) {
    const int64_t missing = wanted - n;
    const auto equal = nan ? list<kIsNaN, T> : list<kEqual, T>;
    if (equal(batch->scores, 0, batch->n, floor, missing - 1, index + n, keys) < missing) return Outcome::kMissed;
    merge(index, n, index + n, missing, selected);
    batch->threshold = floor;
    return Outcome::kDone;
  }
  const Limit<T> limit = find_limit<T>(keys, n, wanted, key_of(floor), keys + n);
  if (batch->wants_threshold) {
    Key<T> least = kNaN<T>;
    for (int64_t i = 0; i < n; ++i) {
      const Key<T> key = keys[i] > limit.above ? keys[i] : kNaN<T>;
      least = key < least ? key : least;
    }
    if (limit.ties > 0) least = limit.above;
    batch->threshold = score_of<T>(least);
  }
  keep<T>(index, keys, n, limit, selected);
  return Outcome::kDone;
}

// The first way that leads to the wanted pairs: from the hint, from a sample, without a floor. False: no memory.
template <class T>
bool select_flat(Batch<T>* batch, T hint, int32_t* selected) {
  const int64_t n = batch->n, wanted = batch->wanted, size = sample_size(n);
  const int64_t ample = 4 * wanted + (size > 0 ? 16 * (n / size) : n);
  const int64_t most = ample < n ? ample : n;
  Outcome outcome = Outcome::kMissed;
  if (hint - hint == 0) {  // finite
    const T floor = hint - (hint < 0 ? -hint : hint) / 8;
    outcome = select_above(batch, floor, most, selected);
  }
  if (outcome == Outcome::kMissed && size > 0)
    outcome = select_above(batch, sampled_floor(batch->scores, n, wanted), most, selected);
  if (outcome == Outcome::kMissed) outcome = select_above(batch, -static_cast<T>(__builtin_inf()), n, selected);
  return outcome == Outcome::kDone;
}

// ------------------------------------------------------------------------------------------------------------ grouping

inline void clear_offsets(SelectionOut out, int64_t batch, int64_t n_components) {
  std::memset(out.offsets, 0, sizeof(int64_t) * static_cast<size_t>(n_components + 1));
  std::memset(out.sample_offsets, 0, sizeof(int64_t) * static_cast<size_t>(batch + 1));
}

// To the component-major list, from the counts in offsets[c + 1], the sample of each pair, and in `position` how many
// pairs of the same component come before it.
inline void scatter(SelectionOut out, const int32_t* sample, int64_t n_pairs, int64_t n_components) {
  for (int64_t c = 0; c < n_components; ++c) out.offsets[c + 1] += out.offsets[c];
  for (int64_t j = 0; j < n_pairs; ++j) {
    const int64_t place = out.offsets[out.component[j]] + out.position[j];
    out.position[j] = static_cast<int32_t>(place);
    out.sample[place] = sample[j];
  }
}

// Every entry of ends[1 : n + 1] becomes the largest up to it. Four stretches at a time, as one has to wait for itself.
inline void running_maximum(int64_t* ends, int64_t n) {
  constexpr int64_t kStretches = 4;
  const int64_t length = n / kStretches;
  int64_t largest[kStretches];
  for (int64_t t = 0; t < kStretches; ++t) {  // entries that are not zero ascend
    int64_t at = t * length;
    while (at > 0 && ends[at] == 0) --at;
    largest[t] = ends[at];
  }
  for (int64_t i = 1; i <= length; ++i)
    for (int64_t t = 0; t < kStretches; ++t) {
      int64_t* end = ends + t * length + i;
      largest[t] = *end > largest[t] ? *end : largest[t];
      *end = largest[t];
    }
  for (int64_t i = kStretches * length + 1; i <= n; ++i) ends[i] = ends[i] > ends[i - 1] ? ends[i] : ends[i - 1];
}

// From ascending flat indices to both orders of the selection; the indices become the samples of the pairs.
inline void group(int32_t* index, int64_t n_pairs, SelectionOut out, int64_t batch, int64_t n_components) {
  // (i + 1/2) / C is at least 1/2C away from the next integer, far more than doubles below 2^31 are rounded by.
  const double inverse = 1 / static_cast<double>(n_components);
  const int32_t width = static_cast<int32_t>(n_components);
  for (int64_t j = 0; j < n_pairs; ++j) {
    const int32_t sample = static_cast<int32_t>((index[j] + 0.5) * inverse);
    out.component[j] = index[j] - sample * width;
    index[j] = sample;
  }
  for (int64_t j = 0; j < n_pairs; ++j) {
    out.sample_offsets[index[j] + 1] = j + 1;  // of a sample the last stays
    out.position[j] = static_cast<int32_t>(out.offsets[out.component[j] + 1]++);
  }
  running_maximum(out.sample_offsets, batch);
  scatter(out, index, n_pairs, n_components);
}

// threshold: a hint of the smallest selected score, and then that score; null when nobody asks.
template <class T>
bool select_batch(const T* scores, SelectionOut out, int64_t batch, int64_t n_components, int64_t n_pairs, T* threshold,
                  int threads) {
  clear_offsets(out, batch, n_components);
  if (n_pairs == 0) return true;
  const Workspace<int32_t> selected(n_pairs + kKept);
  if (selected.data == nullptr) return false;
  const int64_t n = batch * n_components;
  Batch<T> of = {scores, n, n_pairs, pieces_of(n, threads), threshold != nullptr, T{0}};
  if (!select_flat(&of, threshold != nullptr ? *threshold : score_of<T>(kNaN<T>), selected.data)) return false;
  if (threshold != nullptr) *threshold = of.threshold;
  group(selected.data, n_pairs, out, batch, n_components);
  return true;
}

// The smallest of heap[0 : k] is at its root.
template <class U>
inline void sift_down(U* heap, int64_t k, int64_t at) {
  for (;;) {
    int64_t child = 2 * at + 1;
    if (child >= k) return;
    if (child + 1 < k && heap[child + 1] < heap[child]) ++child;
    if (heap[at] <= heap[child]) return;
    const U swap = heap[at];
    heap[at] = heap[child];
    heap[child] = swap;
    at = child;
  }
}

// The k largest of each sample: a heap of k keys finds the sample's threshold, a second walk over the row emits.
template <class T>
bool select_samples(const T* scores, SelectionOut out, int64_t batch, int64_t n_components, int64_t k) {
  typedef Key<T> U;
  clear_offsets(out, batch, n_components);
  if (k == 0) return true;
  const Workspace<U> keys(k);
  const Workspace<int32_t> of_pairs(k * batch);
  U* heap = keys.data;
  int32_t* sample = of_pairs.data;
  if (heap == nullptr || sample == nullptr) return false;
  int64_t emitted = 0;
  for (int64_t s = 0; s < batch; ++s) {
    const T* row = scores + s * n_components;
    for (int64_t c = 0; c < k; ++c) heap[c] = key_of(row[c]);
    for (int64_t at = k / 2 - 1; at >= 0; --at) sift_down(heap, k, at);
    for (int64_t c = k; c < n_components; ++c) {
      const U key = key_of(row[c]);
      if (key <= heap[0]) continue;
      heap[0] = key;
      sift_down(heap, k, 0);
    }
    const U limit = heap[0];
    int64_t ties = 0;
    for (int64_t c = 0; c < k; ++c) ties += heap[c] == limit;
    for (int64_t c = 0; c < n_components; ++c) {
      const U key = key_of(row[c]);
      if (key < limit) continue;
      if (key == limit && ties-- <= 0) continue;
      out.component[emitted] = static_cast<int32_t>(c);
      out.position[emitted] = static_cast<int32_t>(out.offsets[c + 1]++);
      sample[emitted++] = static_cast<int32_t>(s);
    }
    out.sample_offsets[s + 1] = emitted;
  }
  scatter(out, sample, emitted, n_components);
  return true;
}

}  // namespace

// capacity: entries of each instance's lists. counts [I] (may be null): how many pairs each instance selects, at most
// capacity, in place of capacity; what lies beyond is set to zero. k >= 0: k of each sample instead. thresholds [I]
// (may be null, and must be if k >= 0): of each instance a hint of its smallest selected score (not finite: none), and
// then that score; kept where nothing is selected.
template <class T>
bool batch_topk(const T* scores, SelectionOut out, int64_t n_instances, int64_t batch, int64_t n_components,
                int64_t capacity, const int64_t* counts, int64_t k, T* thresholds, int threads) {
  Failure failure;
  threads = worth(n_instances * batch * n_components, threads);
  parallel_for(n_instances, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const SelectionOut at = {out.sample + i * capacity, out.offsets + i * (n_components + 1),
                               out.component + i * capacity, out.sample_offsets + i * (batch + 1),
                               out.position + i * capacity};
      const T* of = scores + i * batch * n_components;
      const int64_t n_pairs = counts == nullptr ? capacity : counts[i];
      const bool ok =
          k >= 0 ? select_samples(of, at, batch, n_components, k)
                 : select_batch(of, at, batch, n_components, n_pairs, thresholds == nullptr ? nullptr : thresholds + i,
                                n_instances == 1 ? threads : 1);
      if (!ok) failure.set();
      for (int64_t j = n_pairs; j < capacity; ++j) at.sample[j] = at.component[j] = at.position[j] = 0;
    }
  });
  return failure.none();
}

#define FASTAPD_INSTANTIATE(T)                                                                                         \
  template bool batch_topk<T>(const T*, SelectionOut, int64_t, int64_t, int64_t, int64_t, const int64_t*, int64_t, T*, \
                              int);
FASTAPD_INSTANTIATE(float)
FASTAPD_INSTANTIATE(double)

}  // namespace FASTAPD_LEVEL
}  // namespace fastapd
