// Masked autoregressive flows: both directions of all their transforms, over a batch.
#pragma once

#include <cstdint>
#include <vector>

#include "caller.h"
#include "kernels.h"
#include "memory.h"

namespace tarflow {

// A layer as tarflow_fast/masked/sorting.py has it: sorted, dense, contiguous, fp32 or fp64.
struct MaskedLayerSource {
  const void *weight, *bias;     // (outputs, inputs), (outputs)
  const void *scale, *shift;     // (inputs) or null
  int64_t inputs, outputs, source, add;
  std::vector<int64_t> begin, reach, add_at;
  int64_t activation;
  double alpha;
};

struct MaskedSource {
  int64_t dims, passed, parameters, law;
  double floor;
  bool shift_first;
  SplineLaw spline;
  std::vector<int64_t> begin;
  std::vector<MaskedLayerSource> layers;
};

// M (size, size), b (size).
struct MaskedMatrixSource {
  const void *weight, *bias;
  int64_t size;
};

// One transform of a pass over a flow; where transform is −1, M x + b; where matrix is −1 too, x · scale + shift.
struct MaskedStep {
  int64_t transform, matrix;
  bool forward;
  std::vector<int64_t> row;  // (D), the column of the batch that each of its sorted dimensions is
  std::vector<MaskedContext> offset, gate;  // (layers)
  const void *scale, *shift;  // (D)
};

struct MaskedBatch {
  int64_t samples;
  const void* in;  // (B, D)
  void* out;  // (B, D)
  double* log_det;  // (B,), of all transforms but not of scales
};

// A pass of the engine contract over the dimensions [first, stop) of one transform: tokens [first + 1, stop + 1).
struct MaskedBlockBatch {
  int64_t samples, first, stop;
  const void* z;  // (B, D + 1)
  void *x, *log;  // (B, D + 1)
  void *change, *residual;  // (B, stop − first), or null for the sequential pass
  void* memory;  // panels(B) · memory_bytes(), the same from pass to pass
  std::vector<MaskedContext> offset, gate;
};

class MaskedFlow {
 public:
  // Packs the weights. threads, hook: as in Engine::run.
  MaskedFlow(const std::vector<MaskedSource>& transforms, const std::vector<MaskedMatrixSource>& matrices, bool f64,
             const Kernels& kernels);

  bool run(const std::vector<MaskedStep>& steps, const MaskedBatch& batch, int threads, const Caller::Hook& hook) const;
  bool run_block(const MaskedBlockBatch& batch, int threads, const Caller::Hook& hook) const;

  int64_t lanes() const { return lanes_; }  // samples of a panel
  int64_t memory_bytes() const;             // what a panel takes between passes of the first transform
  int64_t packed_bytes() const;

 private:
  struct Packed {
    MaskedTransform plain;
    std::vector<int64_t> begin, raw_at;
    std::vector<MaskedLayer> layers;
    std::vector<std::vector<int64_t>> group_begin, add_at;
    std::vector<std::vector<MaskedGroup>> groups;
    Memory weights;
    size_t weight_bytes;
    int64_t memory_units, parameter_rows;
  };

  struct PackedMatrix {
    MaskedMatrix plain;
    std::vector<MaskedGroup> groups;
    Memory weights;
    size_t weight_bytes;
  };

  template <class T>
  void pack(const MaskedSource& source, Packed& packed) const;
  template <class T>
  void pack(const MaskedMatrixSource& source, PackedMatrix& packed) const;
  void add_groups(int64_t row, int64_t stop, int64_t inputs, std::vector<MaskedGroup>& groups) const;
  template <class T>
  bool run_as(const std::vector<MaskedStep>& steps, const MaskedBatch& batch, int threads,
              const Caller::Hook& hook) const;
  template <class T>
  bool run_block_as(const MaskedBlockBatch& batch, int threads, const Caller::Hook& hook) const;
  template <class Work>
  bool over_panels(int64_t samples, int threads, const Caller::Hook& hook, const Work& work) const;

  const MaskedKernels& kernels_;
  const bool f64_;
  const int64_t lanes_;
  std::vector<Packed> transforms_;
  std::vector<PackedMatrix> matrices_;
};

}  // namespace tarflow
