// Parallel passes over the tokens ahead of each sample's frontier, without the host: see tarflow_fast/solvers/frontier.py,
// whose rule this is.
//
// A pass evaluates the window [reached, reached + W) of each sample. Its tokens that moved by no more than tol, up to the
// first that moved by more, keep what was guessed for them; that one gets its new value; those after it get theirs as
// guesses, unless they overflow, and start again from where they began. A sample whose final token is not finite has
// failed: the tokens after it become NaN.
#pragma once

#include "affine.cuh"

namespace tarflow {

// The tokens that the next pass evaluates. Returns whether there are any; the same in all blocks.
template <int WARPS>
DEVICE bool look(const Params& p, const Rows& rows) {
  const Global<int> reached(p.reached);
  sync_block();  // all warps have read the tokens of the pass before
  for (int i = thread(); i < p.positions; i += WARPS * 32) {
    const int next = load(reached, p.sample[i]) + p.column[i];  // the token that is made
    store(rows.tokens, i, next < p.tokens ? next - 1 : -1);
  }
  sync_block();
  for (int i = 0; i < p.positions; i += p.window)
    if (load(rows.tokens, i) >= 0) return true;
  return false;
}

// What a pass makes final. A block takes a sample. memory: 3 W floats.
template <int WARPS>
DEVICE void advance(const Params& p, const Rows& rows, Shared<float> memory) {
  const Global<float> x(p.x), guess(p.guess), log_dets(p.log_det), residuals(p.residual);
  const Global<int> reached(p.reached), evaluations(p.evaluations);
  const int warp = thread() / 32, lane = thread() % 32, D = p.token_dim, W = p.window;
#pragma unroll 1
  for (int begin = block() * W; begin < p.positions; begin += blocks() * W) {
    if (load(rows.tokens, begin) < 0) continue;
    const int sample = p.sample[begin], front = load(rows.tokens, begin) + 1;
    const int width = p.tokens - front < W ? p.tokens - front : W;
    sync_block();  // the sample before has been dealt with
#pragma unroll 1
    for (int j = warp; j < width; j += WARPS) {
      const int64_t place = rows.place(begin, front + j);
      Moved moved;
      float bad = 0;
      const float log_det = next_token(p, rows, begin + j, front + j - 1, [&](int d, float value, float xa) {
        moved.take(load(x, place * D + d), value, xa);
        if (!(fabsf(value) < INFINITY)) bad = 1;
      });
      const float change = largest_lane(moved.change), residual = largest_lane(moved.residual);
      bad = largest_lane(bad);
      if (lane > 0) continue;
      store(log_dets, place, log_det);
      store(memory, j, change);
      store(memory, W + j, residual);
      store(memory, 2 * W + j, bad);
    }
    sync_block();
    int kept = 0;
    float residual = 0;
#pragma unroll 1
    for (; kept < width && load(memory, kept) <= p.tol; kept++) residual = larger(residual, load(memory, W + kept));
    const bool failed = kept < width && load(memory, 2 * W + kept) > 0;
#pragma unroll 1
    for (int j = kept + warp; j < width; j += WARPS) {
      const int64_t place = rows.place(begin, front + j);
      const bool back = j > kept && load(memory, 2 * W + j) > 0;
      next_token(p, rows, begin + j, front + j - 1, [&](int d, float value, float) {
        if (!failed || j == kept) store(x, place * D + d, back ? load(guess, place * D + d) : value);
      });
    }
    if (failed) {
      const int64_t first = rows.place(begin, front + kept + 1) * D;
      const int count = (p.tokens - front - kept - 1) * D;
      for (int i = thread(); i < count; i += WARPS * 32) store(x, first + i, NAN);
    }
    if (thread() > 0) continue;
    store(reached, sample, failed ? p.tokens : kept < width ? front + kept + 1 : front + width);
    store(evaluations, sample, load(evaluations, sample) + width);
    store(residuals, sample, larger(load(residuals, sample), residual));
  }
}

}  // namespace tarflow
