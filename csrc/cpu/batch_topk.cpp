// The largest of batch * n_components scores of each instance, or of each sample, exactly, as a grouped selection.
//
// Radix select: scores become unsigned keys whose order is the contract's (NaN largest, -0 = +0, denormals in order).
// One pass counts the leading digit, the keys of the digit that holds the threshold are compacted, and the remaining
// digits are resolved on those alone. One more pass emits every key above the threshold and the first of those equal
// to it, in flat (sample-major) order; counts per component then give the component-major list by a stable scatter.
// Work: two reads of the scores plus O(n_pairs). One thread owns one instance.
#include <cstring>

#include "../ops.h"
#include "parallel.h"

namespace fastapd {
namespace FASTAPD_LEVEL {
namespace {

template <class T>
struct Key;
template <>
struct Key<float> {
  typedef uint32_t type;
  static constexpr int kBits = 32;
};
template <>
struct Key<double> {
  typedef uint64_t type;
  static constexpr int kBits = 64;
};

template <class T>
inline typename Key<T>::type key_of(T score) {
  typedef typename Key<T>::type U;
  if (score != score) return ~U{0};
  score += T{0};  // -0 becomes +0
  U bits;
  std::memcpy(&bits, &score, sizeof bits);
  const U sign = U{1} << (Key<T>::kBits - 1);
  return bits & sign ? ~bits : bits | sign;
}

constexpr int kDigitBits = 11;
constexpr int64_t kBuckets = int64_t{1} << kDigitBits;

// Finds the bucket that holds the wanted-th largest; wanted becomes its rank inside that bucket.
inline int64_t find_bucket(const int64_t* histogram, int64_t* wanted) {
  int64_t bucket = kBuckets - 1;
  while (histogram[bucket] < *wanted) *wanted -= histogram[bucket--];
  return bucket;
}

// The wanted-th largest key, and in *ties how many keys equal to it belong to the selection.
template <class T>
bool threshold(const T* scores, int64_t n, int64_t wanted, typename Key<T>::type* result, int64_t* ties) {
  typedef typename Key<T>::type U;
  int64_t histogram[kBuckets];
  std::memset(histogram, 0, sizeof histogram);
  int shift = Key<T>::kBits - kDigitBits;
  for (int64_t i = 0; i < n; ++i) ++histogram[key_of(scores[i]) >> shift];
  U digit = static_cast<U>(find_bucket(histogram, &wanted));
  int64_t n_left = histogram[digit];
  const Workspace<U> kept(n_left);
  U* left = kept.data;
  if (left == nullptr) return false;
  int64_t filled = 0;
  for (int64_t i = 0; i < n; ++i) {
    const U key = key_of(scores[i]);
    if (key >> shift == digit) left[filled++] = key;
  }
  U prefix = digit << shift;
  while (shift > 0) {
    const int width = shift < kDigitBits ? shift : kDigitBits;
    shift -= width;
    const U mask = (U{1} << width) - 1;
    std::memset(histogram, 0, sizeof histogram);
    for (int64_t i = 0; i < n_left; ++i) ++histogram[(left[i] >> shift) & mask];
    digit = static_cast<U>(find_bucket(histogram, &wanted));
    filled = 0;
    for (int64_t i = 0; i < n_left; ++i)
      if (((left[i] >> shift) & mask) == digit) left[filled++] = left[i];
    n_left = filled;
    prefix |= digit << shift;
  }
  *result = prefix;
  *ties = wanted;
  return true;
}

// From the sample-major list (component, sample_offsets) and the counts in offsets[c + 1] to the component-major one.
inline bool group_by_component(SelectionOut out, int64_t batch, int64_t n_components) {
  const Workspace<int64_t> cursors(n_components);
  int64_t* cursor = cursors.data;
  if (cursor == nullptr) return false;
  for (int64_t c = 0; c < n_components; ++c) {
    cursor[c] = out.offsets[c];
    out.offsets[c + 1] += out.offsets[c];
  }
  for (int64_t s = 0; s < batch; ++s)
    for (int64_t j = out.sample_offsets[s]; j < out.sample_offsets[s + 1]; ++j) {
      const int64_t place = cursor[out.component[j]]++;
      out.sample[place] = static_cast<int32_t>(s);
      out.position[j] = static_cast<int32_t>(place);
    }
  return true;
}

inline void clear_offsets(SelectionOut out, int64_t batch, int64_t n_components) {
  std::memset(out.offsets, 0, sizeof(int64_t) * static_cast<size_t>(n_components + 1));
  std::memset(out.sample_offsets, 0, sizeof(int64_t) * static_cast<size_t>(batch + 1));
}

template <class T>
bool select_batch(const T* scores, SelectionOut out, int64_t batch, int64_t n_components, int64_t n_pairs) {
  typedef typename Key<T>::type U;
  clear_offsets(out, batch, n_components);
  if (n_pairs == 0) return true;
  U limit;
  int64_t ties;
  if (!threshold(scores, batch * n_components, n_pairs, &limit, &ties)) return false;
  int64_t emitted = 0;
  for (int64_t s = 0; s < batch; ++s) {
    const T* row = scores + s * n_components;
    for (int64_t c = 0; c < n_components; ++c) {
      const U key = key_of(row[c]);
      if (key < limit) continue;
      if (key == limit && ties-- <= 0) continue;
      out.component[emitted++] = static_cast<int32_t>(c);
      ++out.offsets[c + 1];
    }
    out.sample_offsets[s + 1] = emitted;
  }
  return group_by_component(out, batch, n_components);
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
  typedef typename Key<T>::type U;
  clear_offsets(out, batch, n_components);
  if (k == 0) return true;
  const Workspace<U> keys(k);
  U* heap = keys.data;
  if (heap == nullptr) return false;
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
      out.component[emitted++] = static_cast<int32_t>(c);
      ++out.offsets[c + 1];
    }
    out.sample_offsets[s + 1] = emitted;
  }
  return group_by_component(out, batch, n_components);
}

}  // namespace

// capacity: entries of each instance's lists. counts [I] (may be null): how many pairs each instance selects, at most
// capacity, in place of capacity; what lies beyond is set to zero. k >= 0: k of each sample instead.
template <class T>
bool batch_topk(const T* scores, SelectionOut out, int64_t n_instances, int64_t batch, int64_t n_components,
                int64_t capacity, const int64_t* counts, int64_t k, int threads) {
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
          k >= 0 ? select_samples(of, at, batch, n_components, k) : select_batch(of, at, batch, n_components, n_pairs);
      if (!ok) failure.set();
      for (int64_t j = n_pairs; j < capacity; ++j) at.sample[j] = at.component[j] = at.position[j] = 0;
    }
  });
  return failure.none();
}

#define FASTAPD_INSTANTIATE(T) \
  template bool batch_topk<T>(const T*, SelectionOut, int64_t, int64_t, int64_t, int64_t, const int64_t*, int64_t, int);
FASTAPD_INSTANTIATE(float)
FASTAPD_INSTANTIATE(double)

}  // namespace FASTAPD_LEVEL
}  // namespace fastapd
