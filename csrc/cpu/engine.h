// One flow block: its packed weights, and the passes over a batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "caller.h"
#include "kernels.h"
#include "memory.h"
#include "schedule.h"

namespace tarflow {

// One flow block's weights, fp32 and contiguous.
struct Source {
  const float *in_weight, *in_bias, *position, *out_weight, *out_bias;
  std::function<LayerSource(int64_t)> layer;  // called for each layer in turn; a call may free what the last one gave
};

struct Plan;

class Engine {
 public:
  // machine: the caches that passes are made to suit.
  Engine(const Sizes& sizes, const Source& source, bool bf16, const Kernels& kernels, const Machine& machine);

  // Returns how `run` divides such a pass, and what the model of the machine expects of it.
  Schedule schedule(const Batch& batch, bool sequential, int threads) const;

  // Makes the tokens of the batch's windows, at least one. A sequential pass makes them one after the other, and all
  // windows are the same; a parallel pass makes all from the tokens as they are. hook: told how many tokens of a
  // sequential pass are done; a parallel pass is one step. Returns false if the hook ended the pass. Any number of
  // calls may run at once, on different batches.
  bool run(const Batch& batch, bool sequential, int threads, const Caller::Hook& hook) const;

  int64_t cache_elements() const;  // elements of a cache row: keys and values of all layers, in the weights' dtype
  int64_t channel_stride() const { return block_.channel_stride; }
  size_t packed_bytes() const { return packed_bytes_; }
  int64_t tile_rows() const { return passes_.tile_rows; }
  int64_t near() const { return near_bytes(machine_, lanes_, tile_rows()); }  // see near_bytes

 private:
  Schedule schedule(const Plan& plan, const Batch& batch, bool sequential, int threads) const;

  Block block_{};
  std::vector<Layer> layers_;
  Memory memory_;
  size_t packed_bytes_ = 0;
  Passes passes_;
  const Machine machine_;
  int64_t lanes_;
};

}  // namespace tarflow
