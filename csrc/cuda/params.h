// What one launch of the kernel is given: sizes, how work is divided, and the memory of a flow block and a batch.
#pragma once

#include <cstdint>

namespace tarflow {

constexpr int MOST_ROWS = 64;  // R: tokens that are evaluated at once, those of the unguided branch included
constexpr int TILE = 16;       // of a weight matrix: so many outputs, so many inputs

// Memory on the device: so many elements of a type that the kernel knows.
struct Buffer {
  void* data;
  int64_t count;
  const char* name;
};

// What the launch is to do.
enum Mode : int {
  SEQUENTIAL,   // tokens [start, stop), one after the other, of all positions' samples
  FIXED_POINT,  // one parallel pass over all positions
  FRONTIER,     // parallel passes until every sample's frontier is at the end, see frontier.cuh
};

// Phases between two barriers, as bits of `skip_phases`.
enum Phase : int { EMBED, QKV, ATTENTION, PROJ, FC1, FC2, PROJ_OUT, PHASES };

// Names as in tarflow_fast/backend/cuda/plan.py and engine.py, which fill them in.
//
// Of the block: channels C, heads H, head_dim d, hidden_dim F of the MLP, tokens T, token_dim D, out_dim O (2D, or D if volume-preserving), layers
// L, affine (0 if volume-preserving).
// Of the launch: mode; start, stop: of SEQUENTIAL; positions P: tokens that are evaluated at once, of one branch; branches
// 1 or 2, R = P · branches; samples: of the whole batch, rows of a branch in the cache; guide_a, guide_b: what is guided;
// skip_phases: phases that are not done, for measurements; of FRONTIER window W: tokens of a sample in a pass (P = W · samples
// of the launch, sample after sample), max_passes.
// Of the plan: slots of the ring; slot_k: inputs that a slot holds of 16 outputs; staged_rows: rows of a
// product's input that are in shared memory at once, a multiple of 8; splits: blocks that share the keys of a row and head,
// least_keys: what each takes at least;
// most_jobs: of any block, see `jobs`.
// clang-format off
#define TARFLOW_SIZES(X)                                                                                       \
  X(channels) X(heads) X(head_dim) X(hidden_dim) X(tokens) X(token_dim) X(out_dim) X(layers) X(affine) X(mode) X(start)      \
  X(stop) X(positions) X(branches) X(samples) X(guide_a) X(guide_b) X(skip_phases) X(window) X(max_passes) X(slots) X(slot_k)             \
  X(staged_rows) X(splits) X(least_keys) X(most_jobs)
// clang-format on

// C', F', O', D': C, F, O, D rounded up to whole tiles; T type of weights and cache; fp32 unless said. Packed linear
// layers are one after the other: proj_in, then qkv, proj, fc1, fc2 of each layer, then proj_out.
//   weights    T, see pack_linear in tarflow_fast/backend/cuda/pack.py; LayerNorm's γ and β are folded into qkv and fc1
//   biases     of the same layers, each a whole number of tiles
//   work       int32 (4 L + 2, blocks, 2): the first tile and the number of tiles of each packed layer and block
//   jobs       int32 (blocks, most_jobs, 2): what a block fetches for a token, in its order: a place in `weights` and a
//              number, in tiles of 16 × 16; 0 at the end
//   position   (T, C), class_rows (branches · samples, C) or empty: embeddings
//   guidance   (T − 1,) or empty
//   scale      (branches,): of the logits, with log2 e
//   z, x, input, guess (samples, T, D): input is where tokens are read, of FIXED_POINT a copy of x; log_det (samples, T)
//   change, residual (samples, widest) or empty: of FIXED_POINT; of FRONTIER residual (samples,)
//   reached, evaluations int32 (samples,), passes int32 (1,), trail (4, samples, T) or empty: of FRONTIER
//   keys_values T (L, 2, branches · samples, H, T, d)
//   h, queries (R, C'); partials (R, H, splits, d) and then (R, H, splits, 2): sums, their maximum and weight
//   hidden     T (R, F'); parameters (R, O')
//   barrier    uint32 (1,): 0 at launch
// clang-format off
#define TARFLOW_BUFFERS(X)                                                                                     \
  X(weights) X(biases) X(work) X(jobs) X(position) X(class_rows) X(guidance) X(scale) X(z) X(x) X(input) X(guess)      \
  X(log_det) X(change) X(residual) X(reached) X(evaluations) X(passes) X(trail) X(keys_values) X(h) X(queries) X(partials) X(hidden) X(parameters) X(barrier)
// clang-format on

struct Params {
#define TARFLOW_FIELD(name) int name;
  TARFLOW_SIZES(TARFLOW_FIELD)
#undef TARFLOW_FIELD
#define TARFLOW_FIELD(name) Buffer name;
  TARFLOW_BUFFERS(TARFLOW_FIELD)
#undef TARFLOW_FIELD
  // Of each position: its sample, the token that is evaluated, and its column of `change`. Of SEQUENTIAL the sample
  // alone counts, of FRONTIER the sample and the column.
  int sample[MOST_ROWS], token[MOST_ROWS], column[MOST_ROWS];
  // Of FRONTIER, see frontier.cuh. stream, rounding: the share of a token's size that rounding of the residual stream,
  // and of weights and cache, may move it by.
  float tol, stream, rounding;
};

}  // namespace tarflow
