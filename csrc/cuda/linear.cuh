// One linear layer of a pass, Y = X Wᵀ + b, where each block makes its own tiles of 16 outputs, for all rows; or the sums
// of a part of their inputs, of which b is in the first.
//
// A tile's inputs are divided among warps, which multiply with the weights as the 16-row operand and up to NT · 8 rows as
// the other; their sums are added up in the warps' order, so that a row's result depends on nothing but that row. Of more
// than 16 rows half of the block's warps do that, which makes half as many sums, and the others stage one half of X while
// the first one is multiplied. A block that has several tiles of a layer prepares X once where it fits in shared memory.
#pragma once

#include "ring.cuh"

namespace tarflow {

// The shared memory of a product. staged: (staged_rows, stride) of X, where the stride keeps lanes in different banks.
// sums: (ABREAST<NT, T>, NT, MULTIPLIERS<NT, WARPS>, 32, 4), or with `sums_in_slots` those of each tile in its slot, which
// is then the first memory of the ring.
template <class T>
struct Scratch {
  Shared<T> staged;
  int stride;
  Shared<float> sums;
};

// Few rows leave a tensor core waiting for its own sums, unless these are in two parts.
template <int NT>
constexpr int CHAINS = NT <= 2 ? 2 : 1;

// Tiles of outputs that are multiplied with what is read once of X, where each has one slot. 16 rows have no registers
// for two on sm_80. plan.py counts their sums, too.
template <int NT, class T>
constexpr int ABREAST = sizeof(T) == 4 || NT == 2 ? 1
                        : NT == 1                 ? 2
                                                  : 3;

// The warps that multiply, which are the first ones.
template <int NT, int WARPS>
constexpr int MULTIPLIERS = NT > 2 && WARPS > 1 ? WARPS / 2 : WARPS;

// What is staged of X at once: all columns; or the first half by all warps, and the rest by those that do not multiply.
enum Share { WHOLE, FIRST, REST };

DEVICE int first_half(int k_tiles) { return k_tiles / 2; }

// What a warp multiplies for two of its k-tiles, k and k + WARPS: W of each tile, and X of each n-tile.
template <int NT, class T>
struct Operands {
  Vector<T, 8> a[ABREAST<NT, T>][2];
  Vector<T, 2> b[NT][4];
};

// Returns the first of the k-tiles from `begin` on that this warp takes, one in WARPS: whichever share they are in.
template <int WARPS>
DEVICE int first_k(int begin) {
  const int warp = thread() / 32;
  return begin == 0 ? warp : begin + ((warp - begin) & (WARPS - 1));
}

// sums += W X for the slots of up to ABREAST tiles, by the k-tiles [begin, end) of this warp: one in WARPS. The n-tiles
// [first, first + count) of rows are staged, from column `column` of `staged` on.
template <int NT, int WARPS, class T>
DEVICE void multiply(float (&sums)[ABREAST<NT, T>][CHAINS<NT> * NT][4], Shared<T> slots,
                     const int (&slot)[ABREAST<NT, T>], int tiles, int begin, int end, const Scratch<T>& scratch,
                     int column, int first, int count) {
  const int lane = thread() % 32, matrix = lane / 8;
  const int at = lane % 8 * scratch.stride + column + matrix % 2 * 8;
  const auto read = [&](Operands<NT, T>& to, int k) {
    const bool both = k + WARPS < end;
#pragma unroll
    for (int t = 0; t < ABREAST<NT, T>; t++) {
      if (t >= tiles) continue;
      to.a[t][0] = load_vector<8>(slots, slot[t] + (k * 32 + lane) * 8);
      if (both) to.a[t][1] = load_vector<8>(slots, slot[t] + ((k + WARPS) * 32 + lane) * 8);
    }
    const int from = at + (both && matrix >= 2 ? k + WARPS : k) * TILE;
#pragma unroll
    for (int n = 0; n < NT; n++)
      if (n >= first && n < first + count)
        load_matrices(to.b[n], scratch.staged, from + (n - first) * 8 * scratch.stride);
  };
  const auto add = [&](const Operands<NT, T>& of, int k) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (k + i * WARPS >= end) continue;
#pragma unroll
      for (int t = 0; t < ABREAST<NT, T>; t++) {
        if (t >= tiles) continue;
#pragma unroll
        for (int n = 0; n < NT; n++)
          if (n >= first && n < first + count)
            multiply_tiles(sums[t][i % CHAINS<NT> * NT + n], of.a[t][i], of.b[n][2 * i], of.b[n][2 * i + 1]);
      }
    }
  };
  constexpr int STEP = 2 * WARPS;
  int k = first_k<WARPS>(begin);
  Operands<NT, T> now = {}, next = {};
  if (k < end) read(now, k);
#pragma unroll 1
  for (; k < end; k += 2 * STEP) {
    if (k + STEP < end) read(next, k + STEP);
    add(now, k);
    if (k + 2 * STEP < end) read(now, k + 2 * STEP);
    if (k + STEP < end) add(next, k + STEP);
  }
}

// Does the same in fp32, by the same lanes. The slot holds tiles of 16 outputs × 16 inputs as they are.
template <int NT, int WARPS>
DEVICE void multiply_plain(float (&sums)[1][CHAINS<NT> * NT][4], Shared<float> slots, int slot, int begin, int end,
                           const Scratch<float>& scratch, int column, int first, int count) {
  const int lane = thread() % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int k = first_k<WARPS>(begin); k < end; k += WARPS) {
    const int a = slot + k * TILE * TILE + g * TILE;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      if (n < first || n >= first + count) continue;
      const int b = ((n - first) * 8 + 2 * t) * scratch.stride + column + k * TILE;
#pragma unroll
      for (int i = 0; i < TILE; i++) {
        const float high = load(slots, a + i), low = load(slots, a + 8 * TILE + i);
        const float even = load(scratch.staged, b + i), odd = load(scratch.staged, b + scratch.stride + i);
        sums[0][n][0] += high * even;
        sums[0][n][1] += high * odd;
        sums[0][n][2] += low * even;
        sums[0][n][3] += low * odd;
      }
    }
  }
}

// Computes a layer. stage(first, count, k0, k, share) puts columns [k0, k0 + k) of rows [first, first + count) of X into
// scratch.staged, from row 0 and column 0 on, or a share of the columns, which it can if `shares`. before(part, n, row)
// loads what finish needs, long before finish(part, n, row, y, loaded) takes an output, on the same thread. work:
// (layers, 3), the first of this block's units of a layer, their number, and that of its units of the layers before.
// biases: (bias_tiles, 16), of all units of this block.
template <int NT, int WARPS, bool GATED, class T, class Stage, class Before, class Finish>
DEVICE void linear(const Params& p, const Linear& layer, int all_rows, Ring<T, WARPS, GATED>& ring, Shared<int> work,
                   const Scratch<T>& scratch, Shared<float> biases, bool shares, Stage stage, Before before,
                   Finish finish) {
  constexpr int MOST = ABREAST<NT, T>, OUTPUTS = NT * 8 * TILE, PARTS = MULTIPLIERS<NT, WARPS>;
  constexpr int EACH = (MOST * OUTPUTS + WARPS * 32 - 1) / (WARPS * 32);  // outputs that a thread finishes
  const int first_unit = load(work, 3 * layer.index), units = load(work, 3 * layer.index + 1);
  const int slot_tiles = p.slot_k / TILE, staged_tiles = p.staged_k / TILE;
  const int lane = thread() % 32, warp = thread() / 32, m = thread() % TILE;
  const auto tile_of = [&](int j) -> int { return MOST == 1 ? 0 : (thread() + j * WARPS * 32) / OUTPUTS; };
  const auto row_of = [&](int j) -> int {
    return MOST == 1 ? thread() / TILE + j * WARPS * 2 : (thread() + j * WARPS * 32) % OUTPUTS / TILE;
  };
  int staged_k = -1, staged_row = -1;
  Unit unit(layer, first_unit);
  for (int i = 0, tiles = 1; i < units; i += tiles, unit.tile += tiles) {
    if (i > 0 && p.sums_in_slots) {
      sync_block();  // the sums of the tiles before have been read
      ring.release();
      ring.fill();
    }
    if (unit.tile == layer.tiles) unit = {layer, first_unit + i};
    const int part = unit.part, first_k = layer.first_k(part), end_k = layer.first_k(part + 1);
    const int first_row = unit.group * p.group_rows, left = all_rows - first_row;
    const int rows = left < 0 ? 0 : left < p.group_rows ? left : p.group_rows;
    const int turns = rows > p.staged_rows ? divide_up(rows, p.staged_rows) : 1;
    tiles = 1;
    if (turns == 1 && end_k - first_k <= slot_tiles)
      while (tiles < MOST && tiles < p.slots && i + tiles < units && unit.tile + tiles < layer.tiles) tiles++;
    const int first_bias = load(work, 3 * layer.index + 2) + i;
    Loaded<float> bias[EACH] = {};
    decltype(before(0, 0, 0)) loaded[EACH] = {};
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int of = tile_of(j), row = row_of(j), tile = unit.tile + of;
      if (of >= tiles || row >= rows) continue;
      if (part == 0 && p.bias_tiles)
        bias[j] = load(biases, (first_bias + of) * TILE + m);
      else if (part == 0)
        bias[j] = constant(Global<const float>(p.biases), layer.biases + tile * TILE + m);
      loaded[j] = before(part, tile * TILE + m, first_row + row);
    }
    float sums[ABREAST<NT, T>][CHAINS<NT> * NT][4];
    for (auto& sum : sums[0])
      for (float& each : sum) each = 0;
    int slot[ABREAST<NT, T>] = {};
    int from_k = first_k;  // the first k-tile that is staged together with k
    for (int k = first_k; k < end_k; k += slot_tiles) {
      const int k_tiles = end_k - k < slot_tiles ? end_k - k : slot_tiles;
      if (k + k_tiles > from_k + staged_tiles) from_k = k;
      for (int turn = 0; turn < turns; turn++) {
        const int first = turn * p.staged_rows;
        const int count = rows - first < p.staged_rows ? rows - first : p.staged_rows;
        Share share = WHOLE;
        const auto stage_share = [&] {
          const int rest = end_k - from_k;
          section(STAGING);
          stage(first_row + first, count, from_k * TILE, (rest < staged_tiles ? rest : staged_tiles) * TILE, share);
        };
        if (staged_k != from_k || staged_row != first_row + first) {
          if (staged_k >= 0) {
            sync_block();  // all warps have read what is staged
            ring.release(turn > 0);
            ring.fill();
          }
          if (PARTS < WARPS && shares && k_tiles > 1 && k_tiles == end_k - from_k) share = FIRST;
          stage_share();
          staged_k = from_k;
          staged_row = first_row + first;
        }
        section(FETCH);
        if (turn == 0 && k > first_k && ring.empty()) {  // all that was fetched has been multiplied
          sync_block();
          ring.release();
          ring.fill();
        }
        if (turn == 0)
          for (int t = 0; t < ABREAST<NT, T>; t++)
            if (t < tiles) slot[t] = ring.take();
        // Several tiles are multiplied in one go, so their sums begin here: they need no registers before.
        for (int t = 1; t < ABREAST<NT, T>; t++)
          for (auto& sum : sums[t])
            for (float& each : sum) each = 0;
        const int column = k - from_k, n_tiles = divide_up(count, 8);
        sync_block();
        const auto multiply_k = [&](int begin, int end) {
          section(MULTIPLY);
          if constexpr (sizeof(T) == 4)
            multiply_plain<NT, PARTS>(sums, ring.slots(), slot[0], begin, end, scratch, column * TILE, first / 8,
                                      n_tiles);
          else
            multiply<NT, PARTS>(sums, ring.slots(), slot, tiles, begin, end, scratch, column * TILE, first / 8,
                                n_tiles);
        };
        const int half = first_half(k_tiles);
#pragma unroll 1
        for (int begin = 0; begin < k_tiles;) {
          const int end = share == FIRST ? half : k_tiles;
          if (share == REST) sync_block();
          const bool more = share == FIRST;
          if (more)
            share = REST;
          else if (NT > 2)
            ring.fill_some(1);  // the L2 cache has nothing else to do
          if (PARTS == WARPS || warp < PARTS)
            multiply_k(begin, end);
          else if (more) {
            stage_share();
            // So that these sums take no registers meanwhile: what is not multiplied is not added up.
            for (auto& of_tile : sums)
              for (auto& sum : of_tile)
                for (float& each : sum) each = 0;
          }
          begin = end;
        }
      }
    }
    section(SUMS);
    if (p.sums_in_slots) sync_block();  // all warps have read the weights
    const int first_slot = slot[0];
    const auto sums_of = [&](int t) -> int {  // the first element of a tile's sums
      return p.sums_in_slots ? ring.following(first_slot, t) / (4 / static_cast<int>(sizeof(T))) : t * NT * PARTS * 128;
    };
#pragma unroll
    for (int t = 0; t < MOST; t++)
#pragma unroll
      for (int n = 0; n < NT; n++) {
        if (t >= tiles || n * 8 >= rows || warp >= PARTS) continue;
        float (&of)[4] = sums[t][n];
        if constexpr (CHAINS<NT> == 2)
          for (int c = 0; c < 4; c++) of[c] += sums[t][NT + n][c];
        store_vector(scratch.sums, sums_of(t) + (n * PARTS + warp) * 128 + lane * 4,
                     Vector<float, 4>{of[0], of[1], of[2], of[3]});
      }
    if (GATED && p.sums_in_slots) fence_copies();
    sync_block();
    if (!p.sums_in_slots) ring.release();
    section(EPILOGUE);
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int of = tile_of(j), row = row_of(j), n = row % 8;
      if (of >= tiles || row >= rows) continue;
      const int of_lane = m % 8 * 4 + n / 2, of_sum = m / 8 * 2 + n % 2;
      Loaded<float> parts[PARTS];
#pragma unroll
      for (int w = 0; w < PARTS; w++)
        parts[w] = load(scratch.sums, sums_of(of) + (row / 8 * PARTS + w) * 128 + of_lane * 4 + of_sum);
      float y = bias[j];
#pragma unroll
      for (int w = 0; w < PARTS; w++) y += parts[w];
      finish(part, (unit.tile + of) * TILE + m, first_row + row, y, loaded[j]);
    }
  }
}

// Takes the weights of a layer that is skipped.
template <int WARPS, bool GATED, class T>
DEVICE void skip(const Params& p, const Linear& layer, Ring<T, WARPS, GATED>& ring, Shared<int> work) {
  const int first = load(work, 3 * layer.index), units = load(work, 3 * layer.index + 1), slot_tiles = p.slot_k / TILE;
  for (int i = first; i < first + units; i++) {
    const int part = Unit(layer, i).part;
    for (int k = layer.first_k(part); k < layer.first_k(part + 1); k += slot_tiles) {
      ring.take();
      if (GATED) sync_block();  // all have seen that it has come
      ring.release();
      ring.fill();
    }
  }
}

}  // namespace tarflow
