// The rows of a launch: which token each of them is, and where its keys and values are.
//
// Row b · P + i is position i in branch b; with guidance the second branch is the unguided one. A position whose token
// is −1 has nothing to evaluate, and what is computed for it goes nowhere.
#pragma once

#include "layers.cuh"

namespace tarflow {

struct Rows {
  const Params& p;
  Shared<int> tokens;  // the token of each position, except for SEQUENTIAL, where it is `next` for all
  // With `tiles`: the first position of each, and the number of positions; then the most and the fewest keys of each.
  Shared<int> tiles;
  int next;  // one more with each token, or pass

  DEVICE int count() const { return p.positions * p.branches; }
  DEVICE int branch(int row) const { return row >= p.positions; }  // there are two at most, and no division is cheap
  DEVICE int position(int row) const { return row - branch(row) * p.positions; }
  DEVICE int token_at(int position) const { return p.mode == SEQUENTIAL ? next : load(tokens, position); }
  DEVICE int token(int row) const { return token_at(position(row)); }
  DEVICE int cache_row(int row) const { return branch(row) * p.samples + p.sample[position(row)]; }

  // Returns the index of the key (0) or value (1) of the row's token 0 in one layer and head.
  DEVICE int64_t cached(int layer, int which, int row, int head) const {
    const int64_t rows = static_cast<int64_t>(p.branches) * p.samples;
    return (((2 * layer + which) * rows + cache_row(row)) * p.heads + head) * p.tokens * p.head_dim;
  }
  // Returns how far a value lies after its key.
  DEVICE int64_t value_after_key() const {
    return static_cast<int64_t>(p.branches) * p.samples * p.heads * p.tokens * p.head_dim;
  }
  // Returns the index in (samples, T) of token `token` of the sample at a position.
  DEVICE int64_t place(int position, int token) const {
    return static_cast<int64_t>(p.sample[position]) * p.tokens + token;
  }
};

// Returns the row of a buffer that has all rows for two turns, see sent.cuh. There is one of few rows.
DEVICE int64_t turn_row(int turn, int row) { return turn * MOST_ROWS + row; }

}  // namespace tarflow
