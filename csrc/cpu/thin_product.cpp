// C = alpha A B, or C += alpha A B, for products with one short side, where the library's GEMM reaches half of its own
// speed: C [M, N] is written by rows, A is read by entries of any strides, B is packed into panels of up to kTile
// vectors.
//
// A tile of registers holds R rows by V vectors of C over a stretch of K; the panels of that stretch stay in the L2
// cache while the rows of A and C go by once. Jobs are stretches of rows, each owned by one thread; sums over K are
// taken in one order, so nothing depends on the number of threads. Accumulation is in T.
#include "../ops.h"
#include "parallel.h"

namespace fastapd {
namespace FASTAPD_LEVEL {
namespace {

inline int64_t padded(int64_t n, int64_t lanes) {
  return (n + lanes - 1) / lanes * lanes;
}

#if defined(__AVX512F__)
constexpr int kTile = 4, kRegisters = 24;
#else
constexpr int kTile = 2, kRegisters = 10;
#endif
constexpr int64_t kRowsOfJob = 480;      // a multiple of every R
constexpr int64_t kRowsTogether = 24;    // of A, that stay in the L1 cache while the panels go by
constexpr int64_t kDepth = 512;          // the longest stretch of K
constexpr int64_t kPanels = 128 * 1024;  // entries of all panels of a stretch

// panel[k][lanes of V vectors] = B[k0 + k, n0 + lane] for depth rows; lanes beyond n are zero.
template <class T>
void pack_panel(const T* B, int64_t stride_k, int64_t stride_n, int64_t depth, int64_t n, int64_t wide, T* panel) {
  for (int64_t k = 0; k < depth; ++k) {
    const T* from = B + k * stride_k;
    T* to = panel + k * wide;
    if (stride_n == 1) {
      int64_t e = 0;
      for (; e + kLanes<T> <= n; e += kLanes<T>) store(to + e, load(from + e));
      for (; e < n; ++e) to[e] = from[e];
    } else {
      for (int64_t e = 0; e < n; ++e) to[e] = from[e * stride_n];
    }
    for (int64_t e = n; e < wide; ++e) to[e] = 0;
  }
}

// R rows by V vectors of C = alpha * A panel; `keep` adds to what is there.
template <class T, int R, int V>
inline void tile(const T* A, int64_t stride_m, int64_t stride_k, int64_t depth, const T* panel, T alpha, bool keep,
                 T* C, int64_t stride_c, int64_t n) {
  vec<T> acc[R][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    vec<T> b[V];
    for (int v = 0; v < V; ++v) b[v] = load(panel + v * kLanes<T>);
    for (int r = 0; r < R; ++r) {
      const T a = A[r * stride_m];
      for (int v = 0; v < V; ++v) acc[r][v] += a * b[v];
    }
    A += stride_k;
    panel += V * kLanes<T>;
  }
  for (int r = 0; r < R; ++r) {
    T* row = C + r * stride_c;
    for (int v = 0; v < V; ++v) {
      const vec<T> sum = alpha * acc[r][v];
      T* at = row + v * kLanes<T>;
      const int64_t left = n - v * kLanes<T>;
      if (left >= kLanes<T>) {
        store(at, keep ? load(at) + sum : sum);
      } else {
        T ends[2 * kLanes<T>];  // longer than needed, or the compiler fears for its end
        store(ends, sum);
        for (int64_t e = 0; e < left; ++e) at[e] = keep ? at[e] + ends[e] : ends[e];
      }
    }
  }
}

template <class T, int V>
void rows_of_tiles(const T* A, int64_t stride_m, int64_t stride_k, int64_t rows, int64_t depth, const T* panel, T alpha,
                   bool keep, T* C, int64_t stride_c, int64_t n) {
  constexpr int R = kRegisters / V;
  int64_t m = 0;
  for (; m + R <= rows; m += R)
    tile<T, R, V>(A + m * stride_m, stride_m, stride_k, depth, panel, alpha, keep, C + m * stride_c, stride_c, n);
  for (; m + 2 <= rows; m += 2)
    tile<T, 2, V>(A + m * stride_m, stride_m, stride_k, depth, panel, alpha, keep, C + m * stride_c, stride_c, n);
  for (; m < rows; ++m)
    tile<T, 1, V>(A + m * stride_m, stride_m, stride_k, depth, panel, alpha, keep, C + m * stride_c, stride_c, n);
}

template <class T>
void rows_of_panel(const ThinProduct<T>& p, const T* A, int64_t rows, int64_t depth, const T* panel, bool keep, T* C,
                   int64_t n) {
  switch ((n + kLanes<T> - 1) / kLanes<T>) {
#if defined(__AVX512F__)
    case 4:
      return rows_of_tiles<T, 4>(A, p.a_stride_m, p.a_stride_k, rows, depth, panel, p.alpha, keep, C, p.n, n);
    case 3:
      return rows_of_tiles<T, 3>(A, p.a_stride_m, p.a_stride_k, rows, depth, panel, p.alpha, keep, C, p.n, n);
#endif
    case 2:
      return rows_of_tiles<T, 2>(A, p.a_stride_m, p.a_stride_k, rows, depth, panel, p.alpha, keep, C, p.n, n);
    default:
      return rows_of_tiles<T, 1>(A, p.a_stride_m, p.a_stride_k, rows, depth, panel, p.alpha, keep, C, p.n, n);
  }
}

}  // namespace

template <class T>
bool thin_product(ThinProduct<T> p, int threads) {
  const int64_t full = kTile * kLanes<T>, panels = (p.n + full - 1) / full;
  const int64_t stretches = (p.m + kRowsOfJob - 1) / kRowsOfJob;
  int64_t longest = kPanels / (panels * full + 1);
  longest = longest < 32 ? 32 : longest > kDepth ? kDepth : longest;
  Failure failure;
  threads = worth(p.n_instances * p.m * p.n * p.k, threads);
  if (p.k == 0) p.a_stride_i = p.a_stride_m = p.b_stride_i = 0;  // no entries have no address to step from
  parallel_for(p.n_instances * stretches, 1, threads, [&](int64_t begin, int64_t end) {
    const Workspace<T> work((p.k < longest ? p.k : longest) * panels * full);
    if (work.data == nullptr) return failure.set();
    for (int64_t k0 = 0; k0 == 0 || k0 < p.k; k0 += longest) {
      const int64_t depth = p.k - k0 < longest ? p.k - k0 : longest;
      const bool keep = k0 > 0 || p.accumulate;
      int64_t packed = -1;
      for (int64_t job = begin; job < end; ++job) {
        const int64_t i = job / stretches, m0 = job % stretches * kRowsOfJob;
        const int64_t rows = p.m - m0 < kRowsOfJob ? p.m - m0 : kRowsOfJob;
        if (packed != i)
          for (int64_t q = 0; q < panels; ++q) {
            const int64_t n = p.n - q * full < full ? p.n - q * full : full;
            pack_panel(p.B + i * p.b_stride_i + k0 * p.b_stride_k + q * full * p.b_stride_n, p.b_stride_k, p.b_stride_n,
                       depth, n, padded(n, kLanes<T>), work.data + q * full * depth);
          }
        packed = i;
        for (int64_t m = m0; m < m0 + rows; m += kRowsTogether) {
          const int64_t together = m0 + rows - m < kRowsTogether ? m0 + rows - m : kRowsTogether;
          const T* A = p.A + i * p.a_stride_i + m * p.a_stride_m + k0 * p.a_stride_k;
          for (int64_t q = 0; q < panels; ++q)
            rows_of_panel(p, A, together, depth, work.data + q * full * depth, keep,
                          p.C + (i * p.m + m) * p.n + q * full, p.n - q * full < full ? p.n - q * full : full);
        }
      }
    }
  });
  return failure.none();
}

template bool thin_product<float>(ThinProduct<float>, int);
template bool thin_product<double>(ThinProduct<double>, int);

}  // namespace FASTAPD_LEVEL
}  // namespace fastapd
