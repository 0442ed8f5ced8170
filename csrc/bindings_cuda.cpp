// fastapd._C_cuda: a device, a stream, addresses and sizes in; the GIL released, the device made current, CUDA's errors
// out as RuntimeError with the op's name. No mathematics.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/ops.h"

namespace py = pybind11;
using namespace fastapd::cuda;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The first two arguments of every op: the device that the addresses are on, and the stream's handle.
template <class... A>
auto on_device(const char* op, void (*run)(Stream, A...)) {
  return [op, run](int device, Address stream, A... arguments) {
    const py::gil_scoped_release release;
    const DeviceGuard guard(device, op);
    run(at<void>(stream), arguments...);
  };
}

template <class T>
void run_unit_norm(Stream stream, Address rows, int64_t n, int64_t d) {
  unit_norm<T>(stream, at<T>(rows), n, d);
}

template <class T>
void run_remove_along(Stream stream, Address grad, Address rows, int64_t n, int64_t d) {
  remove_along<T>(stream, at<T>(grad), at<const T>(rows), n, d);
}

template <class T>
void run_sum_loss(Stream stream, Address residual, Address target, Address loss, Address partials, int64_t n_instances,
                  int64_t n) {
  component_sum_loss<T>(stream, at<T>(residual), at<const T>(target), at<T>(loss), at<Acc<T>>(partials), n_instances,
                        n);
}

// Addresses and sizes one by one: a call is checked for integers alone.
#define FASTAPD_SELECTION_PARAMETERS \
  Address sample, Address offsets, Address component, Address sample_offsets, Address position
#define FASTAPD_SIZES_PARAMETERS                                                                                  \
  int64_t n_instances, int64_t batch, int64_t n_components, int64_t rank, int64_t d_in, int64_t d_out, int64_t n_pairs

fastapd::Selection selection_at(FASTAPD_SELECTION_PARAMETERS) {
  return {at<const int32_t>(sample), at<const int64_t>(offsets), at<const int32_t>(component),
          at<const int64_t>(sample_offsets), at<const int32_t>(position)};
}

template <class T>
void run_forward(Stream stream, Address x, Address At, Address B, FASTAPD_SELECTION_PARAMETERS, Address u, Address y,
                 Address z, int64_t z_columns, FASTAPD_SIZES_PARAMETERS) {
  component_forward_selected<T>(stream, at<const T>(x), at<const T>(At), at<const T>(B),
                                selection_at(sample, offsets, component, sample_offsets, position), at<T>(u), at<T>(y),
                                at<Acc<T>>(z), z_columns,
                                {n_instances, batch, n_components, rank, d_in, d_out, n_pairs});
}

template <class T, bool Add>
void run_backward(Stream stream, Address grad_y, Address x, Address At, Address B, Address u,
                  FASTAPD_SELECTION_PARAMETERS, Address grad_u, Address grad_x, Address grad_At, Address grad_B,
                  Address z, int64_t z_columns, FASTAPD_SIZES_PARAMETERS) {
  component_forward_selected_backward<T>(
      Add ? "component_forward_selected_accumulate" : "component_forward_selected_backward", stream,
      at<const T>(grad_y), at<const T>(x), at<const T>(At), at<const T>(B), at<const T>(u),
      selection_at(sample, offsets, component, sample_offsets, position), at<T>(grad_u), at<T>(grad_x), at<T>(grad_At),
      at<T>(grad_B), Add, at<Acc<T>>(z), z_columns, {n_instances, batch, n_components, rank, d_in, d_out, n_pairs});
}

// `layers` is the address of n_layers times the 8 fields of a ReducedLayer, in order, in the host's memory.
template <class T>
std::vector<ReducedLayer<T>> layers_at(Address layers, int64_t n_layers) {
  std::vector<ReducedLayer<T>> out;
  const int64_t* field = at<const int64_t>(layers);
  for (int64_t l = 0; l < n_layers; ++l, field += 8)
    out.push_back({at<const T>(static_cast<Address>(field[0])), at<const T>(static_cast<Address>(field[1])),
                   at<const T>(static_cast<Address>(field[2])), field[3], field[4], field[5], field[6], field[7]});
  return out;
}

template <class T>
void run_attribution(Stream stream, Address layers, int64_t n_layers, Address out, int64_t n_instances, int64_t batch,
                     int64_t n_components, int64_t n_outputs) {
  attribution_reduce<T>(stream, layers_at<T>(layers, n_layers).data(), n_layers, at<T>(out), n_instances, batch,
                        n_components, n_outputs);
}

template <class T>
void run_attribution_backward(Stream stream, Address layers, int64_t n_layers, Address grad, Address dT,
                              int64_t n_instances, int64_t batch, int64_t n_components, int64_t n_outputs) {
  attribution_reduce_backward<T>(stream, layers_at<T>(layers, n_layers).data(), n_layers, at<const T>(grad),
                                 at<Acc<T>>(dT), n_instances, batch, n_components, n_outputs);
}

template <class T>
void run_topk(Stream stream, Address scores, Address counts, Address thresholds, Address sample, Address offsets,
              Address component, Address sample_offsets, Address position, Address workspace, int64_t n_instances,
              int64_t batch, int64_t n_components, int64_t n_pairs, int64_t few, int64_t samples, int64_t n_parts,
              int64_t part_scores, int64_t room, int64_t listed, int64_t threads) {
  batch_topk<T>(stream, at<const T>(scores), at<const int64_t>(counts), at<T>(thresholds), at<int>(sample),
                at<int64_t>(offsets), at<int>(component), at<int64_t>(sample_offsets), at<int>(position),
                at<void>(workspace), {n_instances, batch, n_components, n_pairs},
                {few, samples, n_parts, part_scores, room, listed, threads});
}

int64_t workspace_of_topk(bool of_double, int64_t n_instances, int64_t batch, int64_t n_components, int64_t n_pairs,
                          int64_t few, int64_t samples, int64_t n_parts, int64_t part_scores, int64_t room,
                          int64_t listed, int64_t threads) {
  const TopkSizes sizes{n_instances, batch, n_components, n_pairs};
  const TopkPlan plan{few, samples, n_parts, part_scores, room, listed, threads};
  return of_double ? topk_workspace<double>(sizes, plan) : topk_workspace<float>(sizes, plan);
}

template <class T>
void run_sample_topk(Stream stream, Address scores, Address sample, Address offsets, Address component,
                     Address sample_offsets, Address position, Address workspace, int64_t n_instances, int64_t batch,
                     int64_t n_components, int64_t n_pairs, int64_t k, int64_t small, int64_t threads) {
  sample_topk<T>(stream, at<const T>(scores), at<int>(sample), at<int64_t>(offsets), at<int>(component),
                 at<int64_t>(sample_offsets), at<int>(position), at<void>(workspace),
                 {n_instances, batch, n_components, n_pairs}, k, small, threads);
}

int64_t workspace_of_sample_topk(int64_t n_instances, int64_t batch, int64_t n_components, int64_t n_pairs,
                                 int64_t small) {
  return sample_topk_workspace({n_instances, batch, n_components, n_pairs}, small);
}

template <class T>
void run_svdvals(Stream stream, Address At, Address B, Address values, Address grams, Address scales,
                 int64_t n_instances, int64_t n_components, int64_t rank, int64_t d_in, int64_t d_out,
                 int most_in_warp) {
  component_svdvals<T>(stream, at<const T>(At), at<const T>(B), at<double>(values), at<double>(grams),
                       at<double>(scales), {n_instances, n_components, rank, d_in, d_out}, most_in_warp);
}

constexpr char kSchatten[] = "schatten", kFactored[] = "schatten_factored", kAccumulate[] = "schatten_accumulate";

template <class T, const char* kOp>
void run_schatten(Stream stream, bool exact, Address At, Address B, Address counts, double p, double eps, int64_t batch,
                  double scale, bool accumulate, Address loss, Address grad_At, Address grad_B, Address grams,
                  Address scales, Address partials, int64_t n_instances, int64_t n_components, int64_t rank,
                  int64_t d_in, int64_t d_out, int most_in_warp) {
  const fastapd::SchattenSizes sizes = {n_instances, n_components, rank, d_in, d_out};
  if (exact)
    schatten<T>(kOp, stream, at<const T>(At), at<const T>(B), at<const int64_t>(counts), p, eps, batch, scale,
                accumulate, at<T>(loss), at<T>(grad_At), at<T>(grad_B), at<double>(grams), at<double>(scales),
                at<double>(partials), sizes, most_in_warp);
  else
    schatten_factored<T>(kOp, stream, at<const T>(At), at<const T>(B), at<const int64_t>(counts), p, eps, batch, scale,
                         accumulate, at<T>(loss), at<T>(grad_At), at<T>(grad_B), at<double>(partials), sizes);
}

template <class T>
void run_masked(Stream stream, Address At, Address B, Address mask, double p, double eps, int64_t batch, Address loss,
                Address grad_At, Address grad_B, Address grad_mask, Address norms, Address to_S, Address partials,
                int64_t n_instances, int64_t n_components, int64_t rank, int64_t d_in, int64_t d_out) {
  schatten_masked<T>("schatten_factored_masked", stream, at<const T>(At), at<const T>(B), at<const T>(mask), p, eps,
                     batch, at<T>(loss), at<T>(grad_At), at<T>(grad_B), at<T>(grad_mask), at<double>(norms),
                     at<double>(to_S), at<double>(partials), {n_instances, n_components, rank, d_in, d_out});
}

template <class T>
void bind_ops(py::module_& m, const std::string& dtype) {
  const auto bind = [&](const char* op, auto run) { m.def((op + ("_" + dtype)).c_str(), on_device(op, run)); };
  bind("unit_norm", &run_unit_norm<T>);
  bind("remove_along", &run_remove_along<T>);
  bind("component_sum_loss", &run_sum_loss<T>);
  for (const char* op : {"batch_topk", "batch_topk_warm", "batch_topk_counts"}) bind(op, &run_topk<T>);
  bind("sample_topk", &run_sample_topk<T>);
  bind("component_svdvals", &run_svdvals<T>);
  bind("schatten", &run_schatten<T, kSchatten>);
  bind("schatten_factored", &run_schatten<T, kFactored>);
  bind("schatten_accumulate", &run_schatten<T, kAccumulate>);
  bind("schatten_factored_masked", &run_masked<T>);
  bind("component_forward_selected", &run_forward<T>);
  bind("component_forward_selected_backward", &run_backward<T, false>);
  bind("component_forward_selected_accumulate", &run_backward<T, true>);
  bind("attribution_reduce", &run_attribution<T>);
  bind("attribution_reduce_backward", &run_attribution_backward<T>);
}

py::list device_dicts() {
  py::list dicts;
  for (const Device& device : devices()) {
    py::dict entry;
    entry["name"] = device.name;
    entry["capability"] = py::make_tuple(device.major, device.minor);
    entry["memory_bytes"] = device.memory_bytes;
    entry["multiprocessors"] = device.multiprocessors;
    dicts.append(entry);
  }
  return dicts;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "fastapd's CUDA kernels; imports without a driver and then reports no device.";
  m.attr("memory") = memory();
  bind_ops<float>(m, "float32");
  bind_ops<double>(m, "float64");
  bind_ops<Half>(m, "float16");
  bind_ops<BFloat16>(m, "bfloat16");
  m.def("component_sum_loss_partials", &component_sum_loss_partials);
  m.def("batch_topk_workspace", &workspace_of_topk);
  m.def("sample_topk_workspace", &workspace_of_sample_topk);
  m.attr("sample_topk_row") = kTopkRow;
  m.def("schatten_masked_parts", [](int64_t n_components, int64_t batch) {
    const MaskedParts parts = schatten_masked_parts(n_components, batch);
    return py::make_tuple(parts.batch, parts.across);
  });
  m.attr("attribution_reduce_layers") = kMostLayers;
  m.def("start_nothing", on_device("start_nothing", &start_nothing), "Raises why no kernel starts on a device.");
  m.def("device_count", &device_count, "Usable devices; 0 without a driver or a device.");
  m.def("unavailable_reason", &unavailable_reason, "CUDA's text for why no device can be used, or None when one can.");
  m.def("devices", &device_dicts, "A dict of name, capability, memory_bytes and multiprocessors for each device.");
  m.def("driver_version", &driver_version, "The newest CUDA the driver serves, as 13000 for 13.0; 0 without a driver.");
  m.def("runtime_version", &runtime_version, "The CUDA this module was built with, as 13000 for 13.0.");
}
