// Devices and launches by CUDA's runtime. The caller chooses the current device.
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernel.h"

namespace tarflow {
namespace {

[[noreturn]] void fail(const char* call, cudaError_t error, const std::string& text) {
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorName(error) + ": " + text);
}

void check(const char* call, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which the next call is not to report too
  fail(call, error, cudaGetErrorString(error));
}
#define CHECK(call, ...) check(#call, call(__VA_ARGS__))

int current() {
  int number;
  CHECK(cudaGetDevice, &number);
  return number;
}

int attribute(cudaDeviceAttr which) {
  int value;
  CHECK(cudaDeviceGetAttribute, &value, which, current());
  return value;
}

// Returns how many blocks the device can have at once, asked once for a device, kernel and size. The limit of shared
// memory is set to the device's own, so that sizes can come in any order.
int most_blocks(const Instance& instance, int64_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Kernel, int64_t>, int> found;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, fresh] = found.try_emplace({current(), instance.kernel, shared_bytes}, 0);
  if (!fresh) return entry->second;
  try {
    const Device on = device();
    int each;
    CHECK(cudaFuncSetAttribute, instance.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
          static_cast<int>(on.shared_bytes));
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor, &each, instance.kernel, instance.warps * 32,
          static_cast<size_t>(shared_bytes));
    return entry->second = each * on.multiprocessors;
  } catch (...) {
    found.erase(entry);
    throw;
  }
}

}  // namespace

Device device() {
  if (!attribute(cudaDevAttrCooperativeLaunch))
    fail("cudaDevAttrCooperativeLaunch", cudaErrorNotSupported,
         "this device cannot start all blocks of a grid at once");
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

void launch(const Instance& instance, const Params& params, int blocks, int64_t shared_bytes, uintptr_t stream) {
  const int most = most_blocks(instance, shared_bytes);
  if (blocks > most)
    fail("cudaLaunchCooperativeKernel", cudaErrorCooperativeLaunchTooLarge,
         std::to_string(blocks) + " blocks of " + std::to_string(instance.warps * 32) + " threads with " +
             std::to_string(shared_bytes) + " bytes of shared memory; this device can have " + std::to_string(most));
  Params copy = params;
  void* arguments[] = {&copy};
  CHECK(cudaLaunchCooperativeKernel, reinterpret_cast<const void*>(instance.kernel), dim3(blocks),
        dim3(instance.warps * 32), arguments, static_cast<size_t>(shared_bytes),
        reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace tarflow
