// Singular values of A_c B_c and exact Schatten sums with their gradients, from the factors: what reads and writes the
// factors. What lies between is in svd_core.cu.
//
//   gram    G_A = A^T A and G_B = B B^T, summed in twice double's precision
//   core    singular values, and H_A and H_B of the gradients
//   apply   d At = H_A At and d B = H_B B, in double, written or added to a gradient
//
// A Gram matrix squares the condition number. Two numbers hold each of its sums: in double alone the second of two
// equal columns would leave a pivot of 1e-16, a singular value of 1e-8 that is not there, to which an eps of 1e-16
// gives a gradient of order one. A warp owns a tile of 4 by 4 entries of one factor's matrix and its lanes share the
// columns of the factor, neighbouring numbers, so that no entry waits for another; seven operations an entry and
// column. An apply block owns some columns of one factor's gradient, two a thread, and walks the rows in groups of 8.
//
// What is read and written is the factors twice and the gradients once, and 32 m^2 bytes of workspace a component back
// and forth: little beside 12 m (d_in + d_out) as long as d is a few times m. A layer whose components have full rank
// in small d is served as well by forming the products. Factors in double are first brought to a size whose squares
// double can hold (scales); all others have such squares.
#include "cuda/reduce.h"
#include "cuda/svd.h"

namespace fastapd::cuda {
namespace {

constexpr int kGramThreads = 128, kTile = 4;
constexpr int kApplyThreads = 128, kColumns = 2, kRows = 8;

// high + low += a b with an error of 1e-32 of the largest of the three. The product of numbers of less than double's
// precision is exact, fused with a sum or not.
template <class T>
__device__ inline void add_product(double& high, double& low, double a, double b) {
  const double product = sizeof(T) == sizeof(double) ? rounded_product(a, b) : a * b;
  const double sum = high + product, part = sum - high;
  low += (high - (sum - part)) + (product - part);
  if constexpr (sizeof(T) == sizeof(double)) low += fma(a, b, -product);
  high = sum;
}

// Sums kPairs pairs over the lanes. Each step halves the pairs that a lane has and the lanes that have parts of one: of
// 16 pairs, lane l comes to hold, with its neighbour, the sum of pair l / 2 in the first.
template <int kPairs>
__device__ inline void sum_pairs(double* high, double* low) {
  constexpr int kHalf = kPairs / 2, kKept = kPairs > 1 ? kHalf : 1;
  const bool upper = (threadIdx.x & kPairs) != 0;
#pragma unroll
  for (int e = 0; e < kKept; ++e) {
    const double keep = upper ? high[e + kHalf] : high[e], give = upper ? high[e] : high[e + kHalf];
    const double keep_low = upper ? low[e + kHalf] : low[e], give_low = upper ? low[e] : low[e + kHalf];
    const double other = __shfl_xor_sync(kAllLanes, give, kPairs);
    const double other_low = __shfl_xor_sync(kAllLanes, give_low, kPairs);
    const double sum = keep + other, part = sum - keep;
    high[e] = sum;
    low[e] = keep_low + other_low + ((keep - (sum - part)) + (other - part));
  }
  if constexpr (kPairs > 1) sum_pairs<kHalf>(high, low);
}

// Entries row.., column.. of f f^T, rounded and what rounding lost, to gram and m^2 numbers behind.
template <class T, bool kDiagonal>
__device__ inline void gram_tile(const T* f, double scale, int row, int column, int m, int64_t d, double* gram) {
  double high[kTile * kTile] = {}, low[kTile * kTile] = {};
  const T *a[kTile], *b[kTile];
#pragma unroll
  for (int r = 0; r < kTile; ++r) {  // rows that are not there read the last one, and are not stored
    a[r] = f + (row + r < m ? row + r : m - 1) * d;
    b[r] = f + (column + r < m ? column + r : m - 1) * d;
  }
  const auto load = [&](const T* at) {
    const double x = widened(*at);
    return sizeof(T) == sizeof(double) ? x * scale : x;
  };
  for (int64_t i = threadIdx.x % kWarp; i < d; i += kWarp) {
    double x[kTile], y[kTile];
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
      x[r] = load(a[r] + i);
      y[r] = kDiagonal ? x[r] : load(b[r] + i);
    }
#pragma unroll
    for (int r = 0; r < kTile; ++r)
#pragma unroll
      for (int s = kDiagonal ? r : 0; s < kTile; ++s)
          add_product<T>(high[r * kTile + s], low[r * kTile + s], x[r], y[s]);
  }
  sum_pairs<kTile * kTile>(high, low);
  const int entry = threadIdx.x % kWarp / 2, i = row + entry / kTile, j = column + entry % kTile;
  if (threadIdx.x % 2 != 0 || j >= m || i > j) return;
  const double total = high[0] + low[0];
  gram[i * m + j] = total;
  gram[(m + i) * m + j] = low[0] - (total - high[0]);
}

template <class T>
__global__ void __launch_bounds__(kGramThreads)
    gram_kernel(const T* At, const T* B, const int64_t* counts, double* grams, double* scales, int64_t n_groups, int m,
                int64_t d_in, int64_t d_out, int n_tiles) {
  const int64_t job = warp_of_grid(), g = job / (2 * n_tiles);
  const int factor = static_cast<int>(job / n_tiles % 2), tile = static_cast<int>(job % n_tiles);
  if (g >= n_groups || (counts != nullptr && counts[g] == 0)) return;
  const int64_t d = factor == 0 ? d_in : d_out;
  const T* f = factor == 0 ? At + g * m * d : B + g * m * d;
  double scale = 1;
  if constexpr (sizeof(T) == sizeof(double)) {
    double most = 0;
    for (int64_t i = threadIdx.x % kWarp; i < m * d; i += kWarp) most = fabs(f[i]) > most ? fabs(f[i]) : most;
    scale = balance(warp_max(most));
    if (tile == 0 && threadIdx.x % kWarp == 0) scales[2 * g + factor] = scale;
  }
  int column = 0;  // of the tiles on and above the diagonal, by columns
  while ((column + 1) * (column + 2) / 2 <= tile) ++column;
  const int row = tile - column * (column + 1) / 2;
  double* gram = grams + (4 * g + 2 * factor) * m * m;
  if (row == column)
    gram_tile<T, true>(f, scale, row * kTile, column * kTile, m, d, gram);
  else
    gram_tile<T, false>(f, scale, row * kTile, column * kTile, m, d, gram);
}

template <class T>
__global__ void __launch_bounds__(kApplyThreads)
    apply_kernel(const T* At, const T* B, const int64_t* counts, const double* grams, const double* scales, T* grad_At,
                 T* grad_B, bool accumulate, int m, int64_t d_in, int64_t d_out, int64_t n_in, int64_t n_chunks) {
  FASTAPD_SHARED(double, h, kRows* kMostRank);  // [m, kRows]
  const int64_t g = blockIdx.x / n_chunks, chunk = blockIdx.x % n_chunks;
  const bool of_B = chunk >= n_in;
  const int64_t d = of_B ? d_out : d_in;
  const int threads = blockDim.x;
  const int64_t first = (of_B ? chunk - n_in : chunk) * threads * kColumns + threadIdx.x;
  const T* f = (of_B ? B : At) + g * m * d;
  T* grad = (of_B ? grad_B : grad_At) + g * m * d;
  if (counts[g] == 0) {
    for (int64_t i = first; !accumulate && i < first + kColumns * threads && i < d; i += threads)
      for (int r = 0; r < m; ++r) grad[r * d + i] = narrowed<T>(0);
    return;
  }
  const double* H = grams + (4 * g + (of_B ? 3 : 1)) * m * m;
  const double before = scales[2 * g + of_B], after = 1 / scales[2 * g + !of_B];
  for (int row = 0; row < m; row += kRows) {
    __syncthreads();  // all have read what was here
    for (int e = threadIdx.x; e < m * kRows; e += threads) {
      const int r = row + e % kRows;
      h[e] = r < m ? H[e / kRows * m + r] : 0;  // which is symmetric
    }
    __syncthreads();
    double sum[kRows][kColumns] = {};
#pragma unroll 2
    for (int k = 0; k < m; ++k) {
      double x[kColumns];
#pragma unroll
      for (int q = 0; q < kColumns; ++q) {
        const int64_t i = first + q * threads;
        x[q] = i < d ? widened(f[k * d + i]) * before : 0;
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int q = 0; q < kColumns; ++q) sum[r][q] += h[k * kRows + r] * x[q];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int q = 0; q < kColumns; ++q)
        if (const int64_t i = first + q * threads; row + r < m && i < d)
          put(grad + (row + r) * d + i, sum[r][q] * after, accumulate);
  }
}

template <class T>
void grams_of(const char* op, Stream stream, const T* At, const T* B, const int64_t* counts, double* grams,
              double* scales, SchattenSizes n) {
  const int64_t n_groups = n.n_instances * n.n_components, m = n.rank, blocks = ceil_div(m, kTile);
  const int64_t n_tiles = blocks * (blocks + 1) / 2;
  launch(op, gram_kernel<T>, ceil_div(2 * n_groups * n_tiles, kGramThreads / kWarp), kGramThreads, 0, stream, At, B,
         counts, grams, scales, n_groups, m, n.d_in, n.d_out, n_tiles);
}

}  // namespace

template <class T>
void component_svdvals(Stream stream, const T* At, const T* B, double* values, double* grams, double* scales,
                       SchattenSizes n, int most_in_warp) {
  const char* op = "component_svdvals";
  if (n.rank == 0) return;
  grams_of(op, stream, At, B, nullptr, grams, scales, n);
  Cores cores = {};
  cores.grams = grams;
  cores.scales = scales;
  cores.scaled = sizeof(T) == sizeof(double);
  cores.values = values;
  cores.n_groups = n.n_instances * n.n_components;
  cores.rank = static_cast<int>(n.rank);
  svd_cores(op, stream, cores, most_in_warp);
}

template <class T>
void schatten(const char* op, Stream stream, const T* At, const T* B, const int64_t* counts, double p, double eps,
              int64_t batch, double scale, bool accumulate, T* loss, T* grad_At, T* grad_B, double* grams,
              double* scales, double* partials, SchattenSizes n, int most_in_warp) {
  const int64_t n_groups = n.n_instances * n.n_components;
  const bool gradient = grad_At != nullptr || grad_B != nullptr;  // one is null when it has no entries
  if (n.rank > 0) {
    grams_of(op, stream, At, B, counts, grams, scales, n);
    const Cores cores = {grams, scales, sizeof(T) == sizeof(double), counts, nullptr, partials,
                         gradient, exponent_of(p, eps), batch, scale, n_groups, static_cast<int>(n.rank)};
    svd_cores(op, stream, cores, most_in_warp);
  }
  if (n.rank > 0 && gradient) {
    const int64_t wide = n.d_in > n.d_out ? n.d_in : n.d_out, warps = ceil_div(wide, kWarp * kColumns);
    const int threads = static_cast<int>(warps * kWarp < kApplyThreads ? warps * kWarp : kApplyThreads);
    const int64_t n_in = ceil_div(n.d_in, threads * kColumns), n_out = ceil_div(n.d_out, threads * kColumns);
    launch(op, apply_kernel<T>, n_groups * (n_in + n_out), threads, 0, stream, At, B, counts, grams, scales, grad_At,
           grad_B, accumulate, n.rank, n.d_in, n.d_out, n_in, n_in + n_out);
  }
  schatten_total(op, stream, partials, loss, n.n_instances, n.rank > 0 ? n.n_components : 0);
}

#define FASTAPD_INSTANTIATE(T)                                                                                         \
  template void component_svdvals<T>(Stream, const T*, const T*, double*, double*, double*, SchattenSizes, int);       \
  template void schatten<T>(const char*, Stream, const T*, const T*, const int64_t*, double, double, int64_t, double,  \
                            bool, T*, T*, T*, double*, double*, double*, SchattenSizes, int);
FASTAPD_INSTANTIATE(float)
FASTAPD_INSTANTIATE(double)
FASTAPD_INSTANTIATE(Half)
FASTAPD_INSTANTIATE(BFloat16)

}  // namespace fastapd::cuda
