// What the kernels of the exact Schatten sums and of the factored ones have in common, and the cores between the Gram
// matrices and the gradients, which know no dtype but double.
#pragma once
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "schatten.h"

namespace fastapd::cuda {

constexpr int kMostInWarp = 32;     // rank of a core whose columns stay in the registers of a warp
constexpr int kMostRank = 128;      // of one whose matrix fits the shared memory of a block
constexpr int kBlockThreads = 512;  // of such a block

// Of (s + eps)^half. The power of eps alone, which all that is zero or unused contributes, comes from the host and is
// as exact as pow.
struct Exponent {
  double half, eps, of_eps;
};
inline Exponent exponent_of(double p, double eps) {
  return {p / 2, eps, p == 1 ? sqrt(eps) : pow(eps, p / 2)};
}

// For each component the decomposition of R_A R_B^T; either its part of a sum and the matrices of its gradients, or its
// singular values.
struct Cores {
  double* grams;          // [groups, 4, m, m]: upper triangles of G_A and of G_B, each rounded and what rounding lost.
                          // Then H_A in place of the second, H_B of the fourth, if gradient.
  double* scales;         // [groups, 2]: powers of two that A and B are multiplied by
  bool scaled;            // whether the Gram matrices are those of the scaled factors; else scales are set here
  const int64_t* counts;  // [groups], or null: all components are used
  double* values;         // [groups, m], descending; or null
  double* partials;       // [groups], what each adds to the sum; or null
  bool gradient;
  Exponent exponent;
  int64_t batch;
  double scale;  // of the gradients
  int64_t n_groups;
  int rank;
};

void svd_cores(const char* op, Stream stream, const Cores& cores, int most_in_warp);

// loss [I] = sums of partials [I, n], in an order that depends on n alone.
template <class T>
void schatten_total(const char* op, Stream stream, const double* partials, T* loss, int64_t n_instances, int64_t n);

// a b, rounded: no compiler fuses it with a sum that it is a term of, as it does with a plain product.
__device__ inline double rounded_product(double a, double b) {
  return fma(a, b, 0.0);
}

// base^exponent of a number whose magnitude has this logarithm, to about 1e-13; of negative ones to whole exponents.
// CUDA's pow is exact to the last bit, and a call that many registers would have to survive.
__device__ inline double power_by_log(double base, double logarithm, double exponent) {
  if (exponent == 0) return 1;
  const double size = exp(exponent * logarithm);
  if (!(base < 0)) return size;
  const double half = exponent / 2;
  return floor(half) == half ? size : floor(exponent) == exponent ? -size : __longlong_as_double(~0LL);
}

struct Power {
  double value, slope;  // (s + eps)^half and half (s + eps)^(half - 1)
};

// The slope is zero where s + eps is, where that of a root is infinite (only possible with eps = 0).
__device__ inline Power power_of(double s, Exponent exponent) {
  const double base = s + exponent.eps, half = exponent.half;
  if (half == 1) return {base, 1};
  if (half == 0.5) {
    const double root = sqrt(base);
    return {root, base == 0 ? 0 : 0.5 / root};
  }
  const double logarithm = log(fabs(base));
  return {base == exponent.eps ? exponent.of_eps : power_by_log(base, logarithm, half),
          base == 0 && half < 1 ? 0 : half * power_by_log(base, logarithm, half - 1)};
}

// What the eps of the samples that do not use a component contributes to the sum, for each rank; none if batch < 0.
__device__ inline double unused_term(int64_t count, int64_t batch, Exponent exponent) {
  return batch < 0 || count == batch ? 0 : static_cast<double>(batch - count) * exponent.of_eps;
}

// The number as what is stored: through float for half precision.
template <class T>
__device__ inline T narrowed_from(double x) {
  return narrowed<T>(static_cast<Acc<T>>(x));
}

template <class T>
__device__ inline void put(T* out, double value, bool accumulate) {
  *out = narrowed_from<T>(accumulate ? static_cast<double>(widened(*out)) + value : value);
}

}  // namespace fastapd::cuda
