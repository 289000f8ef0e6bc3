// Small kernels for tests/backend/cuda/test_depth.py, whose times follow from the parameters of the model of time.
// p.start is how many of each; p.stop, how many times over; p.mode, in which way.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "emulation/machine.h"
#include "kernel.h"
#include "pair.cuh"

namespace py = pybind11;
using namespace tarflow;

namespace {

constexpr int MOST = 16, SECTOR = 8;  // elements

// Loads of a sector each: every one used before the next (0), all before the first is used (1), and held there (2).
void loads(CONSTANT_PARAMS p) {
  const Global<float> x(p.x);
  float sum = 0;
  for (int round = 0; round < p.stop; round++) {
    if (p.mode == 0) {
      for (int i = 0; i < p.start; i++) sum += load(x, i * SECTOR);
      continue;
    }
    Loaded<float> values[MOST] = {};
    for (int i = 0; i < p.start; i++) values[i] = load(x, i * SECTOR);
    if (p.mode == 2) sync_warp();
    for (int i = 0; i < p.start; i++) sum += values[i];
  }
  if (sum < 0) store(Global<float>(p.z), 0, sum);
}

// Vectors that are stored as they were loaded.
void moves(CONSTANT_PARAMS p) {
  const Global<float> x(p.x);
  const auto memory = shared<float>(0, 4 * 32);
  for (int i = 0; i < p.start; i++) store_vector(memory, 4 * thread(), load_vector<4>(x, i * SECTOR));
}

void constants(CONSTANT_PARAMS p) {
  const Global<const float> x(p.x);
  float sum = 0;
  for (int round = 0; round < p.stop; round++)
    for (int i = 0; i < p.start; i++) sum += constant(x, i * SECTOR);
  if (sum < 0) store(Global<float>(p.z), 0, sum);
}

void in_shared(CONSTANT_PARAMS p) {
  const auto memory = shared<float>(0, MOST);
  if (thread() < MOST) store(memory, thread(), 1.0f);
  sync_block();
  float sum = 0;
  for (int i = 0; i < p.start; i++) sum += load(memory, i);
  if (sum < 0) store(Global<float>(p.z), 0, sum);
}

// p.start vectors of 16 bytes for each thread, all on their way at once.
void stream(CONSTANT_PARAMS p) {
  const Global<float> x(p.x);
  Vector<float, 4> values[MOST];
  for (int i = 0; i < p.start; i++) values[i] = load_vector<4>(x, (i * 256 + thread()) * 4);
  float sum = 0;
  for (int i = 0; i < p.start; i++) sum += values[i].at[0];
  if (sum < 0) store(Global<float>(p.z), 0, sum);
}

// p.start products, of one sum (0) or of a sum each (1).
void products(CONSTANT_PARAMS p) {
  float sums[MOST][4] = {};
  const Vector<bf16, 8> a = {};
  const Vector<bf16, 2> b = {};
  for (int i = 0; i < p.start; i++) multiply_tiles(sums[p.mode == 0 ? 0 : i], a, b, b);
  if (thread() % 32 == 0) store(Global<float>(p.z), block(), sums[0][0]);
}

void barriers(CONSTANT_PARAMS p) {
  const Global<unsigned> counter(p.barrier);
  for (int i = 0; i < p.start; i++) {
    sync_block();
    if (thread() == 0) signal(counter);
    if (p.mode == 1 && block() == 1) instructions(5000);  // a block that is late
    if (thread() == 0) await(counter, blocks() * (i + 1));
    sync_block();
  }
}

// Two blocks that send each other p.start vectors in turn, each when it has got the one before.
void answers(CONSTANT_PARAMS p) {
  const Global<float> x(p.x);
  const Global<unsigned> counter(p.barrier);
  if (thread() == 0 && block() == 0)
    for (int i = 0; i < p.start; i++) empty<4>(x, i * SECTOR);
  sync_block();
  if (thread() == 0) {
    signal(counter);
    await(counter, 2);
  }
  sync_block();
  if (thread() > 0) return;
  for (int i = 0; i < p.start; i++) {
    if (i % 2 == block())
      send_vector(x, i * SECTOR, Vector<float, 4>{1, 1, 1, 1});
    else
      while (any_empty(look<4>(x, i * SECTOR, true))) continue;
  }
}

// Copies of 1024 bytes, p.start of them for each of two blocks: by each for itself (0), or a half by each for both (1).
void bulk(CONSTANT_PARAMS p) {
  constexpr int COUNT = 256;
  const Global<const float> x(p.x);
  const auto gates = shared<Gate>(0, 2);
  const auto memory = shared<float>(16, COUNT / 2);
  if (thread() == 0) {
    make_gate(gates, 0, 1);
    publish_gates();
  }
  sync_pair();
  if (thread() == 0) {
    promise(gates, 0, 4 * COUNT * p.start);
    for (int i = 0; i < 2 * p.start; i++) {
      const int half = i % 2;
      if (p.mode == 0 || half == block()) copy_bulk(memory, 0, x, i * COUNT / 2, COUNT / 2, gates, 0, p.mode == 1);
    }
  }
  pass_gate(gates, 0, 0);
  sync_pair();
}

// Two blocks that arrive in turn at a gate of the other, which has one of its own for it, p.start times.
void arrivals(CONSTANT_PARAMS p) {
  const auto gates = shared<Gate>(0, 2);
  if (thread() == 0) {
    for (int i = 0; i < 2; i++) make_gate(gates, i, 1);
    publish_gates();
  }
  sync_pair();
  for (int i = 0; i < p.start && thread() == 0; i++) {
    if (i % 2 == block())
      arrive_at_both(gates, i % 2);
    else
      pass_gate(gates, i % 2, i / 2 & 1);
  }
  sync_pair();
}

const std::map<std::string, Kernel> KERNELS{{"bulk", bulk},      {"arrivals", arrivals},   {"loads", loads},
                                            {"moves", moves},    {"constants", constants}, {"in_shared", in_shared},
                                            {"stream", stream},  {"products", products},   {"barriers", barriers},
                                            {"answers", answers}};

void run(const std::string& kernel, const std::map<std::string, int>& sizes, const py::dict& buffers, int blocks,
         int warps) {
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
  launch({"", 0, warps, KERNELS.at(kernel)}, params, 0, blocks, 1024, 0);
}

}  // namespace

PYBIND11_MODULE(timed_kernels, m) { m.def("run", &run); }
