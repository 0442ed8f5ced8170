// Every launcher of a CUDA kernel, with its shapes; arrays and axes as in csrc/ops.h. T is float, double, Half or
// BFloat16 unless a comment says which. All start kernels on the stream of the current device, wait for nothing and
// allocate nothing, so that a step can be captured into a graph; workspace is given. No CUDA header here.
#pragma once
#include <cstdint>

#include "../ops.h"
#include "cuda/device.h"
#include "cuda/numbers.h"

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
