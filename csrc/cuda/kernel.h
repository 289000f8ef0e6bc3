// The kernels that there are, and how one is launched. The one file for nvcc's runtime is launch.cu; the emulation has its
// own.
#pragma once

#include <array>
#include <cstdint>

#include "params.h"

namespace tarflow {

using Kernel = void (*)(Params);

// One instance of the kernel: for which type of weights, at most how many rows, and its block's size.
struct Instance {
  const char* dtype;  // "float32", "bfloat16", "float16"
  int rows;  // 8, 16, 32 or 64
  int warps;
  Kernel kernel;
};

// With tiles for 8, 16, 32 and 64 rows.
using Instances = std::array<Instance, 4>;
Instances float32_instances();
Instances float16_instances();
Instances bfloat16_instances();

struct Device {
  int multiprocessors;
  int64_t shared_bytes;  // that a block can have
};

// Throw std::runtime_error with the name of the call that failed and why.
Device device();
// All blocks at once, or not at all. stream: a cudaStream_t.
void launch(const Instance& instance, const Params& params, int blocks, int64_t shared_bytes, uintptr_t stream);

}  // namespace tarflow
