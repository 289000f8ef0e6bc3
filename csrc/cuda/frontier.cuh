// Parallel passes over the tokens ahead of each sample's frontier, without the host, by the rule of
// tarflow_fast/solvers/frontier.py.
//
// A pass evaluates the window [reached, reached + W) of each sample. Its first tokens keep their guesses as long as
// each moved by no more than tol, or than rounding of the stream may move it. The first that moved by more gets its new
// value. The tokens after it get their new values as guesses, or start again from where they began if they overflow. A
// sample whose final token is not finite has failed: the tokens after it become NaN.
#pragma once

#include "affine.cuh"

namespace tarflow {

// Looks up the tokens that the next pass evaluates. Returns whether there are any, which is the same in all blocks.
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

// The findings of a pass for each token of a sample's window.
struct Found {
  Shared<float> memory;  // 5 W + 1 floats
  int W;

  DEVICE Loaded<float> change(int j) const { return load(memory, j); }
  DEVICE Loaded<float> residual(int j) const { return load(memory, W + j); }
  DEVICE bool bad(int j) const { return load(memory, 2 * W + j) > 0; }
  DEVICE Loaded<float> size(int j) const { return load(memory, 3 * W + j); }  // of the guess, at least 1
  // How far token j had moved in the pass before; −1 is the token before the window.
  DEVICE Loaded<float> before(int j) const { return load(memory, 4 * W + 1 + j); }
  DEVICE void keep_before(int j, float moved) const { store(memory, 4 * W + 1 + j, moved); }
  DEVICE void keep(int j, const Moved& moved, float bad, float size) const {
    store(memory, j, moved.change);
    store(memory, W + j, moved.residual);
    store(memory, 2 * W + j, bad);
    store(memory, 3 * W + j, size);
  }
};

// Does `Trail.record` for a sample, by a block, whose threads take a token each. The constants are those of
// tarflow_fast/solvers/trail.py.
template <int WARPS>
DEVICE void record(const Params& p, int sample, int front, int width, int kept, const Found& found) {
  constexpr float NEAR = 0.5f, FORGET = 0.9f;
  constexpr int AT_ONCE = 4;
  const Global<float> trail(p.trail);
  const int64_t plane = static_cast<int64_t>(p.samples) * p.tokens;
  const int64_t first = static_cast<int64_t>(sample) * p.tokens + front;
  const int j = thread();
  for (int i = thread(); i <= width; i += WARPS * 32) found.keep_before(i - 1, load(trail, first + i - 1));
  sync_block();
  if (j >= width) return;
  const int64_t moved = first + j, sensitivity = moved + plane, defect = sensitivity + plane, scale = defect + plane;
  const Loaded<float> shown_before = load(trail, sensitivity), scale_before = load(trail, scale);
  float reach = 0, size = 1;
#pragma unroll 1
  for (int begin = 0; begin <= j; begin += AT_ONCE) {
    Loaded<float> moves[AT_ONCE] = {}, sizes[AT_ONCE] = {};
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      if (begin + u > j) continue;
      moves[u] = found.before(begin + u - 1);
      sizes[u] = found.size(begin + u);
    }
    instructions(4 * AT_ONCE);
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      reach = larger(reach, moves[u]);
      size = larger(size, sizes[u]);
    }
  }
  const float before = found.before(j), change = found.change(j), residual = found.residual(j);
  const bool finite = !found.bad(j);
  if (finite && before >= 0 && before < INFINITY && reach > p.rounding * size && reach <= NEAR * size) {
    const float shown = larger(change - p.rounding * found.size(j), 0.0f) / reach;
    store(trail, sensitivity, larger(shown, FORGET * shown_before));
  }
  if (finite && residual > 0 && residual < INFINITY)
    store(trail, scale, larger(change / residual, FORGET * scale_before));
  store(trail, defect, j < kept ? change : 0.0f);
  store(trail, moved, j < kept ? 0.0f : finite ? change : INFINITY);
}

// Makes final what a pass allows. A block takes a sample. memory: 5 W + 1 floats.
template <int WARPS>
DEVICE void advance(const Params& p, const Rows& rows, Shared<float> memory) {
  const Global<float> x(p.x), guess(p.guess), log_dets(p.log_det), residuals(p.residual);
  const Global<int> reached(p.reached), evaluations(p.evaluations);
  const int warp = thread() / 32, lane = thread() % 32, D = p.token_dim, W = p.window;
  const Found found{memory, W};
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
      float bad = 0, size = 1;
      const auto before = [&](int d) { return load(x, place * D + d); };
      const float log_det =
          next_token(p, rows, begin + j, front + j - 1, before, [&](int, float value, float xa, float old) {
        moved.take(old, value, xa);
        size = larger(size, fabsf(old));
        if (!(fabsf(value) < INFINITY)) bad = 1;
      });
      float most[4] = {moved.change, moved.residual, bad, size};
      largest_lane(most);
      if (lane > 0) continue;
      store(log_dets, place, log_det);
      found.keep(j, {most[0], most[1]}, most[2], most[3]);
    }
    sync_block();
    int kept = 0;  // by each warp, whose lanes take a token each
#pragma unroll 1
    for (int first = 0, stay = 32; first < width && stay == 32; first += 32) {
      const int j = first + lane;
      Loaded<float> change = {}, size = {};
      if (j < width) {
        change = found.change(j);
        size = found.size(j);
      }
      const float least = p.tol > 0 ? larger(p.tol, p.stream * size) : 0.0f;
      stay = first_lane(j >= width || !(change <= least));
      kept += stay;
    }
    const bool failed = kept < width && found.bad(kept);
#pragma unroll 1
    for (int j = kept + warp; j < width; j += WARPS) {
      const int64_t place = rows.place(begin, front + j);
      const bool back = j > kept && found.bad(j);
      const auto before = [&](int d) { return back ? load(guess, place * D + d) : Loaded<float>{}; };
      next_token(p, rows, begin + j, front + j - 1, before, [&](int d, float value, float, float start) {
        if (!failed || j == kept) store(x, place * D + d, back ? start : value);
      });
    }
    if (failed) {
      const int64_t first = rows.place(begin, front + kept + 1) * D;
      const int count = (p.tokens - front - kept - 1) * D;
      for (int i = thread(); i < count; i += WARPS * 32) store(x, first + i, NAN);
    }
    record<WARPS>(p, sample, front, width, kept, found);
    if (warp > 0) continue;
    float residual[1] = {};
#pragma unroll 1
    for (int j = lane; j < kept; j += 32) residual[0] = larger(residual[0], found.residual(j));
    largest_lane(residual);
    if (lane > 0) continue;
    store(reached, sample, failed ? p.tokens : kept < width ? front + kept + 1 : front + width);
    store(evaluations, sample, load(evaluations, sample) + width);
    store(residuals, sample, larger(load(residuals, sample), residual[0]));
  }
}

}  // namespace tarflow
