// Small kernels for tests/backend/cuda/test_emulation.py. p.mode says which step is left out or done wrong, 0 for none.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "pair.cuh"
#include "kernel.h"
#include "emulation/machine.h"

namespace py = pybind11;
using namespace tarflow;

namespace {

// parameters (16, 8) = h (16, 8) + weights (16, 16) · keys_values (16, 8), by each block's first warp.
template <class T>
void product(CONSTANT_PARAMS p) {
  const int lane = thread() % 32, g = lane / 4, t = lane % 4;
  const Global<const T> a(p.weights), b(p.keys_values);
  const Global<const float> c(p.h);
  const Global<float> out(p.parameters);
  Vector<T, 8> of_a;
  Vector<T, 2> b0, b1;
  for (int i = 0; i < 2; i++) {
    of_a.at[i] = constant(a, g * 16 + 2 * t + i);
    of_a.at[2 + i] = constant(a, (g + 8) * 16 + 2 * t + i);
    of_a.at[4 + i] = constant(a, g * 16 + 2 * t + 8 + i);
    of_a.at[6 + i] = constant(a, (g + 8) * 16 + 2 * t + 8 + i);
    b0.at[i] = constant(b, (2 * t + i) * 8 + g);
    b1.at[i] = constant(b, (2 * t + 8 + i) * 8 + g);
  }
  float sums[4];
  for (int i = 0; i < 4; i++) sums[i] = constant(c, (g + i / 2 * 8) * 8 + 2 * t + i % 2);
  multiply_tiles(sums, of_a, b0, b1);
  for (int i = 0; i < 4; i++) store(out, (g + i / 2 * 8) * 8 + 2 * t + i % 2, sums[i]);
}

// hidden = x in T, z = hidden in float.
template <class T>
void convert(CONSTANT_PARAMS p) {
  const Global<const float> x(p.x);
  const Global<T> hidden(p.hidden);
  const Global<float> z(p.z);
  for (int i = thread(); i < p.x.count; i += 64) {
    store(hidden, i, from_float<T>(constant(x, i)));
    store(z, i, to_float(load(hidden, i)));
  }
}

// z (5, 64): x shuffled by 1, 2, 4, 8, 16.
void shuffle(CONSTANT_PARAMS p) {
  const int lane = thread() % 32;
  if (p.mode == 1 && lane >= 16) return;
  float other[5];
  const float own = constant(Global<const float>(p.x), thread());
  for (int i = 0; i < 5; i++) other[i] = shuffle_xor(own, p.mode == 2 && lane == 5 ? 31 : 1 << i);
  if (p.mode == 3) {
    float sums[4] = {};
    if (lane < 16) multiply_tiles(sums, Vector<bf16, 8>{}, Vector<bf16, 2>{}, Vector<bf16, 2>{});
    if (lane >= 16) shuffle_xor(own, 0);
  }
  for (int i = 0; i < 5; i++) store(Global<float>(p.z), i * 64 + thread(), other[i]);
}

// z = x of the next thread, in each block, by elements of 2 bytes in shared memory.
void neighbours(CONSTANT_PARAMS p) {
  const auto memory = shared<bf16>(16, 64);
  const int t = thread();
  for (int round = 0; round < 3; round++) {
    store(memory, t, from_float<bf16>(constant(Global<const float>(p.x), t)));
    if (p.mode != 1) sync_block();
    const float next = to_float(load(memory, (t + 1) % 64));
    if (p.mode != 2) sync_block();
    if (block() == 0) store(Global<float>(p.z), t, next);
  }
}

// z = x of the lane beside, through shared memory, between two shuffles: these do not order it.
void after_shuffle(CONSTANT_PARAMS p) {
  const auto memory = shared<float>(0, 64);
  store(memory, thread(), constant(Global<const float>(p.x), thread()));
  shuffle_xor(0, 1);
  store(Global<float>(p.z), thread(), load(memory, thread() ^ 1));
}

// All threads read an element, and then one of them, which has read it last, writes it.
void read_by_all(CONSTANT_PARAMS p) {
  const auto memory = shared<float>(0, 1);
  const Global<float> z(p.z);
  if (thread() == 7) store(memory, 0, 1.0f);
  sync_block();
  float sum = load(memory, 0) + load(z, 0);
  shuffle_xor(sum, 1);  // so that the others of its warp have read
  if (thread() == 7) sum += load(memory, 0) + load(z, 0);
  if (p.mode == 0) sync_block();
  if (thread() == 7 && p.mode != 2) store(memory, 0, sum);
  if (thread() == 7 && p.mode != 1) store(z, 0, sum);
}

// Rounds of: each block writes its part of h (2, blocks, 64), and reads another's after a barrier. z: sums of these.
void exchange(CONSTANT_PARAMS p) {
  const Global<float> h(p.h);
  const Global<unsigned> counter(p.barrier);
  const int t = thread(), grid = blocks() * 64;
  float sum = 0;
  for (int round = 0; round < 6; round++) {
    const int half = round % 2 * grid;
    store(h, half + block() * 64 + t, static_cast<float>(block() * 100 + t + round));
    if (p.mode != 1) {
      if (p.mode != 2) sync_block();
      if (t == 5) signal(counter);
      if (t == 5) await(counter, p.mode == 4 ? 100 : blocks() * (round + 1) - (p.mode == 5));
      if (p.mode != 3) sync_block();
    }
    sum += load(h, half + (block() + 1) % blocks() * 64 + (t + round) % 64);
  }
  store(Global<float>(p.z), block() * 64 + t, sum);
}

// z (1,) = 7, which block 0 stores to x between its first signal and its second one, and block 1 loads. One warp a block;
// shuffles let time pass and order nothing.
void handover(CONSTANT_PARAMS p) {
  const Global<float> x(p.x);
  const Global<unsigned> counter(p.barrier);
  const int lane = thread();
  if (block() == 0) {
    if (lane == 5) signal(counter);
    shuffle_xor(0, 1);
    if (lane == 6) store(x, 0, 7.0f);
    shuffle_xor(0, 1);
    if (p.mode != 1) sync_block();
    if (lane == 5) signal(counter);
  } else {
    if (p.mode == 3)
      for (int i = 0; i < 500; i++) shuffle_xor(0, 1);
    if (lane == 5) await(counter, p.mode == 3 ? 1 : 2);
    if (p.mode != 2) sync_block();
    if (lane == 5) store(Global<float>(p.z), 0, load(x, 0));
  }
}

// z (32,) = x (32,) with lanes' neighbours exchanged. One warp, of which every fourth lane copies.
void late_wait(CONSTANT_PARAMS p) {
  const auto memory = shared<float>(0, 32);
  const int lane = thread();
  if (lane % 4 == 0) copy_async(memory, lane, Global<const float>(p.x), lane);
  commit_copies();
  if (p.mode == 1) sync_block();
  wait_copies(0);
  if (p.mode == 0) sync_block();
  shuffle_xor(0, 1);  // all have waited
  store(Global<float>(p.z), lane, load(memory, lane ^ 1));
}

// z (32,) = h (32,), which another lane has written than the one that copies it. One warp.
void copy_of_written(CONSTANT_PARAMS p) {
  const Global<float> h(p.h);
  const auto memory = shared<float>(0, 32);
  const int lane = thread(), other = (lane + 4) % 32;
  store(h, lane, static_cast<float>(lane));
  if (p.mode != 1) sync_block();
  if (lane % 4 == 0) copy_async(memory, other, h, other);
  commit_copies();
  if (p.mode == 2) {
    sync_block();
    store(h, lane, 0.0f);
  }
  wait_copies(0);
  sync_block();
  store(Global<float>(p.z), lane, load(memory, lane));
}

// z (64,) = sums over the tiles of x (tiles, 64): a ring of 3 slots, each of a tile, by copies of 4 elements.
void ring(CONSTANT_PARAMS p) {
  constexpr int SLOTS = 3;
  const Global<const float> x(p.x);
  const auto slots = shared<float>(128, SLOTS * 64);
  const int t = thread(), tiles = p.tokens;
  const auto fetch = [&](int tile) {
    if (tile < tiles && t < 16) copy_async(slots, tile % SLOTS * 64 + t * 4, x, tile * 64 + t * 4);
    if (p.mode != 6) commit_copies();
  };
  for (int tile = 0; tile < SLOTS; tile++) fetch(tile);
  float sum = 0;
  for (int tile = 0; tile < tiles; tile++) {
    if (p.mode != 1) wait_copies(p.mode == 2 ? SLOTS : SLOTS - 1);
    if (p.mode != 3) sync_block();
    const auto four = load_vector<4>(slots, tile % SLOTS * 64 + 60 - t / 4 * 4);
    sum += four.at[3 - t % 4];
    if (p.mode != 4) sync_block();
    fetch(tile + SLOTS);
  }
  if (p.mode == 5) fetch(0);
  if (p.mode != 5) wait_copies(0);
  if (block() == 0) store(Global<float>(p.z), 63 - t, sum);
}

// One access by one thread, at element p.start of x (32 elements from a multiple of 16 bytes) or of as many in shared
// memory.
void access(CONSTANT_PARAMS p) {
  const Global<float> x(p.x);
  const Global<const float> constants(p.x);
  const auto all = shared<float>(0, 48), memory = shared<float>(16, 32);
  if (thread() == 0)
    for (int i = 0; i < 48; i++) store(all, i, 0.0f);
  sync_block();
  if (thread() != 9) return;
  const int i = p.start;
  switch (p.mode) {
    case 0: load(x, i); break;
    case 1: store(x, i, 1.0f); break;
    case 2: constant(constants, i); break;
    case 3: load_vector<2>(x, i); break;
    case 4: load_vector<4>(x, i); break;
    case 5: prefetch(x, i); break;
    case 6: copy_async(memory, 0, constants, i); break;
    case 7: load(memory, i); break;
    case 8: store(memory, i, 1.0f); break;
    case 9: load_vector<2>(memory, i); break;
    case 10: load_vector<4>(memory, i); break;
    case 11: store_vector(memory, i, Vector<float, 4>{}); break;
    case 12: copy_async(memory, i, constants, 0); break;
  }
  commit_copies();
  wait_copies(0);
}

// Reads shared memory of which p.start elements were written.
void unwritten(CONSTANT_PARAMS p) {
  const auto memory = shared<float>(0, 4);
  if (thread() != 0) return;
  for (int i = 0; i < p.start; i++) store(memory, i, 0.0f);
  load_vector<4>(memory, 0);
}

// x, which z is too, is written by one block and read as what nobody writes.
void written_constant(CONSTANT_PARAMS p) {
  const Global<const float> constants(p.x);
  const auto memory = shared<float>(0, 4);
  if (block() == 0 && thread() == 3 && p.mode < 2) store(Global<float>(p.z), 2, 1.0f);
  if (block() == 0 && thread() == 3 && p.mode == 2) {
    constant(constants, 2);
    store(Global<float>(p.z), 2, 1.0f);
  }
  sync_block();
  if (thread() == 3 && p.mode == 0) constant(constants, 2);
  if (thread() == 3 && p.mode == 1) copy_async(memory, 0, constants, 0);
  commit_copies();
  wait_copies(0);
}

// Each block sends four numbers to the next one in each of four turns, through h (2, blocks, 4), of which the half of a
// turn is emptied in the next one: by the block that has sent, or with p.start by the thread that has got them.
void sending(CONSTANT_PARAMS p) {
  const Global<float> h(p.h);
  const Global<unsigned> counter(p.barrier);
  const int from = (block() + 1) % blocks();
  unsigned passed = 0;
  const auto at = [&](int half, int of) { return (half * blocks() + of) * 4; };
  const auto barrier = [&] {
    sync_block();
    if (thread() == 0) signal(counter);
    if (thread() == 5) await(counter, passed += blocks());
    sync_block();
  };
  for (int half = 0; half < 2; half++)
    if (thread() == 0 && p.mode != 6) empty<4>(h, at(half, block()));
  if (p.mode != 1) barrier();
  float sum = 0;
  for (int turn = 0; turn < 4; turn++) {
    const int half = turn % 2;
    if (thread() == 0 && p.mode != 5) {
      const float own = 10.0f * block() + turn;
      send_vector(h, at(half, block()), Vector<float, 4>{own, own, own, own});
      if (p.mode == 2) send(h, at(half, block()), own);
    }
    if (p.mode == 3) {
      for (float each : load_vector<4>(h, at(half, from)).at) sum += each;
    } else if (!p.start || thread() == 0 || (p.mode == 7 && thread() == 1)) {
      auto value = look<4>(h, at(half, from), true);
      for (Patience patience; any_empty(value); patience.again()) value = look<4>(h, at(half, from), true);
      for (float each : value.at) sum += each;
      if (p.start && thread() == 0) empty<4>(h, at(half, from));
    }
    if (p.mode == 4 && thread() == 0) empty<4>(h, at(half, block()));
    barrier();
    if (!p.start && thread() == 0 && p.mode != 8) empty<4>(h, at(half, block()));
  }
  if (thread() == 0) store(Global<float>(p.z), block(), sum);
}

// z (blocks, 64) = sums over the tiles of x (tiles, 64), in each block of a pair: each copies half of a tile for both, into
// a ring of 3 slots, and writes there what it has so far before it frees a slot.
void pair_ring(CONSTANT_PARAMS p) {
  constexpr int SLOTS = 3;
  const Global<const float> x(p.x);
  const auto gates = shared<Gate>(0, 2 * SLOTS);
  const auto slots = shared<float>(128, SLOTS * 64);
  const int t = thread(), rank = block() % 2, tiles = p.tokens;
  if (t == 0) {
    for (int slot = 0; slot < SLOTS; slot++) {
      make_gate(gates, slot, 1);
      make_gate(gates, SLOTS + slot, p.mode == 11 ? 3 : 2);
    }
    if (p.mode != 6) publish_gates();
  }
  if (p.mode != 9) sync_pair();
  const auto fetch = [&](int tile) {
    const int slot = tile % SLOTS, lap = tile / SLOTS;
    if (tile >= tiles || t > 0) return;
    if (p.mode != 1) pass_gate(gates, SLOTS + slot, ~lap & 1);
    promise(gates, slot, p.mode == 7 ? 128 : 256);
    copy_bulk(slots, slot * 64 + rank * 32, x, tile * 64 + rank * 32, 32, gates, slot, p.mode != 12);
  };
  for (int tile = 0; tile < SLOTS; tile++) fetch(tile);
  float sum = 0;
  for (int tile = 0; tile < tiles; tile++) {
    const int slot = tile % SLOTS, lap = tile / SLOTS;
    if (p.mode == 10 && rank == 1 && tile == tiles - 1) break;
    if (p.mode != 2 && (p.mode != 3 || t == 0)) pass_gate(gates, slot, lap & 1);
    if (p.mode != 3) sync_block();
    sum += load(slots, slot * 64 + 63 - t);
    sync_block();
    store(slots, slot * 64 + t, sum);
    if (p.mode != 4) fence_copies();
    if (p.mode != 8) sync_block();
    if (t == 0) arrive_at_both(gates, SLOTS + slot);
    fetch(tile + SLOTS);
  }
  if (p.mode == 5 && t == 0 && rank == 0) copy_bulk(slots, 0, x, 0, 32, gates, 0, false);
  if (p.mode != 10) sync_pair();
  store(Global<float>(p.z), block() * 64 + 63 - t, sum);
}

void skipped_sync(CONSTANT_PARAMS p) {
  if (thread() != p.start) sync_block();
}

void reserved(CONSTANT_PARAMS p) { shared<float>(p.start, p.stop); }

// So many of each, for timings.
void many(CONSTANT_PARAMS p) {
  const auto memory = shared<float>(0, 64);
  float value = 1;
  store(memory, thread(), value);
  for (int i = 0; i < p.start; i++) value += load(memory, thread());
  for (int i = 0; i < p.stop; i++) value += shuffle_xor(value, 1 << i % 5);
  store(Global<float>(p.z), block() * 64 + thread(), value);
}

const std::map<std::string, Kernel> KERNELS{
    {"product_bf16", product<bf16>},
    {"product_fp16", product<fp16>},
    {"convert_bf16", convert<bf16>},
    {"convert_fp16", convert<fp16>},
    {"shuffle", shuffle},
    {"neighbours", neighbours},
    {"read_by_all", read_by_all},
    {"after_shuffle", after_shuffle},
    {"exchange", exchange},
    {"handover", handover},
    {"late_wait", late_wait},
    {"copy_of_written", copy_of_written},
    {"ring", ring},
    {"pair_ring", pair_ring},
    {"access", access},
    {"unwritten", unwritten},
    {"reserved", reserved},
    {"sending", sending},
    {"skipped_sync", skipped_sync},
    {"written_constant", written_constant},
    {"many", many},
};

// buffers: name to (address, count).
void run(const std::string& kernel, const std::map<std::string, int>& sizes, const py::dict& buffers, int blocks,
         int warps, int64_t shared_bytes) {
  Params params{};
#define TARFLOW_FIELD(field) \
  if (sizes.count(#field)) params.field = sizes.at(#field);
  TARFLOW_SIZES(TARFLOW_FIELD)
#undef TARFLOW_FIELD
#define TARFLOW_FIELD(field)                                                     \
  params.field.name = #field;                                                    \
  if (buffers.contains(#field)) {                                                \
    const auto memory = py::cast<py::tuple>(buffers[#field]);                    \
    params.field.data = reinterpret_cast<void*>(py::cast<uintptr_t>(memory[0])); \
    params.field.count = py::cast<int64_t>(memory[1]);                           \
  }
  TARFLOW_BUFFERS(TARFLOW_FIELD)
#undef TARFLOW_FIELD
  const py::gil_scoped_release release;
  launch({"", 0, warps, KERNELS.at(kernel)}, params, 0, blocks, shared_bytes, 0);
}

}  // namespace

PYBIND11_MODULE(emulation_kernels, m) {
  m.def("run", &run);
  m.def("set_device", &emulation::set_device);
  m.def("set_seed", &emulation::set_seed);
}
