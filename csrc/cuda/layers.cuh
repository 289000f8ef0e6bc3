// The packed linear layers of a flow block: proj_in, then qkv, proj, fc1, fc2 of each layer, then proj_out.
#pragma once

#include "device.cuh"

namespace tarflow {

DEVICE int divide_up(int n, int by) { return (n + by - 1) / by; }
DEVICE int whole_tiles(int n) { return divide_up(n, TILE) * TILE; }

struct Linear {
  int index;    // the layer's number among the packed ones
  int k_tiles;  // tiles along its inputs
  int biases;   // where its biases begin
};

DEVICE Linear linear_of(const Params& p, Phase phase, int layer) {
  const int c = divide_up(p.channels, TILE), qkv = divide_up(3 * p.channels, TILE), f = divide_up(p.hidden_dim, TILE);
  const int before = c + layer * (qkv + c + f + c);  // tiles of outputs
  switch (phase) {
    case EMBED: return {0, divide_up(p.token_dim, TILE), 0};
    case QKV: return {4 * layer + 1, c, before * TILE};
    case PROJ: return {4 * layer + 2, c, (before + qkv) * TILE};
    case FC1: return {4 * layer + 3, c, (before + qkv + c) * TILE};
    case FC2: return {4 * layer + 4, f, (before + qkv + c + f) * TILE};
    default: return {4 * p.layers + 1, c, (c + p.layers * (qkv + c + f + c)) * TILE};
  }
}

// Returns the layer of a number among the packed ones.
DEVICE Linear linear_at(const Params& p, int index) {
  if (index == 0) return linear_of(p, EMBED, 0);
  if (index == 4 * p.layers + 1) return linear_of(p, PROJ_OUT, 0);
  const int which = (index - 1) % 4;
  return linear_of(p, which == 0 ? QKV : which == 1 ? PROJ : which == 2 ? FC1 : FC2, (index - 1) / 4);
}

}  // namespace tarflow
