// a_bc = sum over outputs o of ( sum over layers l of <u_lbc B_lc, g_lbo> )^2 with u_lbc = x_lb A_lc, the reverse form.
//
// u is the library's GEMM for all components at once. T[c, o] = sum_l <u_lbc B_lc, g_lbo> is for every sample one GEMM
// over the concatenated outputs of the layers, squared and summed where it is made: neither T [b, C, n_outputs] nor the
// components' outputs z = u B are written. A block owns one sample and kC components. For kO outputs at a time it walks
// the layers and their d_out in steps of kStep, forms z by `rank` multiplications a number and brings g into shared
// memory, and multiplies them there: a thread owns 4 components by 8 outputs, or by 4, in float (in double for double).
// Only after the last layer are sums squared, and only those of outputs that exist; threads of the same components add
// up in order. Beyond a small rank the caller gives z instead of u, made by the library. The backward pass wants T
// itself, times 2 grad, and leaves the rest, plain products, to the library.
//
// Blocks come in groups of kGroup samples, components outside, samples inside, so that the gradients of a group and the
// factors of its components stay in the L2 cache. kC by kO is 64 by 128, or 32 by 32, two warps, where there are
// fewer of either: toy models.
//
// Not the right choice where arithmetic is the floor and float32 may go to tensor cores, which are not used here.
#include "cuda/launch.h"
#include "cuda/ops.h"

namespace fastapd::cuda {
namespace {

constexpr int kStep = 16, kOwnC = 4;
template <int kO>
constexpr int kOwnO = kO / 16 < 4 ? 4 : kO / 16;
constexpr int64_t kGroup = 8;

template <class T>
struct Layers {
  ReducedLayer<T> of[kMostLayers];
};

// As many numbers as one load brings from shared memory.
template <class A>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(A));
  A of[kSize];
};

template <int kN, class A>
__device__ inline void load_vectors(const A* from, A (&to)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; i += Vector<A>::kSize) {
    const Vector<A> v = *reinterpret_cast<const Vector<A>*>(from + i);
#pragma unroll
    for (int j = 0; j < Vector<A>::kSize; ++j) to[i + j] = v.of[j];
  }
}

template <int kC, int kO>
constexpr int kThreads = kC / kOwnC * (kO / kOwnO<kO>);
// Of a multiprocessor, so that a thread has 128 registers, 255 for doubles; by itself ptxas would rather spill a few.
template <class T, int kC, int kO>
constexpr int kBlocks = (sizeof(Acc<T>) == 8 ? 256 : 512) / kThreads<kC, kO>;

// tile[k * width + j] = number(j) for kN rows j, where k, of kStep, is the thread's: neighbours read neighbours.
template <int kN, int kThreads, class A, class Number>
__device__ inline void fill(A* tile, int width, Number number) {
  const int k = static_cast<int>(threadIdx.x) % kStep;
#pragma unroll 4
  for (int j = static_cast<int>(threadIdx.x) / kStep; j < kN; j += kThreads / kStep) tile[k * width + j] = number(j);
}

// out [I, b, C]; or, if grad [I, b, C] is given, dT [I, b, C, n_outputs] = 2 grad T.
template <class T, int kC, int kO>
__global__ void __launch_bounds__(kThreads<kC, kO>, kBlocks<T, kC, kO>)
    reduce_kernel(const Layers<T> layers, int n_layers, const T* grad, T* out, Acc<T>* dT, int64_t n_rows,
                  int64_t batch, int64_t n_components, int64_t n_outputs, int64_t n_tiles) {
  constexpr int kAll = kThreads<kC, kO>, kWidthC = kC + 4, kWidthO = kO + 4;  // 4 more: fewer rows in one bank
  constexpr int kIn = Vector<Acc<T>>::kSize, kOwn = kOwnO<kO>;
  const int64_t row = blockIdx.x / (kGroup * n_tiles) * kGroup + blockIdx.x % kGroup;
  if (row >= n_rows) return;
  const int64_t i = row / batch, b = row % batch, first_c = blockIdx.x / kGroup % n_tiles * kC;
  FASTAPD_SHARED(Vector<Acc<T>>, z_vectors, kStep * kWidthC / kIn);
  FASTAPD_SHARED(Vector<Acc<T>>, g_vectors, kStep * kWidthO / kIn);
  Acc<T>* z = reinterpret_cast<Acc<T>*>(z_vectors);
  Acc<T>* g = reinterpret_cast<Acc<T>*>(g_vectors);
  const int mine_c = static_cast<int>(threadIdx.x) % (kC / kOwnC) * kOwnC;
  const int mine_o = static_cast<int>(threadIdx.x) / (kC / kOwnC) * kOwn;
  Acc<T> squares[kOwnC] = {};
#pragma unroll 1
  for (int64_t first_o = 0; first_o < n_outputs; first_o += kO) {
    Acc<T> sums[kOwnC][kOwn] = {};
#pragma unroll 1
    for (int l = 0; l < n_layers; ++l) {
      const ReducedLayer<T>& layer = layers.of[l];
      const int64_t d_out = layer.d_out, rank = layer.rank;
      const T* of_u = layer.u + (row * n_components + first_c) * (rank < 0 ? d_out : rank);
      const T* of_B = layer.B + (i * n_components + first_c) * rank * d_out;
      const T* of_g = layer.g + i * layer.g_stride_i + b * layer.g_stride_b + first_o * layer.g_stride_o;
#pragma unroll 1
      for (int64_t first_k = 0; first_k < d_out; first_k += kStep) {
        const int64_t at = first_k + threadIdx.x % kStep;
        fill<kC, kAll>(z, kWidthC, [&](int j) {
          if (first_c + j >= n_components || at >= d_out) return Acc<T>{0};
          if (rank < 0) return static_cast<Acc<T>>(widened(of_u[j * d_out + at]));
          Acc<T> sum = 0;
          const T* u = of_u + j * rank;
          const T* factor = of_B + j * rank * d_out + at;
#pragma unroll 1
          for (int64_t r = 0; r < rank; ++r, factor += d_out) sum += widened(u[r]) * widened(*factor);
          return sum;
        });
        fill<kO, kAll>(g, kWidthO, [&](int j) {
          if (first_o + j >= n_outputs || at >= d_out) return Acc<T>{0};
          return static_cast<Acc<T>>(widened(of_g[j * layer.g_stride_o + at]));
        });
        __syncthreads();  // the tiles are there
#pragma unroll 2
        for (int k = 0; k < kStep; ++k) {
          Acc<T> zs[kOwnC], gs[kOwn];
          load_vectors(z + k * kWidthC + mine_c, zs);
          load_vectors(g + k * kWidthO + mine_o, gs);
#pragma unroll
          for (int c = 0; c < kOwnC; ++c)
#pragma unroll
            for (int o = 0; o < kOwn; ++o) sums[c][o] += zs[c] * gs[o];
        }
        __syncthreads();  // nobody reads them any more
      }
    }
    if (grad == nullptr) {
#pragma unroll
      for (int c = 0; c < kOwnC; ++c)
#pragma unroll
        for (int o = 0; o < kOwn; ++o)  // 0 times what is infinite is no sum of an output
          if (first_o + mine_o + o < n_outputs) squares[c] += sums[c][o] * sums[c][o];
      continue;
    }
#pragma unroll
    for (int c = 0; c < kOwnC; ++c) {
      const int64_t component = row * n_components + first_c + mine_c + c;
      if (first_c + mine_c + c >= n_components) continue;
      const Acc<T> scale = 2 * widened(grad[component]);
#pragma unroll
      for (int o = 0; o < kOwn; ++o)
        if (const int64_t at = first_o + mine_o + o; at < n_outputs)
          dT[component * n_outputs + at] = scale * sums[c][o];
    }
  }
  if (grad != nullptr) return;
#pragma unroll
  for (int c = 0; c < kOwnC; ++c) z[mine_o / kOwn * kC + mine_c + c] = squares[c];
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); c < kC; c += kAll) {
    Acc<T> sum = 0;
    for (int o = 0; o < kO / kOwn; ++o) sum += z[o * kC + c];
    if (first_c + c < n_components) out[row * n_components + first_c + c] = narrowed<T>(sum);
  }
}

template <class T>
void run(const char* op, Stream stream, const ReducedLayer<T>* layers, int64_t n_layers, const T* grad, T* out,
         Acc<T>* dT, int64_t n_instances, int64_t batch, int64_t n_components, int64_t n_outputs) {
  Layers<T> given = {};
  for (int64_t l = 0; l < n_layers; ++l) given.of[l] = layers[l];
  const int64_t n_rows = n_instances * batch;
  const auto start = [&](auto kernel, int64_t components, int threads) {
    const int64_t n_tiles = ceil_div(n_components, components);
    launch(op, kernel, ceil_div(n_rows, kGroup) * kGroup * n_tiles, threads, 0, stream, given, n_layers, grad, out, dT,
           n_rows, batch, n_components, n_outputs, n_tiles);
  };
  if (n_components > 32 && n_outputs > 32)
    start(reduce_kernel<T, 64, 128>, 64, kThreads<64, 128>);
  else
    start(reduce_kernel<T, 32, 32>, 32, kThreads<32, 32>);
}

}  // namespace

template <class T>
void attribution_reduce(Stream stream, const ReducedLayer<T>* layers, int64_t n_layers, T* out, int64_t n_instances,
                        int64_t batch, int64_t n_components, int64_t n_outputs) {
  run<T>("attribution_reduce", stream, layers, n_layers, nullptr, out, nullptr, n_instances, batch, n_components,
         n_outputs);
}

template <class T>
void attribution_reduce_backward(Stream stream, const ReducedLayer<T>* layers, int64_t n_layers, const T* grad,
                                 Acc<T>* dT, int64_t n_instances, int64_t batch, int64_t n_components,
                                 int64_t n_outputs) {
  run<T>("attribution_reduce_backward", stream, layers, n_layers, grad, nullptr, dT, n_instances, batch, n_components,
         n_outputs);
}

#define FASTAPD_INSTANTIATE(T)                                                                                       \
  template void attribution_reduce<T>(Stream, const ReducedLayer<T>*, int64_t, T*, int64_t, int64_t, int64_t,        \
                                      int64_t);                                                                      \
  template void attribution_reduce_backward<T>(Stream, const ReducedLayer<T>*, int64_t, const T*, Acc<T>*, int64_t,  \
                                               int64_t, int64_t, int64_t);
FASTAPD_INSTANTIATE(float)
FASTAPD_INSTANTIATE(double)
FASTAPD_INSTANTIATE(Half)
FASTAPD_INSTANTIATE(BFloat16)

}  // namespace fastapd::cuda
