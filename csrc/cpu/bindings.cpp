// The module that Python sees. Tensors come as addresses: Python owns and checks them, and keeps them alive for the
// call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <exception>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "density_pass.h"
#include "dispatch.h"
#include "engine.h"
#include "masked_flow.h"
#include "threads.h"

namespace py = pybind11;
using namespace tarflow;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

using Addresses = std::map<std::string, Address>;  // addresses of fp32 tensors, by name

const float* tensor_named(const Addresses& addresses, const std::string& name) {
  const auto found = addresses.find(name);
  if (found == addresses.end()) throw std::invalid_argument("no tensor is called " + name);
  return at<const float>(found->second);
}

LayerSource layer_from(const Addresses& addresses) {
  LayerSource l{};
#define TARFLOW_FIELD(field) l.field = tensor_named(addresses, #field);
  TARFLOW_LAYER_TENSORS(TARFLOW_FIELD)
#undef TARFLOW_FIELD
  return l;
}

Sizes sizes_from(const std::map<std::string, int64_t>& given) {
  Sizes s{};
#define TARFLOW_FIELD(field) s.field = given.at(#field);
  TARFLOW_BLOCK_SIZES(TARFLOW_FIELD)
#undef TARFLOW_FIELD
  return s;
}

using Caches = std::map<std::string, std::pair<int64_t, int64_t>>;  // bytes, and cores that share them, by level

Caches caches_of(const Machine& machine) {
  return {{"L1", {machine.l1.bytes, machine.l1.cores}},
          {"L2", {machine.l2.bytes, machine.l2.cores}},
          {"L3", {machine.l3.bytes, machine.l3.cores}}};
}

// layer(i) returns the tensors of layer i, which need to live until the next call. caches: those of the machine that
// passes are made to suit, by default this one's. meeting: the seconds that its threads take at a barrier.
Engine make(const std::map<std::string, int64_t>& sizes, const Addresses& weights, const py::function& layer, bool bf16,
            const std::string& instruction_set, const std::optional<Caches>& caches, double meeting) {
  Machine machine = this_machine();
  machine.meeting = meeting;
  if (caches)
    for (const auto& [cache, name] : {std::pair{&machine.l1, "L1"}, {&machine.l2, "L2"}, {&machine.l3, "L3"}})
      *cache = {caches->at(name).first, caches->at(name).second};
  Source source{tensor_named(weights, "proj_in_weight"), tensor_named(weights, "proj_in_bias"),
                tensor_named(weights, "position"),       tensor_named(weights, "proj_out_weight"),
                tensor_named(weights, "proj_out_bias"),  nullptr};
  source.layer = [&](int64_t i) {
    const py::gil_scoped_acquire acquire;
    return layer_from(layer(i).cast<Addresses>());
  };
  const Sizes plain = sizes_from(sizes);
  const py::gil_scoped_release release;
  return Engine(plain, source, bf16, kernels_named(instruction_set), machine);
}

// Runs work(hook) without the GIL. The work calls hook(steps) about every 50 ms on this thread, which lets signal
// handlers run and tells progress. An exception that these raise ends the work and is raised here.
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

// Runs a pass. start, stop: the window of each sample.
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

// Returns how a sequential pass over all tokens is divided, and the seconds that are expected of its parts.
py::dict schedule(const Engine& engine, int64_t samples, int64_t tokens, bool guided, int threads) {
  const std::vector<int64_t> start(samples, 1), stop(samples, tokens);
  Batch batch{};
  const float some = 0.0f;
  batch.start = start.data(), batch.stop = stop.data(), batch.samples = samples;
  batch.guidance = guided ? &some : nullptr;  // whether there is one, which is not read
  const Schedule found = engine.schedule(batch, true, threads);
  py::dict out;
  out["teams"] = found.teams, out["team_size"] = found.size, out["group_rows"] = found.group_rows;
  out["tile_rows"] = engine.tile_rows(), out["near_bytes"] = engine.near();
  out["products"] = found.products, out["attention"] = found.attention, out["waiting"] = found.waiting;
  return out;
}

// Runs a density pass, and returns the bytes of memory that it took. blocks: in the order in which the data go through
// them, each with "sizes", "weights" ("embedding" is 0 where there is none), "layers", and "order", 0 for the data's
// own.
int64_t density(const std::vector<py::dict>& blocks, int64_t samples, Address x, Address outputs, Address log_det,
                Address gradient, bool bf16, const std::string& instruction_set, int threads, int64_t most_bytes) {
  std::vector<std::vector<LayerSource>> layers;
  std::vector<DensityBlock> plain;
  for (const py::dict& block : blocks) {
    const auto weights = block["weights"].cast<Addresses>();
    layers.emplace_back();
    for (const Addresses& layer : block["layers"].cast<std::vector<Addresses>>())
      layers.back().push_back(layer_from(layer));
    plain.push_back({sizes_from(block["sizes"].cast<std::map<std::string, int64_t>>()),
                     tensor_named(weights, "proj_in_weight"), tensor_named(weights, "proj_in_bias"),
                     tensor_named(weights, "position"), tensor_named(weights, "proj_out_weight"),
                     tensor_named(weights, "proj_out_bias"), tensor_named(weights, "embedding"), layers.back().data(),
                     at<const int64_t>(block["order"].cast<Address>())});
  }
  const DensityBatch batch{samples, at<const float>(x), at<float>(outputs), at<double>(log_det), at<float>(gradient)};
  int64_t bytes = 0;
  without_gil(py::none(), [&](const Caller::Hook& hook) {
    density_pass(plain, batch, bf16, kernels_named(instruction_set), threads, most_bytes, bytes, hook);
  });
  return bytes;
}

using Numbers = std::vector<int64_t>;

const void* address_in(const py::dict& given, const char* name) { return at<const void>(given[name].cast<Address>()); }

SplineLaw law_from(const std::map<std::string, double>& given) {
  SplineLaw law{};
#define TARFLOW_FIELD(type, name) law.name = static_cast<type>(given.at(#name));
  TARFLOW_SPLINE_FIELDS(TARFLOW_FIELD)
#undef TARFLOW_FIELD
  return law;
}

MaskedLayerSource masked_layer_from(const py::dict& given) {
  return {address_in(given, "weight"),     address_in(given, "bias"),       address_in(given, "scale"),
          address_in(given, "shift"),      given["inputs"].cast<int64_t>(), given["outputs"].cast<int64_t>(),
          given["source"].cast<int64_t>(), given["add"].cast<int64_t>(),    given["begin"].cast<Numbers>(),
          given["reach"].cast<Numbers>(),  given["add_at"].cast<Numbers>(), given["activation"].cast<int64_t>(),
          given["alpha"].cast<double>()};
}

// transforms: sorted, as tarflow_fast/backend/cpu/masked.py gives them, matrices likewise; their tensors are copied.
MaskedFlow make_masked(const std::vector<py::dict>& transforms, const std::vector<py::dict>& matrices, bool f64,
                       const std::string& instruction_set) {
  std::vector<MaskedSource> sources;
  for (const py::dict& each : transforms) {
    sources.push_back(
        {each["dims"].cast<int64_t>(),
         each["passed"].cast<int64_t>(),
         each["parameters"].cast<int64_t>(),
         each["law"].cast<int64_t>(),
         each["floor"].cast<double>(),
         each["shift_first"].cast<bool>(),
         each["spline"].is_none() ? SplineLaw{} : law_from(each["spline"].cast<std::map<std::string, double>>()),
         each["begin"].cast<Numbers>(),
         {}});
    for (const py::dict& layer : each["layers"].cast<std::vector<py::dict>>())
      sources.back().layers.push_back(masked_layer_from(layer));
  }
  std::vector<MaskedMatrixSource> squares;
  for (const py::dict& each : matrices)
    squares.push_back({address_in(each, "weight"), address_in(each, "bias"), each["size"].cast<int64_t>()});
  const py::gil_scoped_release release;
  return MaskedFlow(sources, squares, f64, kernels_named(instruction_set));
}

using Terms = std::vector<std::pair<Address, int64_t>>;  // addresses and rows, 0 for none

std::vector<MaskedContext> contexts_from(const Terms& given) {
  std::vector<MaskedContext> out;
  for (const auto& [address, rows] : given) out.push_back({at<const void>(address), rows});
  return out;
}

// steps: dicts with the fields of MaskedStep.
void run_masked(const MaskedFlow& flow, const std::vector<py::dict>& steps, int64_t samples, Address in, Address out,
                Address log_det, int threads, const py::object& progress) {
  std::vector<MaskedStep> plain;
  for (const py::dict& step : steps)
    plain.push_back({step["transform"].cast<int64_t>(), step["matrix"].cast<int64_t>(), step["forward"].cast<bool>(),
                     step["row"].cast<Numbers>(), contexts_from(step["offset"].cast<Terms>()),
                     contexts_from(step["gate"].cast<Terms>()), address_in(step, "scale"), address_in(step, "shift")});
  const MaskedBatch batch{samples, at<const void>(in), at<void>(out), at<double>(log_det)};
  without_gil(progress, [&](const Caller::Hook& hook) { flow.run(plain, batch, threads, hook); });
}

void run_masked_block(const MaskedFlow& flow, int64_t samples, int64_t first, int64_t stop, Address z, Address x,
                      Address log, Address change, Address residual, Address memory, const Terms& offset,
                      const Terms& gate, int threads, const py::object& progress) {
  const MaskedBlockBatch batch{samples,
                               first,
                               stop,
                               at<const void>(z),
                               at<void>(x),
                               at<void>(log),
                               at<void>(change),
                               at<void>(residual),
                               at<void>(memory),
                               contexts_from(offset),
                               contexts_from(gate)};
  without_gil(progress, [&](const Caller::Hook& hook) { flow.run_block(batch, threads, hook); });
}

// Returns (name, whether it can be used here) of each instruction set, the slowest first.
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

// Runs work(rank, first, stop) over the parts of [0, n) on as many threads as have `least` of them each. Parts are whole
// multiples of `step`.
template <class Work>
void in_parts(int64_t n, int64_t least, int64_t step, int threads, const Work& work) {
  threads = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(n / std::max<int64_t>(least, 1), 1)));
  if (threads > 1) threads = Pool::at_hand(threads);
  if (threads <= 1) return work(0, int64_t{0}, n);
  const int64_t each = ((n + threads - 1) / threads + step - 1) / step * step;
  Pool::instance().run(threads, [&](int rank) { work(rank, std::min(n, rank * each), std::min(n, (rank + 1) * each)); },
                       [] { return true; });
}

constexpr int64_t GRAIN = 32768;  // the values that torch, too, gives each thread at least (at::internal::GRAIN_SIZE)

// Transforms values by splines, or makes the gradients where there is a d_value; wide: whether all tensors are fp64,
// else fp32. See SplineBatch.
void spline(const std::map<std::string, double>& law, Address parameters, Address value, Address image,
            Address log_derivative, Address place, Address d_parameters, Address d_value, int64_t count, bool wide,
            bool inverse, const std::string& instruction_set, int threads) {
  const SplineLaw plain = law_from(law);
  const Kernels& kernels = kernels_named(instruction_set);
  const py::gil_scoped_release release;
  const auto room = static_cast<size_t>((2 * plain.parameters + 2 * plain.bins) * kernels.vector);
  std::vector<double> scratch(room * std::max(threads, 1));
  const SplineBatch batch{
      at<const void>(parameters), at<const void>(value),  at<void>(image),   at<void>(log_derivative),
      at<const void>(place),      at<void>(d_parameters), at<void>(d_value), inverse};
  in_parts(count, GRAIN, kernels.vector, threads, [&](int rank, int64_t first, int64_t stop) {
    (wide ? kernels.spline_f64 : kernels.spline_f32)(plain, batch, scratch.data() + rank * room, first, stop);
  });
}

// Makes the update of an affine coupling, or its gradients where there is a d_in; see CouplingBatch.
void affine_coupling(Address parameters, Address changes, Address in, Address latents, Address out, Address log_det,
                     Address d_parameters, Address d_in, int64_t samples, int64_t values, double bound, bool scaled,
                     bool inverse, bool wide, const std::string& instruction_set, int threads) {
  const Kernels& kernels = kernels_named(instruction_set);
  const py::gil_scoped_release release;
  const CouplingBatch batch{at<const void>(parameters),
                            at<const void>(changes),
                            at<const void>(in),
                            at<const void>(latents),
                            at<void>(out),
                            at<void>(log_det),
                            at<void>(d_parameters),
                            at<void>(d_in),
                            values,
                            bound,
                            scaled,
                            inverse};
  in_parts(samples, GRAIN / std::max<int64_t>(values, 1), 1, threads, [&](int, int64_t first, int64_t stop) {
    (wide ? kernels.couple_f64 : kernels.couple_f32)(batch, first, stop);
  });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The native CPU engine; see tarflow_fast/backend/cpu/engine.py.";
  using py::arg;
  m.def("instruction_sets", &list_instruction_sets);
  m.def("caches", [] { return std::pair(caches_of(this_machine()), this_machine().source); });
  m.def("read_sysfs", [](const std::string& folder) { return caches_of(read_sysfs(folder)); }, arg("folder"));
  m.def("elementary", &elementary, arg("name"), arg("instruction_set"), arg("x"), arg("out"), arg("count"));
  m.def("density", &density, py::kw_only(), arg("blocks"), arg("samples"), arg("x"), arg("outputs"), arg("log_det"),
        arg("gradient"), arg("bf16"), arg("instruction_set"), arg("threads"), arg("most_bytes"));
  m.def("spline", &spline, py::kw_only(), arg("law"), arg("parameters"), arg("value"), arg("image"),
        arg("log_derivative"), arg("at") = 0, arg("d_parameters") = 0, arg("d_value") = 0, arg("count"), arg("wide"),
        arg("inverse"), arg("instruction_set"), arg("threads") = 1);
  m.def("affine_coupling", &affine_coupling, py::kw_only(), arg("parameters"), arg("changes"), arg("given") = 0,
        arg("latents") = 0, arg("out"), arg("log_det"), arg("d_parameters") = 0, arg("d_given") = 0, arg("samples"),
        arg("values"), arg("bound"), arg("scaled"), arg("inverse"), arg("wide"), arg("instruction_set"),
        arg("threads"));
  m.def("prefer_huge_pages", [](Address memory, size_t bytes) { prefer_huge_pages(at<void>(memory), bytes); },
        arg("memory"), arg("bytes"));
  py::class_<Engine>(m, "Engine")
      .def(py::init(&make), py::kw_only(), arg("sizes"), arg("weights"), arg("layer"), arg("bf16"),
           arg("instruction_set"), arg("caches") = py::none(), arg("meeting") = MEETING_SECONDS)
      .def("schedule", &schedule, py::kw_only(), arg("samples"), arg("tokens"), arg("guided"), arg("threads"))
      .def("run", &run, py::kw_only(), arg("z"), arg("x"), arg("token_log_det"), arg("start"), arg("stop"),
           arg("change"), arg("residual"), arg("widest"), arg("keys_values"), arg("embedding"), arg("guidance"),
           arg("guide_a"), arg("guide_b"), arg("unguided_scale"), arg("sequential"), arg("threads"), arg("progress"))
      .def_property_readonly("cache_elements", &Engine::cache_elements)
      .def_property_readonly("channel_stride", &Engine::channel_stride)
      .def_property_readonly("packed_bytes", &Engine::packed_bytes);
  py::class_<MaskedFlow>(m, "MaskedFlow")
      .def(py::init(&make_masked), py::kw_only(), arg("transforms"), arg("matrices"), arg("f64"),
           arg("instruction_set"))
      .def("run", &run_masked, py::kw_only(), arg("steps"), arg("samples"), arg("values"), arg("out"), arg("log_det"),
           arg("threads"), arg("progress"))
      .def("run_block", &run_masked_block, py::kw_only(), arg("samples"), arg("first"), arg("stop"), arg("z"), arg("x"),
           arg("log"), arg("change"), arg("residual"), arg("memory"), arg("offset"), arg("gate"), arg("threads"),
           arg("progress"))
      .def_property_readonly("lanes", &MaskedFlow::lanes)
      .def_property_readonly("memory_bytes", &MaskedFlow::memory_bytes)
      .def_property_readonly("packed_bytes", &MaskedFlow::packed_bytes);
}
