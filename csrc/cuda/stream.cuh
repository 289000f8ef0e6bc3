// The residual stream, to which products are added that several blocks make in parts.
//
//   stream = h + Σ_i rest[i]
//
// Nothing is added atomically: whoever reads the stream adds up the parts, in their order. Where rows are few, the block
// that has the first part of a product's inputs adds its sum to h, and the other keeps its own in `rest`; each block that
// reads adds both. Else all parts are sent to `rest`, and the step that applies LayerNorm adds them up and puts the sum
// into h, of which each block has rows of its own.
#pragma once

#include "rows.cuh"

namespace tarflow {

// The stream after a phase's product. proj and fc2 have memory of their own, as the first part of one is added to h and
// what the other left.
struct Stream {
  const Params& p;
  Phase after;

  DEVICE int width() const { return whole_tiles(p.channels); }
  // Returns the number of sums besides h: of few rows, and of many.
  DEVICE int rests() const { return (1 << halvings_of(p, after)) - 1; }
  DEVICE int sent() const { return after == EMBED ? 0 : 1 << halvings_of(p, after); }
  DEVICE int64_t at(int row) const { return static_cast<int64_t>(row) * width(); }
  DEVICE int64_t rest_at(int i, int row) const { return at(((after == FC2 ? MOST_PARTS : 0) + i) * MOST_ROWS + row); }
};

// An element of the stream on its way, where rows are few.
struct LoadedStream {
  Loaded<float> h = {}, rest = {};

  DEVICE void load_from(const Stream& stream, int row, int n) {
    h = load(Global<float>(stream.p.h), stream.at(row) + n);
    if (stream.rests()) rest = load(Global<float>(stream.p.rest), stream.rest_at(0, row) + n);
  }
  DEVICE float sum() const { return h + rest; }
};

}  // namespace tarflow
