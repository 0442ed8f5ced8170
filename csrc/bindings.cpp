// fastapd._C: addresses and sizes in, the current instruction-set level chosen, the GIL released. No mathematics.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops.h"

namespace py = pybind11;
using namespace fastapd;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// sample, offsets, component, sample_offsets, position
using SelectionAddresses = std::array<Address, 5>;
// n_instances, batch, n_components, rank, d_in, d_out, n_pairs
using ForwardShape = std::array<int64_t, 7>;

Selection selection_at(const SelectionAddresses& a) {
  return {at<const int32_t>(a[0]), at<const int64_t>(a[1]), at<const int32_t>(a[2]), at<const int64_t>(a[3]),
          at<const int32_t>(a[4])};
}

ForwardSizes sizes_of(const ForwardShape& s) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6]};
}

#if FASTAPD_X86_LEVELS
#define FASTAPD_AT_LEVEL(CALL) \
  switch (current_level()) {   \
    case Level::kAvx512:       \
      return avx512::CALL;     \
    case Level::kAvx2:         \
      return avx2::CALL;       \
    default:                   \
      return baseline::CALL;   \
  }
#else
#define FASTAPD_AT_LEVEL(CALL) return baseline::CALL;
#endif

template <class T>
bool run_batch_topk(Address scores, const SelectionAddresses& out, int64_t n_instances, int64_t batch,
                    int64_t n_components, int64_t capacity, Address counts, int64_t k, Address thresholds,
                    int threads) {
  const SelectionOut o = {at<int32_t>(out[0]), at<int64_t>(out[1]), at<int32_t>(out[2]), at<int64_t>(out[3]),
                          at<int32_t>(out[4])};
  FASTAPD_AT_LEVEL(batch_topk<T>(at<const T>(scores), o, n_instances, batch, n_components, capacity,
                                 at<const int64_t>(counts), k, at<T>(thresholds), threads))
}

template <class T>
void run_forward(Address x, Address At, Address B, const SelectionAddresses& s, Address u, Address y,
                 const ForwardShape& n, int threads) {
  FASTAPD_AT_LEVEL(component_forward_selected<T>(at<const T>(x), at<const T>(At), at<const T>(B), selection_at(s),
                                                 at<T>(u), at<T>(y), sizes_of(n), threads))
}

template <class T>
void run_backward(Address grad_y, Address x, Address At, Address B, Address u, const SelectionAddresses& s,
                  Address grad_u, Address grad_x, Address grad_At, Address grad_B, bool accumulate,
                  const ForwardShape& n, int threads) {
  FASTAPD_AT_LEVEL(component_forward_selected_backward<T>(
      at<const T>(grad_y), at<const T>(x), at<const T>(At), at<const T>(B), at<const T>(u), selection_at(s),
      at<T>(grad_u), at<T>(grad_x), at<T>(grad_At), at<T>(grad_B), accumulate, sizes_of(n), threads))
}

// x, g, At, B, d_in, d_out, rank, and the strides of g by instance, sample and output
using LayerArguments = std::array<int64_t, 10>;

template <class T>
std::vector<AttributionLayer<T>> layers_at(const std::vector<LayerArguments>& arguments) {
  std::vector<AttributionLayer<T>> layers;
  for (const LayerArguments& a : arguments)
    layers.push_back({at<const T>(static_cast<Address>(a[0])), at<const T>(static_cast<Address>(a[1])),
                      at<const T>(static_cast<Address>(a[2])), at<const T>(static_cast<Address>(a[3])), a[4], a[5],
                      a[6], a[7], a[8], a[9]});
  return layers;
}

template <class T>
bool run_attribution(const std::vector<LayerArguments>& arguments, Address out, int64_t n_instances, int64_t batch,
                     int64_t n_components, int64_t n_outputs, int threads) {
  const std::vector<AttributionLayer<T>> layers = layers_at<T>(arguments);
  const int64_t n = static_cast<int64_t>(layers.size());
  FASTAPD_AT_LEVEL(
      attribution_reduce<T>(layers.data(), n, at<T>(out), n_instances, batch, n_components, n_outputs, threads))
}

template <class T>
bool run_attribution_backward(const std::vector<LayerArguments>& arguments, Address grad,
                              const std::vector<Address>& grad_At, const std::vector<Address>& grad_B,
                              int64_t n_instances, int64_t batch, int64_t n_components, int64_t n_outputs,
                              int threads) {
  const std::vector<AttributionLayer<T>> layers = layers_at<T>(arguments);
  const int64_t n = static_cast<int64_t>(layers.size());
  std::vector<T*> to_A, to_B;
  for (const Address a : grad_At) to_A.push_back(at<T>(a));
  for (const Address b : grad_B) to_B.push_back(at<T>(b));
  FASTAPD_AT_LEVEL(attribution_reduce_backward<T>(layers.data(), n, at<const T>(grad), to_A.data(), to_B.data(),
                                                  n_instances, batch, n_components, n_outputs, threads))
}

// A program as flat lists: inputs (x, width), lefts (At, input, rank), terms (F, source, barrier), barriers (gate or 0,
// width), links (L, from, to, stride_i); then n_instances, batch, n_components.
struct TangentArguments {
  std::vector<std::array<int64_t, 2>> inputs;
  std::vector<std::array<int64_t, 3>> lefts, terms;
  std::vector<std::array<int64_t, 2>> barriers;
  std::vector<std::array<int64_t, 4>> links;
  std::array<int64_t, 3> sizes;
};

template <class T>
const T* entry(int64_t address) {
  return at<const T>(static_cast<Address>(address));
}

template <class T>
struct Tangent {
  explicit Tangent(const TangentArguments& a) {
    for (const auto& e : a.inputs) inputs.push_back({entry<T>(e[0]), e[1]});
    for (const auto& e : a.lefts) lefts.push_back({entry<T>(e[0]), e[1], e[2]});
    for (const auto& e : a.terms) terms.push_back({entry<T>(e[0]), e[1], e[2]});
    for (const auto& e : a.barriers) barriers.push_back({entry<T>(e[0]), e[1]});
    for (const auto& e : a.links) links.push_back({entry<T>(e[0]), e[1], e[2], e[3]});
    const auto size = [](const auto& list) { return static_cast<int64_t>(list.size()); };
    program = {
        inputs.data(),
        lefts.data(),
        terms.data(),
        barriers.data(),
        links.data(),
        {a.sizes[0], a.sizes[1], a.sizes[2], size(inputs), size(lefts), size(terms), size(barriers), size(links)}};
  }
  std::vector<TangentInput<T>> inputs;
  std::vector<TangentLeft<T>> lefts;
  std::vector<TangentTerm<T>> terms;
  std::vector<TangentBarrier<T>> barriers;
  std::vector<TangentLink<T>> links;
  TangentProgram<T> program;
};

template <class T>
bool run_tangent(const TangentArguments& arguments, Address out, int threads) {
  const Tangent<T> t(arguments);
  FASTAPD_AT_LEVEL(attribution_tangent<T>(t.program, at<T>(out), threads))
}

template <class T>
bool run_tangent_backward(const TangentArguments& arguments, Address grad, const std::vector<Address>& grad_At,
                          const std::vector<Address>& grad_F, int threads) {
  const Tangent<T> t(arguments);
  std::vector<T*> to_A, to_F;
  for (const Address a : grad_At) to_A.push_back(at<T>(a));
  for (const Address f : grad_F) to_F.push_back(at<T>(f));
  FASTAPD_AT_LEVEL(attribution_tangent_backward<T>(t.program, at<const T>(grad), to_A.data(), to_F.data(), threads))
}

template <class T>
void run_unit_norm(Address rows, int64_t n, int64_t d, int threads) {
  FASTAPD_AT_LEVEL(unit_norm<T>(at<T>(rows), n, d, threads))
}

template <class T>
void run_remove_along(Address grad, Address rows, int64_t n, int64_t d, int threads) {
  FASTAPD_AT_LEVEL(remove_along<T>(at<T>(grad), at<const T>(rows), n, d, threads))
}

// sizes: n_instances, m, n, k, then the strides of A by instance, m, k and of B by instance, k, n
template <class T>
bool run_thin_product(Address A, Address B, Address C, double alpha, bool accumulate, const std::array<int64_t, 10>& s,
                      int threads) {
  const ThinProduct<T> product = {at<const T>(A), at<const T>(B), at<T>(C), static_cast<T>(alpha),
                                  accumulate,     s[0],           s[1],     s[2],
                                  s[3],           s[4],           s[5],     s[6],
                                  s[7],           s[8],           s[9]};
  FASTAPD_AT_LEVEL(thin_product<T>(product, threads))
}

template <class T>
void run_sum_loss(Address residual, Address target, Address loss, int64_t n_instances, int64_t n, int threads) {
  FASTAPD_AT_LEVEL(component_sum_loss<T>(at<T>(residual), at<const T>(target), at<T>(loss), n_instances, n, threads))
}

// n_instances, n_components, rank, d_in, d_out
using SchattenShape = std::array<int64_t, 5>;

SchattenSizes schatten_sizes(const SchattenShape& s) {
  return {s[0], s[1], s[2], s[3], s[4]};
}

template <class T>
bool run_svdvals(Address At, Address B, Address out, const SchattenShape& n, int threads) {
  FASTAPD_AT_LEVEL(component_svdvals<T>(at<const T>(At), at<const T>(B), at<T>(out), schatten_sizes(n), threads))
}

template <class T>
bool run_schatten(Address At, Address B, Address counts, double p, double eps, int64_t batch, bool exact, double scale,
                  bool accumulate, Address loss, Address grad_At, Address grad_B, const SchattenShape& n, int threads) {
  FASTAPD_AT_LEVEL(schatten<T>(at<const T>(At), at<const T>(B), at<const int64_t>(counts), p, eps, batch, exact, scale,
                               accumulate, at<T>(loss), at<T>(grad_At), at<T>(grad_B), schatten_sizes(n), threads))
}

template <class T>
bool run_schatten_masked(Address At, Address B, Address mask, double p, double eps, int64_t batch, Address loss,
                         Address grad_At, Address grad_B, Address grad_mask, const SchattenShape& n, int threads) {
  FASTAPD_AT_LEVEL(schatten_masked<T>(at<const T>(At), at<const T>(B), at<const T>(mask), p, eps, batch, at<T>(loss),
                                      at<T>(grad_At), at<T>(grad_B), at<T>(grad_mask), schatten_sizes(n), threads))
}

// Calls without the GIL; a kernel that could not allocate its workspace says so by returning false.
template <class... A>
auto releasing(bool (*run)(A...)) {
  return [run](A... arguments) {
    bool ok;
    {
      py::gil_scoped_release release;
      ok = run(arguments...);
    }
    if (!ok) throw std::bad_alloc();
  };
}

template <class T>
void bind_ops(py::module_& m, const std::string& dtype) {
  m.def(("batch_topk_" + dtype).c_str(), releasing(&run_batch_topk<T>));
  m.def(("component_svdvals_" + dtype).c_str(), releasing(&run_svdvals<T>));
  m.def(("schatten_" + dtype).c_str(), releasing(&run_schatten<T>));
  m.def(("schatten_masked_" + dtype).c_str(), releasing(&run_schatten_masked<T>));
  m.def(("attribution_reduce_" + dtype).c_str(), releasing(&run_attribution<T>));
  m.def(("attribution_reduce_backward_" + dtype).c_str(), releasing(&run_attribution_backward<T>));
  m.def(("attribution_tangent_" + dtype).c_str(), releasing(&run_tangent<T>));
  m.def(("attribution_tangent_backward_" + dtype).c_str(), releasing(&run_tangent_backward<T>));
  m.def(("unit_norm_" + dtype).c_str(), &run_unit_norm<T>, py::call_guard<py::gil_scoped_release>());
  m.def(("remove_along_" + dtype).c_str(), &run_remove_along<T>, py::call_guard<py::gil_scoped_release>());
  m.def(("thin_product_" + dtype).c_str(), releasing(&run_thin_product<T>));
  m.def(("component_sum_loss_" + dtype).c_str(), &run_sum_loss<T>, py::call_guard<py::gil_scoped_release>());
  m.def(("component_forward_selected_" + dtype).c_str(), &run_forward<T>, py::call_guard<py::gil_scoped_release>());
  m.def(("component_forward_selected_backward_" + dtype).c_str(), &run_backward<T>,
        py::call_guard<py::gil_scoped_release>());
}

const std::vector<std::string> kLevelNames = {"baseline", "avx2", "avx512"};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of fastapd; every function takes data addresses, sizes and a thread count.";
  py::class_<TangentArguments>(m, "TangentArguments")
      .def(py::init([](std::vector<std::array<int64_t, 2>> inputs, std::vector<std::array<int64_t, 3>> lefts,
                       std::vector<std::array<int64_t, 3>> terms, std::vector<std::array<int64_t, 2>> barriers,
                       std::vector<std::array<int64_t, 4>> links, std::array<int64_t, 3> sizes) {
        return TangentArguments{std::move(inputs),   std::move(lefts), std::move(terms),
                                std::move(barriers), std::move(links), sizes};
      }));
  bind_ops<float>(m, "float32");
  bind_ops<double>(m, "float64");
  m.def("cpu_levels", [] {
    const auto end = kLevelNames.begin() + 1 + static_cast<int>(best_level());
    return std::vector<std::string>(kLevelNames.begin(), end);
  });
  m.def("cpu_level", [] { return kLevelNames[static_cast<size_t>(current_level())]; });
  m.def("set_cpu_level", [](const std::string& name) {
    for (int i = 0; i <= static_cast<int>(best_level()); ++i)
      if (kLevelNames[static_cast<size_t>(i)] == name) return set_level(static_cast<Level>(i));
    throw std::invalid_argument("set_cpu_level: name must be one of cpu_levels(), got " + name);
  });
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
