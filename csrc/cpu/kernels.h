// What the engine hands to the kernels of one instruction set: packed weights, a batch, scratch memory.
// All of it is plain data: this header is compiled for several instruction sets, and an inline function shared between
// them could be linked in a version that the machine does not have.
#pragma once

#include <cstdint>

#include "affine_coupling.h"
#include "masked.h"
#include "spline.h"

namespace tarflow {

class Barrier;
struct DensityKernels;

// The sizes of a flow block, named as in tarflow_fast/engine/shape.py. affine: 0 where tokens are shifted alone.
#define TARFLOW_BLOCK_SIZES(X) X(tokens) X(token_dim) X(channels) X(layers) X(head_dim) X(hidden) X(affine)

struct Sizes {
#define TARFLOW_FIELD(name) int64_t name;
  TARFLOW_BLOCK_SIZES(TARFLOW_FIELD)
#undef TARFLOW_FIELD
};

// The weights of a transformer layer, named as in tarflow_fast/engine/weights.py, as torch has them: fp32, contiguous,
// linear layers (out, in).
// clang-format off
#define TARFLOW_LAYER_TENSORS(X)                                                               \
  X(norm1_weight) X(norm1_bias) X(qkv_weight) X(qkv_bias) X(proj_weight) X(proj_bias)          \
  X(norm2_weight) X(norm2_bias) X(fc1_weight) X(fc1_bias) X(fc2_weight) X(fc2_bias)
// clang-format on

struct LayerSource {
#define TARFLOW_FIELD(name) const float* name;
  TARFLOW_LAYER_TENSORS(TARFLOW_FIELD)
#undef TARFLOW_FIELD
};

// y = x Wᵀ + b. Columns of y are packed in panels of two vectors: [panel][k/n][width][n] with n = Passes::together. Rows
// of W beyond the true number of columns are zero, and so is their bias.
struct Linear {
  const void* weight;
  const float* bias;
  int64_t k, panels;
};

struct Layer {
  Linear qkv;  // columns are q, k, v of head 0, then of head 1 …; each of these begins a new panel
  Linear proj, fc1, fc2;
};

// One flow block. Strides are in elements and padded, because rows of activations must not share sets of the L1 cache.
struct Block {
  int64_t channels, heads, tokens, token_dim;
  int64_t head_dim;      // padded to a multiple of 16; the padding of q, k and v is zero
  int64_t unit_panels;   // panels of one head's q, k or v
  int64_t key_tokens;    // tokens padded to a multiple of the vector width
  int64_t out_dim;       // 2D, or D for volume-preserving blocks
  int64_t layers;
  bool affine, bf16;
  float attention_scale;
  const Layer* layer;
  Linear in, out;         // fp32 in every mode: few bytes, and they carry x itself
  const float* position;  // (T, channel_stride)
  int64_t channel_stride, attention_stride, hidden_stride, out_stride, in_stride;
};

// A batch of B samples has R = B cache rows, or 2B when guided, the conditional ones first.
struct Batch {
  const float* z;          // (B, T, D)
  float* x;                // (B, T, D)
  float* token_log_det;    // (B, T)
  const int64_t* start;    // (B,), the pass makes tokens [start[b], stop[b]) of sample b
  const int64_t* stop;     // (B,)
  float* change;           // (B, widest window) or null, max_d |new x − old x| of each token, 0 beyond its window
  float* residual;         // (B, widest window) or null, max_d |forward(old x) − z|
  int64_t widest;
  void* keys_values;       // [layer][R][head][K | V]; fp32: K [key_tokens/VW][d][VW], V [token][d];
                           // bf16: K [key_tokens/VW][d/2][VW][2], V [token/2][d][2]
  const float* embedding;  // (R, channel_stride) or null
  const float* guidance;   // g_i for i = 0 … T−2, or null
  bool guide_a, guide_b;
  float unguided_scale;    // 1 / attn_temp
  int64_t samples;
};

constexpr int64_t GROUP_ROWS = 96;  // rows of both branches that an evaluation takes at most, whole tiles of all sets

// A row of activations is the evaluation of one token of one sample. input: (D,), the token in x, or a copy of it.
struct Row {
  int64_t sample, token;
  const float* input;
};

// A worker is one thread of a team, with the team's scratch. A team works on the same rows and divides columns and
// heads.
struct Worker {
  int64_t rank, size;
  Barrier* barrier;
  float *stream, *query, *attended, *hidden, *out;  // shared by the team
  float *normed, *gathered, *scratch;  // the worker's own
  int64_t near_bytes;  // of a panel's weights that stay in L1 while all rows pass
};

// A step evaluates the transformer on `count` rows, each `ahead` tokens further on than the row says, writes their keys
// and values, and makes the tokens of x that follow theirs. A row sees the rows of its sample with earlier tokens.
using Step = void (*)(const Block&, const Batch&, const Worker&, const Row*, int64_t count, int64_t ahead);

// Values [first, stop) of a batch of splines, and samples of one of couplings.
using SplineRun = void (*)(const SplineLaw& law, const SplineBatch& batch, void* scratch, int64_t first, int64_t stop);
using CouplingRun = void (*)(const CouplingBatch& batch, int64_t first, int64_t stop);

// What there is for weights of one dtype. tile_rows: rows whose sums stay in registers. multiplies: multiply-adds that a
// core makes in a cycle, at best. together: k of a column that lie together in a panel, 1 in fp32.
struct Passes {
  Step step;
  int64_t tile_rows;
  double multiplies;
  int64_t together;
};

struct Kernels {
  const char* name;
  int64_t vector;  // VW, fp32 lanes; a panel has 2·VW columns
  bool bf16_operands;  // whether the rows of a bf16 product are bf16 too, or fp32
  Passes f32, bf16;
  const DensityKernels* density;
  const MaskedKernels* masked;
  // These are for tests of the parts: out[i] = GELU(x[i]), GELU′(x[i]) and exp(x[i]), where n is a multiple of 16.
  void (*gelu)(const float* x, float* out, int64_t n);
  void (*gelu_slope)(const float* x, float* out, int64_t n);
  void (*exp)(const float* x, float* out, int64_t n);
  SplineRun spline_f32, spline_f64;
  CouplingRun couple_f32, couple_f64;
};

// A table is null where the compiler's target has no such instructions.
extern const Kernels* const kernels_portable;
extern const Kernels* const kernels_avx2;
extern const Kernels* const kernels_avx512;
extern const Kernels* const kernels_avx512_bf16;
extern const Kernels* const kernels_amx_bf16;
extern const Kernels* const kernels_neon_bf16;

// The kernels call this. It is in threads.cpp, so that no atomic is inlined into code for one instruction set.
void wait_at(Barrier* barrier);

}  // namespace tarflow
