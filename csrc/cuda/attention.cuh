// The attention of one query to the tokens up to its own, softmax(q kᵀ · scale) v.
//
// `attend` takes the keys of a row and head, or of a window's rows and a head (see window.cuh), split among as many
// blocks as are worth it. Where there is one split it leaves the attended values; else each block leaves an unnormalised
// sum of values with the maximum of its logits and the sum of its weights, and `attended` adds up the parts: for the
// product that follows, or once and for all in a step of its own (`merge`), if the plan says so.
//
// In a block, groups of lanes take a key each, 16 bytes a lane. All of it is fp32.
#pragma once

#include "sent.cuh"

namespace tarflow {

constexpr int KEYS_IN_FLIGHT = 4;  // keys that each group of lanes has under way
constexpr float LOWEST = -INFINITY;

// Returns the floats that a warp leaves to its block: a sum for each channel, the maximum and the weight.
DEVICE int part_floats(int head_dim) { return divide_up(head_dim, 4) * 4 + 4; }

// Returns the factor by which a sum under the maximum m counts under the higher one M. An empty sum has m = −∞ and is
// 0.
DEVICE float rescale(float m, float M) { return m == LOWEST ? 0.0f : exp2f(m - M); }

// Returns how many of `keys` a split takes.
DEVICE int split_keys(const Params& p, int keys) {
  const int even = divide(keys + p.splits - 1, p.splits);
  return even < p.least_keys ? p.least_keys : even;
}

// A part of the work: some keys [first, last) of a row and head.
struct Part {
  int row, head, split, first, last;

  DEVICE Part(const Params& p, const Rows& rows, int index) {
    const int pair = divide(index, p.splits);
    split = index - pair * p.splits;
    row = divide(pair, p.heads);
    head = pair - row * p.heads;
    const int keys = rows.token(row) + 1, each = split_keys(p, keys);
    first = split * each < keys ? split * each : keys;
    last = first + each < keys ? first + each : keys;
  }
  DEVICE int64_t index(const Params& p) const {
    return (static_cast<int64_t>(row) * p.heads + head) * p.splits + split;
  }
};

// Returns how many elements of `partials` the maxima and weights of a turn take, and where those of a turn begin: after
// the sums, at a multiple of 16 bytes.
DEVICE int statistics_size(const Params& p, const Rows& rows) {
  return divide_up(rows.count() * p.heads * p.splits * 2, 4) * 4;
}
DEVICE int64_t statistics(const Params& p, const Rows& rows, int turn) {
  const int64_t sums = static_cast<int64_t>(rows.count()) * p.heads * p.splits * p.head_dim;
  return (sums + 3) / 4 * 4 + turn * statistics_size(p, rows);
}

// Asks for keys [first, last) and values of a part before they are needed.
template <class T, int WARPS>
DEVICE void prefetch_part(const Params& p, const Rows& rows, int layer, const Part& part, int first, int last) {
  const Global<T> cache(p.keys_values);
  const int64_t keys = rows.cached(layer, 0, part.row, part.head), values = rows.cached(layer, 1, part.row, part.head);
#pragma unroll 1
  for (int key = first + thread(); key < last; key += WARPS * 32) {
    prefetch(cache, keys + static_cast<int64_t>(key) * p.head_dim);
    prefetch(cache, values + static_cast<int64_t>(key) * p.head_dim);
  }
}

// Asks for keys and values of this block's first part while other blocks still compute this token's, or the layer before:
// `early` as many as the L2 cache keeps until then, and later the others. Memory would else be idle while the attention's
// other phases run, and the bound of the attention itself.
template <class T, int WARPS>
DEVICE void prefetch_keys(const Params& p, const Rows& rows, int layer, bool early) {
  if (block() >= rows.count() * p.heads * p.splits) return;
  const Part part(p, rows, block());
  const int middle = part.first + p.early_keys < part.last ? part.first + p.early_keys : part.last;
  prefetch_part<T, WARPS>(p, rows, layer, part, early ? part.first : middle, early ? middle : part.last);
}

// Some channels of a query, on their way.
template <int V>
struct Query {
  static constexpr int STEP = V < 4 ? V : 4;
  Vector<float, STEP> values[V / STEP];

  DEVICE void load_from(const Params& p, const Part& part, int turn, int channel, bool inside) {
    const Global<float> queries(p.queries);
    const int64_t at = turn_row(turn, part.row) * whole_tiles(p.channels) + part.head * p.head_dim + channel;
#pragma unroll
    for (int i = 0; i < V / STEP; i++) {
      values[i] = {};
      if (inside) values[i] = load_vector<STEP>(queries, at + i * STEP);
    }
  }
  DEVICE float at(int i) const { return values[i / STEP].at[i % STEP]; }
};

// A round of keys and values, on their way.
template <class T, int V>
struct Round {
  Vector<T, V> k[KEYS_IN_FLIGHT], v[KEYS_IN_FLIGHT];
};

// Stores, or sends, what a row has attended to, of which there is one part: channels of one head, unnormalised.
template <class T, bool SENDS, int N>
DEVICE void store_attended(const Params& p, int turn, int row, int channel, const float (&sum)[N], float weights) {
  const Global<T> attended(p.attended);
  const int64_t at = turn_row(turn, row) * whole_tiles(p.channels) + channel;
  Vector<T, N> y;
  for (int i = 0; i < N; i++) y.at[i] = from_float<T>(weights > 0 || weights != weights ? sum[i] / weights : 0.0f);
  leave<SENDS>(attended, at, y);
}

// Attends with this block's parts. V: elements of a key that a lane takes, which divide head_dim. SENDS: whether what it
// leaves is sent. memory: (WARPS, part_floats(d)).
template <class T, int V, int WARPS, bool SENDS>
DEVICE void attend(const Params& p, const Rows& rows, int layer, int turn, Shared<float> memory) {
  const Global<T> cache(p.keys_values);
  const Global<float> partials(p.partials);
  const int warp = thread() / 32, lane = thread() % 32, d = p.head_dim, parts = rows.count() * p.heads * p.splits;
  int width = 1;  // lanes that share a key
  while (width * V < d) width *= 2;
  const int channel = lane % width * V, side = 32 / width, stride = WARPS * side;
  const bool inside = channel < d;
  bool again = false;
  for (int index = block(); index < parts; index += blocks()) {
    const Part part(p, rows, index);
    const bool ends = SENDS && p.splits == 1 && part.head + 1 == p.heads;
    const int width_ended =
        d + (ends ? whole_tiles(p.channels) - p.channels : 0);  // columns beyond the channels are sent too
    if (part.first == part.last) {
      if (!SENDS || p.splits > 1) continue;
      const float none[1] = {0};
#pragma unroll 1
      for (int c = thread(); c < width_ended; c += WARPS * 32)
        store_attended<T, SENDS, 1>(p, turn, part.row, part.head * d + c, none, 0);
      continue;
    }
    if (index + blocks() < parts) {
      const Part following(p, rows, index + blocks());
      prefetch_part<T, WARPS>(p, rows, layer, following, following.first, following.last);
    }
    const int64_t keys = rows.cached(layer, 0, part.row, part.head) + channel;
    const int64_t values = rows.cached(layer, 1, part.row, part.head) + channel;
    const int own_key = warp * side + lane / width;
    const auto read = [&](Round<T, V>& round, int first) {
#pragma unroll
      for (int u = 0; u < KEYS_IN_FLIGHT; u++) {
        const int key = first + u * stride + own_key;
        if (inside && key < part.last) {
          round.k[u] = load_vector<V>(cache, keys + static_cast<int64_t>(key) * d);
          round.v[u] = load_vector<V>(cache, values + static_cast<int64_t>(key) * d);
        }
      }
    };
    Query<V> query;
    query.load_from(p, part, turn, channel, inside);
    const Loaded<float> scale = constant(Global<const float>(p.scale), rows.branch(part.row));
    float sum[V] = {}, most = LOWEST, weights = 0;
    Round<T, V> next = {};
    read(next, part.first);
#pragma unroll 1
    for (int first = part.first; first < part.last; first += stride * KEYS_IN_FLIGHT) {
      const Round<T, V> now = next;
      next = {};
      read(next, first + stride * KEYS_IN_FLIGHT);
      sync_warp();
      float logit[KEYS_IN_FLIGHT];
#pragma unroll
      for (int u = 0; u < KEYS_IN_FLIGHT; u++) {
        const int key = first + u * stride + own_key;
        logit[u] = 0;
        if (inside && key < part.last) {
          instructions(2 * V);
          for (int i = 0; i < V; i++) logit[u] += query.at(i) * to_float(now.k[u].at[i]);
        }
        logit[u] *= scale;
      }
      for (int mask = 1; mask < width; mask *= 2) {
        Loaded<float> other[KEYS_IN_FLIGHT];
#pragma unroll
        for (int u = 0; u < KEYS_IN_FLIGHT; u++) other[u] = shuffle_xor(logit[u], mask);
#pragma unroll
        for (int u = 0; u < KEYS_IN_FLIGHT; u++) logit[u] += other[u];
      }
      float higher = most;
#pragma unroll
      for (int u = 0; u < KEYS_IN_FLIGHT; u++) {
        if (first + u * stride + own_key >= part.last) logit[u] = LOWEST;
        higher = fmaxf(higher, logit[u]);
      }
      const float kept = rescale(most, higher);
      most = higher;
      weights *= kept;
      for (int i = 0; i < V; i++) sum[i] *= kept;
#pragma unroll
      for (int u = 0; u < KEYS_IN_FLIGHT; u++) {
        const float weight = rescale(logit[u], most);
        weights += weight;
        instructions(2 * V + 6);
        if (inside && logit[u] != LOWEST)
          for (int i = 0; i < V; i++) sum[i] += weight * to_float(now.v[u].at[i]);
      }
    }
    section(MERGE);
    for (int mask = width; mask < 32; mask *= 2) {  // merges the warp's groups
      const Loaded<float> other = shuffle_xor(most, mask), heavier = shuffle_xor(weights, mask);
      Loaded<float> others[V];
#pragma unroll
      for (int i = 0; i < V; i++) others[i] = shuffle_xor(sum[i], mask);
      const float M = fmaxf(most, other), mine = rescale(most, M), theirs = rescale(other, M);
      weights = weights * mine + heavier * theirs;
#pragma unroll
      for (int i = 0; i < V; i++) sum[i] = sum[i] * mine + others[i] * theirs;
      most = M;
    }
    if (again) sync_block();  // the part before has been read
    again = true;
    const int size = part_floats(d), own = warp * size, of_block = size - 4;
    if (inside && lane < width) {
      constexpr int STEP = Query<V>::STEP;
#pragma unroll
      for (int i = 0; i < V; i += STEP) {
        Vector<float, STEP> some;
        for (int j = 0; j < STEP; j++) some.at[j] = sum[i + j];
        store_vector(memory, own + channel + i, some);
      }
    }
    if (lane == 0) store_vector(memory, own + of_block, Vector<float, 2>{most, weights});
    sync_block();
#pragma unroll 1
    for (int c = thread(); c < width_ended; c += WARPS * 32) {  // merges the block's warps
      if (c >= d) {
        const float none[1] = {0};
        store_attended<T, SENDS, 1>(p, turn, part.row, part.head * d + c, none, 0);
        continue;
      }
      Vector<float, 2> of[WARPS];
      Loaded<float> sums[WARPS];
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        of[w] = load_vector<2>(memory, w * size + of_block);
        sums[w] = load(memory, w * size + c);
      }
      float M = LOWEST, total = 0, y[1] = {0};
#pragma unroll
      for (int w = 0; w < WARPS; w++) M = fmaxf(M, of[w].at[0]);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float share = rescale(of[w].at[0], M);
        instructions(6);
        total += share * of[w].at[1];
        y[0] += share * sums[w];
      }
      if (p.splits == 1) {
        store_attended<T, SENDS, 1>(p, turn, part.row, part.head * d + c, y, total);
        continue;
      }
      const int64_t of_part = statistics(p, rows, turn) + 2 * part.index(p);
      if constexpr (SENDS)
        send(partials, part.index(p) * d + c, y[0]);
      else
        store(partials, part.index(p) * d + c, y[0]);
      if (c > 0) continue;
      if constexpr (SENDS)
        send_vector(partials, of_part, Vector<float, 2>{M, total});
      else
        store_vector(partials, of_part, Vector<float, 2>{M, total});
    }
    section(ATTEND);
  }
}

// Returns channels [channel, channel + V), all of one head, of what a row has attended to. SENT: whether the parts are
// sent; of these the sums have one reader, who empties them, and all lanes of a warp take part. row: −1 for none.
template <int V, class T, bool SENT>
DEVICE Vector<T, V> attended(const Params& p, const Rows& rows, int turn, int row, int channel) {
  constexpr int AT_ONCE = 8;
  const Global<float> partials(p.partials);
  const int d = p.head_dim, keys = row < 0 ? 0 : rows.token(row) + 1, each = p.tiles ? 1 : split_keys(p, keys);
  const int parts = keys == 0 ? 0 : p.tiles ? p.splits : divide(keys + each - 1, each);
  const int head = divide(channel, d), of_head = channel - head * d;
  const int64_t first = (static_cast<int64_t>(row) * p.heads + head) * p.splits;
  const int64_t of_first = statistics(p, rows, turn) + 2 * first;
  float y[V] = {}, most = LOWEST, weights = 0;
#pragma unroll 1
  for (int begin = 0; begin < (SENT ? p.splits : parts); begin += AT_ONCE) {
    const auto sum_at = [&](int i) -> int64_t { return begin + i < parts ? (first + begin + i) * d + of_head : -1; };
    const auto of_at = [&](int i) -> int64_t { return begin + i < parts ? of_first + 2 * (begin + i) : -1; };
    Vector<float, V> sum[AT_ONCE];
    Vector<float, 2> of[AT_ONCE];
    if constexpr (SENT) {
      const bool sent = sends(p, ATTENTION);
      // The lanes of a head wait for one part each.
      await_sent<2>(sent, partials, of_at(divide(of_head, V) & (AT_ONCE - 1)));
      sync_warp();
      look_for(sent, partials, sum, sum_at);
      look_for(sent, partials, of, of_at);
      receive(sent, partials, sum, sum_at);
      receive(sent, partials, of, of_at);
    } else {
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        of[i] = {};
        sum[i] = {};
        if (begin + i >= parts) continue;
        sum[i] = load_vector<V>(partials, sum_at(i));
        of[i] = load_vector<2>(partials, of_at(i));
      }
    }
    float higher = most;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
      if (begin + i < parts) higher = fmaxf(higher, of[i].at[0]);
    const float kept = rescale(most, higher);
    most = higher;
    weights *= kept;
    for (int j = 0; j < V; j++) y[j] *= kept;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      if (begin + i >= parts) continue;
      const float share = rescale(of[i].at[0], most);
      instructions(2 * V + 6);
      weights += share * of[i].at[1];
      for (int j = 0; j < V; j++) y[j] += share * sum[i].at[j];
      if constexpr (SENT) empty<V>(partials, sum_at(i));
    }
  }
  Vector<T, V> result;
  for (int j = 0; j < V; j++) result.at[j] = from_float<T>(parts > 0 ? y[j] / weights : 0.0f);
  return result;
}

// Adds up the parts of all rows, once for all blocks, whose warps divide rows and channels among them.
template <class T, int V, int WARPS, bool SENDS>
DEVICE void merge(const Params& p, const Rows& rows, int turn) {
  const Global<T> to(p.attended);
  const int width = whole_tiles(p.channels), vectors = (SENDS ? width : p.channels) / V;
#pragma unroll 1
  for (int begin = (thread() / 32 * blocks() + block()) * 32; begin < rows.count() * vectors;
       begin += blocks() * WARPS * 32) {
    const int i = begin + thread() % 32, row = divide(i, vectors), channel = (i - row * vectors) * V;
    instructions(30);
    const bool inside = row < rows.count() && channel < p.channels;
    const Vector<T, V> of_channel = attended<V, T, SENDS>(p, rows, turn, inside ? row : -1, inside ? channel : 0);
    if (row >= rows.count()) continue;
    Vector<T, V> y{};
    if (inside) y = of_channel;
    const int64_t at = turn_row(turn, row) * width + channel;
    leave<SENDS>(to, at, y);
  }
}

}  // namespace tarflow
