// A Schatten sum with its gradient, and singular values, for as many components at once as a vector holds doubles: one
// component a lane. For float32 factors that are not nearly dependent; who is not is told, and takes another way.
//
// The Gram matrices of both factors are summed in float64, along d, and turned so that a vector holds one entry of all
// components. Their Cholesky factors are those of a QR factorisation, G_A = R_A^T R_A, G_B = R_B^T R_B, with an error
// of 1e-16 over the smallest pivot (relative to its diagonal: the length of a column does not matter), so a lane with
// one below kPivot is refused. One-sided Jacobi turns the columns of X = R_A R_B^T into W = U diag(sigma), and with g =
// 2 f'(sigma^2) the gradients are
//   dA = A H_A    H_A = Y diag(g) Y^T, Y = R_A^{-1} W          dB = H_B B    H_B = T diag(g) T^T, T = R_A^T U
// where no V is needed, nor Q: H is applied in float64 to the factors as they are. T knows u_i to 1e-14 of the largest
// sigma over sigma_i, so a lane that spans more than 1e7 is refused as well.
//
// A lane computes the same whatever its neighbours hold: it takes no part in a sweep once it has converged.
#pragma once
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace fastapd {
namespace FASTAPD_LEVEL {
namespace {

constexpr int64_t kGroup = kLanes<double>;
constexpr double kPivot = 1e-7;        // of a column's squared length, what must be left beside the columns before it
constexpr double kSpan = 1e-14;        // of sigma^2, smallest to largest
constexpr double kOrthogonal = 1e-28;  // of a squared cosine: such columns are left as they are
constexpr int kPairs = 4;              // that are turned at a time
constexpr double kLast = 1e-14;  // of a squared cosine: a sweep that met no larger one was the last, as it squares

using Lanes = vec<double>;
using Mask = decltype(Lanes{} < Lanes{});
typedef float Narrow __attribute__((vector_size(FASTAPD_VECTOR_BYTES / 2)));
typedef float NarrowUnaligned __attribute__((vector_size(FASTAPD_VECTOR_BYTES / 2), aligned(4), may_alias));

inline Lanes fill(double value) {
  return Lanes{} + value;
}

inline Lanes widened(const float* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const NarrowUnaligned*>(p), Lanes);
#endif
}

inline void narrow(float* p, Lanes v) {
#if defined(__AVX512F__)
  _mm256_storeu_ps(p, _mm512_maskz_cvtpd_ps(0xff, reinterpret_cast<__m512d>(v)));
#else
  *reinterpret_cast<NarrowUnaligned*>(p) = __builtin_convertvector(v, Narrow);
#endif
}

inline Lanes root(Lanes v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_maskz_sqrt_pd(0xff, reinterpret_cast<__m512d>(v)));
#elif defined(__AVX2__)
  return reinterpret_cast<Lanes>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(v)));
#elif defined(__SSE2__)
  return reinterpret_cast<Lanes>(_mm_sqrt_pd(reinterpret_cast<__m128d>(v)));
#else
  for (int64_t l = 0; l < kGroup; ++l) v[l] = __builtin_sqrt(v[l]);
  return v;
#endif
}

inline bool any(Mask mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_pd(reinterpret_cast<__m256d>(mask)) != 0;
#else
  bool found = false;
  for (int64_t l = 0; l < kGroup; ++l) found = found || mask[l] != 0;
  return found;
#endif
}

// base^exponent to about 1e-13, for base in [1e-300, 1e300] and a result in [2^-1000, 2^1000].
inline Lanes power_lanes(Lanes base, double exponent, Mask* ok) {
  const Lanes magic = fill(6755399441055744.0);  // 1.5 * 2^52: in its last bits a double holds an integer
  const Mask one = reinterpret_cast<Mask>(fill(1.0));
  *ok &= (base >= 1e-300) & (base <= 1e300);
  base = *ok ? base : fill(1.0);
  Mask e = (reinterpret_cast<Mask>(base) >> 52) - 1023;
  Lanes f = reinterpret_cast<Lanes>((reinterpret_cast<Mask>(base) & 0xfffffffffffffLL) | one);
  const Mask upper = f > 1.4142135623730951;
  f = upper ? f * 0.5 : f;
  e -= upper;                                        // a true lane is -1
  const Lanes z = (f - 1.0) / (f + 1.0), s = z * z;  // log f = 2 (z + z^3/3 + z^5/5 + ..), s < 0.03
  Lanes series = fill(1.0 / 21);
  for (int n = 19; n > 0; n -= 2) series = series * s + 1.0 / n;
  const Lanes logarithm = (reinterpret_cast<Lanes>(e + reinterpret_cast<Mask>(magic)) - magic) +
                          2 * 1.4426950408889634 * z * series;  // to base 2
  Lanes y = logarithm * exponent;
  *ok &= (y >= -1000.0) & (y <= 1000.0);
  y = *ok ? y : Lanes{};
  const Lanes shifted = y + magic;
  const Lanes r = (y - (shifted - magic)) * 0.6931471805599453;
  Lanes result = fill(1.0);
  for (int n = 13; n > 0; --n) result = result * r * (1.0 / n) + 1.0;
  const Mask n = reinterpret_cast<Mask>(shifted) - reinterpret_cast<Mask>(magic);
  return result * reinterpret_cast<Lanes>((n + 1023) << 52);
}

// ------------------------------------------------------------------------------------------- along the rows of factors

// Columns [begin, begin + n) of the rows of f [m, d], in float64, n rounded up to whole vectors with zeros.
inline void widen(const float* f, int64_t m, int64_t d, int64_t begin, int64_t n, double* out, int64_t stride) {
  for (int64_t r = 0; r < m; ++r) {
    const float* from = f + r * d + begin;
    double* to = out + r * stride;
    int64_t i = 0;
    for (; i + kGroup <= n; i += kGroup) store(to + i, widened(from + i));
    if (i == n) continue;
    for (int64_t end = i + kGroup; i < end; ++i) to[i] = i < n ? static_cast<double>(from[i]) : 0;
  }
}

// Unrolled before arrays are taken apart into registers; unrolled later, tiles would live in memory.
#if defined(__clang__)
#define FASTAPD_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FASTAPD_UNROLL _Pragma("GCC unroll 16")
#endif

// Conditions that are known when a lambda is compiled.
struct Yes {
  constexpr operator bool() const { return true; }
};
struct No {
  constexpr operator bool() const { return false; }
};

#if defined(__clang__)
#define FASTAPD_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTAPD_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Mask{__VA_ARGS__})
#endif

// The sums over the lanes of each of kGroup vectors.
inline __attribute__((always_inline)) Lanes sum_each(const Lanes* v) {
#if FASTAPD_VECTOR_BYTES == 64
  Lanes pair[4], four[2];
  FASTAPD_UNROLL
  for (int i = 0; i < 4; ++i)
    pair[i] = FASTAPD_SHUFFLE(v[2 * i], v[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
              FASTAPD_SHUFFLE(v[2 * i], v[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  FASTAPD_UNROLL
  for (int i = 0; i < 2; ++i)
    four[i] = FASTAPD_SHUFFLE(pair[2 * i], pair[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
              FASTAPD_SHUFFLE(pair[2 * i], pair[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return FASTAPD_SHUFFLE(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         FASTAPD_SHUFFLE(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15);
#elif FASTAPD_VECTOR_BYTES == 32
  Lanes pair[2];
  FASTAPD_UNROLL
  for (int i = 0; i < 2; ++i)
    pair[i] = FASTAPD_SHUFFLE(v[2 * i], v[2 * i + 1], 0, 4, 2, 6) + FASTAPD_SHUFFLE(v[2 * i], v[2 * i + 1], 1, 5, 3, 7);
  return FASTAPD_SHUFFLE(pair[0], pair[1], 0, 1, 4, 5) + FASTAPD_SHUFFLE(pair[0], pair[1], 2, 3, 6, 7);
#else
  return FASTAPD_SHUFFLE(v[0], v[1], 0, 2) + FASTAPD_SHUFFLE(v[0], v[1], 1, 3);
#endif
}

// total[(r * row + s) * kGroup] += (= if first) the dot product of row r of a and row s of b, from the diagonal on if a
// is b.
template <int R, int S, bool kDiagonal>
inline void dot_tile(const double* a, const double* b, int64_t stride, int64_t n, bool first, double* total,
                     int64_t row) {
  constexpr int kEntries = kDiagonal ? R * (R + 1) / 2 : R * S;
  constexpr int kWhole = static_cast<int>((kEntries + kGroup - 1) / kGroup * kGroup);
  Lanes acc[kWhole];  // cleared, it would live in memory
  const auto add = [&](int64_t i, auto begins) {
    Lanes y[S];
    FASTAPD_UNROLL
    for (int s = 0; s < S; ++s) y[s] = load(b + s * stride + i);
    int e = 0;
    FASTAPD_UNROLL
    for (int r = 0; r < R; ++r) {
      const Lanes x = kDiagonal ? y[r < S ? r : 0] : load(a + r * stride + i);
      FASTAPD_UNROLL
      for (int s = kDiagonal ? r : 0; s < S; ++s, ++e) acc[e] = begins ? x * y[s] : acc[e] + x * y[s];
    }
  };
  add(0, Yes{});
  for (int64_t i = kGroup; i < n; i += kGroup) add(i, No{});
  FASTAPD_UNROLL
  for (int e = kEntries; e < kWhole; ++e) acc[e] = acc[0];  // not looked at
  double sums[kWhole];
  FASTAPD_UNROLL
  for (int e = 0; e < kWhole; e += static_cast<int>(kGroup)) store(sums + e, sum_each(acc + e));
  int e = 0;
  FASTAPD_UNROLL
  for (int r = 0; r < R; ++r) FASTAPD_UNROLL
  for (int s = kDiagonal ? r : 0; s < S; ++s) {
    double* to = total + (r * row + s) * kGroup;
    *to = first ? sums[e++] : *to + sums[e++];
  }
}

template <int R>
inline void dot_row(const double* rows, int64_t stride, int64_t n, int64_t m, int64_t r, bool first, double* total) {
  dot_tile<R, R, true>(rows + r * stride, rows + r * stride, stride, n, first, total + (r * m + r) * kGroup, m);
  int64_t s = r + R;
  for (; s + 4 <= m; s += 4)
    dot_tile<R, 4, false>(rows + r * stride, rows + s * stride, stride, n, first, total + (r * m + s) * kGroup, m);
  for (; s < m; ++s)
    dot_tile<R, 1, false>(rows + r * stride, rows + s * stride, stride, n, first, total + (r * m + s) * kGroup, m);
}

// Columns of a factor that are widened at a time: what the second cache holds.
inline int64_t chunk_of(int64_t m, int64_t d) {
  const int64_t whole = (d + kGroup - 1) / kGroup * kGroup, fit = 12288 / (m > 0 ? m : 1) / kGroup * kGroup;
  const int64_t chunk = fit > 64 ? fit : 64;
  return chunk < whole ? chunk : whole;
}

constexpr int kPanel = FASTAPD_VECTOR_BYTES == 64 ? 4 : 2;  // vectors of columns that a tile of `apply` has

// One component's upper triangle of f f^T, into its lane of G [m, m, kGroup].
inline void gram(const float* f, int64_t m, int64_t d, double* G, double* rows) {
  const int64_t chunk = chunk_of(m, d);
  if (d == 0)
    for (int64_t k = 0; k < m * m; ++k) G[k * kGroup] = 0;
  for (int64_t begin = 0; begin < d; begin += chunk) {
    const int64_t n = d - begin < chunk ? d - begin : chunk;
    widen(f, m, d, begin, n, rows, chunk);
    int64_t r = 0;
    for (; r + 4 <= m; r += 4) dot_row<4>(rows, chunk, n, m, r, begin == 0, G);
    if (m - r == 1) dot_row<1>(rows, chunk, n, m, r, begin == 0, G);
    if (m - r == 2) dot_row<2>(rows, chunk, n, m, r, begin == 0, G);
    if (m - r == 3) dot_row<3>(rows, chunk, n, m, r, begin == 0, G);
  }
}

// The last columns of R rows, fewer than a panel has.
template <int R>
__attribute__((noinline)) void put_part(const Lanes* acc, float* out, int64_t d, int64_t n, bool accumulate) {
  for (int64_t r = 0; r < R; ++r)
    for (int64_t i = 0; i < n; ++i) {
      const double value = acc[r * kPanel + i / kGroup][i % kGroup];
      out[r * d + i] = static_cast<float>(accumulate ? static_cast<double>(out[r * d + i]) + value : value);
    }
}

template <int R>
inline void apply_tile(const double* h, int64_t m, const double* panel, float* out, int64_t d, int64_t n,
                       bool accumulate) {
  Lanes acc[R][kPanel];  // cleared, it would live in memory
  const auto add = [&](int64_t k, auto begins) {
    Lanes x[kPanel];
    FASTAPD_UNROLL
    for (int v = 0; v < kPanel; ++v) x[v] = load(panel + (k * kPanel + v) * kGroup);
    FASTAPD_UNROLL
    for (int r = 0; r < R; ++r) {
      const double c = h[r * m + k];
      FASTAPD_UNROLL
      for (int v = 0; v < kPanel; ++v) acc[r][v] = begins ? c * x[v] : acc[r][v] + c * x[v];
    }
  };
  add(0, Yes{});
  for (int64_t k = 1; k < m; ++k) add(k, No{});
  if (n >= kPanel * kGroup && accumulate) {
    FASTAPD_UNROLL
    for (int r = 0; r < R; ++r) FASTAPD_UNROLL
    for (int v = 0; v < kPanel; ++v) narrow(out + r * d + v * kGroup, widened(out + r * d + v * kGroup) + acc[r][v]);
  } else if (n >= kPanel * kGroup) {
    FASTAPD_UNROLL
    for (int r = 0; r < R; ++r) FASTAPD_UNROLL
    for (int v = 0; v < kPanel; ++v) narrow(out + r * d + v * kGroup, acc[r][v]);
  } else {
    Lanes rest[R][kPanel];
    FASTAPD_UNROLL
    for (int r = 0; r < R; ++r) FASTAPD_UNROLL
    for (int v = 0; v < kPanel; ++v) rest[r][v] = acc[r][v];
    put_part<R>(&rest[0][0], out, d, n, accumulate);
  }
}

// out [m, d] = h f, or added to it; h [m, m], f [m, d].
inline void apply(const double* h, const float* f, int64_t m, int64_t d, float* out, bool accumulate, double* panel) {
  constexpr int64_t width = kPanel * kGroup;
  for (int64_t begin = 0; begin < d; begin += width) {
    const int64_t n = d - begin < width ? d - begin : width;
    widen(f, m, d, begin, n, panel, width);
    float* to = out + begin;
    int64_t r = 0;
    for (; r + 4 <= m; r += 4) apply_tile<4>(h + r * m, m, panel, to + r * d, d, n, accumulate);
    if (m - r >= 2) {
      apply_tile<2>(h + r * m, m, panel, to + r * d, d, n, accumulate);
      r += 2;
    }
    if (m - r == 1) apply_tile<1>(h + r * m, m, panel, to + r * d, d, n, accumulate);
  }
}

// ------------------------------------------------------------------------------------------------- the factored form

inline double squared_length(const float* a, int64_t n) {
  Lanes sum[4] = {Lanes{}, Lanes{}, Lanes{}, Lanes{}};
  int64_t i = 0;
  for (; i + 4 * kGroup <= n; i += 4 * kGroup) {
    FASTAPD_UNROLL
    for (int v = 0; v < 4; ++v) {
      const Lanes x = widened(a + i + v * kGroup);
      sum[v] += x * x;
    }
  }
  for (; i + kGroup <= n; i += kGroup) {
    const Lanes x = widened(a + i);
    sum[0] += x * x;
  }
  double total = sum_lanes<double>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < n; ++i) total += static_cast<double>(a[i]) * static_cast<double>(a[i]);
  return total;
}

// out = factor a, or added to out.
inline void scaled(const float* a, double factor, int64_t n, bool accumulate, float* out) {
  int64_t i = 0;
  if (accumulate)
    for (; i + kGroup <= n; i += kGroup) narrow(out + i, widened(out + i) + factor * widened(a + i));
  else
    for (; i + kGroup <= n; i += kGroup) narrow(out + i, factor * widened(a + i));
  for (; i < n; ++i) {
    const double value = factor * static_cast<double>(a[i]);
    out[i] = static_cast<float>(accumulate ? static_cast<double>(out[i]) + value : value);
  }
}

// --------------------------------------------------------------------------------- across components, one in each lane

// G [m, m], upper triangle, becomes R with R^T R = G / trace. Returns the trace.
template <int M>
inline Lanes factorise(double* G, int64_t rank, Mask* ok) {
  const int64_t m = M ? M : rank;
  Lanes trace = {};
  for (int64_t k = 0; k < m; ++k) trace += load(G + (k * m + k) * kGroup);
  *ok &= (trace > 1e-200) & (trace < 1e200);
  const Lanes inverse = 1.0 / trace;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = i; j < m; ++j) store(G + (i * m + j) * kGroup, load(G + (i * m + j) * kGroup) * inverse);
  for (int64_t i = 0; i < m; ++i) {  // row i of R from the rows above it
    double* Gi = G + i * m * kGroup;
    const Lanes diagonal = load(Gi + i * kGroup);
    for (int64_t k = 0; k < i; ++k) {
      const double* Gk = G + k * m * kGroup;
      const Lanes c = load(Gk + i * kGroup);
      for (int64_t j = i; j < m; ++j) store(Gi + j * kGroup, load(Gi + j * kGroup) - c * load(Gk + j * kGroup));
    }
    const Lanes pivot = load(Gi + i * kGroup);
    *ok &= pivot > kPivot * diagonal;
    const Lanes scale = 1.0 / root(pivot);
    for (int64_t j = i; j < m; ++j) store(Gi + j * kGroup, load(Gi + j * kGroup) * scale);
  }
  return trace;
}

// W[j] = column j of R_A R_B^T.
template <int M>
inline void core(const double* RA, const double* RB, int64_t rank, double* W) {
  const int64_t m = M ? M : rank;
  for (int64_t j = 0; j < m; ++j)
    for (int64_t i = 0; i < m; ++i) {
      Lanes x = {};
      for (int64_t k = i > j ? i : j; k < m; ++k)
        x += load(RA + (i * m + k) * kGroup) * load(RB + (j * m + k) * kGroup);
      store(W + (j * m + i) * kGroup, x);
    }
}

template <int M>
inline Lanes dot_lanes(const double* a, const double* b, int64_t rank) {
  const int64_t m = M ? M : rank;
  Lanes even = {}, odd = {};
  int64_t i = 0;
  for (; i + 2 <= m; i += 2) {
    even += load(a + i * kGroup) * load(b + i * kGroup);
    odd += load(a + (i + 1) * kGroup) * load(b + (i + 1) * kGroup);
  }
  if (i < m) even += load(a + i * kGroup) * load(b + i * kGroup);
  return even + odd;
}

// The tangent and the cosine of the angle that makes columns of squared lengths alpha and alpha + gap, of the product
// gamma, orthogonal. The tangent is good to 1e-8, as what is left of gamma goes with the next sweep, where it matters;
// the cosine to the last bits, as it changes lengths.
inline void rotation(Lanes gap, Lanes gamma, Lanes* tangent, Lanes* cosine) {
  const Lanes size = gap < 0.0 ? -gap : gap, square = gap * gap + 4.0 * gamma * gamma;
#if defined(__AVX512F__)  // division and roots take longer than the rest of a rotation
  const auto inverse_root = [](Lanes v) { return reinterpret_cast<Lanes>(_mm512_maskz_rsqrt14_pd(0xff, v)); };
  const auto refine = [](Lanes v, Lanes y) { return y * (1.5 - 0.5 * v * y * y); };
  const Lanes sum = size + square * refine(square, inverse_root(square));
  const Lanes guess = reinterpret_cast<Lanes>(_mm512_maskz_rcp14_pd(0xff, sum));
  const Lanes t = 2.0 * gamma * (guess * (2.0 - sum * guess)), v = 1.0 + t * t;
  *cosine = refine(v, refine(v, inverse_root(v)));
#else
  const Lanes t = 2.0 * gamma / (size + root(square));
  *cosine = 1.0 / root(1.0 + t * t);
#endif
  *tangent = gap < 0.0 ? -t : t;
}

// Makes the rows of W [m, m] orthogonal. norms [m] become their squared lengths.
template <int M>
inline void orthogonalise_lanes(double* W, double* norms, int64_t rank, Mask* ok) {
  const int64_t m = M ? M : rank, players = m + m % 2;
  Mask active = *ok, large;
  // n pairs, no row in two of them: the processor works on several at a time.
  const auto rotate = [&](const int64_t* left, const int64_t* right, int n) {
    Lanes tangent[kPairs], cosine[kPairs];
    bool turns[kPairs];
    for (int k = 0; k < n; ++k) tangent[k] = dot_lanes<M>(W + left[k] * m * kGroup, W + right[k] * m * kGroup, m);
    for (int k = 0; k < n; ++k) {
      double *to_p = norms + left[k] * kGroup, *to_q = norms + right[k] * kGroup;
      const Lanes alpha = load(to_p), beta = load(to_q), gamma = tangent[k];
      const Lanes square = gamma * gamma, both = alpha * beta;
      const Mask turn = active & (square > kOrthogonal * both);
      large |= turn & (square > kLast * both);
      Lanes t, c;
      rotation(beta - alpha, gamma, &t, &c);
      t = turn ? t : Lanes{};
      tangent[k] = t;
      cosine[k] = turn ? c : fill(1.0);
      turns[k] = any(turn);
      store(to_p, alpha - t * gamma);
      store(to_q, beta + t * gamma);
    }
    for (int k = 0; k < n; ++k) {
      if (!turns[k]) continue;
      double *wp = W + left[k] * m * kGroup, *wq = W + right[k] * m * kGroup;
      const Lanes c = cosine[k], s = c * tangent[k];
      for (int64_t i = 0; i < m; ++i) {
        const Lanes a = load(wp + i * kGroup), b = load(wq + i * kGroup);
        store(wp + i * kGroup, c * a - s * b);
        store(wq + i * kGroup, s * a + c * b);
      }
    }
  };
  for (int sweep = 0; sweep < 40 && any(active); ++sweep) {
    for (int64_t j = 0; j < m; ++j) store(norms + j * kGroup, dot_lanes<M>(W + j * m * kGroup, W + j * m * kGroup, m));
    large = Mask{};
    int64_t left[kPairs], right[kPairs];
    if (m <= 24) {  // a tournament
      for (int64_t round = 0; round + 1 < players; ++round) {
        int n = 0;
        const auto meet = [&](int64_t p, int64_t q) {
          left[n] = p;
          right[n++] = q;
          if (n < kPairs) return;
          rotate(left, right, n);
          n = 0;
        };
        if (players == m) meet(round, players - 1);
        for (int64_t k = 1; k < players / 2; ++k)
          meet(round + k < players - 1 ? round + k : round + k - players + 1,
               round - k < 0 ? round - k + players - 1 : round - k);
        if (n > 0) rotate(left, right, n);
      }
    } else {  // block against block, which the first cache holds
      for (int64_t first = 0; first < m; first += kPairs) {
        for (int64_t p = first; p < first + kPairs && p < m; ++p)
          for (int64_t q = p + 1; q < first + kPairs && q < m; ++q) rotate(&p, &q, 1);
        for (int64_t second = first + kPairs; second < m; second += kPairs)
          for (int64_t shift = 0; shift < kPairs; ++shift) {
            int n = 0;
            for (int64_t k = 0; k < kPairs; ++k) {
              left[n] = first + k;
              right[n] = second + (k + shift) % kPairs;
              if (right[n] < m) ++n;
            }
            rotate(left, right, n);
          }
      }
    }
    active &= large;
  }
  *ok &= ~active;
  Lanes most = {}, least = fill(__DBL_MAX__);
  for (int64_t j = 0; j < m; ++j) {
    const Lanes n = dot_lanes<M>(W + j * m * kGroup, W + j * m * kGroup, m);
    store(norms + j * kGroup, n);
    most = n > most ? n : most;
    least = n < least ? n : least;
  }
  *ok &= least > kSpan * most;
}

// H[r, k] = sum_i weight_i rows[i, r] rows[i, k], and the same below the diagonal.
template <int M>
inline void weighted_gram(const double* rows, const double* weight, int64_t rank, double* H) {
  const int64_t m = M ? M : rank;
  for (int64_t r = 0; r < m; ++r)
    for (int64_t k = r; k < m; k += 4) {
      Lanes acc[4] = {Lanes{}, Lanes{}, Lanes{}, Lanes{}};
      const int64_t n = m - k < 4 ? m - k : 4;
      if (n == 4) {
        for (int64_t i = 0; i < m; ++i) {
          const double* row = rows + i * m * kGroup;
          const Lanes x = load(weight + i * kGroup) * load(row + r * kGroup);
          for (int s = 0; s < 4; ++s) acc[s] += x * load(row + (k + s) * kGroup);
        }
      } else {
        for (int64_t i = 0; i < m; ++i) {
          const double* row = rows + i * m * kGroup;
          const Lanes x = load(weight + i * kGroup) * load(row + r * kGroup);
          for (int64_t s = 0; s < n; ++s) acc[s] += x * load(row + (k + s) * kGroup);
        }
      }
      for (int64_t s = 0; s < n; ++s) {
        store(H + (r * m + k + s) * kGroup, acc[s]);
        store(H + ((k + s) * m + r) * kGroup, acc[s]);
      }
    }
}

struct Group {
  const float* At[kGroup];
  const float* B[kGroup];
  float* grad_At[kGroup];  // null when no gradient is wanted
  float* grad_B[kGroup];
  double weight[kGroup];
  double total[kGroup];  // of the powers; out
  bool ok[kGroup];       // whether this component was computed; out
  int64_t n;
};

// Columns for which there must be room: of a chunk of the Gram matrix, or of a panel.
inline int64_t rows_of(int64_t m, int64_t d_in, int64_t d_out) {
  const int64_t chunk = chunk_of(m, d_in > d_out ? d_in : d_out);
  return chunk > kPanel * kGroup ? chunk : kPanel * kGroup;
}

// Doubles that the functions below need, the first of them at a multiple of 64 bytes.
inline int64_t group_size(int64_t m, int64_t d_in, int64_t d_out) {
  return (4 * m * m + 2 * m) * kGroup + m * rows_of(m, d_in, d_out) + m * m + 8;
}

inline double* aligned(double* p) {
  return reinterpret_cast<double*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64);
}

// sigma^2 [m, kGroup] of each component of the group, in units of the product of the traces, which is returned.
template <int M>
inline Lanes decompose_lanes(const Group& group, int64_t rank, int64_t d_in, int64_t d_out, double* memory,
                             Lanes* trace_A, Lanes* trace_B, Mask* ok) {
  const int64_t m = M ? M : rank, square = m * m * kGroup;
  double *RA = memory, *RB = RA + square, *W = RB + square, *norms = W + 2 * square, *rows = norms + 2 * m * kGroup;
  for (int64_t l = 0; l < kGroup; ++l) {
    if (l < group.n) {
      gram(group.At[l], m, d_in, RA + l, rows);
      gram(group.B[l], m, d_out, RB + l, rows);
      continue;
    }
    for (int64_t k = 0; k < m * m; ++k) RA[k * kGroup + l] = RB[k * kGroup + l] = 0;
  }
  *ok = ~Mask{};
  *trace_A = factorise<M>(RA, m, ok);
  *trace_B = factorise<M>(RB, m, ok);
  if (!any(*ok)) return Lanes{};
  core<M>(RA, RB, m, W);
  orthogonalise_lanes<M>(W, norms, m, ok);
  return *trace_A * *trace_B;
}

template <int M>
void schatten_lanes(Group& group, double p, double eps, bool accumulate, int64_t rank, int64_t d_in, int64_t d_out,
                    double* memory) {
  const int64_t m = M ? M : rank, square = m * m * kGroup;
  memory = aligned(memory);
  double *RA = memory, *Y = RA + square, *W = Y + square, *H = W + square, *norms = H + square;
  double *weights = norms + m * kGroup, *rows = weights + m * kGroup, *h = rows + m * rows_of(m, d_in, d_out);
  Lanes trace_A, trace_B;
  Mask ok;
  const Lanes unit = decompose_lanes<M>(group, m, d_in, d_out, memory, &trace_A, &trace_B, &ok);
  Lanes total = {};
  if (any(ok))
    for (int64_t i = 0; i < m; ++i) {
      const Lanes base = load(norms + i * kGroup) * unit + eps;
      const Lanes value = power_lanes(base, p / 2, &ok);
      total += value;
      store(weights + i * kGroup, p * value / base);
    }
  for (int64_t l = 0; l < group.n; ++l) {
    group.total[l] = total[l];
    group.ok[l] = ok[l] != 0;
  }
  if (!any(ok) || (group.grad_At[0] == nullptr && group.grad_B[0] == nullptr)) return;

  const auto spread = [&](const float* const* f, float* const* grad, int64_t d, Lanes factor) {
    for (int64_t l = 0; l < group.n; ++l) {
      if (!group.ok[l]) continue;
      const double c = factor[l] * group.weight[l];
      for (int64_t k = 0; k < m * m; ++k) h[k] = c * H[k * kGroup + l];
      apply(h, f[l], m, d, grad[l], accumulate, rows);
    }
  };
  for (int64_t j = 0; j < m; ++j)  // Y = R_A^{-1} W, from the last row up
    for (int64_t i = m; i-- > 0;) {
      Lanes y = load(W + (j * m + i) * kGroup);
      for (int64_t k = i + 1; k < m; ++k) y -= load(RA + (i * m + k) * kGroup) * load(Y + (j * m + k) * kGroup);
      store(Y + (j * m + i) * kGroup, y / load(RA + (i * m + i) * kGroup));
    }
  weighted_gram<M>(Y, weights, m, H);
  spread(group.At, group.grad_At, d_in, trace_B);
  for (int64_t j = 0; j < m; ++j) {  // T = R_A^T W, in place from the last row up; U is W over sigma
    for (int64_t i = m; i-- > 0;) {
      Lanes x = {};
      for (int64_t k = 0; k <= i; ++k) x += load(RA + (k * m + i) * kGroup) * load(W + (j * m + k) * kGroup);
      store(W + (j * m + i) * kGroup, x);
    }
    store(weights + j * kGroup, load(weights + j * kGroup) / load(norms + j * kGroup));
  }
  weighted_gram<M>(W, weights, m, H);
  spread(group.B, group.grad_B, d_out, trace_A);
}

// sigma [m] of each component, in no order, to out [kGroup, m].
template <int M>
void svdvals_lanes(Group& group, int64_t rank, int64_t d_in, int64_t d_out, double* memory, double* out) {
  const int64_t m = M ? M : rank;
  memory = aligned(memory);
  const double* norms = memory + 4 * m * m * kGroup;
  Lanes trace_A, trace_B;
  Mask ok;
  const Lanes unit = decompose_lanes<M>(group, m, d_in, d_out, memory, &trace_A, &trace_B, &ok);
  for (int64_t l = 0; l < group.n; ++l) {
    group.ok[l] = ok[l] != 0;
    for (int64_t i = 0; i < m && group.ok[l]; ++i) out[l * m + i] = __builtin_sqrt(norms[i * kGroup + l] * unit[l]);
  }
}

// The instance with a rank known to the compiler, where there is one.
#define FASTAPD_AT_RANK(RUN, m, ...) \
  switch (m) {                       \
    case 1:                          \
      RUN<1>(__VA_ARGS__);           \
      break;                         \
    case 2:                          \
      RUN<2>(__VA_ARGS__);           \
      break;                         \
    case 3:                          \
      RUN<3>(__VA_ARGS__);           \
      break;                         \
    case 4:                          \
      RUN<4>(__VA_ARGS__);           \
      break;                         \
    case 8:                          \
      RUN<8>(__VA_ARGS__);           \
      break;                         \
    case 16:                         \
      RUN<16>(__VA_ARGS__);          \
      break;                         \
    default:                         \
      RUN<0>(__VA_ARGS__);           \
  }

}  // namespace
}  // namespace FASTAPD_LEVEL
}  // namespace fastapd
