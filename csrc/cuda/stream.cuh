// The residual stream, to which products are added that several blocks make in parts.
//
//   stream = h + Σ_i rest[i]
//
// The block that has the first part of a product's inputs adds its sum to h, and the others keep theirs in `rest`, so
// that nothing is added atomically. Whoever reads the stream adds them up, in the order of the parts: where rows are few
// each block does, of the two parts that there are then; else the step that applies LayerNorm does, and puts the sum
// into h.
#pragma once

#include "rows.cuh"

namespace tarflow {

// The stream after a phase's product. proj and fc2 have memory of their own, as the first part of one is added to h and
// what the other left.
struct Stream {
  const Params& p;
  Phase after;

  DEVICE int width() const { return whole_tiles(p.channels); }
  // Returns the number of sums besides h.
  DEVICE int rests() const { return (1 << halvings_of(p, after)) - 1; }
  DEVICE int64_t at(int row) const { return static_cast<int64_t>(row) * width(); }
  DEVICE int64_t rest_at(int i, int row) const {
    return at(((after == FC2 ? MOST_PARTS - 1 : 0) + i) * MOST_ROWS + row);
  }
};

// An element of the stream on its way, where there are two parts at most.
struct LoadedStream {
  Loaded<float> h = {}, rest = {};

  DEVICE void load_from(const Stream& stream, int row, int n) {
    h = load(Global<float>(stream.p.h), stream.at(row) + n);
    if (stream.rests()) rest = load(Global<float>(stream.p.rest), stream.rest_at(0, row) + n);
  }
  DEVICE float sum() const { return h + rest; }
};

}  // namespace tarflow
