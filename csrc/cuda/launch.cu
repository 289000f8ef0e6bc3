// Devices and launches by CUDA's runtime. The runtime is linked statically and is not the one of torch, so each call
// is told which device it is for.
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

int attribute(cudaDeviceAttr which, int index) {
  int value;
  CHECK(cudaDeviceGetAttribute, &value, which, index);
  return value;
}

// Returns "13.0" for 13000.
std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

// Returns how many blocks the device can have at once, asked once for a device, kernel and size. The limit of shared
// memory is set to the device's own, so that sizes can come in any order.
int most_blocks(const Instance& instance, int index, int64_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Kernel, int64_t>, int> found;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, fresh] = found.try_emplace({index, instance.kernel, shared_bytes}, 0);
  if (!fresh) return entry->second;
  try {
    const Device on = device(index);
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

void probe(int index) {
  int driver, runtime;
  CHECK(cudaDriverGetVersion, &driver);
  CHECK(cudaRuntimeGetVersion, &runtime);
  if (driver == 0) throw std::runtime_error("there is no NVIDIA driver here; install one");
  if (driver / 1000 < runtime / 1000)  // a driver serves all runtimes of its major version, and those before
    throw std::runtime_error("the NVIDIA driver here serves CUDA " + version(driver) +
                             ", and the CUDA engine was built with CUDA " + version(runtime) +
                             "; install a later driver, or install tarflow_fast again with an nvcc of CUDA " +
                             std::to_string(driver / 1000));
  device(index);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, bfloat16_instances()[0].kernel);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    cudaGetLastError();
    throw std::runtime_error("the CUDA engine was built for other GPUs than this one (" +
                             std::string(cudaGetErrorName(error)) +
                             "); install tarflow_fast again on this machine, or see TARFLOW_FAST_CUDA_ARCHITECTURES");
  }
  check("cudaFuncGetAttributes", error);
}

Device device(int index) {
  CHECK(cudaSetDevice, index);
  if (!attribute(cudaDevAttrCooperativeLaunch, index))
    fail("cudaDevAttrCooperativeLaunch", cudaErrorNotSupported,
         "this device cannot start all blocks of a grid at once");
  return {attribute(cudaDevAttrMultiProcessorCount, index), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)};
}

void launch(const Instance& instance, const Params& params, int index, int blocks, int64_t shared_bytes,
            uintptr_t stream) {
  CHECK(cudaSetDevice, index);
  const int most = most_blocks(instance, index, shared_bytes);
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
