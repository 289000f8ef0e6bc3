// The parameters of one launch of the kernel: sizes, the division of work, and the memory of a flow block and a batch.
#pragma once

#include <cstdint>

namespace tarflow {

constexpr int MOST_ROWS = 64;  // the most rows R that are evaluated at once, those of the unguided branch included
constexpr int GROUP_ROWS = 32;  // the most rows of a group, whose outputs are one unit of work
constexpr int MOST_PARTS = 8;  // the most parts of a product's inputs that blocks share
constexpr int TILE = 16;       // the outputs, and the inputs, of a tile of a weight matrix

// A buffer is memory on the device: so many elements of a type that the kernel knows.
struct Buffer {
  void* data;
  int64_t count;
  const char* name;
};

// The mode says what the launch is to do.
enum Mode : int {
  SEQUENTIAL,   // tokens [start, stop) of all positions' samples, one after the other
  FIXED_POINT,  // one parallel pass over all positions
  FRONTIER,     // parallel passes until every sample's frontier is at the end, see frontier.cuh
};

// The phases between two barriers are bits of `skip_phases`.
enum Phase : int { EMBED, QKV, ATTENTION, PROJ, FC1, FC2, PROJ_OUT, PHASES };

// The sections of a phase, by which the emulation's model of time (emulation/timing.h) tells what it found.
enum Section : int {
  OTHER,
  STAGING,
  NORM,
  MULTIPLY,
  SUMS,
  EPILOGUE,
  ATTEND,
  MERGE,
  FETCH,
  UPDATE,
  AWAIT,
  BARRIER,
  SECTIONS
};

// The sizes, whose names are as in tarflow_fast/backend/cuda/plan.py and engine.py, which fill them in.
//
// The block has channels C, heads H, head_dim d, hidden_dim F of the MLP, tokens T, token_dim D, out_dim O (2D, or D if
// volume-preserving), layers L, and affine (0 if volume-preserving).
// The launch has a mode; start and stop, for SEQUENTIAL; positions P, the tokens of one branch that are evaluated at
// once; branches, 1 or 2, with R = P · branches; samples, those of the whole batch, which are the rows of a branch in
// the cache; guide_a and guide_b, whether xa and xb are guided; skip_phases, the phases that are not done, for
// measurements; and for FRONTIER max_passes and a window W, the tokens of a sample in a pass (P = W · samples of the
// launch, sample after sample).
// The plan has pairs, whether blocks 2 i and 2 i + 1, which
// have the same tiles for a group of rows each, copy for each other (launch.cu clears it where they cannot); slots, those of the ring; slot_k, the inputs that a slot holds for 16 outputs; sums_in_slots, whether a
// product leaves the sums of its warps where its weights were; group_rows, all rows R or, of more than 32, the first half
// of them, a multiple of 8; staged_rows, the rows of a product's input that are in shared memory at once, a multiple of
// 8, and staged_k their columns; tiles, the tiles of up to 32 positions of one sample each whose rows attend together
// (see window.cuh), or 0 where each row attends alone; room, the keys that these have in shared memory with their values;
// proj_halvings and fc2_halvings, how often the inputs of proj and fc2 are halved among blocks (at most once if R ≤ 16);
// merges, whether the attention's parts are added up in a step of their own; splits, the blocks that share the keys of a row
// and head; least_keys, the keys that each of these takes at least; early_keys, how many keys of a block's first part are
// asked for phases before they are needed; most_jobs, the most jobs of any block for a token;
// and bias_tiles, the most tiles of any block, whose biases are in shared memory, or 0 where they are not.
// clang-format off
#define TARFLOW_SIZES(X)                                                                                       \
  X(channels) X(heads) X(head_dim) X(hidden_dim) X(tokens) X(token_dim) X(out_dim) X(layers) X(affine) X(mode) X(start)      \
  X(stop) X(positions) X(branches) X(samples) X(guide_a) X(guide_b) X(skip_phases) X(window) X(max_passes) X(slots) X(slot_k) X(sums_in_slots) X(group_rows) \
  X(pairs) X(staged_rows) X(staged_k) X(tiles) X(proj_halvings) X(fc2_halvings) X(merges) X(splits) X(least_keys) X(early_keys) X(room) X(most_jobs) X(bias_tiles)
// clang-format on

// The buffers, which are fp32 unless another type is given. "type" is that of weights and cache. C', F', O', D' are C,
// F, O, D rounded up to whole tiles. Packed linear layers are one after the other: proj_in, then qkv, proj, fc1, fc2 of
// each layer, then proj_out.
//   weights    type, see pack_linear in tarflow_fast/backend/cuda/pack.py; LayerNorm's γ and β are in qkv and fc1
//   biases     the biases of the same layers, each a whole number of tiles
//   work       int32 (4 L + 2, blocks, 2): the first unit and the number of units of each packed layer and block; a unit
//              is a tile, a part of its inputs and a group of rows: all tiles of the first part, then of the second, and
//              then the same for the second group
//   jobs       int32 (blocks, most_jobs, 2): what a block fetches for a token, in order: a place in `weights` and a
//              number, in tiles of 16 × 16; 0 at the end
//   position   (T, C), class_rows (branches · samples, C) or empty: the embeddings
//   guidance   (T − 1,) or empty: g after each token
//   scale      (branches,): the scale of the logits, times log2 e
//   z, x, input, guess (samples, T, D): tokens are read from input, a copy of x for FIXED_POINT; log_det (samples, T)
//   change, residual (samples, widest) or empty: for FIXED_POINT; for FRONTIER residual is (samples,)
//   reached, evaluations int32 (samples,), passes int32 (1,), trail (4, samples, T) or empty: for FRONTIER
//   keys_values type (L, 2, branches · samples, H, T, d)
//   rest       (2, MOST_PARTS, MOST_ROWS, C'), see stream.cuh: of proj and of fc2
//   h          (R, C'); parameters (R, O')
//   queries    (2, MOST_ROWS, C'), of that type where there are `tiles`
//   partials   (R, H, splits, d) and then (2, R, H, splits, 2): sums, then their maximum and weight
//   hidden     type (2, MOST_ROWS, F'); attended type (2, MOST_ROWS, C'); norms type (2, 2, MOST_ROWS, C'), for qkv and
//              proj_out, then for fc1. These and queries and the second part of partials are for two turns, see sent.cuh
//   barrier    uint32 (1,): 0 at launch
// clang-format off
#define TARFLOW_BUFFERS(X)                                                                                     \
  X(weights) X(biases) X(work) X(jobs) X(position) X(class_rows) X(guidance) X(scale) X(z) X(x) X(input) X(guess)      \
  X(log_det) X(change) X(residual) X(reached) X(evaluations) X(passes) X(trail) X(keys_values) X(h) X(rest) X(queries) X(partials) X(hidden) X(attended) X(norms) X(parameters) X(barrier)
// clang-format on

struct Params {
#define TARFLOW_FIELD(name) int name;
  TARFLOW_SIZES(TARFLOW_FIELD)
#undef TARFLOW_FIELD
#define TARFLOW_FIELD(name) Buffer name;
  TARFLOW_BUFFERS(TARFLOW_FIELD)
#undef TARFLOW_FIELD
  // Each position has its sample, the token that is evaluated, and its column of `change`. For SEQUENTIAL only the
  // sample counts, for FRONTIER the sample and the column.
  int sample[MOST_ROWS], token[MOST_ROWS], column[MOST_ROWS];
  // These are for FRONTIER, see frontier.cuh. stream, rounding: the share of a token's size that rounding of the
  // residual stream, and of weights and cache, may move it by.
  float tol, stream, rounding;
};

}  // namespace tarflow
