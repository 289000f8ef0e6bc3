// kernel.h on the emulated device.
#include "../kernel.h"
#include "machine.h"

namespace tarflow {

Device device() { return {emulation::device_multiprocessors(), emulation::device_shared_bytes()}; }

void launch(const Instance& instance, const Params& params, int blocks, int64_t shared_bytes, uintptr_t) {
  emulation::run_grid(params, blocks, instance.warps * 32, shared_bytes, [&] { instance.kernel(params); });
}

}  // namespace tarflow
