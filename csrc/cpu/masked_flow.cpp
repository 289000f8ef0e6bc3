#include "masked_flow.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "threads.h"

namespace tarflow {

namespace {

// What a thread works in: one piece of memory for a panel of any of the transforms.
struct Room {
  Memory memory;
  char *values, *more, *logs, *changes, *residuals, *units, *parameters;
  double *log_det, *scratch;

  Room(int64_t lanes, int64_t dims, int64_t units_count, int64_t parameter_rows, int64_t scratch_count,
       size_t element) {
    Arena counting;
    lay_out(counting, lanes, dims, units_count, parameter_rows, scratch_count, element);
    memory = allocate(counting.used());
    Arena arena(memory.get());
    lay_out(arena, lanes, dims, units_count, parameter_rows, scratch_count, element);
  }

 private:
  void lay_out(Arena& arena, int64_t lanes, int64_t dims, int64_t units_count, int64_t parameter_rows,
               int64_t scratch_count, size_t element) {
    for (char** each : {&values, &more, &logs, &changes, &residuals}) *each = arena.take<char>(dims * lanes, element);
    units = arena.take<char>(units_count * lanes, element);
    parameters = arena.take<char>(parameter_rows * lanes, element);
    log_det = arena.take<double>(lanes);
    scratch = arena.take<double>(scratch_count);
  }
};

// Rows of a batch into a panel, [column][lanes]; lanes beyond the last sample repeat it.
template <class T>
void load_panel(const T* batch, int64_t stride, int64_t columns, int64_t first, int64_t samples, int64_t lanes,
                T* panel) {
  for (int64_t n = 0; n < lanes; n++) {
    const T* row = batch + std::min(first + n, samples - 1) * stride;
    for (int64_t d = 0; d < columns; d++) panel[d * lanes + n] = row[d];
  }
}

template <class T>
void store_panel(const T* panel, int64_t columns, int64_t first, int64_t samples, int64_t lanes, T* batch,
                 int64_t stride) {
  for (int64_t n = 0; n < std::min(lanes, samples - first); n++) {
    T* row = batch + (first + n) * stride;
    for (int64_t d = 0; d < columns; d++) row[d] = panel[d * lanes + n];
  }
}

// Weights of a group, (rows, stride) in the source, as products take them; returns the end of them.
template <class T>
T* pack_group(const T* dense, int64_t stride, MaskedGroup& group, T* to) {
  group.weight = to;
  for (int64_t k = 0; k < group.inputs; k++)
    for (int64_t i = 0; i < group.count; i++) *to++ = dense[(group.row + i) * stride + k];
  return to;
}

}  // namespace

MaskedFlow::MaskedFlow(const std::vector<MaskedSource>& transforms, const std::vector<MaskedMatrixSource>& matrices,
                       bool f64, const Kernels& kernels)
    : kernels_(*kernels.masked), f64_(f64), lanes_(f64 ? kernels_.lanes_f64 : kernels_.lanes_f32) {
  const auto pack_all = [&](const auto& given, auto& packed) {
    packed.resize(given.size());
    for (size_t i = 0; i < given.size(); i++) {
      if (f64)
        pack<double>(given[i], packed[i]);
      else
        pack<float>(given[i], packed[i]);
    }
  };
  pack_all(matrices, matrices_);
  pack_all(transforms, transforms_);
}

void MaskedFlow::add_groups(int64_t row, int64_t stop, int64_t inputs, std::vector<MaskedGroup>& groups) const {
  while (row < stop) {
    int64_t rows = kernels_.rows;
    while (rows > stop - row) rows /= 2;
    groups.push_back({row, rows, inputs, nullptr});
    row += rows;
  }
}

template <class T>
void MaskedFlow::pack(const MaskedMatrixSource& source, PackedMatrix& packed) const {
  const int64_t D = source.size;
  add_groups(0, D, D, packed.groups);
  packed.weight_bytes = (D * D + D) * sizeof(T);
  packed.weights = allocate(packed.weight_bytes);
  T* to = static_cast<T*>(packed.weights.get());
  for (MaskedGroup& group : packed.groups) to = pack_group(static_cast<const T*>(source.weight), D, group, to);
  std::copy_n(static_cast<const T*>(source.bias), D, to);
  packed.plain = {packed.groups.data(), static_cast<int64_t>(packed.groups.size()), to};
}

template <class T>
void MaskedFlow::pack(const MaskedSource& source, Packed& packed) const {
  const int64_t L = static_cast<int64_t>(source.layers.size()), S = static_cast<int64_t>(source.begin.size()) - 1;
  packed.begin = source.begin;
  packed.raw_at.assign(L + 1, -1);
  packed.layers.resize(L);
  packed.groups.resize(L);
  packed.group_begin.resize(L);
  packed.add_at.resize(L);
  std::vector<int64_t> widths{source.dims};
  for (const MaskedLayerSource& layer : source.layers) widths.push_back(layer.outputs);
  int64_t units = 0;
  for (const MaskedLayerSource& layer : source.layers)
    if (layer.add >= 0 && packed.raw_at[layer.add] < 0) {
      packed.raw_at[layer.add] = units;
      units += widths[layer.add];
    }
  // Groups, each of the units of one step; their weights follow one another in the order in which they are used.
  std::vector<std::vector<int64_t>> weight_at(L);
  int64_t count = 0;
  for (int64_t l = 0; l < L; l++) {
    const MaskedLayerSource& from = source.layers[l];
    packed.group_begin[l].push_back(0);
    for (int64_t s = 0; s < S; s++) {
      add_groups(from.begin[s], from.begin[s + 1], from.reach[s], packed.groups[l]);
      packed.group_begin[l].push_back(static_cast<int64_t>(packed.groups[l].size()));
    }
    for (const MaskedGroup& group : packed.groups[l]) {
      weight_at[l].push_back(count);
      count += group.count * group.inputs;
    }
  }
  int64_t vectors = 0;
  for (const MaskedLayerSource& layer : source.layers) vectors += layer.outputs + 2 * layer.inputs;
  packed.weight_bytes = (count + vectors) * sizeof(T);
  packed.weights = allocate(packed.weight_bytes);
  T* weights = static_cast<T*>(packed.weights.get());
  T* rest = weights + count;
  const auto keep = [&](const void* from, int64_t n) -> const void* {
    if (!from) return nullptr;
    std::copy_n(static_cast<const T*>(from), n, rest);
    rest += n;
    return rest - n;
  };
  for (int64_t l = 0; l < L; l++) {
    const MaskedLayerSource& from = source.layers[l];
    const T* dense = static_cast<const T*>(from.weight);
    for (size_t g = 0; g < packed.groups[l].size(); g++)
      pack_group(dense, from.inputs, packed.groups[l][g], weights + weight_at[l][g]);
    packed.add_at[l] = from.add_at;
    packed.layers[l] = {from.source,
                        from.add,
                        from.inputs,
                        from.outputs,
                        packed.groups[l].data(),
                        packed.group_begin[l].data(),
                        keep(from.bias, from.outputs),
                        keep(from.scale, from.inputs),
                        keep(from.shift, from.inputs),
                        packed.add_at[l].data(),
                        from.activation,
                        from.alpha,
                        units};
    units += from.inputs;
  }
  packed.memory_units = units;
  packed.parameter_rows = 0;
  for (int64_t s = 0; s < S; s++) {
    const std::vector<int64_t>& begin = source.layers.back().begin;
    packed.parameter_rows = std::max(packed.parameter_rows, begin[s + 1] - begin[s]);
  }
  packed.plain = {source.dims,
                  source.passed,
                  S,
                  L,
                  source.parameters,
                  packed.begin.data(),
                  packed.layers.data(),
                  packed.raw_at.data(),
                  source.law,
                  source.floor,
                  source.shift_first,
                  source.spline};
}

int64_t MaskedFlow::memory_bytes() const {
  return transforms_.front().memory_units * lanes_ * static_cast<int64_t>(f64_ ? sizeof(double) : sizeof(float));
}

int64_t MaskedFlow::packed_bytes() const {
  size_t bytes = 0;
  for (const Packed& packed : transforms_) bytes += packed.weight_bytes;
  for (const PackedMatrix& packed : matrices_) bytes += packed.weight_bytes;
  return static_cast<int64_t>(bytes);
}

template <class Work>
bool MaskedFlow::over_panels(int64_t samples, int threads, const Caller::Hook& hook, const Work& work) const {
  const int64_t panels = (samples + lanes_ - 1) / lanes_;
  threads = static_cast<int>(std::min<int64_t>(Pool::at_hand(threads), std::max<int64_t>(panels, 1)));
  int64_t dims = 0, units = 0, rows = 0, bins = 0;
  for (const Packed& packed : transforms_) {
    dims = std::max(dims, packed.plain.dims);
    units = std::max(units, packed.memory_units);
    rows = std::max(rows, packed.parameter_rows);
    bins = std::max(bins, packed.plain.spline.bins);
  }
  const size_t element = f64_ ? sizeof(double) : sizeof(float);
  std::vector<Room> rooms;
  for (int i = 0; i < threads; i++)
    rooms.emplace_back(lanes_, dims, units, rows, bins * kernels_.scratch_lanes, element);
  std::atomic<int64_t> next{0};
  Caller caller(hook);
  const auto job = [&](int thread) {
    for (;;) {
      if (thread == 0) caller.attend();
      const int64_t panel = next.fetch_add(1);
      if (panel >= panels || caller.stopped()) return;
      work(rooms[thread], panel);
    }
  };
  Pool::instance().run(threads, job, [&] {
    caller.attend();
    return !caller.stopped();
  });
  return caller.finish();
}

template <class T>
bool MaskedFlow::run_as(const std::vector<MaskedStep>& steps, const MaskedBatch& batch, int threads,
                        const Caller::Hook& hook) const {
  const MaskedRun kernel = f64_ ? kernels_.run_f64 : kernels_.run_f32;
  const MaskedMatrixRun product = f64_ ? kernels_.matrix_f64 : kernels_.matrix_f32;
  const int64_t D = transforms_.front().plain.dims;
  return over_panels(batch.samples, threads, hook, [&](Room& room, int64_t panel) {
    const int64_t first = panel * lanes_;
    T* values = reinterpret_cast<T*>(room.values);
    T* other = reinterpret_cast<T*>(room.more);
    load_panel(static_cast<const T*>(batch.in), D, D, first, batch.samples, lanes_, values);
    std::fill_n(room.log_det, lanes_, 0.0);
    for (const MaskedStep& step : steps) {
      if (step.transform < 0 && step.matrix >= 0) {
        product(matrices_[step.matrix].plain, values, other);
        std::swap(values, other);
        continue;
      }
      if (step.transform < 0) {
        for (int64_t d = 0; d < D; d++)
          for (int64_t n = 0; n < lanes_; n++) {
            T& value = values[d * lanes_ + n];
            value = value * static_cast<const T*>(step.scale)[d] + static_cast<const T*>(step.shift)[d];
          }
        continue;
      }
      const MaskedPanel given{first,           step.row.data(), values,       values,
                              nullptr,         room.log_det,    nullptr,      nullptr,
                              room.units,      room.parameters, room.scratch, step.offset.data(),
                              step.gate.data()};
      kernel(transforms_[step.transform].plain, given, step.forward ? FORWARD : SOLVE, 0, D);
    }
    store_panel(values, D, first, batch.samples, lanes_, static_cast<T*>(batch.out), D);
    std::copy_n(room.log_det, std::min(lanes_, batch.samples - first), batch.log_det + first);
  });
}

template <class T>
bool MaskedFlow::run_block_as(const MaskedBlockBatch& batch, int threads, const Caller::Hook& hook) const {
  const MaskedRun kernel = f64_ ? kernels_.run_f64 : kernels_.run_f32;
  const MaskedTransform& transform = transforms_.front().plain;
  const int64_t D = transform.dims, from = batch.first, count = batch.stop - batch.first;
  const bool together = batch.change != nullptr;
  std::vector<int64_t> row(D);
  for (int64_t d = 0; d < D; d++) row[d] = d;
  return over_panels(batch.samples, threads, hook, [&](Room& room, int64_t panel) {
    const int64_t first = panel * lanes_, samples = batch.samples;
    T *z = reinterpret_cast<T*>(room.more), *x = reinterpret_cast<T*>(room.values);
    T *logs = reinterpret_cast<T*>(room.logs), *changes = reinterpret_cast<T*>(room.changes);
    T* residuals = reinterpret_cast<T*>(room.residuals);
    load_panel(static_cast<const T*>(batch.z) + 1, D + 1, D, first, samples, lanes_, z);
    load_panel(static_cast<const T*>(batch.x) + 1, D + 1, D, first, samples, lanes_, x);
    const MaskedPanel given{first,
                            row.data(),
                            z,
                            x,
                            logs,
                            room.log_det,
                            changes,
                            residuals,
                            static_cast<char*>(batch.memory) + panel * memory_bytes(),
                            room.parameters,
                            room.scratch,
                            batch.offset.data(),
                            batch.gate.data()};
    kernel(transform, given, together ? TOGETHER : SOLVE, from, batch.stop);
    const auto store = [&](const T* rows, void* to, int64_t column, int64_t stride) {
      store_panel(rows + from * lanes_, count, first, samples, lanes_, static_cast<T*>(to) + column, stride);
    };
    store(x, batch.x, from + 1, D + 1);
    store(logs, batch.log, from + 1, D + 1);
    if (together) {
      store(changes, batch.change, 0, count);
      store(residuals, batch.residual, 0, count);
    }
  });
}

bool MaskedFlow::run(const std::vector<MaskedStep>& steps, const MaskedBatch& batch, int threads,
                     const Caller::Hook& hook) const {
  return f64_ ? run_as<double>(steps, batch, threads, hook) : run_as<float>(steps, batch, threads, hook);
}

bool MaskedFlow::run_block(const MaskedBlockBatch& batch, int threads, const Caller::Hook& hook) const {
  return f64_ ? run_block_as<double>(batch, threads, hook) : run_block_as<float>(batch, threads, hook);
}

}  // namespace tarflow
