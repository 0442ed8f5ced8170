// What the machine's CUDA devices are, and which one is current. No CUDA header here: bindings_cuda.cpp is compiled by
// the C++ compiler.
#pragma once
#include <cstddef>
#include <optional>
#include <string>
#include <vector>

namespace fastapd::cuda {

using Stream = void*;  // a cudaStream_t

struct Device {
  std::string name;
  int major, minor;
  std::size_t memory_bytes;
  int multiprocessors;
};

// Throws std::runtime_error "<what>: <CUDA's own text>" unless status, a cudaError_t, is cudaSuccess.
void check(int status, const char* what);

// Makes a device current for its life; what was current comes back, also after an error. Throws with the op's name.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
};

// "cuda", or "cpu" in the emulation that tests build: whose memory the addresses are in.
const char* memory();
// Starts a kernel that does nothing on the current device and does not wait for it. Throws what CUDA says, such as that
// there is no code for this device.
void start_nothing(Stream stream);

// 0 where there is no driver or no device; any other failure (a broken driver, say) throws.
int device_count();
// CUDA's text for why no device can be used, or nothing when one can. Never throws for a CUDA error.
std::optional<std::string> unavailable_reason();
std::vector<Device> devices();
// As 1000 * major + 10 * minor: the newest CUDA the driver serves (0 without a driver), and the CUDA linked in.
int driver_version();
int runtime_version();

}  // namespace fastapd::cuda
