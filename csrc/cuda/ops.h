// Every launcher of a CUDA kernel, with its shapes; arrays and axes as in csrc/ops.h. T is float, double, Half or
// BFloat16 unless a comment says which. All start kernels on the stream of the current device, wait for nothing and
// allocate nothing, so that a step can be captured into a graph; workspace is given. No CUDA header here.
#pragma once
#include <cstdint>

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

}  // namespace fastapd::cuda
