// The attention of one query to the tokens up to its own, softmax(q kᵀ · scale) v, in two parts.
//
// `attend` splits the keys of a row and head among as many blocks as are worth it, each of which leaves an unnormalised
// sum of values with the maximum of its logits and the sum of its weights. In a block, groups of lanes take a key each,
// 16 bytes a lane. `attended` adds up the parts, for the product that follows. All of it is fp32.
#pragma once

#include "rows.cuh"

namespace tarflow {

constexpr int KEYS_IN_FLIGHT = 4;  // keys that each group of lanes has under way
constexpr float LOWEST = -INFINITY;

// Returns the factor by which a sum under the maximum m counts under the higher one M. An empty sum has m = −∞ and is
// 0.
DEVICE float rescale(float m, float M) { return m == LOWEST ? 0.0f : exp2f(m - M); }

// Returns how many of `keys` a split takes.
DEVICE int split_keys(const Params& p, int keys) {
  const int even = divide_up(keys, p.splits);
  return even < p.least_keys ? p.least_keys : even;
}

// A part of the work: some keys [first, last) of a row and head.
struct Part {
  int row, head, split, first, last;

  DEVICE Part(const Params& p, const Rows& rows, int index)
      : row(index / p.splits / p.heads), head(index / p.splits % p.heads), split(index % p.splits) {
    const int keys = rows.token(row) + 1, each = split_keys(p, keys);
    first = split * each < keys ? split * each : keys;
    last = first + each < keys ? first + each : keys;
  }
  DEVICE int64_t index(const Params& p) const {
    return (static_cast<int64_t>(row) * p.heads + head) * p.splits + split;
  }
};

// Returns where in `partials` the maxima and weights begin: after the sums, at an even element.
DEVICE int64_t statistics(const Params& p, const Rows& rows) {
  return (static_cast<int64_t>(rows.count()) * p.heads * p.splits * p.head_dim + 1) / 2 * 2;
}

// Asks for the keys and values before this token's while other blocks still compute this token's.
template <class T, int WARPS>
DEVICE void prefetch_keys(const Params& p, const Rows& rows, int layer) {
  if (block() >= rows.count() * p.heads * p.splits) return;
  const Part part(p, rows, block());
  const Global<T> cache(p.keys_values);
#pragma unroll 1
  for (int i = thread(); i < 2 * (part.last - part.first); i += WARPS * 32)
    prefetch(cache, rows.cached(layer, i % 2, part.row, part.head) + (part.first + i / 2) * p.head_dim);
}

template <int V, class T>
DEVICE void read_query(float (&q)[V], const Params& p, const Rows& rows, const Part& part, int channel, bool inside) {
  const Global<float> queries(p.queries);
  const int64_t at = static_cast<int64_t>(part.row) * whole_tiles(p.channels) + part.head * p.head_dim + channel;
  const float scale = constant(Global<const float>(p.scale), rows.branch(part.row));
  constexpr int step = V < 4 ? V : 4;
#pragma unroll
  for (int i = 0; i < V; i += step) {
    Vector<float, step> values{};
    if (inside) values = load_vector<step>(queries, at + i);
    for (int j = 0; j < step; j++) q[i + j] = values.at[j] * scale;
  }
}

// Attends with this block's parts. V: elements of a key that a lane takes, which divide head_dim. memory: (WARPS, d +
// 2).
template <class T, int V, int WARPS>
DEVICE void attend(const Params& p, const Rows& rows, int layer, Shared<float> memory) {
  const Global<T> cache(p.keys_values);
  const Global<float> partials(p.partials);
  const int warp = thread() / 32, lane = thread() % 32, d = p.head_dim;
  int width = 1;  // lanes that share a key
  while (width * V < d) width *= 2;
  const int channel = lane % width * V, side = 32 / width, stride = WARPS * side;
  const bool inside = channel < d;
  bool again = false;
  for (int index = block(); index < rows.count() * p.heads * p.splits; index += blocks()) {
    const Part part(p, rows, index);
    if (part.first == part.last) continue;
    const int64_t keys = rows.cached(layer, 0, part.row, part.head) + channel;
    const int64_t values = rows.cached(layer, 1, part.row, part.head) + channel;
    float q[V], sum[V] = {}, most = LOWEST, weights = 0;
    read_query<V, T>(q, p, rows, part, channel, inside);
    for (int first = part.first; first < part.last; first += stride * KEYS_IN_FLIGHT) {
      Vector<T, V> k[KEYS_IN_FLIGHT], v[KEYS_IN_FLIGHT];
      float logit[KEYS_IN_FLIGHT];
#pragma unroll
      for (int u = 0; u < KEYS_IN_FLIGHT; u++) {
        const int key = first + u * stride + warp * side + lane / width;
        if (inside && key < part.last) {
          k[u] = load_vector<V>(cache, keys + static_cast<int64_t>(key) * d);
          v[u] = load_vector<V>(cache, values + static_cast<int64_t>(key) * d);
        }
      }
      float higher = most;
#pragma unroll
      for (int u = 0; u < KEYS_IN_FLIGHT; u++) {
        const int key = first + u * stride + warp * side + lane / width;
        logit[u] = 0;
        instructions(2 * V);
        if (inside && key < part.last)
          for (int i = 0; i < V; i++) logit[u] += q[i] * to_float(k[u].at[i]);
        for (int mask = 1; mask < width; mask *= 2) logit[u] += shuffle_xor(logit[u], mask);
        if (key >= part.last) logit[u] = LOWEST;
        higher = fmaxf(higher, logit[u]);
      }
      const float kept = rescale(most, higher);
      most = higher;
      weights *= kept;
      for (int i = 0; i < V; i++) sum[i] *= kept;
#pragma unroll
      for (int u = 0; u < KEYS_IN_FLIGHT; u++) {
        const float weight = rescale(logit[u], most);
        instructions(2 * V + 6);
        weights += weight;
        if (inside && logit[u] != LOWEST)
          for (int i = 0; i < V; i++) sum[i] += weight * to_float(v[u].at[i]);
      }
    }
    section(MERGE);
    for (int mask = width; mask < 32; mask *= 2) {  // merges the warp's groups
      const float other = shuffle_xor(most, mask), M = fmaxf(most, other);
      const float mine = rescale(most, M), theirs = rescale(other, M);
      weights = weights * mine + shuffle_xor(weights, mask) * theirs;
      for (int i = 0; i < V; i++) sum[i] = sum[i] * mine + shuffle_xor(sum[i], mask) * theirs;
      most = M;
    }
    if (again) sync_block();  // the part before has been read
    again = true;
    const int own = warp * (d + 2);
    if (inside && lane < width)
      for (int i = 0; i < V; i++) store(memory, own + channel + i, sum[i]);
    if (lane == 0) {
      store(memory, own + d, most);
      store(memory, own + d + 1, weights);
    }
    sync_block();
    for (int c = thread(); c < d; c += WARPS * 32) {  // merges the block's warps
      float M = LOWEST, total = 0, y = 0;
      for (int w = 0; w < WARPS; w++) M = fmaxf(M, load(memory, w * (d + 2) + d));
      for (int w = 0; w < WARPS; w++) {
        const float share = rescale(load(memory, w * (d + 2) + d), M);
        total += share * load(memory, w * (d + 2) + d + 1);
        y += share * load(memory, w * (d + 2) + c);
      }
      store(partials, part.index(p) * d + c, y);
      if (c > 0) continue;
      store(partials, statistics(p, rows) + 2 * part.index(p), M);
      store(partials, statistics(p, rows) + 2 * part.index(p) + 1, total);
    }
    section(ATTEND);
  }
}

// Returns channels [channel, channel + V), all of one head, of what a row has attended to.
template <int V>
DEVICE Vector<float, V> attended(const Params& p, const Rows& rows, int row, int channel) {
  constexpr int AT_ONCE = 8;
  const Global<float> partials(p.partials);
  const int d = p.head_dim, keys = rows.token(row) + 1, parts = divide_up(keys, split_keys(p, keys));
  const int64_t first = (static_cast<int64_t>(row) * p.heads + channel / d) * p.splits;
  const int64_t of_first = statistics(p, rows) + 2 * first;
  Vector<float, V> y{};
  float most = LOWEST, weights = 0;
  for (int begin = 0; begin < parts; begin += AT_ONCE) {
    Vector<float, V> sum[AT_ONCE];
    Vector<float, 2> of[AT_ONCE];
    float higher = most;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      of[i] = {{LOWEST, 0.0f}};
      if (begin + i >= parts) continue;
      sum[i] = load_vector<V>(partials, (first + begin + i) * d + channel % d);
      of[i] = load_vector<2>(partials, of_first + 2 * (begin + i));
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) higher = fmaxf(higher, of[i].at[0]);
    const float kept = rescale(most, higher);
    most = higher;
    weights *= kept;
    for (int j = 0; j < V; j++) y.at[j] *= kept;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      if (begin + i >= parts) continue;
      const float share = rescale(of[i].at[0], most);
      instructions(2 * V + 6);
      weights += share * of[i].at[1];
      for (int j = 0; j < V; j++) y.at[j] += share * sum[i].at[j];
    }
  }
  if (parts > 0)
    for (int j = 0; j < V; j++) y.at[j] /= weights;
  return y;
}

}  // namespace tarflow
