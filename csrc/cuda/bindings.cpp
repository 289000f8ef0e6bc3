// The module that Python sees. Memory comes as addresses with their number of elements. Python owns and checks it, and
// keeps it alive for as long as the kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernel.h"

#ifdef TARFLOW_EMULATION
#include "emulation/machine.h"
#endif

namespace py = pybind11;
using namespace tarflow;

namespace {

std::vector<Instance> instances() {
  std::vector<Instance> all;
  for (const Instances& some : {float32_instances(), float16_instances(), bfloat16_instances()})
    all.insert(all.end(), some.begin(), some.end());
  return all;
}

const Instance& instance_for(const std::string& dtype, int rows) {
  static const std::vector<Instance> all = instances();
  for (const Instance& each : all)
    if (each.dtype == dtype && rows <= each.rows) return each;
  throw std::invalid_argument("no kernel for " + dtype + " and " + std::to_string(rows) + " rows");
}

int* size_named(Params& params, const std::string& name) {
#define TARFLOW_FIELD(field) \
  if (name == #field) return &params.field;
  TARFLOW_SIZES(TARFLOW_FIELD)
#undef TARFLOW_FIELD
  throw std::invalid_argument("no size is called " + name);
}

Buffer* buffer_named(Params& params, const std::string& name) {
#define TARFLOW_FIELD(field) \
  if (name == #field) return &params.field;
  TARFLOW_BUFFERS(TARFLOW_FIELD)
#undef TARFLOW_FIELD
  throw std::invalid_argument("no buffer is called " + name);
}

Params empty() {
  Params params{};
#define TARFLOW_FIELD(field) params.field.name = #field;
  TARFLOW_BUFFERS(TARFLOW_FIELD)
#undef TARFLOW_FIELD
  return params;
}

// Sets (sample, token, column) of each position.
void set_positions(Params& params, const std::vector<std::tuple<int, int, int>>& positions) {
  if (positions.empty() || positions.size() > MOST_ROWS) throw std::invalid_argument("1 to 64 positions");
  params.positions = static_cast<int>(positions.size());
  for (size_t i = 0; i < positions.size(); i++)
    std::tie(params.sample[i], params.token[i], params.column[i]) = positions[i];
}

void run(const Params& params, const std::string& dtype, int index, int blocks, int64_t shared_bytes,
         uintptr_t stream) {
  const Instance& instance = instance_for(dtype, params.positions * params.branches);
  const py::gil_scoped_release release;
  launch(instance, params, index, blocks, shared_bytes, stream);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA engine's kernel; see tarflow_fast/backend/cuda/engine.py.";
#ifdef TARFLOW_EMULATION
  m.attr("device_type") = "cpu";
  m.def("set_device", &emulation::set_device);
  m.def("set_seed", &emulation::set_seed);
#else
  m.attr("device_type") = "cuda";
#endif
  m.def("probe", &probe, py::arg("index"), py::call_guard<py::gil_scoped_release>());
  m.def("device", [](int index) {
    const Device on = device(index);
    return std::pair(on.multiprocessors, on.shared_bytes);
  }, py::arg("index"));
  m.def("instances", [] {
    std::vector<std::tuple<std::string, int, int>> all;
    for (const Instance& each : instances()) all.emplace_back(each.dtype, each.rows, each.warps);
    return all;
  });
  py::class_<Params>(m, "Launch", py::module_local())
      .def(py::init(&empty))
      .def("set_size", [](Params& params, const std::string& name, int value) { *size_named(params, name) = value; })
      .def("set_buffer",
           [](Params& params, const std::string& name, uintptr_t address, int64_t count) {
    Buffer* buffer = buffer_named(params, name);
    buffer->data = reinterpret_cast<void*>(address);
    buffer->count = count;
  })
      .def("set_positions", &set_positions)
      .def("set_tol",
           [](Params& params, float tol, float stream, float rounding) {
    params.tol = tol;
    params.stream = stream;
    params.rounding = rounding;
  })
      .def("run", &run, py::arg("dtype"), py::arg("index"), py::arg("blocks"), py::arg("shared_bytes"),
           py::arg("stream"));
}
