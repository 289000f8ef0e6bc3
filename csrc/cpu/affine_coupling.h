// The update of an affine coupling as plain data, for the reason given in kernels.h.
#pragma once

#include <cstdint>

namespace tarflow {

// B samples of N values, fp32 or fp64 throughout, named and told as in tarflow_fast/fused/affine_coupling.py. Samples
// [first, stop) are meant. With gradients, `out` and `log_det` are those that flow in, and `latents` is the z of both.
struct CouplingBatch {
  const void* parameters;  // (B, 2, N), t and the raw s; (B, 1, N), t alone, unless scaled
  const void* changes;     // (N,), 1 where values change, 0 where they pass
  const void* in;          // (B, N), x, or z for the inverse; null with gradients
  const void* latents;     // (B, N); null without gradients, or unless scaled
  void* out;               // (B, N)
  void* log_det;           // (B,)
  void* d_parameters;      // as the parameters; null without gradients
  void* d_in;              // (B, N); null without gradients
  int64_t values;          // N
  double bound;            // of the log-scale
  bool scaled, inverse;
};

}  // namespace tarflow
