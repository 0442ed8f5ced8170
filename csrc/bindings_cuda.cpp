// fastapd._C_cuda: addresses, ranges and streams in, CUDA's errors out as RuntimeError. No mathematics.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/device.h"

namespace py = pybind11;
using namespace fastapd::cuda;

namespace {

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
  m.doc() = "fastapd's CUDA code; imports without a driver and then reports no device.";
  m.def("device_count", &device_count, "Usable devices; 0 without a driver or a device.");
  m.def("unavailable_reason", &unavailable_reason, "CUDA's text for why no device can be used, or None when one can.");
  m.def("devices", &device_dicts, "A dict of name, capability, memory_bytes and multiprocessors for each device.");
  m.def("driver_version", &driver_version, "The newest CUDA the driver serves, as 13000 for 13.0; 0 without a driver.");
  m.def("runtime_version", &runtime_version, "The CUDA this module was built with, as 13000 for 13.0.");
}
