// The host side of pair.cuh, which has the same names and meanings and checks every use.
#pragma once

#include "device.h"

namespace tarflow {

// Tests build the kernel without gates, too.
#ifdef TARFLOW_NO_GATES
constexpr bool GATES = false;
#else
constexpr bool GATES = true;
#endif

using Gate = unsigned long long;

DEVICE void make_gate(Shared<Gate> gates, int i, int arrivals) {
  emulation::machine->make_gate(emulation::view(gates), i, arrivals);
}
DEVICE void publish_gates() { emulation::machine->publish_gates(); }
DEVICE void promise(Shared<Gate> gates, int i, int bytes) {
  emulation::machine->promise(emulation::view(gates), i, bytes);
}
DEVICE void arrive_at_both(Shared<Gate> gates, int i) { emulation::machine->arrive_at_both(emulation::view(gates), i); }
DEVICE void pass_gate(Shared<Gate> gates, int i, int odd) {
  emulation::machine->pass_gate(emulation::view(gates), i, odd);
}

template <class T>
DEVICE void copy_bulk(Shared<T> to, int i, Global<const T> from, int64_t j, int count, Shared<Gate> gates, int gate,
                      bool both) {
  emulation::machine->copy_bulk(emulation::view(to), i, emulation::view(from), j, count, emulation::view(gates), gate,
                                both);
}

DEVICE void fence_copies() { emulation::machine->fence_copies(); }
DEVICE void sync_pair() { emulation::machine->sync_pair(); }

}  // namespace tarflow
