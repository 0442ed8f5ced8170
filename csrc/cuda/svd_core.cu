// From the Gram matrices of the factors of components to singular values, Schatten sums and the matrices of gradients.
//
//   G_A = R_A^T R_A, G_B = R_B^T R_B   Cholesky, in twice double's precision; what is left of a column below 1e-15 of
//                                      its length is rounding: it adds no direction, and a row of R is zero
//   X = R_A R_B^T                      one-sided Jacobi turns its columns into X V = U diag(sigma), and R_B^T into W^T
//   W = V^T R_B, Z = U^T R_A           H_A = W^T diag(g) W, H_B = Z^T diag(g) Z with d loss / d sigma_i = g_i sigma_i
//
// so that d At = H_A At, d B = H_B B, without differences of singular values. Everything here is double.
//
// Up to rank 32 the M lanes of a group own a component, 32 / M components a warp: the triangular factors in shared
// memory, then a column of X and one of W^T in the registers of each lane. In round r all lanes j and j ^ r turn their
// columns, which they show each other by shuffles; both compute the same angle. A group that has converged turns no
// further, whatever its neighbours need, so the result of a component is its own. Up to rank 128 a block owns a
// component, with X in shared memory and all else in place of the Gram matrices; a warp turns a pair of columns, all
// pairs of a round of a tournament before the next. Beyond, neither registers nor shared memory hold a component, and a
// library's eigenvalues of large matrices are the right choice.
#include "cuda/reduce.h"
#include "cuda/svd.h"

namespace fastapd::cuda {
namespace {

constexpr int kSweeps = 40;             // after so many Jacobi stops wherever it is; 5 to 15 are usual
constexpr double kDependent = 1e-30;    // of a column's squared length
constexpr double kOrthogonal = 1e-31;   // of a squared cosine: such columns are left as they are
constexpr double kLast = 1e-24;         // of a squared cosine: a sweep that met no larger one was the last, it squares
constexpr double kNothing = 1e-34;      // of the largest squared length: such a column is rounding, no sweep mends it
constexpr double kZero = 1e-16;         // of the largest singular value: with eps = 0 the slope there would be anything

// G, the upper triangle of high + low, becomes R with R^T R = G: in place of high, with zeros below. This thread owns
// columns `column`, `column + columns`, .. and of these the rows `row`, `row + rows`, .. after each pivot's.
template <class Sync>
__device__ inline void factorise(double* high, double* low, double* lengths, double* roots, int m, int stride,
                                 int column, int columns, int row, int rows, Sync sync) {
  if (row == 0)
    for (int j = column; j < m; j += columns) lengths[j] = high[j * stride + j];
#pragma unroll 1
  for (int k = 0; k < m; ++k) {
    sync();
    const double* pivots = high + k * stride;
    const double* pivots_low = low + k * stride;
    const double pivot = pivots[k], pivot_low = pivots_low[k];
    const bool independent = pivot > kDependent * lengths[k];
    const double inverse = independent ? 1 / pivot : 0;
    if (row == 0 && column == 0) roots[k] = independent ? 1 / sqrt(pivot) : 0;
    for (int j = column; independent && j < m; j += columns) {
      if (j <= k) continue;
      const double ratio = pivots[j] * inverse;  // ratio + ratio_low = G_kj / pivot
      const double ratio_low = (fma(-ratio, pivot, pivots[j]) + (pivots_low[j] - ratio * pivot_low)) * inverse;
#pragma unroll 1
      for (int i = k + 1 + row; i <= j; i += rows) {
        double* to = high + i * stride + j;
        double* to_low = low + i * stride + j;
        const double c = pivots[i], before = *to, step = rounded_product(c, ratio), step_low = fma(c, ratio, -step);
        const double sum = before - step, part = sum - before, lost = (before - (sum - part)) - (step + part);
        const double rest = *to_low + (lost - (step_low + (c * ratio_low + pivots_low[i] * ratio)));
        *to = sum + rest;
        *to_low = rest - (*to - sum);
      }
    }
  }
  sync();
  for (int j = column; j < m; j += columns)
    for (int i = row; i < m; i += rows) high[i * stride + j] = j < i ? 0 : high[i * stride + j] * roots[i];
  sync();
}

struct Turn {
  double own, others;  // the new column is own x + others x_of_the_other
  bool turns, large;
};

// What makes two columns of these squared lengths and of the product gamma orthogonal, as one of them sees it; the
// longer goes to the left. Comparisons with NaN are false, so it never turns.
__device__ inline Turn turn_of(double norm, double other, double gamma, double least, bool left, bool active) {
  const double square = gamma * gamma, both = norm * other, gap = other - norm;
  Turn turn = {1, 0, active && square > kOrthogonal * both && norm > least && other > least, false};
  if (!turn.turns) return turn;
  turn.large = square > kLast * both;
  const double size = 2 * gamma / (fabs(gap) + sqrt(gap * gap + 4 * square));
  const double tangent = gap > 0 || (gap == 0 && left) ? size : -size;
  const double cosine = 1 / sqrt(1 + tangent * tangent), sine = cosine * tangent;
  const bool swap = left ? gap > 0 : gap < 0;
  turn.own = swap ? sine : cosine;
  turn.others = swap ? cosine : -sine;
  return turn;
}

// ---------------------------------------------------------------------------------------------------- rank up to 32

template <int M>
constexpr int kStride = M + 1;  // lanes read rows of their own without meeting in a bank
template <int M>
constexpr int kOfComponent = 3 * M * kStride<M> + 3 * M;  // doubles of shared memory
template <int M>
constexpr int kWarps = M == 32 ? 2 : 4;

// The sum or the maximum over the M lanes of a component, the same bits in each.
template <int M>
__device__ inline double sum_of_group(double x) {
  for (int with = M / 2; with > 0; with /= 2) x += __shfl_xor_sync(kAllLanes, x, with);
  return x;
}
template <int M>
__device__ inline double max_of_group(double x) {
  for (int with = M / 2; with > 0; with /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, x, with);
    x = other > x ? other : x;
  }
  return x;
}

// Lane j of a group loads column j of a Gram matrix, and with the others factorises it. Returns zero or, if the factor
// is not finite, NaN: then a square of its entries is not.
template <int M>
__device__ inline double load_factor(const Cores& c, const double* gram, double* scale, bool used, int j, double* high,
                                     double* low, double* lengths, double* roots) {
  const int m = c.rank;
  const bool mine = used && j < m;
  const double length = mine ? gram[j * m + j] : 0;
  const double most = max_of_group<M>(length);
  double by = 1;
  if (!c.scaled) {
    by = balance(sqrt(most));
    if (used && j == 0) *scale = by;
  }
  by *= by;
  for (int i = 0; i < M; ++i) {
    const bool there = mine && i <= j;
    high[i * kStride<M> + j] = there ? gram[i * m + j] * by : 0;
    low[i * kStride<M> + j] = there ? gram[(m + i) * m + j] * by : 0;
  }
  factorise(high, low, lengths, roots, m, kStride<M>, j, M, 0, 1, [] { __syncwarp(); });
  return sum_of_group<M>(length * 0);
}

// x and w: this lane's columns of X and W^T; w is left alone if not wanted.
template <int M>
__device__ inline void jacobi(double (&x)[M], double (&w)[M], bool wanted, int j, bool active) {
#pragma unroll 1
  for (int sweep = 0; sweep < kSweeps && __any_sync(kAllLanes, active); ++sweep) {
    double norm = 0;
#pragma unroll
    for (int i = 0; i < M; ++i) norm += x[i] * x[i];
    const double least = kNothing * max_of_group<M>(norm);
    bool large = false;
#pragma unroll 1
    for (int r = 1; r < M; ++r) {
      double others[M], gamma = 0;
      norm = 0;
#pragma unroll
      for (int i = 0; i < M; ++i) {
        others[i] = __shfl_xor_sync(kAllLanes, x[i], r);
        norm += x[i] * x[i];
        gamma += x[i] * others[i];
      }
      const double other = __shfl_xor_sync(kAllLanes, norm, r);
      const Turn turn = turn_of(norm, other, gamma, least, j < (j ^ r), active);
      large |= turn.large;
      if (!__any_sync(kAllLanes, turn.turns)) continue;
#pragma unroll
      for (int i = 0; i < M; ++i) x[i] = turn.own * x[i] + turn.others * others[i];
      if (!wanted) continue;
#pragma unroll
      for (int i = 0; i < M; ++i) w[i] = turn.own * w[i] + turn.others * __shfl_xor_sync(kAllLanes, w[i], r);
    }
    const double any_large = max_of_group<M>(large ? 1.0 : 0.0);  // all lanes ask, also of groups that are done
    active = active && any_large > 0;
  }
}

// to [m, m] = sum_i weight_i row_i^T row_i of rows [m, kStride]; lane j writes column j.
template <int M>
__device__ inline void outer_sum(const double* rows, const double* weights, int m, int j, bool mine, double* to) {
#pragma unroll 1
  for (int r = 0; r < m; r += 4) {
    double sum[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int i = 0; i < m; ++i) {
      const double* row = rows + i * kStride<M>;
      const double x = weights[i] * row[j];
#pragma unroll
      for (int q = 0; q < 4; ++q) sum[q] += x * row[r + q];
    }
#pragma unroll
    for (int q = 0; q < 4; ++q)
      if (mine && r + q < m) to[(r + q) * m + j] = sum[q];
  }
}

template <int M>
__global__ void __launch_bounds__(kWarps<M>* kWarp, 1) core_in_warp_kernel(Cores c) {
  FASTAPD_DYNAMIC_SHARED(double, shared);
  const int lane = threadIdx.x % kWarp, j = lane % M, m = c.rank;
  const int64_t g = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / M;
  const bool there = g < c.n_groups;
  const int64_t count = !there ? 0 : c.counts == nullptr ? 1 : c.counts[g];
  const bool used = count != 0, mine = used && j < m;
  double* RA = shared + threadIdx.x / M * kOfComponent<M>;
  double *low = RA + M * kStride<M>, *RB = low + M * kStride<M>;
  double *lengths = RB + M * kStride<M>, *roots = lengths + M, *weights = roots + M;
  double* gram = c.grams + (there ? g : 0) * 4 * m * m;
  double* scales = c.scales + (there ? g : 0) * 2;
  double sick = load_factor<M>(c, gram, scales, used, j, RA, low, lengths, roots);
  sick += load_factor<M>(c, gram + 2 * m * m, scales + 1, used, j, RB, low, lengths, roots);

  double x[M], w[M];
#pragma unroll
  for (int i = 0; i < M; ++i) {
    x[i] = sick;
    w[i] = RB[j * kStride<M> + i];
  }
#pragma unroll 1
  for (int k = j; k < m; ++k) {
    const double b = RB[j * kStride<M> + k];
#pragma unroll
    for (int i = 0; i < M; ++i) x[i] += RA[i * kStride<M> + k] * b;
  }
  jacobi<M>(x, w, c.gradient, j, used && sick == 0);

  double square = 0;
#pragma unroll
  for (int i = 0; i < M; ++i) square += x[i] * x[i];
  const double sigma = sqrt(square);
  double back = 1;
  if (used) back = (1 / scales[0]) * (1 / scales[1]);
  if (c.values != nullptr) {
    int place = 0;  // how many come before: the larger, and of equals (as NaN are) those to the left
    for (int i = 0; i < M; ++i) {
      const double other = __shfl_sync(kAllLanes, sigma, lane - j + i);
      place += other > sigma || (i < j && !(other < sigma));
    }
    if (there && place < m) c.values[g * m + place] = sigma * back;
    return;
  }
  const Power power = power_of(sigma * back * (sigma * back), c.exponent);
  const double total = sum_of_group<M>(mine ? power.value : 0);
  const double weight = static_cast<double>(count);
  if (there && j == 0) c.partials[g] = (used ? weight * total : 0) + m * unused_term(count, c.batch, c.exponent);
  if (!c.gradient) return;
  const bool zero = sigma <= kZero * max_of_group<M>(sigma);
  weights[j] = zero || !mine ? 0 : 2 * power.slope * weight * c.scale * back;
  const double inverse = zero ? 0 : 1 / sigma;
#pragma unroll
  for (int i = 0; i < M; ++i) RB[j * kStride<M> + i] = w[i];
#pragma unroll 1
  for (int k = 0; k < m; ++k) {
    double z = 0;
#pragma unroll
    for (int i = 0; i < M; ++i) z += RA[i * kStride<M> + k] * x[i];
    low[j * kStride<M> + k] = z * inverse;
  }
  __syncwarp();
  outer_sum<M>(RB, weights, m, j, mine, gram + m * m);
  outer_sum<M>(low, weights, m, j, mine, gram + 3 * m * m);
}

// --------------------------------------------------------------------------------------------------- rank up to 128

constexpr int kBlockWarps = kBlockThreads / static_cast<int>(kWarp);

// As load_factor, in place, by a block.
__device__ inline double factor_of_block(const Cores& c, double* gram, double* scale, double* lengths, double* roots) {
  const int m = c.rank, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double most = 0, sick = 0;
  for (int j = 0; j < m; ++j) {
    const double length = gram[j * m + j];
    sick += length * 0;
    most = length > most ? length : most;
  }
  __syncthreads();  // all have read what is scaled now
  if (!c.scaled) {
    double by = balance(sqrt(most));
    if (threadIdx.x == 0) *scale = by;
    by *= by;
    for (int i = warp; i < m; i += kBlockWarps)
      for (int j = i + lane; j < m; j += kWarp) {
        gram[i * m + j] *= by;
        gram[(m + i) * m + j] *= by;
      }
    __syncthreads();
  }
  factorise(gram, gram + m * m, lengths, roots, m, m, lane, kWarp, warp, kBlockWarps, [] { __syncthreads(); });
  return sick;
}

// Makes columns x [m, m] orthogonal, one after the other in memory, and turns those of w, which may be null, with them.
// norms [m] and large [kBlockWarps] are workspace.
__device__ inline void jacobi_of_block(double* x, double* w, double* norms, double* large, int m) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, players = m + m % 2;
#pragma unroll 1
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    for (int j = warp; j < m; j += kBlockWarps) {
      double norm = 0;
      for (int i = lane; i < m; i += kWarp) norm += x[j * m + i] * x[j * m + i];
      norm = warp_sum(norm);
      if (lane == 0) norms[j] = norm;
    }
    __syncthreads();
    double least = 0;
    for (int j = 0; j < m; ++j) least = norms[j] > least ? norms[j] : least;
    least *= kNothing;
    bool any = false;
#pragma unroll 1
    for (int round = 0; round + 1 < players; ++round) {
#pragma unroll 1
      for (int k = warp; k < players / 2; k += kBlockWarps) {
        int p = (round + k) % (players - 1), q = (round - k + players - 1) % (players - 1);
        if (k == 0) q = players - 1;
        if (p > q) {
          const int swap = p;
          p = q;
          q = swap;
        }
        if (q >= m) continue;
        double *xp = x + p * m, *xq = x + q * m, alpha = 0, beta = 0, gamma = 0;
        for (int i = lane; i < m; i += kWarp) {
          alpha += xp[i] * xp[i];
          beta += xq[i] * xq[i];
          gamma += xp[i] * xq[i];
        }
        alpha = warp_sum(alpha);
        beta = warp_sum(beta);
        gamma = warp_sum(gamma);
        const Turn left = turn_of(alpha, beta, gamma, least, true, true);
        if (!left.turns) continue;
        any |= left.large;
        const Turn right = turn_of(beta, alpha, gamma, least, false, true);
        const auto turned = [&](double* of_p, double* of_q) {
          for (int i = lane; i < m; i += kWarp) {
            const double a = of_p[i], b = of_q[i];
            of_p[i] = left.own * a + left.others * b;
            of_q[i] = right.own * b + right.others * a;
          }
        };
        turned(xp, xq);
        if (w != nullptr) turned(w + p * m, w + q * m);
      }
      if (lane == 0) large[warp] = any;
      __syncthreads();
    }
    any = false;
    for (int i = 0; i < kBlockWarps; ++i) any |= large[i] != 0;
    __syncthreads();  // all have read what the next sweep writes
    if (!any) return;
  }
}

// to [m, m] = sum_i weight_i row_i^T row_i of rows [m, m].
__device__ inline void outer_sum_of_block(const double* rows, const double* weights, int m, double* to) {
  for (int e = threadIdx.x; e < m * m; e += kBlockThreads) {
    const int r = e / m, k = e % m;
    double sum = 0;
    for (int i = 0; i < m; ++i) sum += weights[i] * rows[i * m + k] * rows[i * m + r];
    to[e] = sum;
  }
}

__global__ void __launch_bounds__(kBlockThreads, 1) core_in_block_kernel(Cores c) {
  FASTAPD_DYNAMIC_SHARED(double, x);
  FASTAPD_SHARED(double, large, kBlockWarps);
  const int m = c.rank, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t g = blockIdx.x, count = c.counts == nullptr ? 1 : c.counts[g];
  double *lengths = x + m * m, *roots = lengths + m, *sigmas = roots + m, *weights = sigmas + m, *terms = weights + m;
  const double off = c.partials == nullptr ? 0 : m * unused_term(count, c.batch, c.exponent);
  if (count == 0) {
    if (threadIdx.x == 0) c.partials[g] = off;
    return;
  }
  double *RA = c.grams + g * 4 * m * m, *RB = RA + 2 * m * m;
  double sick = factor_of_block(c, RA, c.scales + 2 * g, lengths, roots);
  sick += factor_of_block(c, RB, c.scales + 2 * g + 1, lengths, roots);
  for (int j = warp; j < m; j += kBlockWarps)
    for (int i = lane; i < m; i += kWarp) {
      double sum = sick;
      for (int k = i > j ? i : j; k < m; ++k) sum += RA[i * m + k] * RB[j * m + k];
      x[j * m + i] = sum;
    }
  __syncthreads();
  if (sick == 0) jacobi_of_block(x, c.gradient ? RB : nullptr, lengths, large, m);  // row j of R_B: column j of R_B^T
  for (int j = warp; j < m; j += kBlockWarps) {
    double square = 0;
    for (int i = lane; i < m; i += kWarp) square += x[j * m + i] * x[j * m + i];
    square = warp_sum(square);
    if (lane == 0) sigmas[j] = sqrt(square);
  }
  __syncthreads();
  const double back = (1 / c.scales[2 * g]) * (1 / c.scales[2 * g + 1]);
  double most = 0;
  for (int i = 0; i < m; ++i) most = sigmas[i] > most ? sigmas[i] : most;
  const int j = threadIdx.x;
  if (j < m && c.values != nullptr) {
    const double sigma = sigmas[j];
    int place = 0;
    for (int i = 0; i < m; ++i) place += sigmas[i] > sigma || (i < j && !(sigmas[i] < sigma));
    c.values[g * m + place] = sigma * back;
  }
  if (c.values != nullptr) return;
  if (j < m) {
    const double sigma = sigmas[j];
    const Power power = power_of(sigma * back * (sigma * back), c.exponent);
    terms[j] = power.value;
    const bool zero = sigma <= kZero * most;
    weights[j] = zero ? 0 : 2 * power.slope * static_cast<double>(count) * c.scale * back;
    roots[j] = zero ? 0 : 1 / sigma;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int i = 0; i < m; ++i) total += terms[i];
    c.partials[g] = static_cast<double>(count) * total + off;
  }
  if (!c.gradient) return;
  for (int j = warp; j < m; j += kBlockWarps) {  // column j of X becomes row j of Z
    constexpr int kOfLane = kMostRank / static_cast<int>(kWarp);
    double z[kOfLane];
#pragma unroll
    for (int q = 0; q < kOfLane; ++q) {
      const int k = q * static_cast<int>(kWarp) + lane;
      z[q] = 0;
      for (int i = 0; k < m && i <= k; ++i) z[q] += RA[i * m + k] * x[j * m + i];
    }
    __syncwarp();
#pragma unroll
    for (int q = 0; q < kOfLane; ++q)
      if (const int k = q * static_cast<int>(kWarp) + lane; k < m) x[j * m + k] = z[q] * roots[j];
  }
  __syncthreads();
  outer_sum_of_block(RB, weights, m, RA + m * m);
  outer_sum_of_block(x, weights, m, RB + m * m);
}

template <int M>
void in_warp(const char* op, Stream stream, const Cores& cores) {
  constexpr int kThreads = kWarps<M> * static_cast<int>(kWarp), kComponents = kThreads / M;
  launch(op, core_in_warp_kernel<M>, ceil_div(cores.n_groups, kComponents), kThreads,
         kComponents * kOfComponent<M> * sizeof(double), stream, cores);
}

}  // namespace

void svd_cores(const char* op, Stream stream, const Cores& cores, int most_in_warp) {
  const int m = cores.rank;
  if (m > most_in_warp || m > kMostInWarp)
    launch(op, core_in_block_kernel, cores.n_groups, kBlockThreads, (m * m + 5 * m) * sizeof(double), stream, cores);
  else if (m <= 4)
    in_warp<4>(op, stream, cores);
  else if (m <= 8)
    in_warp<8>(op, stream, cores);
  else if (m <= 16)
    in_warp<16>(op, stream, cores);
  else
    in_warp<32>(op, stream, cores);
}

}  // namespace fastapd::cuda
