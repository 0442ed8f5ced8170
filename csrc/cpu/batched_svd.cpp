// Singular values of A_c B_c and Schatten sums with their gradients, from the factors, one component at a time.
//
// Exact form. Both factors are orthogonalised in float64 (A = Q_A R_A, B^T = Q_B R_B, Gram-Schmidt with a second pass,
// a dependent column gives a zero one), so A B = Q_A X Q_B^T with the small core X = R_A R_B^T, and one-sided Jacobi
// gives X = U diag(sigma) V^T to high relative accuracy. The gradient of sum f(sigma_i^2) is
//   dA = Q_A (U diag(g sigma) V^T) R_B        dB^T = Q_B (V diag(g sigma) U^T) R_A        g = 2 f'
// which needs no differences of singular values and no division by one. A Gram matrix would be cheaper, and would
// square the condition number: with it a singular value below 1e-8 of the largest is noise, here below 1e-15. So
// float32 factors whose columns are far from dependent take that way (svd_lanes.h), and the others come here. Factored
// form: sigma_i^2 is replaced by |a_i|^2 |b_i|^2; two reads of the factors. All sums are in float64. A thread owns one
// component; the sum over components is taken in order afterwards.
#include "../ops.h"
#include "../schatten.h"
#include "parallel.h"
#include "svd_lanes.h"

namespace fastapd {
namespace FASTAPD_LEVEL {
namespace {

template <class T>
inline double dot_wide(const T* a, const T* b, int64_t n) {
  double lane[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int l = 0; l < 8; ++l) lane[l] += static_cast<double>(a[i + l]) * static_cast<double>(b[i + l]);
  double total = ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
  for (; i < n; ++i) total += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return total;
}

template <class T>
inline double largest(const T* a, int64_t n) {
  double most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double v = a[i] < 0 ? -static_cast<double>(a[i]) : static_cast<double>(a[i]);
    if (!(v <= most)) most = v;  // keeps a NaN
  }
  return most;
}

// Rows f [m, d] times scale = R^T Q with orthonormal (or zero) rows of q [m, d]; R[i * m + j] is upper triangular.
template <class T>
void orthogonalise(const T* f, double scale, int64_t m, int64_t d, double* q, double* R) {
  for (int64_t k = 0; k < m * m; ++k) R[k] = 0;
  for (int64_t j = 0; j < m; ++j) {
    double* qj = q + j * d;
    for (int64_t i = 0; i < d; ++i) qj[i] = static_cast<double>(f[j * d + i]) * scale;
    const double before = __builtin_sqrt(dot_wide(qj, qj, d));
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t k = 0; k < j; ++k) {
        const double* qk = q + k * d;
        const double c = dot_wide(qk, qj, d);
        R[k * m + j] += c;
        for (int64_t i = 0; i < d; ++i) qj[i] -= c * qk[i];
      }
    const double norm = __builtin_sqrt(dot_wide(qj, qj, d));
    const bool dependent = norm <= 1e-15 * before;  // what is left is rounding: the column adds no direction
    const double inverse = dependent ? 0 : 1 / norm;
    R[j * m + j] = dependent ? 0 : norm;
    for (int64_t i = 0; i < d; ++i) qj[i] *= inverse;
  }
}

// Columns of X, as rows of xt [m, m], become U diag(sigma); v [m, m] (may be null) collects the rotations, column j of
// V as row j. Returns nothing: sigma is the norm of the rows.
void jacobi(double* xt, double* v, int64_t m) {
  if (v != nullptr)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < m; ++j) v[i * m + j] = i == j;
  for (int sweep = 0; sweep < 60; ++sweep) {
    bool rotated = false;
    for (int64_t p = 0; p + 1 < m; ++p)
      for (int64_t q = p + 1; q < m; ++q) {
        double* xp = xt + p * m;
        double* xq = xt + q * m;
        const double alpha = dot_wide(xp, xp, m), beta = dot_wide(xq, xq, m), gamma = dot_wide(xp, xq, m);
        if (!(gamma * gamma > 1e-31 * alpha * beta))
          continue;  // orthogonal to rounding; also NaN, which no sweep mends
        rotated = true;
        const double zeta = (beta - alpha) / (2 * gamma);
        const double t = (zeta < 0 ? -1 : 1) / ((zeta < 0 ? -zeta : zeta) + __builtin_sqrt(1 + zeta * zeta));
        const double c = 1 / __builtin_sqrt(1 + t * t), s = c * t;
        for (int64_t i = 0; i < m; ++i) {
          const double a = xp[i], b = xq[i];
          xp[i] = c * a - s * b;
          xq[i] = s * a + c * b;
        }
        if (v == nullptr) continue;
        for (int64_t i = 0; i < m; ++i) {
          const double a = v[p * m + i], b = v[q * m + i];
          v[p * m + i] = c * a - s * b;
          v[q * m + i] = s * a + c * b;
        }
      }
    if (!rotated) break;
  }
}

inline double power(double base, double exponent) {
  if (exponent == 0.5) return __builtin_sqrt(base);
  if (exponent == 1) return base;
  return __builtin_pow(base, exponent);
}

// d/ds of s^half; zero at zero, where the slope of a root is infinite (only possible with eps = 0).
inline double slope(double base, double half) {
  if (base == 0 && half < 1) return 0;
  return half * power(base, half - 1);
}

struct Work {
  double *qa, *qb, *ra, *rb, *xt, *v, *gx, *sigma;
};

inline int64_t work_size(int64_t m, int64_t d_in, int64_t d_out) {
  return m * (d_in + d_out) + 5 * m * m + m;
}

inline Work work_at(double* p, int64_t m, int64_t d_in, int64_t d_out) {
  Work w;
  w.qa = p;
  w.qb = w.qa + m * d_in;
  w.ra = w.qb + m * d_out;
  w.rb = w.ra + m * m;
  w.xt = w.rb + m * m;
  w.v = w.xt + m * m;
  w.gx = w.v + m * m;
  w.sigma = w.gx + m * m;
  return w;
}

// sigma of one component, unsorted, and what the gradient needs; the scale that was taken out of A and B is put back
// into sigma and returned.
template <class T>
double decompose_component(const T* At, const T* B, int64_t m, int64_t d_in, int64_t d_out, bool vectors, Work w,
                           double* scale_a, double* scale_b) {
  *scale_a = balance(largest(At, m * d_in));
  *scale_b = balance(largest(B, m * d_out));
  orthogonalise(At, *scale_a, m, d_in, w.qa, w.ra);
  orthogonalise(B, *scale_b, m, d_out, w.qb, w.rb);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < m; ++j) w.xt[j * m + i] = dot_wide(w.ra + i * m, w.rb + j * m, m);
  jacobi(w.xt, vectors ? w.v : nullptr, m);
  const double back = (1 / *scale_a) * (1 / *scale_b);
  for (int64_t i = 0; i < m; ++i) w.sigma[i] = __builtin_sqrt(dot_wide(w.xt + i * m, w.xt + i * m, m)) * back;
  return back;
}

// One value of a gradient: written, or added in float64 to what is there.
template <class T>
inline void put(T* out, double value, bool accumulate) {
  *out = static_cast<T>(accumulate ? static_cast<double>(*out) + value : value);
}

// rows r of the gradient [m, d], out[r] = weight * sum_i C[r, i] q[i]
template <class T>
void spread(const double* C, const double* q, double weight, bool accumulate, int64_t m, int64_t d, T* out,
            double* row) {
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t i = 0; i < d; ++i) row[i] = 0;
    for (int64_t k = 0; k < m; ++k) {
      const double c = C[r * m + k] * weight;
      const double* qk = q + k * d;
      for (int64_t i = 0; i < d; ++i) row[i] += c * qk[i];
    }
    for (int64_t i = 0; i < d; ++i) put(out + r * d + i, row[i], accumulate);
  }
}

// Descending, NaN first.
void sort_values(double* sigma, int64_t m) {
  for (int64_t i = 1; i < m; ++i)
    for (int64_t j = i; j > 0 && !(sigma[j] <= sigma[j - 1]) && sigma[j - 1] == sigma[j - 1]; --j) {
      const double swap = sigma[j];
      sigma[j] = sigma[j - 1];
      sigma[j - 1] = swap;
    }
}

// float32 factors go through lanes; where these refuse, and in float64, through the code of this file.
template <class T>
constexpr bool kInLanes = sizeof(T) == sizeof(float);

template <class T>
constexpr int64_t kGrain = kInLanes<T> ? 2 * kGroup : 4;  // components a thread takes at a time

}  // namespace

template <class T>
bool component_svdvals(const T* At, const T* B, T* out, SchattenSizes n, int threads) {
  const int64_t groups = n.n_instances * n.n_components, m = n.rank;
  Failure failure;
  threads = worth(groups * m * m * (n.d_in + n.d_out), threads);
  const int64_t in_lanes = kInLanes<T> ? group_size(m, n.d_in, n.d_out) + kGroup * m : 0;
  parallel_for(groups, kGrain<T>, threads, [&](int64_t begin, int64_t end) {
    const Workspace<double> memory(work_size(m, n.d_in, n.d_out)), lanes(in_lanes);
    if (memory.data == nullptr || lanes.data == nullptr) return failure.set();
    const Work w = work_at(memory.data, m, n.d_in, n.d_out);
    const auto finish = [&](int64_t g, double* sigma) {
      sort_values(sigma, m);
      for (int64_t i = 0; i < m; ++i) out[g * m + i] = static_cast<T>(sigma[i]);
    };
    const auto alone = [&](int64_t g) {
      double scale_a, scale_b;
      decompose_component(At + g * m * n.d_in, B + g * m * n.d_out, m, n.d_in, n.d_out, false, w, &scale_a, &scale_b);
      finish(g, w.sigma);
    };
    if constexpr (kInLanes<T>) {
      double* sigma = lanes.data + group_size(m, n.d_in, n.d_out);
      for (int64_t g = begin; g < end; g += kGroup) {
        Group group;
        group.n = end - g < kGroup ? end - g : kGroup;
        for (int64_t l = 0; l < group.n; ++l) {
          group.At[l] = At + (g + l) * m * n.d_in;
          group.B[l] = B + (g + l) * m * n.d_out;
        }
        FASTAPD_AT_RANK(svdvals_lanes, m, group, m, n.d_in, n.d_out, lanes.data, sigma)
        for (int64_t l = 0; l < group.n; ++l)
          if (group.ok[l])
            finish(g + l, sigma + l * m);
          else
            alone(g + l);
      }
    } else {
      for (int64_t g = begin; g < end; ++g) alone(g);
    }
  });
  return failure.none();
}

namespace {

// The exact form of one component: sum_i (sigma_i^2 + eps)^{p/2}, and its gradient times weight if grad_At is given.
template <class T>
double exact_component(const T* At, const T* B, double weight, double p, double eps, bool accumulate, SchattenSizes n,
                       Work w, double* row, T* grad_At, T* grad_B) {
  const int64_t m = n.rank;
  double scale_a, scale_b;
  const bool gradient = grad_At != nullptr || grad_B != nullptr;  // one is null when it has no entries
  const double back = decompose_component(At, B, m, n.d_in, n.d_out, gradient, w, &scale_a, &scale_b);
  double total = 0;
  for (int64_t i = 0; i < m; ++i) total += power(w.sigma[i] * w.sigma[i] + eps, p / 2);
  if (!gradient) return total;
  for (int64_t k = 0; k < m * m; ++k) w.gx[k] = 0;  // U diag(g sigma) V^T
  const double rounding = 1e-16 * largest(w.sigma, m);
  for (int64_t i = 0; i < m; ++i) {
    if (w.sigma[i] <= rounding) continue;  // zero but for rounding; with eps = 0 the slope there would be anything
    const double g = 2 * slope(w.sigma[i] * w.sigma[i] + eps, p / 2) * back;
    for (int64_t a = 0; a < m; ++a)
      for (int64_t b = 0; b < m; ++b) w.gx[a * m + b] += g * w.xt[i * m + a] * w.v[i * m + b];
  }
  // V is no longer needed: it holds first the coefficients of dA over Q_A, then those of dB over Q_B.
  for (int64_t r = 0; r < m; ++r)
    for (int64_t i = 0; i < m; ++i) {
      double c = 0;
      for (int64_t k = 0; k <= r; ++k) c += w.gx[i * m + k] * w.rb[k * m + r];
      w.v[r * m + i] = c;
    }
  spread(w.v, w.qa, weight / scale_b, accumulate, m, n.d_in, grad_At, row);
  for (int64_t r = 0; r < m; ++r)
    for (int64_t j = 0; j < m; ++j) {
      double c = 0;
      for (int64_t k = 0; k <= r; ++k) c += w.ra[k * m + r] * w.gx[k * m + j];
      w.v[r * m + j] = c;
    }
  spread(w.v, w.qb, weight / scale_a, accumulate, m, n.d_out, grad_B, row);
  return total;
}

// The factored form of one component, with |a_i|^2 |b_i|^2 in place of sigma_i^2, as many i at once as a vector holds.
double factored_component(const float* At, const float* B, double weight, double p, double eps, bool accumulate,
                          SchattenSizes n, float* grad_At, float* grad_B) {
  double total = 0;
  for (int64_t first = 0; first < n.rank; first += kGroup) {
    const int64_t some = n.rank - first < kGroup ? n.rank - first : kGroup;
    Lanes norm_a = fill(1.0), norm_b = fill(1.0);
    for (int64_t l = 0; l < some; ++l) {
      norm_a[l] = squared_length(At + (first + l) * n.d_in, n.d_in);
      norm_b[l] = squared_length(B + (first + l) * n.d_out, n.d_out);
    }
    const Lanes base = norm_a * norm_b + eps;
    Mask ok = ~Mask{};
    Lanes value = power_lanes(base, p / 2, &ok), step = weight * p * value / base;
    for (int64_t l = 0; l < some; ++l) {
      if (!ok[l]) {
        value[l] = power(base[l], p / 2);
        step[l] = 2 * weight * slope(base[l], p / 2);
      }
      total += value[l];
    }
    if (grad_At == nullptr && grad_B == nullptr) continue;
    for (int64_t l = 0; l < some; ++l) {
      const int64_t a = (first + l) * n.d_in;
      scaled(At + a, step[l] * norm_b[l], n.d_in, accumulate, grad_At + a);
    }
    for (int64_t l = 0; l < some; ++l) {
      const int64_t b = (first + l) * n.d_out;
      scaled(B + b, step[l] * norm_a[l], n.d_out, accumulate, grad_B + b);
    }
  }
  return total;
}

template <class T>
double factored_component(const T* At, const T* B, double weight, double p, double eps, bool accumulate,
                          SchattenSizes n, T* grad_At, T* grad_B) {
  double total = 0;
  for (int64_t i = 0; i < n.rank; ++i) {
    const T* a = At + i * n.d_in;
    const T* b = B + i * n.d_out;
    const double norm_a = dot_wide(a, a, n.d_in), norm_b = dot_wide(b, b, n.d_out);
    const double base = norm_a * norm_b + eps;
    total += power(base, p / 2);
    if (grad_At == nullptr && grad_B == nullptr) continue;
    const double g = 2 * weight * slope(base, p / 2);
    const double ga = g * norm_b, gb = g * norm_a;
    for (int64_t d = 0; d < n.d_in; ++d) put(grad_At + i * n.d_in + d, ga * static_cast<double>(a[d]), accumulate);
    for (int64_t d = 0; d < n.d_out; ++d) put(grad_B + i * n.d_out + d, gb * static_cast<double>(b[d]), accumulate);
  }
  return total;
}

}  // namespace

template <class T>
bool schatten(const T* At, const T* B, const int64_t* counts, double p, double eps, int64_t batch, bool exact,
              double scale, bool accumulate, T* loss, T* grad_At, T* grad_B, SchattenSizes n, int threads) {
  const int64_t groups = n.n_instances * n.n_components, m = n.rank;
  const int64_t wide = n.d_in > n.d_out ? n.d_in : n.d_out;
  const int64_t per_thread = exact ? work_size(m, n.d_in, n.d_out) + wide : 0;
  const Workspace<double> per_component(groups);
  double* sums = per_component.data;
  if (sums == nullptr) return false;
  Failure failure;
  threads = worth(groups * m * (exact ? m : 1) * (n.d_in + n.d_out), threads);
  const int64_t in_lanes = exact && kInLanes<T> ? group_size(m, n.d_in, n.d_out) : 0;
  parallel_for(groups, kGrain<T>, threads, [&](int64_t begin, int64_t end) {
    const Workspace<double> memory(per_thread), lanes(in_lanes);
    if (memory.data == nullptr || lanes.data == nullptr) return failure.set();
    const Work w = exact ? work_at(memory.data, m, n.d_in, n.d_out) : Work{};
    double* row = exact ? memory.data + work_size(m, n.d_in, n.d_out) : nullptr;
    Group group;
    int64_t member[kGroup];
    group.n = 0;
    const auto flush = [&] {
      if constexpr (kInLanes<T>) {
        if (group.n == 0) return;
        FASTAPD_AT_RANK(schatten_lanes, m, group, p, eps, accumulate, m, n.d_in, n.d_out, lanes.data)
        for (int64_t l = 0; l < group.n; ++l) {
          const int64_t g = member[l];
          const double weight = static_cast<double>(counts[g]);
          sums[g] = weight * (group.ok[l] ? group.total[l]
                                          : exact_component(group.At[l], group.B[l], scale * weight, p, eps, accumulate,
                                                            n, w, row, group.grad_At[l], group.grad_B[l]));
        }
        group.n = 0;
      }
    };
    for (int64_t g = begin; g < end; ++g) {
      const T* a = At + g * m * n.d_in;
      const T* b = B + g * m * n.d_out;
      T* ga = grad_At == nullptr ? nullptr : grad_At + g * m * n.d_in;
      T* gb = grad_B == nullptr ? nullptr : grad_B + g * m * n.d_out;
      const double weight = static_cast<double>(counts[g]);
      if (counts[g] == 0) {  // an unused component contributes nothing, whatever it holds
        for (int64_t k = 0; ga != nullptr && !accumulate && k < m * n.d_in; ++k) ga[k] = 0;
        for (int64_t k = 0; gb != nullptr && !accumulate && k < m * n.d_out; ++k) gb[k] = 0;
        sums[g] = 0;
        continue;
      }
      if constexpr (kInLanes<T>) {
        if (exact) {
          const int64_t l = group.n++;
          member[l] = g;
          group.At[l] = a, group.B[l] = b, group.grad_At[l] = ga, group.grad_B[l] = gb;
          group.weight[l] = scale * weight;
          if (group.n == kGroup) flush();
          continue;
        }
      }
      const double sum = exact ? exact_component(a, b, scale * weight, p, eps, accumulate, n, w, row, ga, gb)
                               : factored_component(a, b, scale * weight, p, eps, accumulate, n, ga, gb);
      sums[g] = weight * sum;
    }
    flush();
  });
  const double off = static_cast<double>(m) * power(eps, p / 2);
  for (int64_t i = 0; i < n.n_instances; ++i) {
    double total = 0;
    for (int64_t c = 0; c < n.n_components; ++c) {
      const int64_t g = i * n.n_components + c;
      total += sums[g];
      if (batch >= 0 && counts[g] != batch) total += static_cast<double>(batch - counts[g]) * off;
    }
    loss[i] = static_cast<T>(total);
  }
  return failure.none();
}

template <class T>
bool schatten_masked(const T* At, const T* B, const T* mask, double p, double eps, int64_t batch, T* loss, T* grad_At,
                     T* grad_B, T* grad_mask, SchattenSizes n, int threads) {
  const int64_t groups = n.n_instances * n.n_components, m = n.rank, C = n.n_components;
  const bool gradient = grad_At != nullptr || grad_B != nullptr;
  const Workspace<double> memory(groups * (1 + 2 * m));
  double* sums = memory.data;
  if (sums == nullptr) return false;
  double* norms = sums + groups;  // [I, C, 2, m]
  threads = worth(groups * m * (10 * batch + n.d_in + n.d_out), threads);
  parallel_for(groups, 1, threads, [=](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t i = g / C, c = g % C;
      double* na = norms + g * 2 * m;
      double* nb = na + m;
      for (int64_t r = 0; r < m; ++r) {
        const T* a = At + (g * m + r) * n.d_in;
        const T* b = B + (g * m + r) * n.d_out;
        na[r] = dot_wide(a, a, n.d_in);
        nb[r] = dot_wide(b, b, n.d_out);
      }
      double total = 0;
      // Per rank, d loss / d S = sum over samples of mask * slope; na and nb are turned into the factors' weights
      // below.
      for (int64_t r = 0; r < m; ++r) {
        const double S = na[r] * nb[r];
        double dS = 0;
        for (int64_t s = 0; s < batch; ++s) {
          const int64_t at = (i * batch + s) * C + c;
          const double weight = static_cast<double>(mask[at]), base = weight * S + eps;
          total += power(base, p / 2);
          if (!gradient && grad_mask == nullptr) continue;
          const double step = slope(base, p / 2);
          dS += weight * step;
          if (grad_mask != nullptr) {
            const double so_far = r == 0 ? 0 : static_cast<double>(grad_mask[at]);
            grad_mask[at] = static_cast<T>(so_far + S * step);
          }
        }
        if (!gradient) continue;
        const double ga = 2 * dS * nb[r], gb = 2 * dS * na[r];
        for (int64_t d = 0; d < n.d_in; ++d)
          grad_At[(g * m + r) * n.d_in + d] = static_cast<T>(ga * static_cast<double>(At[(g * m + r) * n.d_in + d]));
        for (int64_t d = 0; d < n.d_out; ++d)
          grad_B[(g * m + r) * n.d_out + d] = static_cast<T>(gb * static_cast<double>(B[(g * m + r) * n.d_out + d]));
      }
      sums[g] = total;
    }
  });
  for (int64_t i = 0; i < n.n_instances; ++i) {
    double total = 0;
    for (int64_t c = 0; c < C; ++c) total += sums[i * C + c];
    loss[i] = static_cast<T>(total);
  }
  return true;
}

#define FASTAPD_INSTANTIATE(T)                                                                                       \
  template bool component_svdvals<T>(const T*, const T*, T*, SchattenSizes, int);                                    \
  template bool schatten<T>(const T*, const T*, const int64_t*, double, double, int64_t, bool, double, bool, T*, T*, \
                            T*, SchattenSizes, int);                                                                 \
  template bool schatten_masked<T>(const T*, const T*, const T*, double, double, int64_t, T*, T*, T*, T*,            \
                                   SchattenSizes, int);
FASTAPD_INSTANTIATE(float)
FASTAPD_INSTANTIATE(double)

}  // namespace FASTAPD_LEVEL
}  // namespace fastapd
