// The attention of windows, on tensor cores: the rows of a sample share its keys and values.
//
// A tile is up to 16 consecutive positions of one sample. Each warp takes 16 keys at a time: logits S = Q Kᵀ, and sums of
// values P V. Both operands come straight from the cache, 16 bytes a lane, as any order of what is summed over, and of
// the outputs' columns, is as good as another: in lane (g, t) channels 16 t … 16 t + 15 of a key g are the k of Q Kᵀ in
// four products, and channel 8 g + j of a value is column g of the j-th product of P V. S is P's operand as it is. Q, K,
// V and P are in the weights' type, all sums and the softmax in fp32.
#pragma once

#include "attention.cuh"

namespace tarflow {

constexpr int WINDOW_HEAD = 64;  // the head_dim that this is for
constexpr int WINDOW_ROW = WINDOW_HEAD + 4;  // floats of a row of `memory`: sums, maximum, weight

// A part of the work: some keys [first, last) of the rows of a tile, in one branch and head.
struct WindowPart {
  int head, split, row, count, keys, least, first, last;  // row: the first one; least: the fewest keys of any row

  DEVICE WindowPart(const Params& p, const Rows& rows, int index) {
    const int pair = divide(index, p.splits), of_branches = divide(pair, p.heads);
    split = index - pair * p.splits;
    head = pair - of_branches * p.heads;
    const int branch = of_branches >= p.tiles, tile = of_branches - branch * p.tiles, position = load(rows.tiles, tile);
    row = branch * p.positions + position;
    count = load(rows.tiles, tile + 1) - position;
    keys = load(rows.tiles, p.tiles + 1 + 2 * tile);
    least = load(rows.tiles, p.tiles + 2 + 2 * tile);
    const int each = divide(divide_up(keys, TILE) + p.splits - 1, p.splits) * TILE;
    first = split * each < keys ? split * each : keys;
    last = first + each < keys ? first + each : keys;
  }
};

// Finds the most and the fewest keys of the rows of each tile. It is done once a pass, as all layers need them.
template <int WARPS>
DEVICE void count_keys(const Params& p, const Rows& rows) {
#pragma unroll 1
  for (int tile = thread(); tile < p.tiles; tile += WARPS * 32) {
    int most = 0, least = 1 << 30;
#pragma unroll 1
    for (int i = load(rows.tiles, tile); i < load(rows.tiles, tile + 1); i++) {
      const int keys = rows.token_at(i) + 1;
      most = keys > most ? keys : most;
      least = keys > 0 && keys < least ? keys : least;
    }
    store(rows.tiles, p.tiles + 1 + 2 * tile, most);
    store(rows.tiles, p.tiles + 2 + 2 * tile, least);
  }
  sync_block();
}

template <class T, int WARPS>
DEVICE void prefetch_window(const Params& p, const Rows& rows, int layer) {
  if (block() >= p.tiles * p.branches * p.heads * p.splits) return;
  const WindowPart part(p, rows, block());
  const Global<T> cache(p.keys_values);
  const int64_t keys = rows.cached(layer, 0, part.row, part.head), values = rows.cached(layer, 1, part.row, part.head);
  const int known = part.least - 1 < part.last ? part.least - 1 : part.last;  // the others are being computed
#pragma unroll 1
  for (int key = part.first + thread(); key < known; key += WARPS * 32) {
    prefetch(cache, keys + static_cast<int64_t>(key) * WINDOW_HEAD);
    prefetch(cache, values + static_cast<int64_t>(key) * WINDOW_HEAD);
  }
}

// Attends with this block's parts. SENDS: whether what it leaves is sent. memory: (WARPS, 16, WINDOW_ROW).
template <class T, int WARPS, bool SENDS>
DEVICE void attend_windows(const Params& p, const Rows& rows, int layer, int turn, Shared<float> memory) {
  constexpr int KEYS = TILE, COLUMNS = WINDOW_HEAD / 8;
  constexpr bool AHEAD =
      SENDS;  // whether keys are loaded while those before are used: few rows have no registers for it
  const Global<T> cache(p.keys_values);
  const Global<float> partials(p.partials);
  const Global<T> queries(p.queries);
  const int warp = thread() / 32, lane = thread() % 32, g = lane / 4, t = lane % 4;
  const int width = whole_tiles(p.channels), parts = p.tiles * p.branches * p.heads * p.splits;
  bool again = false;
#pragma unroll 1
  for (int index = block(); index < parts; index += blocks()) {
    const WindowPart part(p, rows, index);
    const int64_t keys = rows.cached(layer, 0, part.row, part.head),
                  values = rows.cached(layer, 1, part.row, part.head);
    // Keys beyond the last are this one again: their weights are 0, and their values have to be numbers.
    const auto read = [&](int from, Vector<T, 8>(&k)[2][2], Vector<T, 8>(&v)[4]) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int key = from + j * 8 + g, inside = key < part.last ? key : part.last - 1;
        const int64_t at = keys + static_cast<int64_t>(inside) * WINDOW_HEAD + t * 16;
        k[j][0] = load_vector<8>(cache, at);
        k[j][1] = load_vector<8>(cache, at + 8);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int key = from + i / 2 * 8 + 2 * t + i % 2, inside = key < part.last ? key : part.last - 1;
        v[i] = load_vector<8>(cache, values + static_cast<int64_t>(inside) * WINDOW_HEAD + g * 8);
      }
    };
    Vector<T, 8> q[2][2];  // channels 16 t … of rows g and g + 8
    int own_keys[2];
    const Loaded<float> scale = constant(Global<const float>(p.scale), rows.branch(part.row));
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = part.row + g + r * 8;
      own_keys[r] = g + r * 8 < part.count ? rows.token(row) + 1 : 0;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        q[r][i] = {};
        if (g + r * 8 < part.count)
          q[r][i] = load_vector<8>(queries, turn_row(turn, row) * width + part.head * WINDOW_HEAD + t * 16 + i * 8);
      }
    }
    Vector<T, 8> k[2][2] = {}, v[4] = {};
    if (AHEAD && part.first + warp * KEYS < part.last) read(part.first + warp * KEYS, k, v);
    sync_warp();
    Vector<T, 8> a[4];
#pragma unroll
    for (int s = 0; s < 4; s++)
      for (int i = 0; i < 8; i++) a[s].at[i] = q[i / 2 % 2][s / 2].at[s % 2 * 4 + i / 4 * 2 + i % 2];
    instructions(16);
    float sum[COLUMNS][4] = {}, most[2] = {LOWEST, LOWEST}, weights[2] = {};
#pragma unroll 1
    for (int from = part.first + warp * KEYS; from < part.last; from += WARPS * KEYS) {
      Vector<T, 8> next_k[2][2] = {}, next_v[4] = {};
      if (!AHEAD) read(from, k, v);
      if (AHEAD && from + WARPS * KEYS < part.last) read(from + WARPS * KEYS, next_k, next_v);
      sync_warp();
      float logits[2][4] = {};
#pragma unroll
      for (int s = 0; s < 4; s++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          Vector<T, 2> b[2];
          for (int i = 0; i < 4; i++) b[i / 2].at[i % 2] = k[j][s / 2].at[s % 2 * 4 + i];
          multiply_tiles(logits[j], a[s], b[0], b[1]);
        }
      bool bad[4] = {};  // of keys from + 2t, 2t + 1, 2t + 8, 2t + 9: whether a value of theirs is not finite
      if (from + KEYS > part.least) {
        // Not all rows attend to all of these, and 0 · ∞ would be NaN in those that do not.
        float any[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          any[i] = 0;
          for (int c = 0; c < 8; c++) {
            if (fabsf(to_float(v[i].at[c])) < INFINITY) continue;
            any[i] = 1;
            v[i].at[c] = from_float<T>(0.0f);
          }
        }
        instructions(100);
        for (int mask = 4; mask < 32; mask *= 2) {
          Loaded<float> other[4];
#pragma unroll
          for (int i = 0; i < 4; i++) other[i] = shuffle_xor(any[i], mask);
#pragma unroll
          for (int i = 0; i < 4; i++) any[i] += other[i];
        }
#pragma unroll
        for (int i = 0; i < 4; i++) bad[i] = any[i] > 0;
      }
      float higher[2] = {most[0], most[1]};
      instructions(40);
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float& logit = logits[i / 2][r * 2 + i % 2];
          logit = from + i / 2 * 8 + 2 * t + i % 2 < own_keys[r] ? (bad[i] ? NAN : logit * scale) : LOWEST;
          higher[r] = fmaxf(higher[r], logit);
        }
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) {
        const Loaded<float> upper = shuffle_xor(higher[0], mask), lower = shuffle_xor(higher[1], mask);
        higher[0] = fmaxf(higher[0], upper);
        higher[1] = fmaxf(higher[1], lower);
      }
      Vector<T, 8> shares;
      instructions(60);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float kept = rescale(most[r], higher[r]);
        most[r] = higher[r];
        weights[r] *= kept;
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) {
          sum[n][2 * r] *= kept;
          sum[n][2 * r + 1] *= kept;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float weight = rescale(logits[i / 2][r * 2 + i % 2], most[r]);
          weights[r] += weight;
          shares.at[i / 2 * 4 + r * 2 + i % 2] = from_float<T>(weight);
        }
      }
#pragma unroll
      for (int n = 0; n < COLUMNS; n++) {
        Vector<T, 2> b[2];
        for (int i = 0; i < 4; i++) b[i / 2].at[i % 2] = v[i].at[n];
        multiply_tiles(sum[n], shares, b[0], b[1]);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        k[i / 2][i % 2] = next_k[i / 2][i % 2];
        v[i] = next_v[i];
      }
    }
    section(MERGE);
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
      const Loaded<float> upper = shuffle_xor(weights[0], mask), lower = shuffle_xor(weights[1], mask);
      weights[0] += upper;
      weights[1] += lower;
    }
    if (again) sync_block();  // the part before has been read
    again = true;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int at = (warp * TILE + g + r * 8) * WINDOW_ROW;
#pragma unroll
      for (int i = 0; i < 4; i++) {  // channels 16 t + 4 i …
        const int n = i % 2 * 4, c = i / 2 + 2 * r;
        store_vector(memory, at + t * 16 + i * 4,
                     Vector<float, 4>{sum[n][c], sum[n + 1][c], sum[n + 2][c], sum[n + 3][c]});
      }
      if (t == 0) store_vector(memory, at + WINDOW_HEAD, Vector<float, 2>{most[r], weights[r]});
    }
    sync_block();
#pragma unroll 1
    for (int i = thread(); i < part.count * (WINDOW_HEAD / 4); i += WARPS * 32) {  // merges the block's warps
      const int r = i / (WINDOW_HEAD / 4), c = i % (WINDOW_HEAD / 4) * 4, row = part.row + r;
      Vector<float, 2> of[WARPS];
      Vector<float, 4> sums[WARPS];
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        of[w] = load_vector<2>(memory, (w * TILE + r) * WINDOW_ROW + WINDOW_HEAD);
        sums[w] = load_vector<4>(memory, (w * TILE + r) * WINDOW_ROW + c);
      }
      float M = LOWEST, total = 0, y[4] = {};
#pragma unroll
      for (int w = 0; w < WARPS; w++) M = fmaxf(M, of[w].at[0]);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float share = rescale(of[w].at[0], M);
        instructions(10);
        total += share * of[w].at[1];
        for (int j = 0; j < 4; j++) y[j] += share * sums[w].at[j];
      }
      if (p.splits == 1) {
        store_attended<T, SENDS, 4>(p, turn, row, part.head * WINDOW_HEAD + c, y, total);
        continue;
      }
      if (rows.token(row) < 0) continue;  // nobody reads it
      const int64_t to = (static_cast<int64_t>(row) * p.heads + part.head) * p.splits + part.split;
      const Vector<float, 4> values{y[0], y[1], y[2], y[3]};
      const Vector<float, 2> of_values{M, total};
      const int64_t of_part = statistics(p, rows, turn) + 2 * to;
      if constexpr (SENDS) {
        send_vector(partials, to * WINDOW_HEAD + c, values);
        if (c == 0) send_vector(partials, of_part, of_values);
      } else {
        store_vector(partials, to * WINDOW_HEAD + c, values);
        if (c == 0) store_vector(partials, of_part, of_values);
      }
    }
    section(ATTEND);
  }
}

}  // namespace tarflow
