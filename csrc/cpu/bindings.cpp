// What Python sees. Tensors come as addresses: Python owns and checks them, and keeps them alive for the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "density_pass.h"
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

using LayerAddresses = std::array<Address, 12>;

LayerSource layer_at(const LayerAddresses& addresses) {
  LayerSource l{};
  auto next = addresses.begin();
  for (const float** p : {&l.norm1_weight, &l.norm1_bias, &l.qkv_weight, &l.qkv_bias, &l.proj_weight, &l.proj_bias,
                          &l.norm2_weight, &l.norm2_bias, &l.fc1_weight, &l.fc1_bias, &l.fc2_weight, &l.fc2_bias})
    *p = at<const float>(*next++);
  return l;
}

// ends: proj_in (weight, bias), position, proj_out (weight, bias). layer(i): the twelve tensors of layer i, which need to
// live until the next call. All fp32.
Engine make(int64_t channels, int64_t head_dim, int64_t tokens, int64_t token_dim, int64_t layers, bool affine,
            const std::array<Address, 5>& ends, const py::function& layer, bool bf16,
            const std::string& instruction_set) {
  Source source{at<const float>(ends[0]), at<const float>(ends[1]), at<const float>(ends[2]),
                at<const float>(ends[3]), at<const float>(ends[4]), nullptr};
  source.layer = [&](int64_t i) {
    const py::gil_scoped_acquire acquire;
    return layer_at(layer(i).cast<LayerAddresses>());
  };
  const py::gil_scoped_release release;
  return Engine({channels, head_dim, tokens, token_dim, layers, affine}, source, bf16, kernels_named(instruction_set));
}

// Runs work(hook) without the GIL. hook(steps), which it calls about every 50 ms on this thread, lets the handlers of
// signals run and tells progress; what these raise ends the work and is raised here.
template <class Work>
void without_gil(const py::object& progress, const Work& work) {
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
    work(hook);
  }
  if (raised) std::rethrow_exception(raised);
}

// start, stop: the window of each sample.
void run(const Engine& engine, Address z, Address x, Address token_log_det, const std::vector<int64_t>& start,
         const std::vector<int64_t>& stop, Address change, Address residual, int64_t widest, Address keys_values,
         Address embedding, Address guidance, bool guide_a, bool guide_b, float unguided_scale, bool sequential,
         int threads, const py::object& progress) {
  const Batch batch{at<const float>(z),
                    at<float>(x),
                    at<float>(token_log_det),
                    start.data(),
                    stop.data(),
                    at<float>(change),
                    at<float>(residual),
                    widest,
                    at<void>(keys_values),
                    at<const float>(embedding),
                    at<const float>(guidance),
                    guide_a,
                    guide_b,
                    unguided_scale,
                    static_cast<int64_t>(start.size())};
  without_gil(progress, [&](const Caller::Hook& hook) { engine.run(batch, sequential, threads, hook); });
}

// A block of the density pass: proj_in (weight, bias), position, proj_out (weight, bias), embedding, and its layers.
using DensityAddresses = std::pair<std::array<Address, 6>, std::vector<LayerAddresses>>;

// blocks: those with an odd number read the tokens backwards. Returns the bytes that the pass took.
int64_t density(int64_t channels, int64_t head_dim, int64_t tokens, int64_t token_dim, bool affine,
                const std::vector<DensityAddresses>& blocks, int64_t samples, Address x, Address outputs,
                Address log_det, Address gradient, bool bf16, const std::string& instruction_set, int threads,
                int64_t most_bytes) {
  const Sizes sizes{channels, head_dim, tokens, token_dim, static_cast<int64_t>(blocks.front().second.size()), affine};
  std::vector<std::vector<LayerSource>> layers;
  std::vector<DensityBlock> plain;
  for (const auto& [ends, addresses] : blocks) {
    layers.emplace_back();
    for (const LayerAddresses& layer : addresses) layers.back().push_back(layer_at(layer));
    plain.push_back({at<const float>(ends[0]), at<const float>(ends[1]), at<const float>(ends[2]),
                     at<const float>(ends[3]), at<const float>(ends[4]), at<const float>(ends[5]), layers.back().data(),
                     plain.size() % 2 == 1});
  }
  const DensityBatch batch{samples, at<const float>(x), at<float>(outputs), at<double>(log_det), at<float>(gradient)};
  int64_t bytes = 0;
  without_gil(py::none(), [&](const Caller::Hook& hook) {
    density_pass(sizes, plain, batch, bf16, kernels_named(instruction_set), threads, most_bytes, bytes, hook);
  });
  return bytes;
}

// (name, whether it can be used here), worst first
std::vector<std::pair<std::string, bool>> list_instruction_sets() {
  std::vector<std::pair<std::string, bool>> out;
  for (const InstructionSet& set : instruction_sets()) out.emplace_back(set.kernels->name, set.usable);
  return out;
}

void elementary(const std::string& name, const std::string& instruction_set, Address x, Address out, int64_t n) {
  const Kernels& kernels = kernels_named(instruction_set);
  (name == "gelu"         ? kernels.gelu
   : name == "gelu_slope" ? kernels.gelu_slope
                          : kernels.exp)(at<const float>(x), at<float>(out), n);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The native CPU engine; see tarflow_fast/engine/cpu_engine.py.";
  m.def("instruction_sets", &list_instruction_sets);
  m.def("elementary", &elementary);
  m.def("density", &density, py::arg("channels"), py::arg("head_dim"), py::arg("tokens"), py::arg("token_dim"),
        py::arg("affine"), py::arg("blocks"), py::arg("samples"), py::arg("x"), py::arg("outputs"), py::arg("log_det"),
        py::arg("gradient"), py::arg("bf16"), py::arg("instruction_set"), py::arg("threads"), py::arg("most_bytes"));
  m.def("prefer_huge_pages", [](Address memory, size_t bytes) { prefer_huge_pages(at<void>(memory), bytes); });
  py::class_<Engine>(m, "Engine")
      .def(py::init(&make))
      .def("run", &run)
      .def_property_readonly("cache_elements", &Engine::cache_elements)
      .def_property_readonly("channel_stride", &Engine::channel_stride)
      .def_property_readonly("packed_bytes", &Engine::packed_bytes);
}
