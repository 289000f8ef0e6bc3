// The kernels that there are, and how one is launched: launch.cu does it by CUDA's runtime, and the emulation has a
// file of its own.
#pragma once

#include <array>
#include <cstdint>

#include "params.h"

namespace tarflow {

using Kernel = void (*)(Params);

// One instance of the kernel, for a type of weights and at most so many rows, with the size of its block.
struct Instance {
  const char* dtype;  // "float32", "bfloat16", "float16"
  int rows;  // 8, 16 or 64
  int warps;
  Kernel kernel;
};

// The instances are for up to 8, 16 and 64 rows.
using Instances = std::array<Instance, 3>;
Instances float32_instances();
Instances float16_instances();
Instances bfloat16_instances();

struct Device {
  int multiprocessors;
  int64_t shared_bytes;  // the shared memory that a block can have
};

// These throw std::runtime_error, which says what is missing, or names the call that failed and why. index: the number
// of the device, which becomes the current one of this thread.
//
// Asks whether kernels of this build can run: driver and runtime, the device, and machine code for it.
void probe(int index);
Device device(int index);
// Launches all blocks at once, or none. stream: a cudaStream_t of this device.
void launch(const Instance& instance, const Params& params, int index, int blocks, int64_t shared_bytes,
            uintptr_t stream);

}  // namespace tarflow
