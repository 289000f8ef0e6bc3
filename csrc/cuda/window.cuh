// The attention of windows, on tensor cores: the rows of a sample share its keys and values.
//
// A tile is up to 32 consecutive positions of one sample. Its keys and values come through shared memory, in chunks of
// which two are there at once; those that no row of the pass makes are copied while the block waits for the others. Each
// warp takes 16 keys at a time for 16 rows: logits S = Q Kᵀ, and sums of values P V. Of more than 16 rows the first half
// of the warps have the first 16. Operands are read as they lie, 16 bytes a lane, as any order of what is summed over, and
// of the outputs' columns, is as good as another: in lane (g, t) channels 16 t … 16 t + 15 of a key g are the k of Q Kᵀ
// in four products, and channel 8 g + j of a value is column g of the j-th product of P V. S is P's operand as it is. Q,
// K, V and P are in the weights' type, all sums and the softmax in fp32.
#pragma once

#include "attention.cuh"

namespace tarflow {

constexpr int WINDOW_HEAD = 64;  // the head_dim that this is for
constexpr int WINDOW_ROWS = 32;  // the most positions of a tile
constexpr float NO_KEYS = 1 << 30;  // the fewest keys where no row has any
// Floats that a row takes of `memory`, its sums, maximum and weight; or a key and its value, whose strides keep the lanes
// that read them together in different banks.
constexpr int WINDOW_ROW = WINDOW_HEAD + 8;

// Returns how many parts the work of a layer has.
DEVICE int window_parts(const Params& p) { return p.tiles * p.branches * p.heads * p.splits; }

// A part of the work: some keys [first, last) of the rows of a tile, in one branch and head. row: the first one. known: how
// many keys no row of the pass makes. least: the fewest of any row.
struct WindowPart {
  int head, split, row, count, keys, least, known, first, last;

  DEVICE WindowPart(const Params& p, const Rows& rows, int index) {
    const int pair = divide(index, p.splits), of_branches = divide(pair, p.heads);
    split = index - pair * p.splits;
    head = pair - of_branches * p.heads;
    const int branch = of_branches >= p.tiles, tile = of_branches - branch * p.tiles, position = load(rows.tiles, tile);
    row = branch * p.positions + position;
    count = load(rows.tiles, tile + 1) - position;
    keys = load(rows.tiles, p.tiles + 1 + 2 * tile);
    least = load(rows.tiles, p.tiles + 2 + 2 * tile);
    known = least - 1;  // or less, where another tile of the sample is before this one
    for (int other = tile; other > 0 && p.sample[load(rows.tiles, other - 1)] == p.sample[position]; other--) {
      const int before = load(rows.tiles, p.tiles + 2 * other) - 1;
      known = before < known ? before : known;
    }
    const int each = divide(divide_up(keys, TILE) + p.splits - 1, p.splits) * TILE;
    first = split * each < keys ? split * each : keys;
    last = first + each < keys ? first + each : keys;
  }
};

// Finds the most and the fewest keys of the rows of each tile, a row on each lane. It is done once a pass, as all layers
// need them.
template <int WARPS>
DEVICE void count_keys(const Params& p, const Rows& rows) {
  static_assert(WINDOW_ROWS == 32);
#pragma unroll 1
  for (int tile = thread() / 32; tile < p.tiles; tile += WARPS) {
    const int row = load(rows.tiles, tile) + thread() % 32;
    const int keys = row < load(rows.tiles, tile + 1) ? rows.token_at(row) + 1 : 0;
    float found[2] = {static_cast<float>(keys), keys > 0 ? -static_cast<float>(keys) : -NO_KEYS};
    largest_lane(found);
    if (thread() % 32 > 0) continue;
    store(rows.tiles, p.tiles + 1 + 2 * tile, static_cast<int>(found[0]));
    store(rows.tiles, p.tiles + 2 + 2 * tile, static_cast<int>(-found[1]));
  }
  sync_block();
}

// The keys and values of a part, on their way through shared memory in chunks. A key's number says which warp takes it, so
// the size of a chunk changes no bits.
template <class T, int WARPS>
struct WindowKeys {
  static constexpr int VECTOR = 16 / sizeof(T), STRIDE = WINDOW_ROW, VECTORS = WINDOW_HEAD / VECTOR;

  WindowPart part;
  Global<T> cache;
  Shared<T> memory;  // (2 chunk, 2, STRIDE), keys and values in turn
  const Rows& rows;
  int64_t keys;
  int halves, slices;  // of more than 16 rows two; the warps of each
  int chunk;  // keys: a multiple of 16, and of those that all slices take at once if there is room

  DEVICE WindowKeys(const Params& p, const Rows& rows, int layer, int index, Shared<T> memory)
      : part(p, rows, index),
        cache(p.keys_values),
        memory(memory),
        rows(rows),
        keys(rows.cached(layer, 0, part.row, part.head)),
        halves(WARPS > 1 && part.count > TILE ? 2 : 1),
        slices(WARPS / halves) {
    const int round = slices * TILE, half = p.room / 2, whole = divide(half, round) * round;
    chunk = whole > 0 ? whole : half / TILE * TILE;
  }

  // Returns the first key of a chunk, the first after it, and where a key of it begins: its value comes STRIDE later.
  DEVICE int first(int number) const { return part.first + number * chunk; }
  DEVICE int last(int number) const { return first(number) + chunk < part.last ? first(number) + chunk : part.last; }
  DEVICE int at(int number, int key) const { return (number % 2 * chunk + key - first(number)) * 2 * STRIDE; }

  // Calls take(to, from) for each vector of a chunk's keys [begin, end) and their values, of which threads take shares.
  template <class Take>
  DEVICE void each(int number, int begin, int end, Take take) const {
    const int64_t between = rows.value_after_key();
#pragma unroll 1
    for (int i = thread(); i < (end - begin) * 2 * VECTORS; i += WARPS * 32) {
      const int key = begin + i / (2 * VECTORS), which = i / VECTORS % 2, c = i % VECTORS * VECTOR;
      take(at(number, key) + which * STRIDE + c,
           keys + (which ? between : 0) + static_cast<int64_t>(key) * WINDOW_HEAD + c);
    }
  }

  // Copies keys [begin, end) of a chunk, as far as it has them.
  DEVICE void copy(int number, int begin, int end) const {
    const int begins = first(number), ends = last(number);
    each(number, begins > begin ? begins : begin, ends < end ? ends : end,
         [&](int to, int64_t from) { copy_async(memory, to, cache, from); });
  }
};

// Asks for the keys and values of this block's first part that are known: before they are copied.
template <class T, int WARPS>
DEVICE void prefetch_window(const Params& p, const Rows& rows, int layer) {
  if (block() >= window_parts(p)) return;
  const WindowPart part(p, rows, block());
  const Global<T> cache(p.keys_values);
  const int64_t keys = rows.cached(layer, 0, part.row, part.head), between = rows.value_after_key();
#pragma unroll 1
  for (int key = part.first + thread(); key < part.last && key < part.known; key += WARPS * 32) {
    const int64_t at = keys + static_cast<int64_t>(key) * WINDOW_HEAD;
    prefetch(cache, at);
    prefetch(cache, at + between);
  }
}

// Copies of them what there is memory for.
template <class T, int WARPS>
DEVICE void copy_window(const Params& p, const Rows& rows, int layer, Shared<T> memory) {
  if (block() >= window_parts(p)) return;
  const WindowKeys<T, WARPS> of(p, rows, layer, block(), memory);
  for (int i = 0; i < 2; i++) {
    of.copy(i, 0, of.part.known);
    commit_copies();
  }
}

// Attends with this block's parts, of which `copy_window` has copied the first, and so many groups of other copies were
// asked for since. SENDS: whether what it leaves is sent. memory, keys: the same memory, for (WARPS, 16, WINDOW_ROW) and for
// `room` keys and values.
template <class T, int WARPS, bool SENDS>
DEVICE void attend_windows(const Params& p, const Rows& rows, int layer, int turn, Shared<float> memory,
                           Shared<T> keys_memory, int since) {
  constexpr int COLUMNS = WINDOW_HEAD / 8, STRIDE = WINDOW_ROW;
  const Global<float> partials(p.partials);
  const Global<T> queries(p.queries);
  const int warp = thread() / 32, lane = thread() % 32, g = lane / 4, t = lane % 4;
  const int width = whole_tiles(p.channels), parts = window_parts(p);
#pragma unroll 1
  for (int index = block(); index < parts; index += blocks()) {
    const WindowKeys<T, WARPS> of_part(p, rows, layer, index, keys_memory);
    const WindowPart& part = of_part.part;
    const int half = divide(warp, of_part.slices), slice = warp - half * of_part.slices;
    const bool ahead = index == block();
    const bool late = ahead && part.known < part.first + 2 * of_part.chunk && part.known < part.last;
    if (!ahead) sync_block();  // the part before has been read
    for (int i = 0; i < 2; i++) {
      if (!ahead || late) of_part.copy(i, ahead ? part.known : 0, part.last);
      if (!ahead || late) commit_copies();
    }
    Vector<T, 8> q[2][2];  // channels 16 t … of rows g and g + 8
    int own_keys[2];
    const Loaded<float> scale = constant(Global<const float>(p.scale), rows.branch(part.row));
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int of = half * TILE + g + r * 8, row = part.row + of;
      own_keys[r] = of < part.count ? rows.token(row) + 1 : 0;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        q[r][i] = {};
        if (of < part.count)
          q[r][i] = load_vector<8>(queries, turn_row(turn, row) * width + part.head * WINDOW_HEAD + t * 16 + i * 8);
      }
    }
    sync_warp();
    Vector<T, 8> a[4];
#pragma unroll
    for (int s = 0; s < 4; s++)
      for (int i = 0; i < 8; i++) a[s].at[i] = q[i / 2 % 2][s / 2].at[s % 2 * 4 + i / 4 * 2 + i % 2];
    instructions(16);
    float sum[COLUMNS][4] = {}, most[2] = {LOWEST, LOWEST}, weights[2] = {};
    int owner = 0;  // the slice that has the next 16 keys
#pragma unroll 1
    for (int i = 0; of_part.first(i) < part.last; i++) {
      const int last = of_part.last(i);
      // The groups that came after this chunk's: those of the next one, and of weights.
      wait_copies(1 + (ahead && !late && i < 2 ? (since < 6 ? since : 6) : 0));
      sync_block();
#pragma unroll 1
      for (int from = of_part.first(i); from < last; from += TILE) {
        const bool own = owner == slice;
        owner = owner + 1 < of_part.slices ? owner + 1 : 0;
        if (!own) continue;
        // Keys beyond the last are this one again: their weights are 0, and their values have to be numbers.
        const auto at = [&](int key) -> int { return of_part.at(i, key < last ? key : last - 1); };
        Vector<T, 8> k[2][2], v[4];
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
          for (int h = 0; h < 2; h++) k[j][h] = load_vector<8>(keys_memory, at(from + j * 8 + g) + t * 16 + h * 8);
#pragma unroll
        for (int j = 0; j < 4; j++)
          v[j] = load_vector<8>(keys_memory, at(from + j / 2 * 8 + 2 * t + j % 2) + STRIDE + g * 8);
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
        if (from + TILE > part.least) {
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
      }
      sync_block();  // all warps have read this chunk
      of_part.copy(i + 2, 0, part.last);
      commit_copies();
    }
    section(MERGE);
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
      const Loaded<float> upper = shuffle_xor(weights[0], mask), lower = shuffle_xor(weights[1], mask);
      weights[0] += upper;
      weights[1] += lower;
    }
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
    for (int i = thread(); i < part.count * (WINDOW_HEAD / 4); i += WARPS * 32) {  // merges the warps of a half
      const int r = i / (WINDOW_HEAD / 4), c = i % (WINDOW_HEAD / 4) * 4, row = part.row + r;
      const int at = (r / TILE * of_part.slices * TILE + r % TILE) * WINDOW_ROW;
      Vector<float, 2> of[WARPS];
      Vector<float, 4> sums[WARPS];
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        of[w] = {};
        sums[w] = {};
        if (w >= of_part.slices) continue;
        of[w] = load_vector<2>(memory, at + w * TILE * WINDOW_ROW + WINDOW_HEAD);
        sums[w] = load_vector<4>(memory, at + w * TILE * WINDOW_ROW + c);
      }
      float M = LOWEST, total = 0, y[4] = {};
#pragma unroll
      for (int w = 0; w < WARPS; w++)
        if (w < of_part.slices) M = fmaxf(M, of[w].at[0]);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        if (w >= of_part.slices) continue;
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
