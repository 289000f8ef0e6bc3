// What masked_flow.cpp hands to the kernels of one instruction set: masked autoregressive transforms, sorted and packed.
// All of it is plain data, for the reason given in kernels.h. Numbers are fp32 or fp64 throughout; void* is either.
// Activations are in panels of samples, [unit][lanes]: a vector has one unit of several samples.
#pragma once

#include <cstdint>

#include "spline.h"

namespace tarflow {

// Rows of a layer that are evaluated together: `count` units in a row from `row` on, which read the first `inputs` of
// the units that the layer reads. weight: [inputs][count].
struct MaskedGroup {
  int64_t row, count, inputs;
  const void* weight;
};

// The names are in the order of tarflow_fast/backend/cpu/masked.py.
enum MaskedActivation { IDENTITY, RELU, LEAKY_RELU, ELU, TANH, SIGMOID, SILU, SOFTPLUS, GELU, SIN, WRAP };
enum MaskedLaw { AFFINE_SOFTCLIP, AFFINE_SOFTPLUS, AFFINE_SIGMOID, AFFINE_EXP, SHIFT, SPLINE };

// h = (W · act(scale · v + shift) + b + offset) · gate + w, see tarflow_fast/masked/layers.py.
struct MaskedLayer {
  int64_t source, add;  // the numbers of the values v and w, where 0 is x and l layer l's result; add −1 for none
  int64_t inputs, outputs;
  const MaskedGroup* group;
  const int64_t* group_begin;  // (S + 1), the groups of step s are [group_begin[s], group_begin[s + 1])
  const void *bias, *scale, *shift;  // (outputs), (inputs) or null, (inputs) or null
  const int64_t* add_at;  // (outputs), which unit of w
  int64_t activation;
  double alpha;
  int64_t read_at;  // where in a panel's memory act(…) is, in units
};

struct MaskedTransform {
  int64_t dims, passed, steps, layers, parameters;
  const int64_t* begin;  // (S + 1), the sorted dimensions that become known in step s
  const MaskedLayer* layer;
  const int64_t* raw_at;  // (layers + 1), where in a panel's memory a value that a layer adds is, −1 for others
  int64_t law;
  double floor;
  bool shift_first;
  SplineLaw spline;
};

// offset or gate of a layer: (outputs, rows), where rows is 1, or one for each sample and lanes beyond the last.
struct MaskedContext {
  const void* data;
  int64_t rows;
};

enum MaskedMode {
  SOLVE,  // x of z, one step after the other
  FORWARD,  // z of x
  TOGETHER  // x of z for a guess of x, all dimensions at once: a fixed-point pass
};

// A panel of samples. Row r of an array is at r · lanes.
struct MaskedPanel {
  int64_t sample;  // the first one's number
  const int64_t* row;  // (D), in which row of z and x each of the sorted dimensions is
  const void* z;
  void* x;  // may be z
  void* log;  // log|dx/dz| of each dimension, rows as x, or null
  double* log_det;  // (lanes), to which log|det| of the map that is applied is added
  void *change, *residual;  // of TOGETHER, rows as x: |new x − old x| and |f(old x) − z|
  void* memory;  // what is known of the units
  void* parameters;  // those of one step
  double* scratch;
  const MaskedContext *offset, *gate;  // (layers), data null for none
};

// Runs over the sorted dimensions [first, stop).
using MaskedRun = void (*)(const MaskedTransform&, const MaskedPanel&, MaskedMode, int64_t first, int64_t stop);

struct MaskedKernels {
  int64_t lanes_f32, lanes_f64;  // of a panel
  int64_t rows;  // the most rows of a group, a power of 2
  int64_t scratch_lanes;  // doubles of scratch for each bin of a spline
  MaskedRun run_f32, run_f64;
};

}  // namespace tarflow
