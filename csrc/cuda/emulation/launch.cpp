// The emulated runtime: probe(), device() and launch() of kernel.h. Every index is that of the one device.
#include <mutex>
#include <stdexcept>
#include <string>

#include "../kernel.h"
#include "machine.h"

namespace tarflow {
namespace {

std::mutex one_launch;
Device emulated{3, 227 << 10};
uint64_t seed = 0, launches = 0;  // launches counts from when the seed was set

}  // namespace

void emulation::set_seed(uint64_t value) {
  const std::lock_guard<std::mutex> lock(one_launch);
  seed = value;
  launches = 0;
}

void emulation::set_device(int multiprocessors, int64_t shared_bytes) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (multiprocessors < 1 || multiprocessors > 255 || shared_bytes < 0 || shared_bytes > 1 << 20)
    throw std::runtime_error("set_device: 1 … 255 multiprocessors, at most 1 MiB of shared memory");
  emulated = {multiprocessors, shared_bytes};
}

void probe(int) {}

Device device(int) {
  const std::lock_guard<std::mutex> lock(one_launch);
  return emulated;
}

void launch(const Instance& instance, const Params& params, int, int blocks, int64_t shared_bytes, uintptr_t) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (instance.warps < 1 || instance.warps > 32) throw std::runtime_error("launch: a block has 1 … 32 warps");
  if (blocks < 1 || blocks > emulated.multiprocessors || shared_bytes < 0 || shared_bytes > emulated.shared_bytes)
    throw std::runtime_error("launch: " + std::to_string(blocks) + " blocks of " + std::to_string(shared_bytes) +
                             " bytes of shared memory; the device has " + std::to_string(emulated.multiprocessors) +
                             " multiprocessors of " + std::to_string(emulated.shared_bytes));
  emulation::Machine machine(blocks, instance.warps * 32, shared_bytes, seed + (launches++ << 32));
  machine.run([&] { instance.kernel(params); });
}

}  // namespace tarflow
