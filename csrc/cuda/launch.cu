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

// A launch of all blocks at once, or of none; with pairs as clusters of two.
struct Launch {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};

  Launch(const Instance& instance, int blocks, int64_t shared_bytes, uintptr_t stream, bool clusters) {
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = 2;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(instance.warps * 32);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    config.numAttrs = clusters ? 2 : 1;
  }
  Launch(const Launch&) = delete;
};

// Returns whether the machine code for this device is that of GATES in pair.cuh, which wants pairs to be clusters.
bool has_gates(const Instance& instance) {
  cudaFuncAttributes attributes;
  CHECK(cudaFuncGetAttributes, &attributes, instance.kernel);
  return attributes.ptxVersion >= 90 && attributes.ptxVersion < 120;
}

// What was asked once for a device, kernel, size and kind of launch.
struct Room {
  int blocks;     // how many blocks the device can have at once
  bool clusters;  // whether they are clusters of two
};

// The limit of shared memory is set to the device's own, so that sizes can come in any order.
Room room_for(const Instance& instance, int index, int blocks, int64_t shared_bytes, bool pairs) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Kernel, int64_t, bool>, Room> found;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, fresh] = found.try_emplace({index, instance.kernel, shared_bytes, pairs}, Room{});
  if (!fresh) return entry->second;
  try {
    const Device on = device(index);
    CHECK(cudaFuncSetAttribute, instance.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
          static_cast<int>(on.shared_bytes));
    int count;
    const bool clusters = pairs && has_gates(instance);
    if (clusters) {
      Launch of(instance, blocks, shared_bytes, 0, true);
      of.config.attrs++;  // the clusters alone are asked about
      of.config.numAttrs--;
      CHECK(cudaOccupancyMaxActiveClusters, &count, instance.kernel, &of.config);
      return entry->second = {2 * count, true};
    }
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor, &count, instance.kernel, instance.warps * 32,
          static_cast<size_t>(shared_bytes));
    return entry->second = {count * on.multiprocessors, false};
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
  Params copy = params;
  Room room = room_for(instance, index, blocks, shared_bytes, copy.pairs);
  if (room.clusters && blocks > room.blocks)  // a part of a device: each block copies for itself, to the same bits
    room = room_for(instance, index, blocks, shared_bytes, false);
  copy.pairs = room.clusters;
  if (blocks > room.blocks)
    fail("cudaLaunchKernelExC", cudaErrorCooperativeLaunchTooLarge,
         std::to_string(blocks) + " blocks of " + std::to_string(instance.warps * 32) + " threads with " +
             std::to_string(shared_bytes) + " bytes of shared memory; this device can have " +
             std::to_string(room.blocks));
  void* arguments[] = {&copy};
  const Launch all(instance, blocks, shared_bytes, stream, room.clusters);
  CHECK(cudaLaunchKernelExC, &all.config, reinterpret_cast<const void*>(instance.kernel), arguments);
}

}  // namespace tarflow
