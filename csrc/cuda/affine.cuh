// The affine update, from the transformer's output after a token to the token after it.
//
//   xa ← xa + g (xa − xa_u), xb ← xb + g (xb − xb_u) with guidance;   x = z · exp(xa) + xb;   log-det = Σ_d xa
#pragma once

#include "rows.cuh"

namespace tarflow {

struct Parameters {
  float xa, xb;
};

constexpr int TOKEN_AT_ONCE = 6;  // the values of a token that a lane has under way: a patch of 8 × 8 × 3 is one round

// Value d of the parameters after a position's token, on its way, in both branches.
struct LoadedParameters {
  Loaded<float> xa = {}, xb = {}, unguided_xa = {}, unguided_xb = {};

  DEVICE void load_from(const Params& p, int position, int d) {
    const Global<float> parameters(p.parameters);
    const int stride = whole_tiles(p.out_dim);
    const int64_t at = static_cast<int64_t>(position) * stride + d,
                  unguided = at + static_cast<int64_t>(p.positions) * stride;
    const int64_t shift = p.affine ? p.token_dim : 0;
    if (p.affine) xa = load(parameters, at);
    xb = load(parameters, at + shift);
    if (p.branches == 2 && p.affine && p.guide_a) unguided_xa = load(parameters, unguided);
    if (p.branches == 2 && p.guide_b) unguided_xb = load(parameters, unguided + shift);
  }
  // g: of the guidance after that token, 0 without.
  DEVICE Parameters guided(const Params& p, float g) const {
    Parameters y{p.affine ? static_cast<float>(xa) : 0.0f, xb};
    if (p.branches == 2 && p.affine && p.guide_a) y.xa += g * (y.xa - unguided_xa);
    if (p.branches == 2 && p.guide_b) y.xb += g * (y.xb - unguided_xb);
    return y;
  }
};

// Replaces each value by what `combine` makes of those of all lanes of a warp, by twos.
template <int N, class Combine>
DEVICE void over_lanes(float (&values)[N], Combine combine) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    Loaded<float> others[N];
#pragma unroll
    for (int i = 0; i < N; i++) others[i] = shuffle_xor(values[i], mask);
#pragma unroll
    for (int i = 0; i < N; i++) values[i] = combine(values[i], others[i]);
  }
}

// Replaces each value by its sum over the lanes of a warp.
template <int N>
DEVICE void sum_lanes(float (&values)[N]) {
  over_lanes(values, [](float a, float b) { return a + b; });
}
DEVICE float sum_lanes(float value) {
  float values[1] = {value};
  sum_lanes<1>(values);
  return values[0];
}

// Returns the larger, or NaN if one is NaN.
DEVICE float larger(float a, float b) { return a != a || a > b ? a : b; }

// Replaces each value by the largest of the lanes of a warp.
template <int N>
DEVICE void largest_lane(float (&values)[N]) {
  over_lanes(values, larger);
}

// Makes token `token` + 1 of a position, by a warp. before(d) loads what take(d, x, xa, loaded) needs besides each value,
// on one lane. Returns the log-det.
template <class Before, class Take>
DEVICE float next_token(const Params& p, const Rows& rows, int position, int token, Before before, Take take) {
  const Global<const float> z(p.z);
  const int64_t at = rows.place(position, token + 1) * p.token_dim;
  Loaded<float> g = {};
  if (p.branches == 2) g = constant(Global<const float>(p.guidance), token);
  float log_det = 0;
#pragma unroll 1
  for (int begin = thread() % 32; begin < p.token_dim; begin += 32 * TOKEN_AT_ONCE) {
    LoadedParameters parameters[TOKEN_AT_ONCE];
    Loaded<float> latent[TOKEN_AT_ONCE] = {}, loaded[TOKEN_AT_ONCE] = {};
#pragma unroll
    for (int u = 0; u < TOKEN_AT_ONCE; u++) {
      const int d = begin + u * 32;
      if (d >= p.token_dim) continue;
      parameters[u].load_from(p, position, d);
      latent[u] = constant(z, at + d);
      loaded[u] = before(d);
    }
#pragma unroll
    for (int u = 0; u < TOKEN_AT_ONCE; u++) {
      const int d = begin + u * 32;
      if (d >= p.token_dim) continue;
      const Parameters y = parameters[u].guided(p, g);
      instructions(20);
      take(d, latent[u] * expf(y.xa) + y.xb, y.xa, loaded[u]);
      log_det += y.xa;
    }
  }
  return sum_lanes(log_det);
}

// What `before` of next_token is where nothing else is needed.
struct Nothing {
  DEVICE Loaded<float> operator()(int) const { return {}; }
};

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
    const auto before = [&](int d) {
      return p.mode == FIXED_POINT ? load(x, place * p.token_dim + d) : Loaded<float>{};
    };
    const float log_det = next_token(p, rows, i, token, before, [&](int d, float value, float xa, float old) {
      if (p.mode == FIXED_POINT) moved.take(old, value, xa);
      store(x, place * p.token_dim + d, value);
    });
    float most[2] = {moved.change, moved.residual};
    largest_lane(most);
    if (thread() % 32 > 0) continue;
    store(log_dets, place, log_det);
    if (p.mode == SEQUENTIAL) continue;
    const int64_t at = p.sample[i] * (p.change.count / p.samples) + p.column[i];
    store(changes, at, most[0]);
    store(residuals, at, most[1]);
  }
}

}  // namespace tarflow
