// The density pass of a whole model over a batch, and the gradient of its log-density.
#pragma once

#include <cstdint>
#include <vector>

#include "caller.h"
#include "density.h"

namespace tarflow {

struct DensityBatch {
  int64_t samples;
  const float* x;   // (B, T, D) in the data's order of tokens
  float* outputs;   // (K, B, T, D), the output of each block; the last one is z
  double* log_det;  // (B,), log|det dz/dx| in nats
  float* gradient;  // (B, T, D), d(log|det dz/dx| − ½ |z|²)/dx, or null
};

// Takes a batch through all blocks, whose tokens have the same number and size. Weights are read where they are, for as
// long as the call lasts. most_bytes: the memory that the pass may take, unless a single sample takes more. bytes: the
// memory that it took. hook: called on the calling thread, at most every 50 ms; it returns whether to go on. Returns
// false if the hook ended the pass. Any number of calls may run at once.
bool density_pass(const std::vector<DensityBlock>& blocks, const DensityBatch& batch, bool bf16, const Kernels& kernels,
                  int threads, int64_t most_bytes, int64_t& bytes, const Caller::Hook& hook);

}  // namespace tarflow
