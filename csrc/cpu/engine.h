// One flow block: its packed weights, and the passes over a batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "kernels.h"

namespace tarflow {

struct Sizes {
  int64_t channels, head_dim, tokens, token_dim, layers;
  bool affine;  // false: volume-preserving
};

// Weights as torch has them: fp32, contiguous, linear layers (out, in).
struct LayerSource {
  const float *norm1_weight, *norm1_bias, *qkv_weight, *qkv_bias, *proj_weight, *proj_bias;
  const float *norm2_weight, *norm2_bias, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
};

struct Source {
  const float *in_weight, *in_bias, *position, *out_weight, *out_bias;
  std::function<LayerSource(int64_t)> layer;  // called for each layer in turn; what it gave goes with the next call
};

// 64-byte aligned memory for `count` bytes, in huge pages where there are any and the size is worth it. Not cleared.
struct Free {
  void operator()(void* p) const;
};
using Memory = std::unique_ptr<void, Free>;
Memory allocate(size_t bytes);

// Asks the system to back what has not been touched yet with huge pages.
void prefer_huge_pages(void* memory, size_t bytes);

class Engine {
 public:
  // steps: how many more tokens of a sequential pass are done; a parallel one is one step. Returns
  // whether to go on. Called on the calling thread only, at most every 50 ms.
  using Hook = std::function<bool(int64_t steps)>;

  Engine(const Sizes& sizes, const Source& source, bool bf16, const Kernels& kernels);

  // Makes the tokens of the batch's windows, one at least: one after the other, where the windows are all the same, or
  // all from the tokens as they are. Returns false if the hook ended it. Any number of calls may run at once, on
  // different batches.
  bool run(const Batch& batch, bool sequential, int threads, const Hook& hook) const;

  int64_t cache_elements() const;  // per cache row: keys and values of all layers, in the weights' dtype
  int64_t channel_stride() const { return block_.channel_stride; }
  size_t packed_bytes() const { return packed_bytes_; }

 private:
  Block block_{};
  std::vector<Layer> layers_;
  Memory memory_;
  size_t packed_bytes_ = 0;
  Step step_;
};

}  // namespace tarflow
