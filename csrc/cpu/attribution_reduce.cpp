// a[b, c] = sum over outputs o of ( sum over layers l of <x_lb A_lc, g_lbo B_lc^T> )^2, samples in vector lanes.
//
// A thread owns a block of as many samples as a vector has lanes. It packs their inputs and gradients transposed, so
// that one vector holds one entry of all of them; then for every component it forms u = x A_c, z = u B_c for all
// layers, and T_o = z . g_o, with the factors' entries as broadcast scalars. T is squared and summed in registers and
// written once. Accumulation is in T, layers are summed before the square, the result does not depend on threads.
// No lane is wasted on short rows, which is what toy models have. Once the packed gradients of a block leave the L2
// cache (n_outputs * sum d_out beyond some thousands) a GEMM per sample is better and the backend refuses.
#include "../ops.h"
#include "parallel.h"

namespace fastapd {
namespace FASTAPD_LEVEL {
namespace {

// packed[entry * lanes + lane] = source[lane * stride + entry] for n lanes; the others are zero.
template <class T>
inline void pack(const T* source, int64_t stride, int64_t entries, int64_t n, T* packed) {
  for (int64_t e = 0; e < entries; ++e) {
    T* row = packed + e * kLanes<T>;
    for (int64_t lane = 0; lane < n; ++lane) row[lane] = source[lane * stride + e];
    for (int64_t lane = n; lane < kLanes<T>; ++lane) row[lane] = 0;
  }
}

// z[0 : d_out] = (x A_c) B_c of one layer for all lanes.
template <class T>
inline void component_output(const T* x, const T* At, const T* B, int64_t rank, int64_t d_in, int64_t d_out, T* z) {
  for (int64_t o = 0; o < d_out; ++o) store(z + o * kLanes<T>, vec<T>{});
  for (int64_t r = 0; r < rank; ++r) {
    vec<T> u = {};
    for (int64_t d = 0; d < d_in; ++d) u += At[r * d_in + d] * load(x + d * kLanes<T>);
    for (int64_t o = 0; o < d_out; ++o) {
      T* zo = z + o * kLanes<T>;
      store(zo, load(zo) + u * B[r * d_out + o]);
    }
  }
}

// sum over N outputs of (z . g_o)^2, for all lanes.
template <class T, int N>
inline vec<T> squares(const T* z, const T* g, int64_t width) {
  vec<T> t[N] = {};
  for (int64_t d = 0; d < width; ++d) {
    const vec<T> zd = load(z + d * kLanes<T>);
    for (int o = 0; o < N; ++o) t[o] += zd * load(g + (o * width + d) * kLanes<T>);
  }
  vec<T> sum = {};
  for (int o = 0; o < N; ++o) sum += t[o] * t[o];
  return sum;
}

// The inputs and gradients of the n samples from `first` on, for all layers: packed_x [sum d_in], packed_g
// [n_outputs, sum d_out] vectors.
template <class T>
void pack_block(const AttributionLayer<T>* layers, int64_t n_layers, int64_t instance, int64_t first, int64_t n,
                int64_t batch, int64_t n_outputs, int64_t width, T* packed_x, T* packed_g) {
  int64_t at = 0;  // where the layer's outputs start among the concatenated widths
  for (int64_t l = 0; l < n_layers; ++l) {
    const AttributionLayer<T>& layer = layers[l];
    pack(layer.x + (instance * batch + first) * layer.d_in, layer.d_in, layer.d_in, n, packed_x);
    packed_x += layer.d_in * kLanes<T>;
    const T* g = layer.g + instance * layer.g_stride_i + first * layer.g_stride_b;
    for (int64_t o = 0; o < n_outputs; ++o)
      pack(g + o * layer.g_stride_o, layer.g_stride_b, layer.d_out, n, packed_g + (o * width + at) * kLanes<T>);
    at += layer.d_out;
  }
}

template <class T>
void reduce_block(const AttributionLayer<T>* layers, int64_t n_layers, int64_t instance, int64_t first, int64_t n,
                  int64_t batch, int64_t n_components, int64_t n_outputs, int64_t width, T* packed_x, T* packed_g, T* z,
                  T* out) {
  pack_block(layers, n_layers, instance, first, n, batch, n_outputs, width, packed_x, packed_g);
  for (int64_t c = 0; c < n_components; ++c) {
    const T* px = packed_x;
    T* pz = z;
    for (int64_t l = 0; l < n_layers; ++l) {
      const AttributionLayer<T>& layer = layers[l];
      const int64_t component = (instance * n_components + c) * layer.rank;
      component_output(px, layer.At + component * layer.d_in, layer.B + component * layer.d_out, layer.rank, layer.d_in,
                       layer.d_out, pz);
      px += layer.d_in * kLanes<T>;
      pz += layer.d_out * kLanes<T>;
    }
    vec<T> total = {};
    int64_t o = 0;
    for (; o + 4 <= n_outputs; o += 4) total += squares<T, 4>(z, packed_g + o * width * kLanes<T>, width);
    for (; o < n_outputs; ++o) total += squares<T, 1>(z, packed_g + o * width * kLanes<T>, width);
    for (int64_t lane = 0; lane < n; ++lane) out[(instance * batch + first + lane) * n_components + c] = total[lane];
  }
}

}  // namespace

template <class T>
bool attribution_reduce(const AttributionLayer<T>* layers, int64_t n_layers, T* out, int64_t n_instances, int64_t batch,
                        int64_t n_components, int64_t n_outputs, int threads) {
  int64_t width_in = 0, width = 0;
  for (int64_t l = 0; l < n_layers; ++l) {
    width_in += layers[l].d_in;
    width += layers[l].d_out;
  }
  const int64_t blocks = (batch + kLanes<T> - 1) / kLanes<T>;
  const int64_t entries = width_in + (n_outputs + 1) * width;
  Failure failure;
  threads = worth(n_instances * batch * n_components * n_outputs * width, threads);
  parallel_for(n_instances * blocks, 4, threads, [&](int64_t begin, int64_t end) {
    const Workspace<T> work(entries * kLanes<T>);
    if (work.data == nullptr) return failure.set();
    T* packed_g = work.data + width_in * kLanes<T>;
    T* z = packed_g + n_outputs * width * kLanes<T>;
    for (int64_t job = begin; job < end; ++job) {
      const int64_t instance = job / blocks, first = job % blocks * kLanes<T>;
      const int64_t n = batch - first < kLanes<T> ? batch - first : kLanes<T>;
      reduce_block(layers, n_layers, instance, first, n, batch, n_components, n_outputs, width, work.data, packed_g, z,
                   out);
    }
  });
  return failure.none();
}

namespace {

// Adds to the lanes' sums of gradients, sums [rank * (d_in + d_out)] vectors for each layer, what one block of samples
// gives for one component. weight holds the incoming gradients of the lanes' attributions.
template <class T>
void backward_block(const AttributionLayer<T>* layers, int64_t n_layers, int64_t component, int64_t n_outputs,
                    int64_t width, const T* packed_x, const T* packed_g, vec<T> weight, T* z, T* dz, T* sums) {
  const T* px = packed_x;
  T* pz = z;
  for (int64_t l = 0; l < n_layers; ++l) {
    const AttributionLayer<T>& layer = layers[l];
    const int64_t row = component * layer.rank;
    component_output(px, layer.At + row * layer.d_in, layer.B + row * layer.d_out, layer.rank, layer.d_in, layer.d_out,
                     pz);
    px += layer.d_in * kLanes<T>;
    pz += layer.d_out * kLanes<T>;
  }
  for (int64_t d = 0; d < width; ++d) store(dz + d * kLanes<T>, vec<T>{});
  for (int64_t o = 0; o < n_outputs; ++o) {
    const T* g = packed_g + o * width * kLanes<T>;
    vec<T> t = {};
    for (int64_t d = 0; d < width; ++d) t += load(z + d * kLanes<T>) * load(g + d * kLanes<T>);
    const vec<T> dt = 2 * t * weight;
    for (int64_t d = 0; d < width; ++d) {
      T* at = dz + d * kLanes<T>;
      store(at, load(at) + dt * load(g + d * kLanes<T>));
    }
  }
  px = packed_x;
  const T* pdz = dz;
  for (int64_t l = 0; l < n_layers; ++l) {
    const AttributionLayer<T>& layer = layers[l];
    for (int64_t r = 0; r < layer.rank; ++r) {
      const T* a = layer.At + (component * layer.rank + r) * layer.d_in;
      const T* b = layer.B + (component * layer.rank + r) * layer.d_out;
      vec<T> u = {}, du = {};
      for (int64_t i = 0; i < layer.d_in; ++i) u += a[i] * load(px + i * kLanes<T>);
      for (int64_t o = 0; o < layer.d_out; ++o) du += b[o] * load(pdz + o * kLanes<T>);
      for (int64_t i = 0; i < layer.d_in; ++i, sums += kLanes<T>)
        store(sums, load(sums) + du * load(px + i * kLanes<T>));
      for (int64_t o = 0; o < layer.d_out; ++o, sums += kLanes<T>)
        store(sums, load(sums) + u * load(pdz + o * kLanes<T>));
    }
    px += layer.d_in * kLanes<T>;
    pdz += layer.d_out * kLanes<T>;
  }
}

}  // namespace

// The thread that owns a chunk of components walks all samples, so the sums over samples have one order.
template <class T>
bool attribution_reduce_backward(const AttributionLayer<T>* layers, int64_t n_layers, const T* grad, T* const* grad_At,
                                 T* const* grad_B, int64_t n_instances, int64_t batch, int64_t n_components,
                                 int64_t n_outputs, int threads) {
  int64_t width_in = 0, width = 0, per_component = 0;
  for (int64_t l = 0; l < n_layers; ++l) {
    width_in += layers[l].d_in;
    width += layers[l].d_out;
    per_component += layers[l].rank * (layers[l].d_in + layers[l].d_out);
  }
  const int64_t lanes = kLanes<T>;
  int64_t chunk = 65536 / (per_component * lanes + 1);  // the sums of a chunk stay in the L2 cache
  chunk = chunk < 1 ? 1 : chunk > n_components ? n_components : chunk;
  const int64_t chunks = n_components > 0 ? (n_components + chunk - 1) / chunk : 0;
  const int64_t entries = width_in + (n_outputs + 2) * width + chunk * per_component;
  Failure failure;
  threads = worth(n_instances * batch * n_components * (n_outputs * width + per_component), threads);
  parallel_for(n_instances * chunks, 1, threads, [&](int64_t from, int64_t to) {
    const Workspace<T> work(entries * lanes);
    if (work.data == nullptr) return failure.set();
    T* packed_x = work.data;
    T* packed_g = packed_x + width_in * lanes;
    T* z = packed_g + n_outputs * width * lanes;
    T* dz = z + width * lanes;
    T* sums = dz + width * lanes;
    for (int64_t job = from; job < to; ++job) {
      const int64_t instance = job / chunks, begin = job % chunks * chunk;
      const int64_t end = begin + chunk < n_components ? begin + chunk : n_components;
      for (int64_t k = 0; k < (end - begin) * per_component * lanes; ++k) sums[k] = 0;
      for (int64_t first = 0; first < batch; first += lanes) {
        const int64_t n = batch - first < lanes ? batch - first : lanes;
        pack_block(layers, n_layers, instance, first, n, batch, n_outputs, width, packed_x, packed_g);
        for (int64_t c = begin; c < end; ++c) {
          vec<T> weight = {};
          for (int64_t lane = 0; lane < n; ++lane)
            weight[lane] = grad[(instance * batch + first + lane) * n_components + c];
          backward_block(layers, n_layers, instance * n_components + c, n_outputs, width, packed_x, packed_g, weight, z,
                         dz, sums + (c - begin) * per_component * lanes);
        }
      }
      const T* sum = sums;
      for (int64_t c = begin; c < end; ++c)
        for (int64_t l = 0; l < n_layers; ++l) {
          const AttributionLayer<T>& layer = layers[l];
          for (int64_t r = 0; r < layer.rank; ++r) {
            const int64_t row = (instance * n_components + c) * layer.rank + r;
            for (int64_t i = 0; i < layer.d_in; ++i, sum += lanes)
              grad_At[l][row * layer.d_in + i] = sum_lanes<T>(load(sum));
            for (int64_t o = 0; o < layer.d_out; ++o, sum += lanes)
              grad_B[l][row * layer.d_out + o] = sum_lanes<T>(load(sum));
          }
        }
    }
  });
  return failure.none();
}

#define FASTAPD_INSTANTIATE(T)                                                                                      \
  template bool attribution_reduce<T>(const AttributionLayer<T>*, int64_t, T*, int64_t, int64_t, int64_t, int64_t,  \
                                      int);                                                                         \
  template bool attribution_reduce_backward<T>(const AttributionLayer<T>*, int64_t, const T*, T* const*, T* const*, \
                                               int64_t, int64_t, int64_t, int64_t, int);
FASTAPD_INSTANTIATE(float)
FASTAPD_INSTANTIATE(double)

}  // namespace FASTAPD_LEVEL
}  // namespace fastapd
