// Gates, and pairs of blocks whose memory one copy serves: what devices of compute capability 9 and 10 have besides.
//
// A gate is in shared memory. It is open when so many arrivals are there and all bytes that were promised to it; then it
// is closed again, for the next time. Blocks 2 i and 2 i + 1 are a pair where a launch has pairs: they are on the device
// at the same time, next to each other.
#pragma once

#include "device.cuh"

#ifdef TARFLOW_EMULATION
#include "emulation/pair.h"
#else

namespace tarflow {

// On 12.x copies to several blocks are not said to be quick.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
constexpr bool GATES = true;
#else
constexpr bool GATES = false;
#endif

using Gate = unsigned long long;

DEVICE unsigned address_of(Shared<Gate> gates, int i) {
  return static_cast<unsigned>(__cvta_generic_to_shared(gates.data + i));
}

// Makes a gate that so many arrivals open. After all are made by one thread, it calls publish_gates.
DEVICE void make_gate(Shared<Gate> gates, int i, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(gates, i)), "r"(arrivals) : "memory");
}

// After the next sync_pair of its thread all may use the gates, and after the next sync_block this block.
DEVICE void publish_gates() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives at a gate of this block, and promises it so many bytes of copies.
DEVICE void promise(Shared<Gate> gates, int i, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(gates, i)), "r"(bytes)
               : "memory");
}

// Arrives at the same gate of both blocks, after all that this block did to shared memory before its last sync_block. PTX
// promises that for a wider scope, whose fence of global memory would cost more than the weights; CUTLASS, too, leans on
// the order of shared memory alone.
DEVICE void arrive_at_both(Shared<Gate> gates, int i) {
#pragma unroll
  for (int rank = 0; rank < 2; rank++)
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(address_of(gates, i)),
        "r"(rank)
        : "memory");
}

// Waits while the number of times that a gate of this block was open is even, with `odd` = 0, or odd. Then the bytes are
// there, for others after the next sync_block; and copies that this thread asks for come after what came before the arrivals.
DEVICE void pass_gate(Shared<Gate> gates, int i, int odd) {
  constexpr unsigned MOST = 1 << 27;  // looks, of some 20 ns: a Patience, with its clock, would take registers
#pragma unroll 1
  for (unsigned looks = 0; looks < MOST; looks++) {
    unsigned open;
    asm volatile(
        "{\n"
        ".reg .pred open;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 open, [%1], %2;\n"
        "selp.u32 %0, 1, 0, open;\n"
        "}"
        : "=r"(open)
        : "r"(address_of(gates, i)), "r"(odd)
        : "memory");
    if (open) return;
  }
  asm volatile("trap;");
}

// Copies `count` elements, a multiple of 16 bytes, by one thread, and gives their bytes to a gate: those of this block, or
// of both blocks of a pair, each to the same place. Nobody may use what is written to before the gate has been passed. All
// uses of it before come before, other blocks' too, and what they wrote is fenced.
template <class T>
DEVICE void copy_bulk(Shared<T> to, int i, Global<const T> from, int64_t j, int count, Shared<Gate> gates, int gate,
                      bool both) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to.data + i));
  const unsigned bytes = count * static_cast<unsigned>(sizeof(T));
  if (both)
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(address),
        "l"(from.data + j), "r"(bytes), "r"(address_of(gates, gate)), "h"(static_cast<unsigned short>(3))
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address),
        "l"(from.data + j), "r"(bytes), "r"(address_of(gates, gate))
        : "memory");
}

// What this thread wrote to shared memory comes before copies that others ask for after the next sync_block.
DEVICE void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// As sync_block, of both blocks of a pair.
DEVICE void sync_pair() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

}  // namespace tarflow

#endif  // TARFLOW_EMULATION
