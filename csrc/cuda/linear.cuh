// One linear layer of a pass, Y = X Wᵀ + b, where each block makes its own tiles of 16 outputs, for all rows.
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

// sums += W X for one slot, by the k-tiles of this warp. The n-tiles [first, first + count) of rows are staged.
template <int NT, int WARPS, class T>
DEVICE void multiply(float (&sums)[NT][4], Shared<T> slots, int slot, int k_tiles, const Scratch<T>& scratch, int first,
                     int count) {
  const int lane = thread() % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int k = thread() / 32; k < k_tiles; k += WARPS) {
    const auto a = load_vector<8>(slots, slot + (k * 32 + lane) * 8);
#pragma unroll
    for (int n = 0; n < NT; n++) {
      if (n < first || n >= first + count) continue;
      const int at = ((n - first) * 8 + g) * scratch.stride + k * TILE + 2 * t;
      multiply_tiles(sums[n], a, load_vector<2>(scratch.staged, at), load_vector<2>(scratch.staged, at + 8));
    }
  }
}

// Does the same in fp32, by the same lanes. The slot holds tiles of 16 outputs × 16 inputs as they are.
template <int NT, int WARPS>
DEVICE void multiply(float (&sums)[NT][4], Shared<float> slots, int slot, int k_tiles, const Scratch<float>& scratch,
                     int first, int count) {
  const int lane = thread() % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int k = thread() / 32; k < k_tiles; k += WARPS) {
    const int a = slot + k * TILE * TILE + g * TILE;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      if (n < first || n >= first + count) continue;
      const int b = ((n - first) * 8 + 2 * t) * scratch.stride + k * TILE;
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
// + count) of X into scratch.staged, from row 0 and column 0 on. finish(n, row, y) takes an output, on one thread.
template <int NT, int WARPS, class T, class Stage, class Finish>
DEVICE void linear(const Params& p, const Linear& layer, int rows, Ring<T, WARPS>& ring, Shared<int> work,
                   const Scratch<T>& scratch, Stage stage, Finish finish) {
  const Global<const float> biases(p.biases);
  const int first_tile = load(work, 2 * layer.index), tiles = load(work, 2 * layer.index + 1);
  const int groups = divide_up(rows, p.staged_rows), slot_tiles = p.slot_k / TILE;
  int staged = -1;
  for (int tile = first_tile; tile < first_tile + tiles; tile++) {
    float sums[NT][4] = {};
    for (int k = 0; k < layer.k_tiles; k += slot_tiles) {
      const int k_tiles = layer.k_tiles - k < slot_tiles ? layer.k_tiles - k : slot_tiles;
      int slot = 0;
      for (int group = 0; group < groups; group++) {
        const int first = group * p.staged_rows;
        const int count = rows - first < p.staged_rows ? rows - first : p.staged_rows;
        if (staged != k * groups + group) {
          if (staged >= 0) {
            sync_block();  // all warps have read what is staged
            ring.release(group > 0);
            ring.fill();
          }
          section(STAGING);
          stage(first, count, k * TILE, k_tiles * TILE);
          staged = k * groups + group;
        }
        section(FETCH);
        if (group == 0) slot = ring.take();
        section(STAGING);
        sync_block();
        section(MULTIPLY);
        multiply<NT, WARPS>(sums, ring.slots(), slot, k_tiles, scratch, first / 8, divide_up(count, 8));
      }
    }
    section(SUMS);
    const int lane = thread() % 32, warp = thread() / 32;
#pragma unroll
    for (int n = 0; n < NT; n++)
      if (n * 8 < rows)
        store_vector(scratch.sums, ((n * WARPS + warp) * 32 + lane) * 4,
                     Vector<float, 4>{sums[n][0], sums[n][1], sums[n][2], sums[n][3]});
    sync_block();
    ring.release();
    section(EPILOGUE);
#pragma unroll 1
    for (int i = thread(); i < rows * TILE; i += WARPS * 32) {
      const int m = i % TILE, row = i / TILE, n = row % 8;
      const int of_lane = (m % 8) * 4 + n / 2, of_sum = m / 8 * 2 + n % 2;
      float y = constant(biases, layer.biases + tile * TILE + m);
      for (int w = 0; w < WARPS; w++) y += load(scratch.sums, ((row / 8 * WARPS + w) * 32 + of_lane) * 4 + of_sum);
      finish(tile * TILE + m, row, y);
    }
  }
}

// Takes the weights of a layer that is skipped.
template <int WARPS, class T>
DEVICE void skip(const Params& p, const Linear& layer, Ring<T, WARPS>& ring, Shared<int> work) {
  const int slots = divide_up(layer.k_tiles, p.slot_k / TILE) * load(work, 2 * layer.index + 1);
  for (int i = 0; i < slots; i++) {
    ring.take();
    ring.release();
    ring.fill();
  }
}

}  // namespace tarflow
