// fastapd._C_cuda: a device, a stream, addresses and sizes in; the GIL released, the device made current, CUDA's errors
// out as RuntimeError with the op's name. No mathematics.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

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
  bind("component_svdvals", &run_svdvals<T>);
  bind("schatten", &run_schatten<T, kSchatten>);
  bind("schatten_factored", &run_schatten<T, kFactored>);
  bind("schatten_accumulate", &run_schatten<T, kAccumulate>);
  bind("schatten_factored_masked", &run_masked<T>);
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
  m.def("schatten_masked_parts", [](int64_t n_components, int64_t batch) {
    const MaskedParts parts = schatten_masked_parts(n_components, batch);
    return py::make_tuple(parts.batch, parts.across);
  });
  m.def("start_nothing", on_device("start_nothing", &start_nothing), "Raises why no kernel starts on a device.");
  m.def("device_count", &device_count, "Usable devices; 0 without a driver or a device.");
  m.def("unavailable_reason", &unavailable_reason, "CUDA's text for why no device can be used, or None when one can.");
  m.def("devices", &device_dicts, "A dict of name, capability, memory_bytes and multiprocessors for each device.");
  m.def("driver_version", &driver_version, "The newest CUDA the driver serves, as 13000 for 13.0; 0 without a driver.");
  m.def("runtime_version", &runtime_version, "The CUDA this module was built with, as 13000 for 13.0.");
}
