// What density_pass.cpp hands to the kernels of one instruction set, for the density pass, x to z, and the gradient of
// its log-density. All of it is plain data, for the reason given in kernels.h.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace tarflow {

// One flow block as torch has it: fp32 and contiguous, with linear layers (out, in) and positions in the data's order.
struct DensityBlock {
  Sizes sizes;
  const float *in_weight, *in_bias, *position, *out_weight, *out_bias;
  const float* embedding;  // (B, C), the class embedding of each sample, or null
  const LayerSource* layer;
  const int64_t* order;  // (T,), the data's token that the block reads as its i-th, or null where that is the i-th
};

// A trace is what a layer leaves behind for the gradient, for all rows of a group. A pass without gradient gives every
// layer the same memory, and one stream: in == mid == out.
struct Trace {
  float *in, *mid, *out;  // (rows, channel_stride), the residual stream before attention, after it, and after the MLP
  float* qkv;  // (rows, qkv_stride), columns ordered (q|k|v, head, channel)
  float* softmax;  // (samples, heads, 3, row_stride), the largest logit, 1 / Σ exp, and Σ_j P_ij dP_ij
  float* norm;  // (rows, 4), mean and 1 / standard deviation of both norms
  float* slope;  // (rows, hidden_stride), GELU′ of the MLP's first layer; null without a gradient
};

// A group of samples on its way through the blocks. A row is one token of one sample, in the block's order; the last
// token of a sample determines no other and has none. A team of threads shares all this memory.
struct DensityGroup {
  int64_t first, samples;  // the group's first sample in the batch, and how many it has
  int64_t rows;  // samples · (tokens − 1)
  Sizes sizes;
  int64_t heads, out_dim;
  int64_t in_stride, channel_stride, qkv_stride, hidden_stride, out_stride, row_stride;
  float attention_scale;

  const float* x;  // (B, T, D) in the data's order, the input of the block at hand
  float* z;  // (B, T, D), its output
  double* log_det;  // (B,), to which Σ −xa over the block's values is added, in nats
  float* gradient;  // (B, T, D), d log p / d z, which the backward steps turn into d log p / d x; or null

  float* stream;  // (rows, channel_stride), written by embed and read by transform
  float *gathered, *out;  // (rows, in_stride), (rows, out_stride)
  float* token_log_det;  // (rows,)
  float* scale;  // (rows, in_stride), exp(−xa) of the block at hand, for the gradient
  void *normed, *attended, *hidden;  // (rows, channel_, channel_, hidden_stride), in the products' operand type
  float *d_stream, *d_normed, *d_attended;  // (rows, channel_stride)
  void *operand, *d_qkv;  // d_stream (rows, channel_stride) and d qkv (rows, qkv_stride) as operands
};

// A worker is one thread of a team, with its scratch.
struct DensityWorker {
  int64_t rank, size;
  Barrier* barrier;
  void* panel;  // a panel of weights
  float* packed[4];  // (row_stride + panel width) · head_dim of keys, values … as panels
  float* scores[2];  // (QUERIES, row_stride)
};

// A step of the pass is called by all threads of a team, and ends with a barrier.
using DensityStep = void (*)(const DensityGroup&, const DensityBlock&, const DensityWorker&);
using DensityLayer = void (*)(const DensityGroup&, const LayerSource&, const Trace&, const DensityWorker&);

struct DensityKernels {
  DensityStep embed, transform, transform_backward, embed_backward;
  DensityLayer layer[2], layer_backward[2];  // fp32, bf16
};

constexpr int64_t QUERIES = 48;  // rows of attention that are taken at once: whole tiles of every instruction set

}  // namespace tarflow
