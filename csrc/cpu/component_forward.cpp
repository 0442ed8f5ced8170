// y_b = sum over the selected components c of b of (x_b A_c) B_c, forward and backward, from a grouped selection.
//
// Three walks, all component-major, so that the factors of a component are read once for all its samples. Each piece of
// an output is written by one thread, in an order that does not depend on their number, so there are no atomics:
//   project     u[k, r]  = x[sample k] . F[c, r, :]          owner: one component
//   accumulate  y[s, :] += sum_r u[k, r] F[c, r, :]          owner: a block of samples and columns
//   outer       G[c, r, :] = sum_k v[k, r] x[sample k]       owner: one component; G is written or added to
// forward  = project(x, At) -> u, accumulate(u, B) -> y
// backward = project(grad_y, B) -> grad_u, accumulate(grad_u, At) -> grad_x, outer(u, grad_y) -> grad_B,
//            outer(grad_u, x) -> grad_At
// Each works on tiles of at most four rows of one operand by four of the other (or by four vectors of columns), which
// is what sixteen accumulators in registers hold. The last columns, fewer than a vector, are a vector with a mask.
// Accumulation is in T, in registers. Above about one component in eight selected per sample, two dense GEMMs win.
#include "../ops.h"
#include "parallel.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastapd {
namespace FASTAPD_LEVEL {
namespace {

constexpr int kTile = 4;  // rows, ranks or vectors of columns at once

// The first n entries of a vector, 1 <= n <= its lanes, in memory that ends behind them.
template <class T>
struct Part {
  explicit Part(int64_t n) : n(n) {}
  vec<T> load(const T* p) const {
    vec<T> v = {};
    for (int64_t lane = 0; lane < n; ++lane) v[lane] = p[lane];
    return v;
  }
  void store(T* p, vec<T> v) const {
    for (int64_t lane = 0; lane < n; ++lane) p[lane] = v[lane];
  }
  const int64_t n;
};

#if defined(__AVX512F__)
template <>
struct Part<float> {
  explicit Part(int64_t n) : mask(static_cast<__mmask16>((1u << n) - 1)) {}
  vec<float> load(const float* p) const { return _mm512_maskz_loadu_ps(mask, p); }
  void store(float* p, vec<float> v) const { _mm512_mask_storeu_ps(p, mask, v); }
  const __mmask16 mask;
};
template <>
struct Part<double> {
  explicit Part(int64_t n) : mask(static_cast<__mmask8>((1u << n) - 1)) {}
  vec<double> load(const double* p) const { return _mm512_maskz_loadu_pd(mask, p); }
  void store(double* p, vec<double> v) const { _mm512_mask_storeu_pd(p, mask, v); }
  const __mmask8 mask;
};
#elif defined(__AVX2__)
template <>
struct Part<float> {
  explicit Part(int64_t n)
      : mask(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))) {}
  vec<float> load(const float* p) const { return _mm256_maskload_ps(p, mask); }
  void store(float* p, vec<float> v) const { _mm256_maskstore_ps(p, mask, v); }
  const __m256i mask;
};
template <>
struct Part<double> {
  explicit Part(int64_t n) : mask(_mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3))) {}
  vec<double> load(const double* p) const { return _mm256_maskload_pd(p, mask); }
  void store(double* p, vec<double> v) const { _mm256_maskstore_pd(p, mask, v); }
  const __m256i mask;
};
#endif

// Columns 0 .. V vectors of a row, the last vector in part if Masked.
template <class T, int V, bool Masked>
inline vec<T> load_column(const T* row, int v, const Part<T>& part) {
  return Masked && v == V - 1 ? part.load(row + v * kLanes<T>) : load(row + v * kLanes<T>);
}
template <class T, int V, bool Masked>
inline void store_column(T* row, int v, vec<T> value, const Part<T>& part) {
  if (Masked && v == V - 1)
    part.store(row + v * kLanes<T>, value);
  else
    store(row + v * kLanes<T>, value);
}

// Asks for the next component's part of a factor, or of its gradient, a little at each of `calls` tiles of this one, so
// that it is in the second level of cache when its turn comes: a walk has few multiplications for each byte.
struct Ahead {
  template <class T>
  Ahead(const T* next, bool there, int64_t values, int64_t calls)
      : at(reinterpret_cast<const char*>(next)), end(at + (there ? values * static_cast<int64_t>(sizeof(T)) : 0)) {
    step = calls > 0 ? ((end - at + calls - 1) / calls + kLine - 1) / kLine * kLine : 0;
    if (end - at > kMost) end = at;
  }
  void some() {
    const char* stop = end - at < step ? end : at + step;
    for (; at < stop; at += kLine) __builtin_prefetch(at, 0, 2);
  }
  static constexpr int64_t kLine = 64, kMost = 1 << 19;
  const char* at;
  const char* end;
  int64_t step;
};

inline int64_t tiles_of(int64_t n) {
  return (n + kTile - 1) / kTile;
}

// ----------------------------------------------------------------------------------------------------------- project

template <int... I>
struct Indices {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  typedef Indices<I...> type;
};

// a and b hold sums in segments of W lanes; the result holds those of a, then those of b, in segments of W / 2.
template <class T, int W, int... Lane>
inline vec<T> halve(vec<T> a, vec<T> b, Indices<Lane...>) {
  constexpr int H = W / 2;
  return __builtin_shufflevector(a, b, (Lane / H * W + Lane % H)...) +
         __builtin_shufflevector(a, b, (Lane / H * W + Lane % H + H)...);
}

// The sum of the lanes of each of N vectors, N a power of two up to their lanes, in the first N lanes. W is the width
// of the segments that are left to sum, M how many vectors are left.
template <class T, int M, int W>
inline vec<T> sums(vec<T>* v) {
  if constexpr (W == 1) {
    return v[0];
  } else {
    typedef typename Count<static_cast<int>(kLanes<T>)>::type lanes;
    constexpr int left = M > 1 ? M / 2 : 1;
    for (int j = 0; j < left; ++j) v[j] = halve<T, W>(v[M > 1 ? 2 * j : 0], v[M > 1 ? 2 * j + 1 : 0], lanes());
    return sums<T, left, W / 2>(v);
  }
}

constexpr int power_of_two(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// out[p * ld + r] = x[p] . f[r] for P rows x and R rows f of length d.
template <class T, int P, int R>
inline void dots(const T* const* x, const T* f, int64_t d, const Part<T>& part, T* out, int64_t ld) {
  constexpr int lanes = static_cast<int>(kLanes<T>), n = power_of_two(P * R), group = n < lanes ? n : lanes;
  vec<T> acc[n] = {};
  int64_t i = 0;
  const auto step = [&](auto loaded) {
    vec<T> fv[R];
    for (int r = 0; r < R; ++r) fv[r] = loaded(f + r * d + i);
    for (int p = 0; p < P; ++p) {
      const vec<T> xv = loaded(x[p] + i);
      for (int r = 0; r < R; ++r) acc[p * R + r] += xv * fv[r];
    }
  };
  for (; i + kLanes<T> < d; i += kLanes<T>) step([](const T* at) { return load(at); });
  step([&](const T* at) { return part.load(at); });
  T total[n < lanes ? lanes : n];
  for (int g = 0; g < n; g += group) store(total + g, sums<T, group, lanes>(acc + g));
  for (int p = 0; p < P; ++p) __builtin_memcpy(out + p * ld, total + p * R, R * sizeof(T));
}

template <class T, int P>
inline void dots_rows(const T* const* x, const T* f, int64_t rank, int64_t d, const Part<T>& part, T* out,
                      Ahead& ahead) {
  int64_t r = 0;
  for (; r + kTile <= rank; r += kTile) {
    ahead.some();
    dots<T, P, 4>(x, f + r * d, d, part, out + r, rank);
  }
  if (r < rank) ahead.some();
  switch (rank - r) {
    case 3:
      return dots<T, P, 3>(x, f + r * d, d, part, out + r, rank);
    case 2:
      return dots<T, P, 2>(x, f + r * d, d, part, out + r, rank);
    case 1:
      return dots<T, P, 1>(x, f + r * d, d, part, out + r, rank);
  }
}

// How much of the last vector of d columns there is: 1 .. all of it; of none, anything.
template <class T>
inline int64_t last_part(int64_t d) {
  return d > 0 ? (d - 1) % kLanes<T> + 1 : 1;
}

template <class T>
void project(const T* x, const T* f, Selection selection, T* u, int64_t n_instances, int64_t batch,
             int64_t n_components, int64_t rank, int64_t d, int64_t n_pairs, int threads) {
  threads = worth(n_instances * n_pairs * rank * d, threads);
  parallel_for(n_instances * n_components, 4, threads, [=](int64_t first, int64_t last) {
    const Part<T> part(last_part<T>(d));
    for (int64_t g = first; g < last; ++g) {
      const int64_t i = g / n_components, c = g % n_components;
      const int64_t* offsets = selection.offsets + i * (n_components + 1);
      const int32_t* sample = selection.sample + i * n_pairs;
      const T* xi = x + i * batch * d;
      const T* fc = f + g * rank * d;
      T* ui = u + i * n_pairs * rank;
      Ahead ahead(fc + rank * d, g + 1 < last, rank * d, tiles_of(offsets[c + 1] - offsets[c]) * tiles_of(rank));
      for (int64_t k = offsets[c]; k < offsets[c + 1]; k += kTile) {
        T* to = ui + k * rank;
        const int64_t n = offsets[c + 1] - k < kTile ? offsets[c + 1] - k : kTile;
        if (d == 0) {
          for (int64_t j = 0; j < n * rank; ++j) to[j] = 0;
          continue;
        }
        const T* rows[kTile];
        for (int64_t p = 0; p < n; ++p) rows[p] = xi + sample[k + p] * d;
        switch (n) {
          case 4:
            dots_rows<T, 4>(rows, fc, rank, d, part, to, ahead);
            break;
          case 3:
            dots_rows<T, 3>(rows, fc, rank, d, part, to, ahead);
            break;
          case 2:
            dots_rows<T, 2>(rows, fc, rank, d, part, to, ahead);
            break;
          default:
            dots_rows<T, 1>(rows, fc, rank, d, part, to, ahead);
        }
      }
    }
  });
}

// -------------------------------------------------------------------------------------------------------- accumulate

// y[p] += sum_r u[p * rank + r] f[r] for P rows y, V vectors of columns of them.
template <class T, int P, int V, bool Masked>
inline void accumulate_tile(const T* u, const T* f, int64_t rank, int64_t d, T* const* y, int64_t o,
                            const Part<T>& part) {
  vec<T> acc[P][V];
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) acc[p][v] = load_column<T, V, Masked>(y[p] + o, v, part);
  for (int64_t r = 0; r < rank; ++r) {
    vec<T> fv[V];
    for (int v = 0; v < V; ++v) fv[v] = load_column<T, V, Masked>(f + r * d + o, v, part);
    for (int p = 0; p < P; ++p)
      for (int v = 0; v < V; ++v) acc[p][v] += u[p * rank + r] * fv[v];
  }
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) store_column<T, V, Masked>(y[p] + o, v, acc[p][v], part);
}

template <class T, int V, bool Masked>
inline void accumulate_rows(const T* u, const T* f, int64_t rank, int64_t d, const int32_t* sample, int64_t n, T* y,
                            int64_t o, const Part<T>& part, Ahead& ahead) {
  for (int64_t k = 0; k < n; k += kTile) {
    ahead.some();
    const int64_t left = n - k < kTile ? n - k : kTile;
    T* rows[kTile];
    for (int64_t p = 0; p < left; ++p) rows[p] = y + sample[k + p] * d;
    const T* uk = u + k * rank;
    switch (left) {
      case 4:
        accumulate_tile<T, 4, V, Masked>(uk, f, rank, d, rows, o, part);
        break;
      case 3:
        accumulate_tile<T, 3, V, Masked>(uk, f, rank, d, rows, o, part);
        break;
      case 2:
        accumulate_tile<T, 2, V, Masked>(uk, f, rank, d, rows, o, part);
        break;
      default:
        accumulate_tile<T, 1, V, Masked>(uk, f, rank, d, rows, o, part);
    }
  }
}

// The first of n ascending numbers that is not less than bound.
inline int64_t first_from(const int32_t* numbers, int64_t n, int64_t bound) {
  int64_t low = 0;
  while (low < n) {
    const int64_t middle = low + (n - low) / 2;
    if (numbers[middle] < bound)
      low = middle + 1;
    else
      n = middle;
  }
  return low;
}

template <class T>
void accumulate(const T* u, const T* f, Selection selection, T* y, int64_t n_instances, int64_t batch,
                int64_t n_components, int64_t rank, int64_t d, int64_t n_pairs, int threads) {
  if (d == 0) return;
  constexpr int64_t tile = kTile * kLanes<T>;
  threads = worth(n_instances * (n_pairs * rank + batch) * d, threads);
  // One thread takes all: the factors pass by once. Several share columns, then samples, whose sums do not mix.
  const int64_t column_blocks = threads > 1 ? (d + 2 * tile - 1) / (2 * tile) : 1;
  const int64_t wanted = 4 * threads / (n_instances * column_blocks + 1);
  const int64_t sample_blocks = threads > 1 && wanted > 1 ? wanted : 1;
  const int64_t columns = threads > 1 ? 2 * tile : d, samples = (batch + sample_blocks - 1) / sample_blocks;
  parallel_for(n_instances * column_blocks * sample_blocks, 1, threads, [=](int64_t first, int64_t last) {
    const Part<T> part(last_part<T>(d));
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t i = piece / (column_blocks * sample_blocks);
      const int64_t o_begin = piece / sample_blocks % column_blocks * columns;
      const int64_t o_end = o_begin + columns < d ? o_begin + columns : d;
      const int64_t s_begin = piece % sample_blocks * samples;
      const int64_t s_end = s_begin + samples < batch ? s_begin + samples : batch;
      const int64_t* offsets = selection.offsets + i * (n_components + 1);
      T* yi = y + i * batch * d;
      if (columns >= d) {
        if (s_begin < s_end) __builtin_memset(yi + s_begin * d, 0, (s_end - s_begin) * d * sizeof(T));
      } else {
        for (int64_t s = s_begin; s < s_end; ++s)
          __builtin_memset(yi + s * d + o_begin, 0, (o_end - o_begin) * sizeof(T));
      }
      for (int64_t c = 0; c < n_components; ++c) {
        int64_t begin = offsets[c], n = offsets[c + 1] - begin;
        const int32_t* sample = selection.sample + i * n_pairs + begin;
        if (sample_blocks > 1) {
          const int64_t skipped = first_from(sample, n, s_begin);
          n = first_from(sample, n, s_end) - skipped;
          begin += skipped;
          sample += skipped;
        }
        if (n == 0) continue;
        const T* uc = u + (i * n_pairs + begin) * rank;
        const T* fc = f + (i * n_components + c) * rank * d;
        const int64_t calls = tiles_of(n) * tiles_of((d + kLanes<T> - 1) / kLanes<T>);
        Ahead ahead(fc + rank * d, c + 1 < n_components && columns >= d, rank * d, calls);
        int64_t o = o_begin;
        for (; o + tile <= o_end; o += tile)
          accumulate_rows<T, 4, false>(uc, fc, rank, d, sample, n, yi, o, part, ahead);
        switch ((o_end - o + kLanes<T> - 1) / kLanes<T>) {
          case 4:
            accumulate_rows<T, 4, true>(uc, fc, rank, d, sample, n, yi, o, part, ahead);
            break;
          case 3:
            accumulate_rows<T, 3, true>(uc, fc, rank, d, sample, n, yi, o, part, ahead);
            break;
          case 2:
            accumulate_rows<T, 2, true>(uc, fc, rank, d, sample, n, yi, o, part, ahead);
            break;
          case 1:
            accumulate_rows<T, 1, true>(uc, fc, rank, d, sample, n, yi, o, part, ahead);
            break;
        }
      }
    }
  });
}

// ------------------------------------------------------------------------------------------------------------- outer

// grad[r, V vectors of columns] for R ranks of one component, in registers over its pairs; added to, if Add.
template <class T, int R, int V, bool Masked, bool Add>
inline void outer_tile(const T* v, const T* x, const int32_t* sample, int64_t n_pairs, int64_t rank, int64_t d,
                       const Part<T>& part, T* grad) {
  vec<T> acc[R][V] = {};
  for (int64_t k = 0; k < n_pairs; ++k) {
    const T* xs = x + sample[k] * d;
    vec<T> xv[V];
    for (int w = 0; w < V; ++w) xv[w] = load_column<T, V, Masked>(xs, w, part);
    for (int r = 0; r < R; ++r)
      for (int w = 0; w < V; ++w) acc[r][w] += v[k * rank + r] * xv[w];
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < V; ++w) {
      T* row = grad + r * d;
      const vec<T> sum = Add ? load_column<T, V, Masked>(row, w, part) + acc[r][w] : acc[r][w];
      store_column<T, V, Masked>(row, w, sum, part);
    }
}

template <class T, int V, bool Masked, bool Add>
inline void outer_rows(const T* v, const T* x, const int32_t* sample, int64_t n_pairs, int64_t rank, int64_t d,
                       const Part<T>& part, T* grad, Ahead& ahead) {
  int64_t r = 0;
  for (; r + kTile <= rank; r += kTile) {
    ahead.some();
    outer_tile<T, 4, V, Masked, Add>(v + r, x, sample, n_pairs, rank, d, part, grad + r * d);
  }
  if (r < rank) ahead.some();
  switch (rank - r) {
    case 3:
      return outer_tile<T, 3, V, Masked, Add>(v + r, x, sample, n_pairs, rank, d, part, grad + r * d);
    case 2:
      return outer_tile<T, 2, V, Masked, Add>(v + r, x, sample, n_pairs, rank, d, part, grad + r * d);
    case 1:
      return outer_tile<T, 1, V, Masked, Add>(v + r, x, sample, n_pairs, rank, d, part, grad + r * d);
  }
}

// All columns of one component's gradient.
template <class T, bool Add>
inline void outer_component(const T* v, const T* x, const int32_t* sample, int64_t n_pairs, int64_t rank, int64_t d,
                            const Part<T>& part, T* grad, Ahead& ahead) {
  constexpr int64_t tile = kTile * kLanes<T>;
  int64_t o = 0;
  for (; o + tile <= d; o += tile)
    outer_rows<T, 4, false, Add>(v, x + o, sample, n_pairs, rank, d, part, grad + o, ahead);
  switch ((d - o + kLanes<T> - 1) / kLanes<T>) {
    case 4:
      return outer_rows<T, 4, true, Add>(v, x + o, sample, n_pairs, rank, d, part, grad + o, ahead);
    case 3:
      return outer_rows<T, 3, true, Add>(v, x + o, sample, n_pairs, rank, d, part, grad + o, ahead);
    case 2:
      return outer_rows<T, 2, true, Add>(v, x + o, sample, n_pairs, rank, d, part, grad + o, ahead);
    case 1:
      return outer_rows<T, 1, true, Add>(v, x + o, sample, n_pairs, rank, d, part, grad + o, ahead);
  }
}

template <class T>
void outer(const T* v, const T* x, Selection selection, T* grad, bool add, int64_t n_instances, int64_t batch,
           int64_t n_components, int64_t rank, int64_t d, int64_t n_pairs, int threads) {
  threads = worth(n_instances * (n_pairs + n_components) * rank * d, threads);
  parallel_for(n_instances * n_components, 4, threads, [=](int64_t first, int64_t last) {
    const Part<T> part(last_part<T>(d));
    for (int64_t g = first; g < last; ++g) {
      const int64_t i = g / n_components, c = g % n_components;
      const int64_t* offsets = selection.offsets + i * (n_components + 1);
      const int64_t begin = offsets[c], n = offsets[c + 1] - begin;
      if (add && n == 0) continue;
      const int32_t* sample = selection.sample + i * n_pairs + begin;
      const T* xi = x + i * batch * d;
      const T* vc = v + (i * n_pairs + begin) * rank;
      T* gc = grad + g * rank * d;
      Ahead ahead(gc + rank * d, g + 1 < last, rank * d, tiles_of((d + kLanes<T> - 1) / kLanes<T>) * tiles_of(rank));
      if (add)
        outer_component<T, true>(vc, xi, sample, n, rank, d, part, gc, ahead);
      else
        outer_component<T, false>(vc, xi, sample, n, rank, d, part, gc, ahead);
    }
  });
}

}  // namespace

template <class T>
void component_forward_selected(const T* x, const T* At, const T* B, Selection selection, T* u, T* y, ForwardSizes n,
                                int threads) {
  project(x, At, selection, u, n.n_instances, n.batch, n.n_components, n.rank, n.d_in, n.n_pairs, threads);
  accumulate(u, B, selection, y, n.n_instances, n.batch, n.n_components, n.rank, n.d_out, n.n_pairs, threads);
}

template <class T>
void component_forward_selected_backward(const T* grad_y, const T* x, const T* At, const T* B, const T* u,
                                         Selection selection, T* grad_u, T* grad_x, T* grad_At, T* grad_B, bool add,
                                         ForwardSizes n, int threads) {
  if (grad_x != nullptr || grad_At != nullptr)
    project(grad_y, B, selection, grad_u, n.n_instances, n.batch, n.n_components, n.rank, n.d_out, n.n_pairs, threads);
  if (grad_x != nullptr)
    accumulate(grad_u, At, selection, grad_x, n.n_instances, n.batch, n.n_components, n.rank, n.d_in, n.n_pairs,
               threads);
  if (grad_At != nullptr)
    outer(grad_u, x, selection, grad_At, add, n.n_instances, n.batch, n.n_components, n.rank, n.d_in, n.n_pairs,
          threads);
  if (grad_B != nullptr)
    outer(u, grad_y, selection, grad_B, add, n.n_instances, n.batch, n.n_components, n.rank, n.d_out, n.n_pairs,
          threads);
}

#define FASTAPD_INSTANTIATE(T)                                                                                      \
  template void component_forward_selected<T>(const T*, const T*, const T*, Selection, T*, T*, ForwardSizes, int);  \
  template void component_forward_selected_backward<T>(const T*, const T*, const T*, const T*, const T*, Selection, \
                                                       T*, T*, T*, T*, bool, ForwardSizes, int);
FASTAPD_INSTANTIATE(float)
FASTAPD_INSTANTIATE(double)

}  // namespace FASTAPD_LEVEL
}  // namespace fastapd
