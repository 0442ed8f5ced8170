// Every launcher of a CUDA kernel, with its shapes; arrays and axes as in csrc/ops.h. T is float, double, Half or
// BFloat16 unless a comment says which. All start kernels on the stream of the current device, wait for nothing and
// allocate nothing, so that a step can be captured into a graph; workspace is given. No CUDA header here.
#pragma once
#include <cstdint>

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

}  // namespace fastapd::cuda
