// The packed linear layers of a flow block: proj_in, then qkv, proj, fc1, fc2 of each layer, then proj_out.
#pragma once

#include "device.cuh"

namespace tarflow {

DEVICE int divide_up(int n, int by) { return (n + by - 1) / by; }

// Returns n / by rounded down, for 0 ≤ n < 2^19, in half of the time of a division of integers. (n + ½) / by is at least
// 1 / (2 by) away from a whole number, which is more than its error.
DEVICE int divide(int n, int by) {
  instructions(15);
  return static_cast<int>(quotient(n + 0.5f, static_cast<float>(by)));
}
DEVICE int whole_tiles(int n) { return divide_up(n, TILE) * TILE; }

// Returns how often the inputs of a phase's product are halved among blocks.
DEVICE int halvings_of(const Params& p, Phase phase) {
  return phase == PROJ ? p.proj_halvings : phase == FC2 ? p.fc2_halvings : 0;
}

struct Linear {
  int index;     // the layer's number among the packed ones
  int tiles;     // tiles along its outputs
  int k_tiles;   // tiles along its inputs
  int biases;    // where its biases begin
  int halvings;  // 2^halvings parts of its inputs are units of work of their own, for each group of rows

  // Returns the first tile along the inputs of a part.
  DEVICE int first_k(int part) const { return k_tiles * part >> halvings; }
};

// A unit of work: a tile of outputs, a part of its inputs, and a group of rows.
struct Unit {
  int tile, part = 0, group;

  DEVICE Unit(const Linear& layer, int unit) : tile(unit) {
    for (; tile >= layer.tiles; tile -= layer.tiles) part++;
    group = part >> layer.halvings;
    part -= group << layer.halvings;
  }
};

DEVICE Linear linear_of(const Params& p, Phase phase, int layer) {
  const int c = divide_up(p.channels, TILE), qkv = divide_up(3 * p.channels, TILE), f = divide_up(p.hidden_dim, TILE);
  const int before = c + layer * (qkv + c + f + c);  // tiles of outputs
  switch (phase) {
    case EMBED: return {0, c, divide_up(p.token_dim, TILE), 0, 0};
    case QKV: return {4 * layer + 1, qkv, c, before * TILE, 0};
    case PROJ: return {4 * layer + 2, c, c, (before + qkv) * TILE, p.proj_halvings};
    case FC1: return {4 * layer + 3, f, c, (before + qkv + c) * TILE, 0};
    case FC2: return {4 * layer + 4, c, f, (before + qkv + c + f) * TILE, p.fc2_halvings};
    default: return {4 * p.layers + 1, divide_up(p.out_dim, TILE), c, (c + p.layers * (qkv + c + f + c)) * TILE, 0};
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
