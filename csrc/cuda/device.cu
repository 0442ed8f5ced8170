#include "cuda/launch.h"

namespace fastapd::cuda {

namespace {

cudaError_t count_devices(int* count) {
  *count = 0;
  const cudaError_t status = cudaGetDeviceCount(count);
  // CUDA remembers a failure until it is asked for; the next launch check of this thread would report ours.
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

__global__ void nothing_kernel() {}

}  // namespace

DeviceGuard::DeviceGuard(int device, const char* op) {
  check(cudaGetDevice(&before_), op);
  if (before_ == device)
    before_ = -1;
  else
    check(cudaSetDevice(device), op);
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

const char* memory() {
#ifdef __CUDACC__
  return "cuda";
#else
  return "cpu";
#endif
}

void start_nothing(Stream stream) {
  launch("start_nothing", nothing_kernel, 1, static_cast<int>(kWarp), 0, stream);
}

void check(int status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(static_cast<cudaError_t>(status)));
}

int device_count() {
  int count = 0;
  const cudaError_t status = count_devices(&count);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver || status == cudaErrorStubLibrary) return 0;
  check(status, "device_count");
  return count;
}

std::optional<std::string> unavailable_reason() {
  int count = 0;
  const cudaError_t status = count_devices(&count);
  if (status == cudaSuccess && count > 0) return std::nullopt;
  return cudaGetErrorString(status == cudaSuccess ? cudaErrorNoDevice : status);
}

std::vector<Device> devices() {
  std::vector<Device> found;
  for (int i = 0, count = device_count(); i < count; ++i) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, i), "devices");
    found.push_back({properties.name, properties.major, properties.minor, properties.totalGlobalMem,
                     properties.multiProcessorCount});
  }
  return found;
}

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "driver_version");
  return version;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "runtime_version");
  return version;
}

}  // namespace fastapd::cuda
