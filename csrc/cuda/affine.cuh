// The affine update, from the transformer's output after a token to the token after it.
//
//   xa ← xa + g (xa − xa_u), xb ← xb + g (xb − xb_u) with guidance;   x = z · exp(xa) + xb;   log-det = Σ_d xa
#pragma once

#include "rows.cuh"

namespace tarflow {

struct Parameters {
  float xa, xb;
};

// Returns value d of the guided parameters after a position's token. guidance: g after that token.
DEVICE Parameters parameters_at(const Params& p, int position, int token, int d) {
  const Global<float> parameters(p.parameters);
  const int stride = whole_tiles(p.out_dim);
  const int64_t at = static_cast<int64_t>(position) * stride + d;
  const int64_t shift = p.affine ? p.token_dim : 0;
  Parameters y{p.affine ? load(parameters, at) : 0.0f, load(parameters, at + shift)};
  if (p.branches == 2) {
    const int64_t unguided = at + static_cast<int64_t>(p.positions) * stride;
    const float g = constant(Global<const float>(p.guidance), token);
    if (p.affine && p.guide_a) y.xa += g * (y.xa - load(parameters, unguided));
    if (p.guide_b) y.xb += g * (y.xb - load(parameters, unguided + shift));
  }
  return y;
}

// Returns the sum over the lanes of a warp.
DEVICE float sum_lanes(float value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// Returns the larger, or NaN if one is NaN.
DEVICE float larger(float a, float b) { return a != a || a > b ? a : b; }

DEVICE float largest_lane(float value) {
  for (int mask = 16; mask > 0; mask /= 2) value = larger(value, shuffle_xor(value, mask));
  return value;
}

// Makes token `token` + 1 of a position, by a warp. take(d, x, xa) gets each value, on one lane. Returns the log-det.
template <class Take>
DEVICE float next_token(const Params& p, const Rows& rows, int position, int token, Take take) {
  const Global<const float> z(p.z);
  const int64_t at = rows.place(position, token + 1) * p.token_dim;
  float log_det = 0;
#pragma unroll 1
  for (int d = thread() % 32; d < p.token_dim; d += 32) {
    const Parameters y = parameters_at(p, position, token, d);
    take(d, constant(z, at + d) * expf(y.xa) + y.xb, y.xa);
    log_det += y.xa;
  }
  return sum_lanes(log_det);
}

// How far a token moves, and its residual: max_d |new x − old x| and max_d |new x − old x| · exp(−xa). A warp computes
// them, and each lane has a part until `largest_lane`.
struct Moved {
  float change = 0, residual = 0;

  DEVICE void take(float before, float after, float xa) {
    const float moved = fabsf(after - before);
    change = larger(change, moved);
    residual = larger(residual, moved * expf(-xa));
  }
};

// Puts the tokens after those that were evaluated into x and log_det. Positions are divided among the grid's warps.
template <int WARPS>
DEVICE void update(const Params& p, const Rows& rows) {
  const Global<float> x(p.x), log_dets(p.log_det), changes(p.change), residuals(p.residual);
#pragma unroll 1
  for (int i = block() + thread() / 32 * blocks(); i < p.positions; i += WARPS * blocks()) {
    const int token = rows.token_at(i);
    const int64_t place = rows.place(i, token + 1);
    Moved moved;
    const float log_det = next_token(p, rows, i, token, [&](int d, float value, float xa) {
      if (p.mode == FIXED_POINT) moved.take(load(x, place * p.token_dim + d), value, xa);
      store(x, place * p.token_dim + d, value);
    });
    const float change = largest_lane(moved.change), residual = largest_lane(moved.residual);
    if (thread() % 32 > 0) continue;
    store(log_dets, place, log_det);
    if (p.mode == SEQUENTIAL) continue;
    const int64_t at = p.sample[i] * (p.change.count / p.samples) + p.column[i];
    store(changes, at, change);
    store(residuals, at, residual);
  }
}

}  // namespace tarflow
