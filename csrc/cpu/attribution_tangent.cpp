// a[b, c] = |g_J t_J|^2 with t_j = sum of the terms (source row) F_c + sum of the links (g_i t_i) L_ij: the attribution
// of a component by the tangent that its weights send through a network in gated linear form, forward and backward.
//
// Samples stand in vector lanes: a block is kTile vectors of samples, packed transposed, so that every product is
// acc[output][samples] += entry of a matrix * in[row][samples], without horizontal sums, without a lane wasted on
// narrow layers and without packing any matrix. A tile of outputs is held in registers over all terms and links of its
// barrier; the gate and, at the last barrier, the squared sum are its epilogue, so that no tangent goes through memory
// twice. Forward: a thread owns a block of samples and walks all components. Backward: it owns a component and walks
// all blocks, recomputing the tangents; gradients are products over the lanes of a block, taken from a transposed copy
// of what flows back. Nothing depends on the number of threads. Accumulation is in T.
#include "../ops.h"
#include "parallel.h"

namespace fastapd {
namespace FASTAPD_LEVEL {
namespace {

// Registers: kRows * kTile accumulators, kTile inputs and a broadcast entry.
#if defined(__AVX512F__)
constexpr int kTile = 4, kRows = 6;
#else
constexpr int kTile = 2, kRows = 5;
#endif

template <class T>
constexpr int64_t kBlock = kTile * kLanes<T>;

inline int64_t padded(int64_t n, int64_t lanes) {
  return (n + lanes - 1) / lanes * lanes;
}

// One matrix of a sum of products: entry (row k, output r) at F[k * step + r * turn], where turn is 1 in the forward
// direction. F is that of instance 0, component 0; `in` holds the rows of the other operand.
template <class T>
struct Part {
  const T* F;
  int64_t stride_i, stride_c, rows, step, turn;
  const T* in;
};

// acc[r][v] = sum over the parts of F[k, r0 + r] * in[k][v]. kUnit says that every turn is 1.
template <class T, int R, bool kUnit>
inline void products(const Part<T>* parts, int64_t n_parts, int64_t i, int64_t c, int64_t r0, vec<T> (&acc)[R][kTile]) {
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kTile; ++v) acc[r][v] = vec<T>{};
  for (int64_t p = 0; p < n_parts; ++p) {
    const int64_t turn = kUnit ? 1 : parts[p].turn;
    const T* f = parts[p].F + i * parts[p].stride_i + c * parts[p].stride_c + r0 * turn;
    const T* in = parts[p].in;
    const int64_t rows = parts[p].rows, step = parts[p].step;
    for (int64_t k = 0; k < rows; ++k) {
      vec<T> x[kTile];
      for (int v = 0; v < kTile; ++v) x[v] = load(in + v * kLanes<T>);
      for (int r = 0; r < R; ++r) {
        const T w = f[r * turn];
        for (int v = 0; v < kTile; ++v) acc[r][v] += w * x[v];
      }
      f += step;
      in += kBlock<T>;
    }
  }
}

// Walks the outputs 0 .. n in tiles of kRows and fewer; body(r0, number of rows as a constant).
template <int N>
struct Count {
  static constexpr int value = N;
};
template <class Body>
inline void in_tiles(int64_t n, const Body& body) {
  int64_t r0 = 0;
  for (; r0 + kRows <= n; r0 += kRows) body(r0, Count<kRows>{});
  switch (n - r0) {
    case 5:
      body(r0, Count<5>{});
      break;
    case 4:
      body(r0, Count<4>{});
      break;
    case 3:
      body(r0, Count<3>{});
      break;
    case 2:
      body(r0, Count<2>{});
      break;
    case 1:
      body(r0, Count<1>{});
      break;
    default:
      break;
  }
}

// out[r][samples] = gate[r][samples] * sum of the parts; gate may be null.
template <class T, bool kUnit>
void store_products(const Part<T>* parts, int64_t n_parts, int64_t i, int64_t c, int64_t n, const T* gate, T* out) {
  in_tiles(n, [&](int64_t r0, auto count) {
    constexpr int R = decltype(count)::value;
    vec<T> acc[R][kTile];
    products<T, R, kUnit>(parts, n_parts, i, c, r0, acc);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kTile; ++v) {
        const int64_t at = (r0 + r) * kBlock<T> + v * kLanes<T>;
        store(out + at, gate == nullptr ? acc[r][v] : acc[r][v] * load(gate + at));
      }
  });
}

// total[samples] = sum over r of (gate[r] * sum of the parts)^2.
template <class T>
void square_products(const Part<T>* parts, int64_t n_parts, int64_t i, int64_t c, int64_t n, const T* gate, T* total) {
  vec<T> sum[kTile] = {};
  in_tiles(n, [&](int64_t r0, auto count) {
    constexpr int R = decltype(count)::value;
    vec<T> acc[R][kTile];
    products<T, R, true>(parts, n_parts, i, c, r0, acc);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kTile; ++v) {
        if (gate != nullptr) acc[r][v] *= load(gate + (r0 + r) * kBlock<T> + v * kLanes<T>);
        sum[v] += acc[r][v] * acc[r][v];
      }
  });
  for (int v = 0; v < kTile; ++v) store(total + v * kLanes<T>, sum[v]);
}

// packed[entry][sample] = source[sample * entries + entry] for n samples; the others are zero.
template <class T>
void pack(const T* source, int64_t entries, int64_t n, T* packed) {
  for (int64_t e = 0; e < entries; ++e) {
    T* row = packed + e * kBlock<T>;
    for (int64_t s = 0; s < n; ++s) row[s] = source[s * entries + e];
    for (int64_t s = n; s < kBlock<T>; ++s) row[s] = 0;
  }
}

// Where everything of a block stands, in rows of kBlock values: what is given (inputs, gates) and what is computed
// (lefts, tangents). And the parts of every barrier.
template <class T>
struct Layout {
  explicit Layout(const TangentProgram<T>& p)
      : offsets(p.n.n_inputs + p.n.n_lefts + 2 * p.n.n_barriers),
        begin(p.n.n_barriers + 1),
        parts(p.n.n_terms + p.n.n_links),
        n_inputs(p.n.n_inputs),
        n_lefts(p.n.n_lefts),
        n_barriers(p.n.n_barriers) {
    if (!ok()) return;
    int64_t* next = offsets.data;
    for (int64_t k = 0; k < n_inputs; ++k) *next++ = given, given += p.inputs[k].width;
    for (int64_t j = 0; j < n_barriers; ++j) *next++ = given, given += p.barriers[j].gate ? p.barriers[j].width : 0;
    for (int64_t k = 0; k < n_lefts; ++k) *next++ = projected, projected += p.lefts[k].rank;
    for (int64_t j = 0; j < n_barriers; ++j) *next++ = tangents, tangents += p.barriers[j].width;
  }
  bool ok() const { return offsets.data != nullptr && begin.data != nullptr && parts.data != nullptr; }
  int64_t input(int64_t k) const { return offsets.data[k] * kBlock<T>; }
  int64_t gate(int64_t j) const { return offsets.data[n_inputs + j] * kBlock<T>; }
  int64_t left(int64_t k) const { return offsets.data[n_inputs + n_barriers + k] * kBlock<T>; }
  // Among the tangents, which follow the lefts.
  int64_t among(int64_t j) const { return offsets.data[n_inputs + n_barriers + n_lefts + j] * kBlock<T>; }
  int64_t tangent(int64_t j) const { return projected * kBlock<T> + among(j); }
  const T* source(int64_t s, const T* from, const T* to) const {
    return s < n_inputs ? from + input(s) : to + left(s - n_inputs);
  }
  const Part<T>* of(int64_t j) const { return parts.data + begin.data[j]; }
  int64_t count(int64_t j) const { return begin.data[j + 1] - begin.data[j]; }

  // The parts of every barrier, in the order of the program, for a block given at `from` and computed at `to`.
  void point(const TangentProgram<T>& p, const T* from, const T* to) {
    int64_t n = 0;
    for (int64_t j = 0; j < n_barriers; ++j) {
      begin.data[j] = n;
      const int64_t width = p.barriers[j].width;
      for (int64_t t = 0; t < p.n.n_terms; ++t) {
        const TangentTerm<T>& term = p.terms[t];
        if (term.barrier != j) continue;
        const int64_t rows = width_of(p, term.source), size = rows * width;
        parts.data[n++] = {term.F, p.n.n_components * size, size, rows, width, 1, source(term.source, from, to)};
      }
      for (int64_t l = 0; l < p.n.n_links; ++l) {
        const TangentLink<T>& link = p.links[l];
        if (link.to != j) continue;
        parts.data[n++] = {link.L, link.stride_i, 0, p.barriers[link.from].width, width, 1, to + tangent(link.from)};
      }
    }
    begin.data[n_barriers] = n;
  }
  static int64_t width_of(const TangentProgram<T>& p, int64_t source) {
    return source < p.n.n_inputs ? p.inputs[source].width : p.lefts[source - p.n.n_inputs].rank;
  }

  Workspace<int64_t> offsets, begin;
  Workspace<Part<T>> parts;
  int64_t n_inputs, n_lefts, n_barriers;
  int64_t given = 0, projected = 0, tangents = 0;  // rows of inputs and gates, lefts, tangents
};

// Inputs and gates of the n samples from `first` on.
template <class T>
void pack_block(const TangentProgram<T>& p, const Layout<T>& layout, int64_t i, int64_t first, int64_t n, T* block) {
  const int64_t row = i * p.n.batch + first;
  for (int64_t k = 0; k < p.n.n_inputs; ++k)
    pack(p.inputs[k].x + row * p.inputs[k].width, p.inputs[k].width, n, block + layout.input(k));
  for (int64_t j = 0; j < p.n.n_barriers; ++j)
    if (p.barriers[j].gate != nullptr)
      pack(p.barriers[j].gate + row * p.barriers[j].width, p.barriers[j].width, n, block + layout.gate(j));
}

template <class T>
const T* gate_of(const TangentProgram<T>& p, const Layout<T>& layout, int64_t j, const T* from) {
  return p.barriers[j].gate == nullptr ? nullptr : from + layout.gate(j);
}

// u = x A_c of all lefts, then the gated tangents of the barriers before `end`.
template <class T>
void forward_block(const TangentProgram<T>& p, const Layout<T>& layout, int64_t i, int64_t c, int64_t end,
                   const T* from, T* to) {
  for (int64_t k = 0; k < p.n.n_lefts; ++k) {
    const TangentLeft<T>& left = p.lefts[k];
    const int64_t width = p.inputs[left.input].width, size = left.rank * width;
    const Part<T> part = {left.At, p.n.n_components * size, size, width, 1, width, from + layout.input(left.input)};
    store_products<T, false>(&part, 1, i, c, left.rank, nullptr, to + layout.left(k));
  }
  for (int64_t j = 0; j < end; ++j)
    store_products<T, true>(layout.of(j), layout.count(j), i, c, p.barriers[j].width, gate_of(p, layout, j, from),
                            to + layout.tangent(j));
}

// Additions of one component on one sample.
template <class T>
int64_t work_of(const TangentProgram<T>& p) {
  int64_t work = 1;
  for (int64_t k = 0; k < p.n.n_lefts; ++k) work += p.lefts[k].rank * p.inputs[p.lefts[k].input].width;
  for (int64_t t = 0; t < p.n.n_terms; ++t)
    work += Layout<T>::width_of(p, p.terms[t].source) * p.barriers[p.terms[t].barrier].width;
  for (int64_t l = 0; l < p.n.n_links; ++l) work += p.barriers[p.links[l].from].width * p.barriers[p.links[l].to].width;
  return work;
}

}  // namespace

template <class T>
bool attribution_tangent(const TangentProgram<T>& p, T* out, int threads) {
  const int64_t blocks = (p.n.batch + kBlock<T> - 1) / kBlock<T>;
  Failure failure;
  threads = worth(p.n.n_instances * p.n.batch * p.n.n_components * work_of(p), threads);
  const int64_t jobs = p.n.n_instances * blocks, grain = jobs >= 64 ? 4 : 1;
  parallel_for(jobs, grain, threads, [&](int64_t begin, int64_t end) {
    Layout<T> layout(p);
    const Workspace<T> work((layout.given + layout.projected + layout.tangents) * kBlock<T>);
    if (!layout.ok() || work.data == nullptr) return failure.set();
    T *from = work.data, *to = from + layout.given * kBlock<T>;
    layout.point(p, from, to);
    const int64_t last = p.n.n_barriers - 1;
    for (int64_t job = begin; job < end; ++job) {
      const int64_t i = job / blocks, first = job % blocks * kBlock<T>;
      const int64_t n = p.n.batch - first < kBlock<T> ? p.n.batch - first : kBlock<T>;
      pack_block(p, layout, i, first, n, from);
      for (int64_t c = 0; c < p.n.n_components; ++c) {
        forward_block(p, layout, i, c, last, from, to);
        T total[kBlock<T>];
        square_products<T>(layout.of(last), layout.count(last), i, c, p.barriers[last].width,
                           gate_of(p, layout, last, from), total);
        T* at = out + (i * p.n.batch + first) * p.n.n_components + c;
        for (int64_t s = 0; s < n; ++s) at[s * p.n.n_components] = total[s];
      }
    }
  });
  return failure.none();
}

namespace {

// out[sample][entry] of n entries, in rows of `step` >= n values whose ends are zero.
template <class T>
void turn_rows(const T* in, int64_t n, int64_t step, T* out) {
  for (int64_t s = 0; s < kBlock<T>; ++s) {
    for (int64_t e = 0; e < n; ++e) out[s * step + e] = in[e * kBlock<T> + s];
    for (int64_t e = n; e < step; ++e) out[s * step + e] = 0;
  }
}

// sum[k0 + r, n0 + lanes] += rows[k0 + r][s] * turned[s][n0 + lanes], over the samples s of a block.
template <class T, int R, int V>
inline void outer_tile(const T* rows, const T* turned, int64_t step, T* sum) {
  vec<T> acc[R][V] = {};
  for (int64_t s = 0; s < kBlock<T>; ++s) {
    vec<T> x[V];
    for (int v = 0; v < V; ++v) x[v] = load(turned + s * step + v * kLanes<T>);
    for (int r = 0; r < R; ++r) {
      const T w = rows[r * kBlock<T> + s];
      for (int v = 0; v < V; ++v) acc[r][v] += w * x[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      T* at = sum + r * step + v * kLanes<T>;
      store(at, load(at) + acc[r][v]);
    }
}

// sum[k, :] += rows[k] . turned for n rows; `step` is a multiple of the lanes.
template <class T>
void outer(const T* rows, int64_t n, const T* turned, int64_t step, T* sum) {
  in_tiles(n, [&](int64_t r0, auto count) {
    constexpr int R = decltype(count)::value;
    const T* from = rows + r0 * kBlock<T>;
    T* to = sum + r0 * step;
    int64_t o = 0;
    for (; o + kTile * kLanes<T> <= step; o += kTile * kLanes<T>)
      outer_tile<T, R, kTile>(from, turned + o, step, to + o);
    for (; o < step; o += kLanes<T>) outer_tile<T, R, 1>(from, turned + o, step, to + o);
  });
}

// What a thread of the backward pass holds for one component; null data anywhere: no memory.
template <class T>
struct Sums {
  explicit Sums(const TangentProgram<T>& p) : at(p.n.n_lefts + p.n.n_terms), parts(p.n.n_terms + p.n.n_links) {
    if (at.data == nullptr) return;
    for (int64_t k = 0; k < p.n.n_lefts; ++k) {
      const int64_t wide = padded(p.inputs[p.lefts[k].input].width, kLanes<T>);
      at.data[k] = size, size += p.lefts[k].rank * wide;
      widest = wide > widest ? wide : widest;
      deepest = p.lefts[k].rank > deepest ? p.lefts[k].rank : deepest;
    }
    for (int64_t t = 0; t < p.n.n_terms; ++t) {
      const int64_t wide = padded(p.barriers[p.terms[t].barrier].width, kLanes<T>);
      at.data[p.n.n_lefts + t] = size, size += Layout<T>::width_of(p, p.terms[t].source) * wide;
      widest = wide > widest ? wide : widest;
    }
  }
  Workspace<int64_t> at;  // where each left's and then each term's gradient starts
  Workspace<Part<T>> parts;
  int64_t size = 0, widest = 0, deepest = 0;
};

// d_t[j] = gate_j * sum over the links j -> k of d_t[k] L_jk^T, for all barriers before the last.
template <class T>
void backward_barriers(const TangentProgram<T>& p, const Layout<T>& layout, int64_t i, int64_t c, const T* from,
                       Part<T>* parts, T* dt) {
  for (int64_t j = p.n.n_barriers - 2; j >= 0; --j) {
    int64_t n = 0;
    const int64_t width = p.barriers[j].width;
    for (int64_t l = 0; l < p.n.n_links; ++l) {
      const TangentLink<T>& link = p.links[l];
      if (link.from != j) continue;
      const int64_t wide = p.barriers[link.to].width;
      parts[n++] = {link.L, link.stride_i, 0, wide, 1, wide, dt + layout.among(link.to)};
    }
    store_products<T, false>(parts, n, i, c, width, gate_of(p, layout, j, from), dt + layout.among(j));
  }
}

// Adds to the sums of component c what one block gives. lane_weight: 2 * the incoming gradients of its samples.
template <class T>
void backward_block(const TangentProgram<T>& p, const Layout<T>& layout, const Sums<T>& sums, int64_t i, int64_t c,
                    const T* lane_weight, const T* from, const T* rows_of_inputs, T* to, T* dt, T* du, T* turned,
                    T* sum) {
  const int64_t last = p.n.n_barriers - 1;
  forward_block(p, layout, i, c, p.n.n_barriers, from, to);
  const T *gate = gate_of(p, layout, last, from), *t = to + layout.tangent(last);
  T* dt_last = dt + layout.among(last);
  for (int64_t r = 0; r < p.barriers[last].width; ++r)
    for (int v = 0; v < kTile; ++v) {
      const int64_t at = r * kBlock<T> + v * kLanes<T>;
      const vec<T> d = load(lane_weight + v * kLanes<T>) * load(t + at);
      store(dt_last + at, gate == nullptr ? d : d * load(gate + at));
    }
  backward_barriers(p, layout, i, c, from, sums.parts.data, dt);
  for (int64_t j = 0; j <= last; ++j) {
    const int64_t width = p.barriers[j].width, wide = padded(width, kLanes<T>);
    bool is_turned = false;
    for (int64_t k = 0; k < p.n.n_terms; ++k) {
      if (p.terms[k].barrier != j) continue;
      if (!is_turned) turn_rows(dt + layout.among(j), width, wide, turned);
      is_turned = true;
      outer(layout.source(p.terms[k].source, from, to), Layout<T>::width_of(p, p.terms[k].source), turned, wide,
            sum + sums.at.data[p.n.n_lefts + k]);
    }
  }
  for (int64_t k = 0; k < p.n.n_lefts; ++k) {
    const TangentLeft<T>& left = p.lefts[k];
    int64_t n = 0;
    for (int64_t l = 0; l < p.n.n_terms; ++l) {
      const TangentTerm<T>& term = p.terms[l];
      if (term.source != p.n.n_inputs + k) continue;
      const int64_t width = p.barriers[term.barrier].width, size = left.rank * width;
      sums.parts.data[n++] = {term.F, p.n.n_components * size, size, width, 1, width, dt + layout.among(term.barrier)};
    }
    store_products<T, false>(sums.parts.data, n, i, c, left.rank, nullptr, du);
    outer(du, left.rank, rows_of_inputs, padded(p.inputs[left.input].width, kLanes<T>), sum + sums.at.data[k]);
    rows_of_inputs += kBlock<T> * padded(p.inputs[left.input].width, kLanes<T>);
  }
}

// to[row, 0 : n] from rows of `step` values.
template <class T>
void copy_rows(const T* from, int64_t rows, int64_t n, int64_t step, T* to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t e = 0; e < n; ++e) to[r * n + e] = from[r * step + e];
}

}  // namespace

template <class T>
bool attribution_tangent_backward(const TangentProgram<T>& p, const T* grad, T* const* grad_At, T* const* grad_F,
                                  int threads) {
  const Layout<T> shape(p);
  const Sums<T> sizes(p);
  if (!shape.ok() || sizes.at.data == nullptr) return false;
  const int64_t blocks = (p.n.batch + kBlock<T> - 1) / kBlock<T>;
  int64_t in_rows = 0;  // the inputs of the lefts once more, sample by sample
  for (int64_t k = 0; k < p.n.n_lefts; ++k) in_rows += padded(p.inputs[p.lefts[k].input].width, kLanes<T>);
  const int64_t per_block = (shape.given + in_rows) * kBlock<T>;
  const Workspace<T> packed(p.n.n_instances * blocks * per_block);
  if (packed.data == nullptr) return false;
  threads = worth(3 * p.n.n_instances * p.n.batch * p.n.n_components * work_of(p), threads);
  parallel_for(p.n.n_instances * blocks, 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t i = job / blocks, first = job % blocks * kBlock<T>;
      const int64_t n = p.n.batch - first < kBlock<T> ? p.n.batch - first : kBlock<T>;
      T* block = packed.data + job * per_block;
      pack_block(p, shape, i, first, n, block);
      T* rows = block + shape.given * kBlock<T>;
      for (int64_t k = 0; k < p.n.n_lefts; ++k) {
        const int64_t width = p.inputs[p.lefts[k].input].width, wide = padded(width, kLanes<T>);
        turn_rows(block + shape.input(p.lefts[k].input), width, wide, rows);
        rows += kBlock<T> * wide;
      }
    }
  });
  Failure failure;
  parallel_for(p.n.n_instances * p.n.n_components, 1, threads, [&](int64_t begin, int64_t end) {
    Layout<T> layout(p);
    const Sums<T> sums(p);
    const Workspace<T> work((shape.projected + 2 * shape.tangents + sizes.deepest + sizes.widest) * kBlock<T> +
                            sizes.size);
    if (!layout.ok() || sums.at.data == nullptr || sums.parts.data == nullptr || work.data == nullptr)
      return failure.set();
    T* to = work.data;
    T* dt = to + (shape.projected + shape.tangents) * kBlock<T>;
    T* du = dt + shape.tangents * kBlock<T>;
    T* turned = du + sizes.deepest * kBlock<T>;
    T* sum = turned + sizes.widest * kBlock<T>;
    for (int64_t job = begin; job < end; ++job) {
      const int64_t i = job / p.n.n_components, c = job % p.n.n_components;
      for (int64_t k = 0; k < sizes.size; ++k) sum[k] = 0;
      for (int64_t q = 0; q < blocks; ++q) {
        const T* from = packed.data + (i * blocks + q) * per_block;
        T lane_weight[kBlock<T>] = {};
        for (int64_t s = 0; s < kBlock<T> && q * kBlock<T> + s < p.n.batch; ++s)
          lane_weight[s] = 2 * grad[(i * p.n.batch + q * kBlock<T> + s) * p.n.n_components + c];
        layout.point(p, from, to);
        backward_block(p, layout, sums, i, c, lane_weight, from, from + shape.given * kBlock<T>, to, dt, du, turned,
                       sum);
      }
      for (int64_t k = 0; k < p.n.n_lefts; ++k) {
        const int64_t width = p.inputs[p.lefts[k].input].width, rank = p.lefts[k].rank;
        copy_rows(sum + sums.at.data[k], rank, width, padded(width, kLanes<T>), grad_At[k] + job * rank * width);
      }
      for (int64_t k = 0; k < p.n.n_terms; ++k) {
        const int64_t width = p.barriers[p.terms[k].barrier].width, rows = Layout<T>::width_of(p, p.terms[k].source);
        copy_rows(sum + sums.at.data[p.n.n_lefts + k], rows, width, padded(width, kLanes<T>),
                  grad_F[k] + job * rows * width);
      }
    }
  });
  return failure.none();
}

#define FASTAPD_INSTANTIATE(T)                                             \
  template bool attribution_tangent<T>(const TangentProgram<T>&, T*, int); \
  template bool attribution_tangent_backward<T>(const TangentProgram<T>&, const T*, T* const*, T* const*, int);
FASTAPD_INSTANTIATE(float)
FASTAPD_INSTANTIATE(double)

}  // namespace FASTAPD_LEVEL
}  // namespace fastapd
