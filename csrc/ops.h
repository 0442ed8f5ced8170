// Every native CPU signature of fastapd, with its shapes. No torch here: plain addresses and sizes.
//
// Axes: I instances, b batch, C components, m rank, K selected pairs per instance, d_in / d_out widths of a layer.
// All arrays are dense and row-major; T is float or double. Factors arrive as At [I, C, m, d_in] and B [I, C, m,
// d_out].
//
// A selection lists K (sample, component) pairs twice:
//   component-major  sample [I, K] int32, offsets [I, C+1] int64        sorted by component, then sample
//   sample-major     component [I, K] int32, sample_offsets [I, b+1] int64, position [I, K] int32
//                    sorted by sample, then component; position is the same pair's place in the component-major list
// so that sums over samples and sums over components are both contiguous walks without atomics.
#pragma once
#include <cstdint>

#include "schatten.h"

namespace fastapd {

struct Selection {
  const int32_t* sample;
  const int64_t* offsets;
  const int32_t* component;
  const int64_t* sample_offsets;
  const int32_t* position;
};

struct SelectionOut {
  int32_t* sample;
  int64_t* offsets;
  int32_t* component;
  int64_t* sample_offsets;
  int32_t* position;
};

// One decomposed layer of attribution_reduce; rank, d_in and d_out may differ from layer to layer.
template <class T>
struct AttributionLayer {
  const T* x;   // [I, b, d_in]
  const T* g;   // [I, b, n_outputs, d_out] by its strides; the batch stride is 0 when all samples share their gradients
  const T* At;  // [I, C, rank, d_in]
  const T* B;   // [I, C, rank, d_out]
  int64_t d_in, d_out, rank;
  int64_t g_stride_i, g_stride_b, g_stride_o;  // in elements; the last axis is dense
};

// A network in gated linear form, for attribution_tangent. Its barriers are its nonlinearities in the order of the
// forward pass; the last one is the output.
struct TangentSizes {
  int64_t n_instances, batch, n_components, n_inputs, n_lefts, n_terms, n_barriers, n_links;
};

template <class T>
struct TangentInput {
  const T* x;  // [I, b, width]
  int64_t width;
};

// A source of width rank, u = x A_c, from one of the inputs.
template <class T>
struct TangentLeft {
  const T* At;  // [I, C, rank, width]
  int64_t input, rank;
};

// What a source adds to a barrier: its row times F_c. Sources are the inputs, then the lefts.
template <class T>
struct TangentTerm {
  const T* F;  // [I, C, width of the source, width of the barrier]
  int64_t source, barrier;
};

template <class T>
struct TangentBarrier {
  const T* gate;  // [I, b, width], or null for ones
  int64_t width;
};

// What a barrier's gated tangent adds to a later one.
template <class T>
struct TangentLink {
  const T* L;  // [I, width of from, width of to] by stride_i, which is 0 when the instances share it
  int64_t from, to, stride_i;
};

// All arrays of a program; terms and links in any order.
template <class T>
struct TangentProgram {
  const TangentInput<T>* inputs;
  const TangentLeft<T>* lefts;
  const TangentTerm<T>* terms;
  const TangentBarrier<T>* barriers;
  const TangentLink<T>* links;
  TangentSizes n;
};

// C [I, m, n] = alpha A B, plus C if `accumulate`; A [I, m, k] and B [I, k, n] by their strides, C dense.
template <class T>
struct ThinProduct {
  const T* A;
  const T* B;
  T* C;
  T alpha;
  bool accumulate;
  int64_t n_instances, m, n, k;
  int64_t a_stride_i, a_stride_m, a_stride_k, b_stride_i, b_stride_k, b_stride_n;
};

struct ForwardSizes {
  int64_t n_instances, batch, n_components, rank, d_in, d_out, n_pairs;
};

// Each csrc/cpu/<op>.cpp is compiled once per instruction-set level, into a namespace of that name.
#define FASTAPD_DECLARE_LEVEL(LEVEL)                                                                                   \
  namespace LEVEL {                                                                                                    \
  /* scores [I, b, C] -> the `capacity` largest of each instance, or counts[i] of them (counts null or [I]; the rest   \
   */                                                                                                                  \
  /* of the lists is zero), or, if k >= 0, the k largest of each sample (capacity = k b). Ties: lowest flat index; */                                                                                                                    \
  /* NaN largest; +-0 equal. thresholds null (always if k >= 0) or [I]: a hint of the smallest selected score of each  \
   */                                                                                                                  \
  /* instance, not finite for none, and then that score. False: no memory for the workspace (about 4 K keys and as */                                                                                                                    \
  /* many indices; about b*C of each if neither hint nor sample tells where to start). */                              \
  template <class T>                                                                                                   \
  bool batch_topk(const T* scores, SelectionOut out, int64_t n_instances, int64_t batch, int64_t n_components,         \
                  int64_t capacity, const int64_t* counts, int64_t k, T* thresholds, int threads);                     \
  /* out [I, b, C] = sum over outputs of (sum over layers of <x A_c, g B_c^T>)^2. */                                   \
  /* Returns false when its workspace (lanes * (sum d_in + (n_outputs + 1) * sum d_out) values a thread) fails. */     \
  template <class T>                                                                                                   \
  bool attribution_reduce(const AttributionLayer<T>* layers, int64_t n_layers, T* out, int64_t n_instances,            \
                          int64_t batch, int64_t n_components, int64_t n_outputs, int threads);                        \
  /* grad_At, grad_B: for each layer the gradient of sum grad * out, grad [I, b, C]; layouts as At and B. */           \
  template <class T>                                                                                                   \
  bool attribution_reduce_backward(const AttributionLayer<T>* layers, int64_t n_layers, const T* grad,                 \
                                   T* const* grad_At, T* const* grad_B, int64_t n_instances, int64_t batch,            \
                                   int64_t n_components, int64_t n_outputs, int threads);                              \
  /* out [I, b, C] = |gate t|^2 at the last barrier, t_j = sum over terms source F_c + sum over links (gate_i t_i)     \
   * L_ij. */                                                                                                          \
  /* Returns false when its workspace (a block of samples of all sources, gates and barriers a thread) fails. */       \
  template <class T>                                                                                                   \
  bool attribution_tangent(const TangentProgram<T>& program, T* out, int threads);                                     \
  /* The gradients of sum grad * out, grad [I, b, C], by every left's At and every term's F, in their layouts. */      \
  /* Workspace: all inputs and gates once more, and for each thread the gradients of one component. */                 \
  template <class T>                                                                                                   \
  bool attribution_tangent_backward(const TangentProgram<T>& program, const T* grad, T* const* grad_At,                \
                                    T* const* grad_F, int threads);                                                    \
  /* rows [n, d] /= their lengths; one without length stays. */                                                        \
  template <class T>                                                                                                   \
  void unit_norm(T* rows, int64_t n, int64_t d, int threads);                                                          \
  /* grad [n, d] -= (grad . row) row, rows of unit length. */                                                          \
  template <class T>                                                                                                   \
  void remove_along(T* grad, const T* rows, int64_t n, int64_t d, int threads);                                        \
  /* Best where n or k is short; false when its panel (512 rows a thread) cannot be allocated. */                      \
  template <class T>                                                                                                   \
  bool thin_product(ThinProduct<T> product, int threads);                                                              \
  /* residual [I, n] -= target, in place, and loss [I] = sum residual^2. */                                            \
  template <class T>                                                                                                   \
  void component_sum_loss(T* residual, const T* target, T* loss, int64_t n_instances, int64_t n, int threads);         \
  /* out [I, C, m] = singular values of A_c B_c, descending, zeros included. False: no memory. */                      \
  template <class T>                                                                                                   \
  bool component_svdvals(const T* At, const T* B, T* out, SchattenSizes sizes, int threads);                           \
  /* loss [I] = sum_c n_c sum_i (s_i + eps)^{p/2} + (batch - n_c) m eps^{p/2} (left out if batch < 0), s_i = sigma_i^2 \
   */                                                                                                                  \
  /* if exact, else |a_i|^2 |b_i|^2; and, if not null, scale times its gradients [I, C, m, d], which replace what is   \
   */                                                                                                                  \
  /* in grad_At and grad_B or, to accumulate, are added to it. False: no memory. */                                    \
  template <class T>                                                                                                   \
  bool schatten(const T* At, const T* B, const int64_t* counts, double p, double eps, int64_t batch, bool exact,       \
                double scale, bool accumulate, T* loss, T* grad_At, T* grad_B, SchattenSizes sizes, int threads);      \
  /* loss [I] = sum_b sum_c sum_i (mask_bc |a_i|^2 |b_i|^2 + eps)^{p/2}, mask [I, b, C], and its gradients. */         \
  template <class T>                                                                                                   \
  bool schatten_masked(const T* At, const T* B, const T* mask, double p, double eps, int64_t batch, T* loss,           \
                       T* grad_At, T* grad_B, T* grad_mask, SchattenSizes sizes, int threads);                         \
  /* u [I, K, m] = x_s A_c and y [I, b, d_out] = sum over the pairs of a sample of u B_c. */                           \
  template <class T>                                                                                                   \
  void component_forward_selected(const T* x, const T* At, const T* B, Selection selection, T* u, T* y,                \
                                  ForwardSizes sizes, int threads);                                                    \
  /* grad_u [I, K, m] = grad_y_s B_c^T (workspace), then whichever of the three gradients is not null. If accumulate,  \
   */                                                                                                                  \
  /* grad_At and grad_B are added to, and what belongs to components without pairs is neither read nor written. */     \
  template <class T>                                                                                                   \
  void component_forward_selected_backward(const T* grad_y, const T* x, const T* At, const T* B, const T* u,           \
                                           Selection selection, T* grad_u, T* grad_x, T* grad_At, T* grad_B,           \
                                           bool accumulate, ForwardSizes sizes, int threads);                          \
  }

FASTAPD_DECLARE_LEVEL(baseline)
#if FASTAPD_X86_LEVELS
FASTAPD_DECLARE_LEVEL(avx2)
FASTAPD_DECLARE_LEVEL(avx512)
#endif

// Instruction-set levels: what this build holds and this processor runs, best last; and the one in use.
enum class Level : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };
Level best_level();
Level current_level();
void set_level(Level level);  // the caller has checked level <= best_level()

}  // namespace fastapd
