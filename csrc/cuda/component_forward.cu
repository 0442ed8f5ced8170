// y_b = sum over the selected components c of b of (x_b A_c) B_c, forward and backward, from a grouped selection.
//
// Passes over the K selected pairs of sample and component, none of which forms a component's weights or adds to memory
// that another warp writes. F is At or B, and every pass works on rows of d numbers with lanes on neighbouring columns:
//   project  v[k]  = x[sample of k] F_c^T                owner: a warp, P pairs of one component, R ranks
//   combine  y_b   = sum over b's pairs v[k] F_c         owner: a warp, one sample, kWide columns
//   outer    G_c (+)= sum over c's pairs v[k]^T x[sample of k]    owner: a warp, R ranks of c, kWide columns
// forward  = project(x, At) -> u, combine(u, B) -> y
// backward = project(grad_y, B) -> grad_u, combine(grad_u, At) -> grad_x, outer(u, grad_y) -> grad_B,
//            outer(grad_u, x) -> grad_At
// combine reads all ranks of F_c once for every pair. Where that is the most of all traffic, the caller gives room for
// z, some columns at a time, and combine becomes two passes that read F_c once for P pairs of it:
//   expand   z[k]  = v[k] F_c                            owner: a warp, P pairs of one component, kWide columns
//   gather   y_b   = sum over b's pairs z[k]             combine again, with rows of z in the place of v[k] F_c
// P and R are 1, 4 or 8: sums in registers, of which a lane has P R, or P or R times kColumns. Components have any
// number of pairs. Tile t of P pairs belongs to the last component c with offsets[c] / P + c <= t: that leaves every
// component room for its tiles, and the grid has the same size whatever was selected, as a captured graph needs. Sums
// are in float (in double for double), in registers, in an order that depends on sizes and the selection alone; u, v
// and what is returned are rounded to T. Nothing is shared between warps: no barriers, no atomics.
//
// Not the right choice: above about one component in eight selected per sample, where two dense GEMMs win; and outer
// for a selection of which one component has most pairs, as a single warp walks over all of them.
#include "cuda/launch.h"
#include "cuda/ops.h"

namespace fastapd::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 4, kWide = kColumns * int(kWarp);  // columns of a lane and of a warp
constexpr int kRows = 4;                                    // that are on their way from memory at once
template <class T>
constexpr int kMost = sizeof(Acc<T>) == 8 ? 4 : 8;  // pairs or ranks at once: doubles take two registers

__device__ inline int lane_of_warp() {
  return static_cast<int>(threadIdx.x % kWarp);
}

// ------------------------------------------------------------------------------------------------- tiles of components

template <int P>
__device__ inline int64_t first_tile(const int64_t* offsets, int64_t c) {
  return offsets[c] / P + c;
}

// The component that a tile belongs to: the whole warp asks 32 of them at once.
template <int P>
__device__ inline int64_t component_of_tile(const int64_t* offsets, int64_t n_components, int64_t tile) {
  int64_t low = 0, n = n_components;  // it is one of n from low on, and low itself begins early enough
  while (n > 1) {
    const int64_t step = (n + kWarp - 1) / kWarp, mine = lane_of_warp() * step;
    const bool early = mine < n && first_tile<P>(offsets, low + mine) <= tile;
    const int64_t passed = (__popc(__ballot_sync(kAllLanes, early)) - 1) * step;
    low += passed;
    n = n - passed < step ? n - passed : step;
  }
  return low;
}

// P pairs or fewer of a component, from `first` up to `end`; none where first >= end.
struct Tile {
  int64_t component, first, end;
};

template <int P>
__device__ inline Tile tile_at(const int64_t* offsets, int64_t n_components, int64_t tile) {
  const int64_t c = component_of_tile<P>(offsets, n_components, tile);
  return {c, offsets[c] + (tile - first_tile<P>(offsets, c)) * P, offsets[c + 1]};
}

int64_t tiles_of(const ForwardSizes& n, int pairs) {
  return n.n_pairs / pairs + n.n_components;
}

// ------------------------------------------------------------------------------------------------------------- project

// The sums over the warp of kN numbers, a power of two: lane l gets that of number l / (32 / kN). Every exchange halves
// how many numbers a lane has, and doubles how many lanes they are of.
template <int kN, int kWith = int(kWarp) / 2, class A>
__device__ inline A sums_of_warp(const A (&x)[kN]) {
  if constexpr (kWith == 0) {
    return x[0];
  } else if constexpr (kN == 1) {
    const A sum[1] = {x[0] + __shfl_xor_sync(kAllLanes, x[0], kWith)};
    return sums_of_warp<1, kWith / 2>(sum);
  } else {
    const bool upper = lane_of_warp() & kWith;
    A half[kN / 2];
#pragma unroll
    for (int j = 0; j < kN / 2; ++j) {
      const A kept = upper ? x[j + kN / 2] : x[j], given = upper ? x[j] : x[j + kN / 2];
      half[j] = kept + __shfl_xor_sync(kAllLanes, given, kWith);
    }
    return sums_of_warp<kN / 2, kWith / 2>(half);
  }
}

// v [I, K, m] from x [I, b, d] and f [I, C, m, d]. A warp for every tile and R ranks, ranks side by side: they read the
// same rows of x.
template <class T, int P, int R>
__global__ void __launch_bounds__(kThreads)
    project_kernel(const T* x, const T* f, const int32_t* sample, const int64_t* offsets, T* v, ForwardSizes n,
                   int64_t d, int64_t n_tiles, int64_t n_rank_tiles) {
  constexpr int kSums = P * R < int(kWarp) ? P * R : int(kWarp);  // that the warp adds up at once
  const int64_t warp = warp_of_grid(), row = warp / n_rank_tiles, first_rank = warp % n_rank_tiles * R;
  const int64_t i = row / n_tiles;
  if (i >= n.n_instances) return;
  const Tile tile = tile_at<P>(offsets + i * (n.n_components + 1), n.n_components, row % n_tiles);
  if (tile.first >= tile.end) return;
  sample += i * n.n_pairs;
  const T* rows[P];
  const T* factors[R];
#pragma unroll
  for (int p = 0; p < P; ++p) {  // of pairs and ranks that are not there, the last one again
    const int64_t k = tile.first + p < tile.end ? tile.first + p : tile.end - 1;
    rows[p] = x + (i * n.batch + sample[k]) * d;
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t rank = first_rank + r < n.rank ? first_rank + r : n.rank - 1;
    factors[r] = f + ((i * n.n_components + tile.component) * n.rank + rank) * d;
  }
  Acc<T> sums[P * R / kSums][kSums] = {};
#pragma unroll(P * R <= int(kWarp) ? 2 : 1)
  for (int64_t o = lane_of_warp(); o < d; o += kWarp) {
    Acc<T> numbers[P];
#pragma unroll
    for (int p = 0; p < P; ++p) numbers[p] = widened(rows[p][o]);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const Acc<T> factor = widened(factors[r][o]);
#pragma unroll
      for (int p = 0; p < P; ++p) sums[(p * R + r) / kSums][(p * R + r) % kSums] += numbers[p] * factor;
    }
  }
#pragma unroll
  for (int part = 0; part < P * R / kSums; ++part) {
    const Acc<T> sum = sums_of_warp(sums[part]);
    constexpr int kLanes = int(kWarp) / kSums;
    const int which = part * kSums + lane_of_warp() / kLanes;
    const int64_t k = tile.first + which / R, rank = first_rank + which % R;
    if (lane_of_warp() % kLanes == 0 && k < tile.end && rank < n.rank)
      v[(i * n.n_pairs + k) * n.rank + rank] = narrowed<T>(sum);
  }
}

// ------------------------------------------------------------------------------------------------------- sums of rows

// sums[j] += scale[j] * row over up to 32 rows of d numbers, for the columns o, o + 32, .. of each lane. Lane l knows
// where row l begins and what its J scales are; beyond the n rows its scales are 0.
template <int J, class R, class A>
__device__ inline void add_rows(A (&sums)[J][kColumns], const R* rows, int64_t place, const A (&scale)[J], int n,
                                int64_t o, int64_t d) {
#pragma unroll 1
  for (int first = 0; first < n; first += kRows) {
    A numbers[kRows][kColumns];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const R* row = rows + __shfl_sync(kAllLanes, place, first + i) + o;
#pragma unroll
      for (int w = 0; w < kColumns; ++w) {  // what is not there counts as 0, as 0 times what is there need not be 0
        const int at = w * static_cast<int>(kWarp);
        numbers[i][w] = first + i < n && o + at < d ? widened(row[at]) : A{0};
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < J; ++j) {
        const A s = __shfl_sync(kAllLanes, scale[j], first + i);
#pragma unroll
        for (int w = 0; w < kColumns; ++w) sums[j][w] += s * numbers[i][w];
      }
  }
}

__device__ inline int at_most_a_warp(int64_t n) {
  return n < static_cast<int64_t>(kWarp) ? static_cast<int>(n) : static_cast<int>(kWarp);
}

// Columns first .. first + width of y [I, b, d_y] from rows of F [I, C, rank, width] and v [I, K, rank]; or, without v,
// from rows of z [I, K, width], rank 1.
template <class T, class R>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const T* v, const R* rows, const int32_t* component, const int64_t* sample_offsets,
                   const int32_t* position, T* y, ForwardSizes n, int64_t rank, int64_t width, int64_t first,
                   int64_t d_y, int64_t n_column_tiles) {
  const int64_t warp = warp_of_grid(), row = warp / n_column_tiles;
  if (row >= n.n_instances * n.batch) return;
  const int64_t i = row / n.batch, b = row % n.batch;
  const int64_t o = warp % n_column_tiles * kWide + lane_of_warp();
  const int64_t begin = sample_offsets[i * (n.batch + 1) + b], end = sample_offsets[i * (n.batch + 1) + b + 1];
  component += i * n.n_pairs + begin;
  position += i * n.n_pairs + begin;
  Acc<T> sums[1][kColumns] = {};
  const int64_t n_rows = (end - begin) * rank;
#pragma unroll 1
  for (int64_t base = 0; base < n_rows; base += kWarp) {
    int64_t place = 0;
    Acc<T> scale[1] = {0};
    if (const int64_t mine = base + lane_of_warp(); mine < n_rows) {
      const int64_t pair = rank == 1 ? mine : mine / rank, r = mine - pair * rank;
      const int64_t k = i * n.n_pairs + position[pair];
      place = (v == nullptr ? k : (i * n.n_components + component[pair]) * rank + r) * width;
      scale[0] = v == nullptr ? Acc<T>{1} : static_cast<Acc<T>>(widened(v[k * rank + r]));
    }
    add_rows<1>(sums, rows, place, scale, at_most_a_warp(n_rows - base), o, width);
  }
#pragma unroll
  for (int w = 0; w < kColumns; ++w)
    if (const int64_t column = o + w * kWarp; column < width)
      y[row * d_y + first + column] = narrowed<T>(sums[0][w]);
}

// z [I, K, width] = v F, columns first .. first + width of it. A warp for every tile and kWide columns, tiles side by
// side: those of one component read the same rows.
template <class T, int P>
__global__ void __launch_bounds__(kThreads)
    expand_kernel(const T* v, const T* f, const int64_t* offsets, Acc<T>* z, ForwardSizes n, int64_t d, int64_t first,
                  int64_t width, int64_t n_tiles, int64_t n_column_tiles) {
  const int64_t warp = warp_of_grid(), i = warp / n_tiles / n_column_tiles;
  if (i >= n.n_instances) return;
  const Tile tile = tile_at<P>(offsets + i * (n.n_components + 1), n.n_components, warp % n_tiles);
  if (tile.first >= tile.end) return;
  const int64_t o = warp / n_tiles % n_column_tiles * kWide + lane_of_warp();
  const T* rows = f + (i * n.n_components + tile.component) * n.rank * d + first;
  v += i * n.n_pairs * n.rank;
  Acc<T> sums[P][kColumns] = {};
#pragma unroll 1
  for (int64_t base = 0; base < n.rank; base += kWarp) {
    const int64_t r = base + lane_of_warp();
    Acc<T> scale[P];
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int64_t k = tile.first + p;
      scale[p] = r < n.rank && k < tile.end ? static_cast<Acc<T>>(widened(v[k * n.rank + r])) : Acc<T>{0};
    }
    add_rows<P>(sums, rows, r * d, scale, at_most_a_warp(n.rank - base), o, width);
  }
#pragma unroll
  for (int p = 0; p < P; ++p)
#pragma unroll
    for (int w = 0; w < kColumns; ++w)
      if (const int64_t k = tile.first + p, column = o + w * kWarp; k < tile.end && column < width)
        z[(i * n.n_pairs + k) * width + column] = sums[p][w];
}

// grad [I, C, m, d] (+)= v^T x. A warp for every R ranks and kWide columns of a component, ranks side by side: they
// read the same rows of x. Added to, a component without pairs is neither read nor written.
template <class T, int R>
__global__ void __launch_bounds__(kThreads, 4)  // without the 4, ptxas would rather spill than have fewer blocks
    outer_kernel(const T* v, const T* x, const int32_t* sample, const int64_t* offsets, T* grad, bool add,
                 ForwardSizes n, int64_t d, int64_t n_rank_tiles, int64_t n_column_tiles) {
  const int64_t warp = warp_of_grid(), owner = warp / n_rank_tiles / n_column_tiles;
  if (owner >= n.n_instances * n.n_components) return;
  const int64_t i = owner / n.n_components, c = owner % n.n_components;
  const int64_t first_rank = warp % n_rank_tiles * R;
  const int64_t o = warp / n_rank_tiles % n_column_tiles * kWide + lane_of_warp();
  const int64_t begin = offsets[i * (n.n_components + 1) + c], end = offsets[i * (n.n_components + 1) + c + 1];
  if (add && begin == end) return;
  sample += i * n.n_pairs;
  v += i * n.n_pairs * n.rank + first_rank;
  Acc<T> sums[R][kColumns] = {};
#pragma unroll 1
  for (int64_t base = begin; base < end; base += kWarp) {
    const int64_t k = base + lane_of_warp();
    const int64_t place = k < end ? (i * n.batch + sample[k]) * d : 0;
    Acc<T> scale[R];
#pragma unroll
    for (int r = 0; r < R; ++r)
      scale[r] = k < end && first_rank + r < n.rank ? static_cast<Acc<T>>(widened(v[k * n.rank + r])) : Acc<T>{0};
    add_rows<R>(sums, x, place, scale, at_most_a_warp(end - base), o, d);
  }
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int w = 0; w < kColumns; ++w)
      if (const int64_t column = o + w * kWarp; first_rank + r < n.rank && column < d) {
        T* at = grad + (owner * n.rank + first_rank + r) * d + column;
        *at = narrowed<T>(add ? widened(*at) + sums[r][w] : sums[r][w]);
      }
}

// ----------------------------------------------------------------------------------------------------------- launchers

template <class... Parameters, class... Arguments>
void launch_warps(const char* op, void (*kernel)(Parameters...), int64_t warps, Stream stream, Arguments... arguments) {
  launch(op, kernel, ceil_div(warps, kThreads / kWarp), kThreads, 0, stream, arguments...);
}

template <class T>
void project(const char* op, Stream stream, const T* x, const T* f, const Selection& s, T* v, const ForwardSizes& n,
             int64_t d) {
  if (n.n_pairs == 0 || n.rank == 0) return;
  const auto run = [&](auto kernel, int pairs, int ranks) {
    const int64_t n_tiles = tiles_of(n, pairs), n_rank_tiles = ceil_div(n.rank, ranks);
    launch_warps(op, kernel, n.n_instances * n_tiles * n_rank_tiles, stream, x, f, s.sample, s.offsets, v, n, d,
                 n_tiles, n_rank_tiles);
  };
  constexpr int M = kMost<T>;
  if (n.rank == 1)
    run(project_kernel<T, 4, 1>, 4, 1);
  else if (n.rank < M || n.n_pairs < n.n_components * M / 2)  // or tiles would be less than half full
    run(project_kernel<T, 4, 4>, 4, 4);
  else
    run(project_kernel<T, M, M>, M, M);
}

template <class T>
void combine(const char* op, Stream stream, const T* v, const T* f, const Selection& s, T* y, Acc<T>* z,
             int64_t z_columns, const ForwardSizes& n, int64_t d) {
  const int64_t n_rows = n.n_instances * n.batch;
  if (z_columns == 0) {
    const int64_t n_column_tiles = ceil_div(d, kWide);
    launch_warps(op, combine_kernel<T, T>, n_rows * n_column_tiles, stream, v, f, s.component, s.sample_offsets,
                 s.position, y, n, n.rank, d, 0, d, n_column_tiles);
    return;
  }
  for (int64_t first = 0; first < d; first += z_columns) {
    const int64_t width = first + z_columns < d ? z_columns : d - first;
    const int64_t n_tiles = tiles_of(n, kMost<T>), n_column_tiles = ceil_div(width, kWide);
    launch_warps(op, expand_kernel<T, kMost<T>>, n.n_instances * n_tiles * n_column_tiles, stream, v, f, s.offsets, z,
                 n, d, first, width, n_tiles, n_column_tiles);
    launch_warps(op, combine_kernel<T, Acc<T>>, n_rows * n_column_tiles, stream, static_cast<const T*>(nullptr), z,
                 s.component, s.sample_offsets, s.position, y, n, 1, width, first, d, n_column_tiles);
  }
}

template <class T>
void outer(const char* op, Stream stream, const T* v, const T* x, const Selection& s, T* grad, bool add,
           const ForwardSizes& n, int64_t d) {
  if (n.rank == 0 || (add && n.n_pairs == 0)) return;
  const auto run = [&](auto kernel, int ranks) {
    const int64_t n_rank_tiles = ceil_div(n.rank, ranks), n_column_tiles = ceil_div(d, kWide);
    launch_warps(op, kernel, n.n_instances * n.n_components * n_rank_tiles * n_column_tiles, stream, v, x, s.sample,
                 s.offsets, grad, add, n, d, n_rank_tiles, n_column_tiles);
  };
  constexpr int M = kMost<T>;
  if (n.rank == 1)
    run(outer_kernel<T, 1>, 1);
  else if (n.rank < M)
    run(outer_kernel<T, 4>, 4);
  else
    run(outer_kernel<T, M>, M);
}

}  // namespace

template <class T>
void component_forward_selected(Stream stream, const T* x, const T* At, const T* B, Selection selection, T* u, T* y,
                                Acc<T>* z, int64_t z_columns, ForwardSizes n) {
  const char* op = "component_forward_selected";
  project(op, stream, x, At, selection, u, n, n.d_in);
  combine(op, stream, u, B, selection, y, z, z_columns, n, n.d_out);
}

template <class T>
void component_forward_selected_backward(const char* op, Stream stream, const T* grad_y, const T* x, const T* At,
                                         const T* B, const T* u, Selection selection, T* grad_u, T* grad_x, T* grad_At,
                                         T* grad_B, bool add, Acc<T>* z, int64_t z_columns, ForwardSizes n) {
  if (grad_x != nullptr || grad_At != nullptr) project(op, stream, grad_y, B, selection, grad_u, n, n.d_out);
  if (grad_x != nullptr) combine(op, stream, grad_u, At, selection, grad_x, z, z_columns, n, n.d_in);
  if (grad_At != nullptr) outer(op, stream, grad_u, x, selection, grad_At, add, n, n.d_in);
  if (grad_B != nullptr) outer(op, stream, u, grad_y, selection, grad_B, add, n, n.d_out);
}

#define FASTAPD_INSTANTIATE(T)                                                                                      \
  template void component_forward_selected<T>(Stream, const T*, const T*, const T*, Selection, T*, T*, Acc<T>*,     \
                                              int64_t, ForwardSizes);                                               \
  template void component_forward_selected_backward<T>(const char*, Stream, const T*, const T*, const T*, const T*, \
                                                       const T*, Selection, T*, T*, T*, T*, bool, Acc<T>*, int64_t, \
                                                       ForwardSizes);
FASTAPD_INSTANTIATE(float)
FASTAPD_INSTANTIATE(double)
FASTAPD_INSTANTIATE(Half)
FASTAPD_INSTANTIATE(BFloat16)

}  // namespace fastapd::cuda
