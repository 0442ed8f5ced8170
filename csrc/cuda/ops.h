// Every launcher of a CUDA kernel, with its shapes; arrays and axes as in csrc/ops.h. T is float, double, Half or
// BFloat16 unless a comment says which. All start kernels on the stream of the current device, wait for nothing and
// allocate nothing, so that a step can be captured into a graph; workspace is given. No CUDA header here.
#pragma once
#include <cstdint>

#include "../ops.h"
#include "cuda/device.h"
#include "cuda/numbers.h"
#include "schatten.h"

namespace fastapd::cuda {

// rows [n, d] /= their lengths; one without length stays.
template <class T>
void unit_norm(Stream stream, T* rows, int64_t n, int64_t d);

// grad [n, d] -= (grad . row) row, rows of unit length.
template <class T>
void remove_along(Stream stream, T* grad, const T* rows, int64_t n, int64_t d);

// How many partial sums of an instance component_sum_loss makes of n numbers.
int64_t component_sum_loss_partials(int64_t n);

// residual [I, n] -= target, in place, and loss [I] = sum residual^2; workspace partials [I, that many of Acc<T>].
template <class T>
void component_sum_loss(Stream stream, T* residual, const T* target, T* loss, Acc<T>* partials, int64_t n_instances,
                        int64_t n);

// What is the same for all kernels of one top-k: scores [I, b, C] of fewer than 2**31 numbers an instance, and the
// places of each instance's lists.
struct TopkSizes {
  int64_t n_instances, batch, n_components, n_pairs;
};

// How the scores of an instance are gone through, in csrc/cuda/batch_topk.cu; from fastapd/ops/_topk_plan.py.
struct TopkPlan {
  int64_t few;          // 1: one kernel, whose last block has all survivors in shared memory; 0: five kernels
  int64_t samples;      // scores that the floor is taken from; 0: no floor, all survive
  int64_t n_parts;      // of an instance: a block's each if few, else a warp's
  int64_t part_scores;  // of each part but the last
  int64_t room;         // survivors that there is memory for: of the instance if few, else of a part
  int64_t listed;       // candidates that there is memory for, unless few
  int64_t threads;      // of a block, if few
};

// The n_pairs largest of each instance's scores, or counts [I] of them, if it is not null; thresholds [I], if not null,
// get the smallest of them. sample [I, K], offsets [I, C + 1], component [I, K], sample_offsets [I, b + 1] and position
// [I, K] are those of Selection. Workspace of topk_workspace<T> bytes. No size but that of an instance is 0.
template <class T>
void batch_topk(Stream stream, const T* scores, const int64_t* counts, T* thresholds, int* sample, int64_t* offsets,
                int* component, int64_t* sample_offsets, int* position, void* workspace, TopkSizes sizes,
                TopkPlan plan);
template <class T>
int64_t topk_workspace(TopkSizes sizes, TopkPlan plan);

// The k largest of each sample, n_pairs = k * batch of each instance; one launch with so many threads if `small`, for
// which scores of a sample are at most kTopkRow. Workspace of sample_topk_workspace bytes.
constexpr int64_t kTopkRow = 1024;
template <class T>
void sample_topk(Stream stream, const T* scores, int* sample, int64_t* offsets, int* component, int64_t* sample_offsets,
                 int* position, void* workspace, TopkSizes sizes, int64_t k, int64_t small, int64_t threads);
int64_t sample_topk_workspace(TopkSizes sizes, int64_t small);

// values [I, C, m], descending, of ranks up to 128; workspace grams [I, C, 4, m, m] and scales [I, C, 2]. Ranks up to
// most_in_warp, and no more than 32, are decomposed by warps, others by blocks.
template <class T>
void component_svdvals(Stream stream, const T* At, const T* B, double* values, double* grams, double* scales,
                       SchattenSizes sizes, int most_in_warp);

// The sum of csrc/ops.h from singular values, of ranks up to 128; workspace as above and partials [I, C]. `op` is named
// in errors.
template <class T>
void schatten(const char* op, Stream stream, const T* At, const T* B, const int64_t* counts, double p, double eps,
              int64_t batch, double scale, bool accumulate, T* loss, T* grad_At, T* grad_B, double* grams,
              double* scales, double* partials, SchattenSizes sizes, int most_in_warp);

// From lengths of columns; workspace partials [I, C, m].
template <class T>
void schatten_factored(const char* op, Stream stream, const T* At, const T* B, const int64_t* counts, double p,
                       double eps, int64_t batch, double scale, bool accumulate, T* loss, T* grad_At, T* grad_B,
                       double* partials, SchattenSizes sizes);

// How many parts schatten_masked divides the samples and the components of an instance into.
struct MaskedParts {
  int64_t batch, across;
};
MaskedParts schatten_masked_parts(int64_t n_components, int64_t batch);

// With a mask [I, b, C]; workspace norms [2, I, C, m], partials [I, parts.batch * parts.across] and, for gradients,
// to_S [parts.batch, I, C, m].
template <class T>
void schatten_masked(const char* op, Stream stream, const T* At, const T* B, const T* mask, double p, double eps,
                     int64_t batch, T* loss, T* grad_At, T* grad_B, T* grad_mask, double* norms, double* to_S,
                     double* partials, SchattenSizes sizes);

// u [I, K, m] = x_s A_c and y [I, b, d_out] = sum over the pairs of a sample of u B_c. Where z_columns > 0, by way of
// the pairs' own outputs, so many columns at a time, in workspace z [I, K, z_columns].
template <class T>
void component_forward_selected(Stream stream, const T* x, const T* At, const T* B, Selection selection, T* u, T* y,
                                Acc<T>* z, int64_t z_columns, ForwardSizes sizes);

// grad_u [I, K, m] = grad_y_s B_c^T (workspace), then whichever of the three gradients is not null; z and z_columns are
// for grad_x. If `add`, grad_At and grad_B are added to, and what belongs to components without pairs is neither read
// nor written. Errors are those of `op`.
template <class T>
void component_forward_selected_backward(const char* op, Stream stream, const T* grad_y, const T* x, const T* At,
                                         const T* B, const T* u, Selection selection, T* grad_u, T* grad_x, T* grad_At,
                                         T* grad_B, bool add, Acc<T>* z, int64_t z_columns, ForwardSizes sizes);

// One decomposed layer of attribution_reduce; its sizes may differ from layer to layer.
template <class T>
struct ReducedLayer {
  const T* u;  // x A, [I, b, C, rank]; or, where rank is -1, x A B, [I, b, C, d_out]
  const T* B;  // [I, C, rank, d_out], not read where rank is -1
  const T* g;  // [I, b, n_outputs, d_out] by its strides; that of the batch is 0 when all samples share their gradients
  int64_t d_out, rank, g_stride_i, g_stride_b, g_stride_o;  // in elements; the last axis is dense
};
constexpr int kMostLayers = 16;

// out [I, b, C] = sum over outputs of (sum over layers of <u B_c, g>)^2 of up to kMostLayers layers.
template <class T>
void attribution_reduce(Stream stream, const ReducedLayer<T>* layers, int64_t n_layers, T* out, int64_t n_instances,
                        int64_t batch, int64_t n_components, int64_t n_outputs);

// dT [I, b, C, n_outputs] = 2 grad (sum over layers of <u B_c, g>), grad [I, b, C].
template <class T>
void attribution_reduce_backward(Stream stream, const ReducedLayer<T>* layers, int64_t n_layers, const T* grad,
                                 Acc<T>* dT, int64_t n_instances, int64_t batch, int64_t n_components,
                                 int64_t n_outputs);

}  // namespace fastapd::cuda
