// What Python sees. Tensors come as addresses: Python owns and checks them, and keeps them alive for the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <exception>
#include <string>
#include <vector>

#include "dispatch.h"
#include "engine.h"

namespace py = pybind11;
using namespace tarflow;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// ends: proj_in (weight, bias), position, proj_out (weight, bias). layer(i): the twelve tensors of layer i, which need to
// live until the next call. All fp32.
Engine make(int64_t channels, int64_t head_dim, int64_t tokens, int64_t token_dim, int64_t layers, bool affine,
            const std::array<Address, 5>& ends, const py::function& layer, bool bf16,
            const std::string& instruction_set) {
  Source source{at<const float>(ends[0]), at<const float>(ends[1]), at<const float>(ends[2]), at<const float>(ends[3]),
                at<const float>(ends[4]), nullptr};
  source.layer = [&](int64_t i) {
    const py::gil_scoped_acquire acquire;
    const auto addresses = layer(i).cast<std::array<Address, 12>>();
    LayerSource l{};
    auto next = addresses.begin();
    for (const float** p : {&l.norm1_weight, &l.norm1_bias, &l.qkv_weight, &l.qkv_bias, &l.proj_weight, &l.proj_bias,
                            &l.norm2_weight, &l.norm2_bias, &l.fc1_weight, &l.fc1_bias, &l.fc2_weight, &l.fc2_bias})
      *p = at<const float>(*next++);
    return l;
  };
  const py::gil_scoped_release release;
  return Engine({channels, head_dim, tokens, token_dim, layers, affine}, source, bf16, kernels_named(instruction_set));
}

// start, stop: the window of each sample. Runs without the GIL. A signal's handler, and progress, run on this thread
// about every 50 ms; what they raise ends the pass and is raised here.
void run(const Engine& engine, Address z, Address x, Address token_log_det, const std::vector<int64_t>& start,
         const std::vector<int64_t>& stop, Address change, Address residual, int64_t widest, Address keys_values,
         Address embedding, Address guidance, bool guide_a, bool guide_b, float unguided_scale, bool sequential,
         int threads, const py::object& progress) {
  const Batch batch{at<const float>(z), at<float>(x), at<float>(token_log_det), start.data(), stop.data(),
                    at<float>(change), at<float>(residual), widest, at<void>(keys_values), at<const float>(embedding),
                    at<const float>(guidance), guide_a, guide_b, unguided_scale, static_cast<int64_t>(start.size())};
  std::exception_ptr raised;
  const auto hook = [&](int64_t steps) {
    const py::gil_scoped_acquire acquire;
    try {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (steps > 0 && !progress.is_none()) progress(steps);
    } catch (...) {
      raised = std::current_exception();
      return false;
    }
    return true;
  };
  {
    const py::gil_scoped_release release;
    engine.run(batch, sequential, threads, hook);
  }
  if (raised) std::rethrow_exception(raised);
}

// (name, whether it can be used here), worst first
std::vector<std::pair<std::string, bool>> list_instruction_sets() {
  std::vector<std::pair<std::string, bool>> out;
  for (const InstructionSet& set : instruction_sets()) out.emplace_back(set.kernels->name, set.usable);
  return out;
}

void elementary(const std::string& name, const std::string& instruction_set, Address x, Address out, int64_t n) {
  const Kernels& kernels = kernels_named(instruction_set);
  (name == "gelu" ? kernels.gelu : kernels.exp)(at<const float>(x), at<float>(out), n);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The native CPU engine; see tarflow_fast/engine/cpu_engine.py.";
  m.def("instruction_sets", &list_instruction_sets);
  m.def("elementary", &elementary);
  m.def("prefer_huge_pages", [](Address memory, size_t bytes) { prefer_huge_pages(at<void>(memory), bytes); });
  py::class_<Engine>(m, "Engine")
      .def(py::init(&make))
      .def("run", &run)
      .def_property_readonly("cache_elements", &Engine::cache_elements)
      .def_property_readonly("channel_stride", &Engine::channel_stride)
      .def_property_readonly("packed_bytes", &Engine::packed_bytes);
}
