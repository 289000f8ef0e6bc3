// One linear layer of a pass, Y = X Wᵀ + b, where each block makes its own tiles of 16 outputs, for all rows; or the sums
// of a part of their inputs, of which b is in the first.
//
// A tile's inputs are divided among the block's warps, which multiply with the weights as the 16-row operand and up to
// NT · 8 rows as the other; their sums are added up in the warps' order, so that a row's result depends on nothing but
// that row. A block that has several tiles of a layer prepares X once where it fits in shared memory.
#pragma once

#include "ring.cuh"

namespace tarflow {

// The shared memory of a product. staged: (staged_rows, stride) of X, where the stride keeps lanes in different banks.
// sums: (NT, WARPS, 32, 4).
template <class T>
struct Scratch {
  Shared<T> staged;
  int stride;
  Shared<float> sums;
};

// Few rows leave a tensor core waiting for its own sums, unless these are in two parts.
template <int NT>
constexpr int CHAINS = NT <= 2 ? 2 : 1;

// What a warp multiplies for two of its k-tiles, k and k + WARPS: W, and X of each n-tile.
template <int NT, class T>
struct Operands {
  Vector<T, 8> a[2];
  Vector<T, 2> b[NT][4];
};

// sums += W X for one slot, by the k-tiles of this warp. The n-tiles [first, first + count) of rows are staged, from
// column `column` of `staged` on.
template <int NT, int WARPS, class T>
DEVICE void multiply(float (&sums)[CHAINS<NT> * NT][4], Shared<T> slots, int slot, int k_tiles,
                     const Scratch<T>& scratch, int column, int first, int count) {
  const int lane = thread() % 32, matrix = lane / 8;
  const int at = lane % 8 * scratch.stride + column + matrix % 2 * 8;
  const auto read = [&](Operands<NT, T>& to, int k) {
    const bool both = k + WARPS < k_tiles;
    to.a[0] = load_vector<8>(slots, slot + (k * 32 + lane) * 8);
    if (both) to.a[1] = load_vector<8>(slots, slot + ((k + WARPS) * 32 + lane) * 8);
    const int from = at + (both && matrix >= 2 ? k + WARPS : k) * TILE;
#pragma unroll
    for (int n = 0; n < NT; n++)
      if (n >= first && n < first + count)
        load_matrices(to.b[n], scratch.staged, from + (n - first) * 8 * scratch.stride);
  };
  const auto add = [&](const Operands<NT, T>& of, int k) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (k + i * WARPS >= k_tiles) continue;
#pragma unroll
      for (int n = 0; n < NT; n++)
        if (n >= first && n < first + count)
          multiply_tiles(sums[i % CHAINS<NT> * NT + n], of.a[i], of.b[n][2 * i], of.b[n][2 * i + 1]);
    }
  };
  constexpr int STEP = 2 * WARPS;
  int k = thread() / 32;
  if constexpr (NT == 8) {  // two sets of operands would not fit in registers
    Operands<NT, T> now = {};
#pragma unroll 1
    for (; k < k_tiles; k += STEP) {
      read(now, k);
      add(now, k);
    }
  } else {
    Operands<NT, T> now = {}, next = {};
    if (k < k_tiles) read(now, k);
#pragma unroll 1
    for (; k < k_tiles; k += 2 * STEP) {
      if (k + STEP < k_tiles) read(next, k + STEP);
      add(now, k);
      if (k + 2 * STEP < k_tiles) read(now, k + 2 * STEP);
      if (k + STEP < k_tiles) add(next, k + STEP);
    }
  }
}

// Does the same in fp32, by the same lanes. The slot holds tiles of 16 outputs × 16 inputs as they are.
template <int NT, int WARPS>
DEVICE void multiply_plain(float (&sums)[CHAINS<NT> * NT][4], Shared<float> slots, int slot, int k_tiles,
                           const Scratch<float>& scratch, int column, int first, int count) {
  const int lane = thread() % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int k = thread() / 32; k < k_tiles; k += WARPS) {
    const int a = slot + k * TILE * TILE + g * TILE;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      if (n < first || n >= first + count) continue;
      const int b = ((n - first) * 8 + 2 * t) * scratch.stride + column + k * TILE;
#pragma unroll
      for (int i = 0; i < TILE; i++) {
        const float high = load(slots, a + i), low = load(slots, a + 8 * TILE + i);
        const float even = load(scratch.staged, b + i), odd = load(scratch.staged, b + scratch.stride + i);
        sums[n][0] += high * even;
        sums[n][1] += high * odd;
        sums[n][2] += low * even;
        sums[n][3] += low * odd;
      }
    }
  }
}

// Computes a layer. stage(first, count, k0, k), called by all threads, puts columns [k0, k0 + k) of rows [first, first
// + count) of X into scratch.staged, from row 0 and column 0 on. before(part, n, row) loads what finish needs, long before
// finish(part, n, row, y, loaded) takes an output, on the same thread. biases: (bias_tiles, 16), of all tiles of this block,
// with those of this layer from first_bias on.
template <int NT, int WARPS, class T, class Stage, class Before, class Finish>
DEVICE void linear(const Params& p, const Linear& layer, int rows, Ring<T, WARPS>& ring, Shared<int> work,
                   const Scratch<T>& scratch, Shared<float> biases, int first_bias, Stage stage, Before before,
                   Finish finish) {
  constexpr int EACH = (NT * 8 * TILE + WARPS * 32 - 1) / (WARPS * 32);  // outputs of a tile that a thread finishes
  const int units = load(work, 2 * layer.index + 1);
  const int groups = divide_up(rows, p.staged_rows), slot_tiles = p.slot_k / TILE, staged_tiles = p.staged_k / TILE;
  const int lane = thread() % 32, warp = thread() / 32, m = thread() % TILE, own_row = thread() / TILE;
  int staged_k = -1, staged_group = -1;
  Unit unit(layer, load(work, 2 * layer.index));
  for (int i = 0; i < units; i++, unit.tile++) {
    if (unit.tile == layer.tiles) unit = {layer, layer.tiles * (unit.part + 1)};
    const int tile = unit.tile, part = unit.part, end_k = layer.first_k(part + 1);
    Loaded<float> bias = {};
    if (part == 0 && p.bias_tiles)
      bias = load(biases, (first_bias + i) * TILE + m);
    else if (part == 0)
      bias = constant(Global<const float>(p.biases), layer.biases + tile * TILE + m);
    decltype(before(0, 0, 0)) loaded[EACH] = {};
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int row = own_row + j * WARPS * 2;
      if (row < rows) loaded[j] = before(part, tile * TILE + m, row);
    }
    float sums[CHAINS<NT> * NT][4] = {};
    const int first_k = layer.first_k(part);
    int from_k = first_k;  // the first k-tile that is staged together with k
    for (int k = first_k; k < end_k; k += slot_tiles) {
      const int k_tiles = end_k - k < slot_tiles ? end_k - k : slot_tiles;
      if (k + k_tiles > from_k + staged_tiles) from_k = k;
      int slot = 0;
      for (int group = 0; group < groups; group++) {
        const int first = group * p.staged_rows;
        const int count = rows - first < p.staged_rows ? rows - first : p.staged_rows;
        if (staged_k != from_k || staged_group != group) {
          if (staged_k >= 0) {
            sync_block();  // all warps have read what is staged
            ring.release(group > 0);
            ring.fill();
          }
          const int rest = end_k - from_k;
          section(STAGING);
          stage(first, count, from_k * TILE, (rest < staged_tiles ? rest : staged_tiles) * TILE);
          staged_k = from_k;
          staged_group = group;
        }
        section(FETCH);
        if (group == 0 && k > first_k && ring.empty()) {  // all that was fetched has been multiplied
          sync_block();
          ring.release();
          ring.fill();
        }
        if (group == 0) slot = ring.take();
        section(STAGING);
        sync_block();
        section(MULTIPLY);
        const int column = (k - from_k) * TILE, n_tiles = divide_up(count, 8);
        if constexpr (sizeof(T) == 4)
          multiply_plain<NT, WARPS>(sums, ring.slots(), slot, k_tiles, scratch, column, first / 8, n_tiles);
        else
          multiply<NT, WARPS>(sums, ring.slots(), slot, k_tiles, scratch, column, first / 8, n_tiles);
      }
    }
    section(SUMS);
#pragma unroll
    for (int n = 0; n < NT; n++) {
      if (n * 8 >= rows) continue;
      if constexpr (CHAINS<NT> == 2)
        for (int i = 0; i < 4; i++) sums[n][i] += sums[NT + n][i];
      store_vector(scratch.sums, ((n * WARPS + warp) * 32 + lane) * 4,
                   Vector<float, 4>{sums[n][0], sums[n][1], sums[n][2], sums[n][3]});
    }
    sync_block();
    ring.release();
    section(EPILOGUE);
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int row = own_row + j * WARPS * 2, n = row % 8;
      if (row >= rows) continue;
      const int of_lane = m % 8 * 4 + n / 2, of_sum = m / 8 * 2 + n % 2;
      Loaded<float> parts[WARPS];
#pragma unroll
      for (int w = 0; w < WARPS; w++)
        parts[w] = load(scratch.sums, ((row / 8 * WARPS + w) * 32 + of_lane) * 4 + of_sum);
      float y = bias;
#pragma unroll
      for (int w = 0; w < WARPS; w++) y += parts[w];
      finish(part, tile * TILE + m, row, y, loaded[j]);
    }
  }
}

// Takes the weights of a layer that is skipped.
template <int WARPS, class T>
DEVICE void skip(const Params& p, const Linear& layer, Ring<T, WARPS>& ring, Shared<int> work) {
  const int first = load(work, 2 * layer.index), units = load(work, 2 * layer.index + 1), slot_tiles = p.slot_k / TILE;
  for (int i = first; i < first + units; i++) {
    const int part = Unit(layer, i).part;
    for (int k = layer.first_k(part); k < layer.first_k(part + 1); k += slot_tiles) {
      ring.take();
      ring.release();
      ring.fill();
    }
  }
}

}  // namespace tarflow
