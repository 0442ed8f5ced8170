// y_b = sum over the selected components c of b of (x_b A_c) B_c, forward and backward, from a grouped selection.
//
// Three walks, each owned by the thread that writes its output, so there are no atomics and the result does not depend
// on the number of threads:
//   project     u[k, r]  = x[sample k] . F[c, r, :]          component-major; owner: one component
//   accumulate  y[s, :]  = sum_k sum_r u[k, r] F[c_k, r, :]  sample-major;    owner: one sample
//   outer       G[c, r, :] = sum_k v[k, r] x[sample k]       component-major; owner: one component
// forward  = project(x, At) -> u, accumulate(u, B) -> y
// backward = project(grad_y, B) -> grad_u, accumulate(grad_u, At) -> grad_x, outer(u, grad_y) -> grad_B,
//            outer(grad_u, x) -> grad_At; outer writes its gradient or adds to it
// Accumulation is in T, in registers. Above about one component in eight selected per sample, two dense GEMMs win.
#include "../ops.h"
#include "parallel.h"

namespace fastapd {
namespace FASTAPD_LEVEL {
namespace {

// out[p * ld + r] = x[p] . f[r] for P rows x and R rows f of length d.
template <class T, int P, int R>
inline void dots(const T* const* x, const T* f, int64_t d, T* out, int64_t ld) {
  vec<T> acc[P][R] = {};
  int64_t i = 0;
  for (; i + kLanes<T> <= d; i += kLanes<T>) {
    vec<T> fv[R];
    for (int r = 0; r < R; ++r) fv[r] = load(f + r * d + i);
    for (int p = 0; p < P; ++p) {
      const vec<T> xv = load(x[p] + i);
      for (int r = 0; r < R; ++r) acc[p][r] += xv * fv[r];
    }
  }
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r) {
      T total = sum_lanes<T>(acc[p][r]);
      for (int64_t j = i; j < d; ++j) total += x[p][j] * f[r * d + j];
      out[p * ld + r] = total;
    }
}

template <class T, int P>
inline void dots_rows(const T* const* x, const T* f, int64_t rank, int64_t d, T* out) {
  int64_t r = 0;
  for (; r + 4 <= rank; r += 4) dots<T, P, 4>(x, f + r * d, d, out + r, rank);
  for (; r < rank; ++r) dots<T, P, 1>(x, f + r * d, d, out + r, rank);
}

template <class T>
void project(const T* x, const T* f, Selection selection, T* u, int64_t n_instances, int64_t batch,
             int64_t n_components, int64_t rank, int64_t d, int64_t n_pairs, int threads) {
  threads = worth(n_instances * n_pairs * rank * d, threads);
  parallel_for(n_instances * n_components, 4, threads, [=](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g) {
      const int64_t i = g / n_components, c = g % n_components;
      const int64_t* offsets = selection.offsets + i * (n_components + 1);
      const int32_t* sample = selection.sample + i * n_pairs;
      const T* xi = x + i * batch * d;
      const T* fc = f + g * rank * d;
      T* ui = u + i * n_pairs * rank;
      int64_t k = offsets[c];
      for (; k + 4 <= offsets[c + 1]; k += 4) {
        const T* rows[4] = {xi + sample[k] * d, xi + sample[k + 1] * d, xi + sample[k + 2] * d, xi + sample[k + 3] * d};
        dots_rows<T, 4>(rows, fc, rank, d, ui + k * rank);
      }
      for (; k < offsets[c + 1]; ++k) {
        const T* rows[1] = {xi + sample[k] * d};
        dots_rows<T, 1>(rows, fc, rank, d, ui + k * rank);
      }
    }
  });
}

// y[0 : 4 vectors or fewer] of one sample, held in registers over all its pairs and ranks.
template <class T, int V>
inline void accumulate_tile(const T* u, const T* f, const int32_t* component, const int32_t* position, int64_t n_pairs,
                            int64_t rank, int64_t d, T* y) {
  vec<T> acc[V] = {};
  for (int64_t j = 0; j < n_pairs; ++j) {
    const T* uk = u + position[j] * rank;
    const T* fc = f + component[j] * rank * d;
    for (int64_t r = 0; r < rank; ++r)
      for (int v = 0; v < V; ++v) acc[v] += uk[r] * load(fc + r * d + v * kLanes<T>);
  }
  for (int v = 0; v < V; ++v) store(y + v * kLanes<T>, acc[v]);
}

template <class T>
void accumulate(const T* u, const T* f, Selection selection, T* y, int64_t n_instances, int64_t batch,
                int64_t n_components, int64_t rank, int64_t d, int64_t n_pairs, int threads) {
  threads = worth(n_instances * (n_pairs * rank + batch) * d, threads);
  parallel_for(n_instances * batch, 32, threads, [=](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t i = row / batch, s = row % batch;
      const int64_t* offsets = selection.sample_offsets + i * (batch + 1);
      const int64_t begin = offsets[s], count = offsets[s + 1] - begin;
      const int32_t* component = selection.component + i * n_pairs + begin;
      const int32_t* position = selection.position + i * n_pairs + begin;
      const T* ui = u + i * n_pairs * rank;
      const T* fi = f + i * n_components * rank * d;
      T* out = y + row * d;
      int64_t o = 0;
      for (; o + 4 * kLanes<T> <= d; o += 4 * kLanes<T>)
        accumulate_tile<T, 4>(ui, fi + o, component, position, count, rank, d, out + o);
      for (; o + kLanes<T> <= d; o += kLanes<T>)
        accumulate_tile<T, 1>(ui, fi + o, component, position, count, rank, d, out + o);
      if (o == d) continue;
      for (int64_t t = o; t < d; ++t) out[t] = 0;
      for (int64_t j = 0; j < count; ++j) {
        const T* uk = ui + position[j] * rank;
        const T* fc = fi + component[j] * rank * d;
        for (int64_t r = 0; r < rank; ++r)
          for (int64_t t = o; t < d; ++t) out[t] += uk[r] * fc[r * d + t];
      }
    }
  });
}

// grad[r, 0 : V vectors] for R ranks of one component, held in registers over its pairs; added to what is there, if
// Add.
template <class T, int R, int V, bool Add>
inline void outer_tile(const T* v, const T* x, const int32_t* sample, int64_t n_pairs, int64_t rank, int64_t d,
                       T* grad) {
  vec<T> acc[R][V] = {};
  for (int64_t k = 0; k < n_pairs; ++k) {
    const T* xs = x + sample[k] * d;
    for (int w = 0; w < V; ++w) {
      const vec<T> xv = load(xs + w * kLanes<T>);
      for (int r = 0; r < R; ++r) acc[r][w] += v[k * rank + r] * xv;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < V; ++w) {
      T* to = grad + r * d + w * kLanes<T>;
      store(to, Add ? load(to) + acc[r][w] : acc[r][w]);
    }
}

template <class T, int R, bool Add>
inline void outer_rows(const T* v, const T* x, const int32_t* sample, int64_t n_pairs, int64_t rank, int64_t d,
                       T* grad) {
  int64_t o = 0;
  for (; o + 2 * kLanes<T> <= d; o += 2 * kLanes<T>)
    outer_tile<T, R, 2, Add>(v, x + o, sample, n_pairs, rank, d, grad + o);
  for (; o + kLanes<T> <= d; o += kLanes<T>) outer_tile<T, R, 1, Add>(v, x + o, sample, n_pairs, rank, d, grad + o);
  for (int r = 0; r < R; ++r)
    for (int64_t t = o; t < d; ++t) {
      T total = 0;
      for (int64_t k = 0; k < n_pairs; ++k) total += v[k * rank + r] * x[sample[k] * d + t];
      grad[r * d + t] = Add ? grad[r * d + t] + total : total;
    }
}

template <class T, bool Add>
void outer(const T* v, const T* x, Selection selection, T* grad, int64_t n_instances, int64_t batch,
           int64_t n_components, int64_t rank, int64_t d, int64_t n_pairs, int threads) {
  threads = worth(n_instances * (n_pairs + n_components) * rank * d, threads);
  parallel_for(n_instances * n_components, 4, threads, [=](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g) {
      const int64_t i = g / n_components, c = g % n_components;
      const int64_t* offsets = selection.offsets + i * (n_components + 1);
      const int64_t begin = offsets[c], count = offsets[c + 1] - begin;
      if (Add && count == 0) continue;
      const int32_t* sample = selection.sample + i * n_pairs + begin;
      const T* xi = x + i * batch * d;
      const T* vc = v + (i * n_pairs + begin) * rank;
      T* gc = grad + g * rank * d;
      int64_t r = 0;
      for (; r + 4 <= rank; r += 4) outer_rows<T, 4, Add>(vc + r, xi, sample, count, rank, d, gc + r * d);
      for (; r < rank; ++r) outer_rows<T, 1, Add>(vc + r, xi, sample, count, rank, d, gc + r * d);
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
  const auto outer_of = add ? outer<T, true> : outer<T, false>;
  if (grad_At != nullptr)
    outer_of(grad_u, x, selection, grad_At, n.n_instances, n.batch, n.n_components, n.rank, n.d_in, n.n_pairs, threads);
  if (grad_B != nullptr)
    outer_of(u, grad_y, selection, grad_B, n.n_instances, n.batch, n.n_components, n.rank, n.d_out, n.n_pairs, threads);
}

#define FASTAPD_INSTANTIATE(T)                                                                                      \
  template void component_forward_selected<T>(const T*, const T*, const T*, Selection, T*, T*, ForwardSizes, int);  \
  template void component_forward_selected_backward<T>(const T*, const T*, const T*, const T*, const T*, Selection, \
                                                       T*, T*, T*, T*, bool, ForwardSizes, int);
FASTAPD_INSTANTIATE(float)
FASTAPD_INSTANTIATE(double)

}  // namespace FASTAPD_LEVEL
}  // namespace fastapd
