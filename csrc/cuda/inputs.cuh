// The inputs of each linear layer's product: their rows are prepared in shared memory, in the weights' type.
#pragma once

#include "affine.cuh"
#include "attention.cuh"
#include "linear.cuh"
#include "stream.cuh"

namespace tarflow {

template <class T>
DEVICE void stage_value(const Scratch<T>& scratch, int row, int k, float value) {
  store(scratch.staged, row * scratch.stride + k, from_float<T>(value));
}

// Copies count rows of k elements of `from`, (·, width), from row `first` and column k0 on, to scratch.staged. put(row,
// column, vector) stores V elements. Threads take vectors in turn, of which AT_ONCE are on their way for each.
template <int WARPS, int V, class From, class Put>
DEVICE void stage_rows(Global<From> from, int width, int first, int count, int k0, int k, Put put) {
  constexpr int AT_ONCE = 8, STRIDE = WARPS * 32;
  const int vectors = k / V, step_rows = divide(STRIDE, vectors), step = STRIDE - step_rows * vectors;
  int row = divide(thread(), vectors), column = thread() - row * vectors;
#pragma unroll 1
  for (int begin = 0; begin < count * vectors; begin += AT_ONCE * STRIDE) {
    Vector<From, V> values[AT_ONCE];
    int rows[AT_ONCE], columns[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      rows[u] = row;
      columns[u] = column * V;
      values[u] = {};
      if (row < count) values[u] = load_vector<V>(from, static_cast<int64_t>(first + row) * width + k0 + column * V);
      row += step_rows;
      column += step;
      if (column >= vectors) {
        column -= vectors;
        row++;
      }
    }
    sync_warp();
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++)
      if (rows[u] < count) put(rows[u], columns[u], values[u]);
  }
}

// (h − mean) / std of the residual stream, which each block makes of all rows that it multiplies: a warp takes a row at a
// time, as far as registers allow.
template <int WARPS, class T>
DEVICE void stage_normed(const Stream& stream, const Scratch<T>& scratch, int first, int count) {
  constexpr int KEPT = 6, STEP = 128;
  const Global<float> h(stream.p.h), rest(stream.p.rest);
  const int width = stream.width(), lane = thread() % 32, channels = stream.p.channels;
  const bool in_parts = stream.rests() > 0;
#pragma unroll 1
  for (int row = thread() / 32; row < count; row += WARPS) {
    const int64_t at = stream.at(first + row), rest_at = stream.rest_at(0, first + row);
    const auto read = [&](int k, Vector<float, 4>& of_h, Vector<float, 4>& of_rest) {
      of_h = of_rest = {};
      if (k >= width) return;
      of_h = load_vector<4>(h, at + k);
      if (in_parts) of_rest = load_vector<4>(rest, rest_at + k);
    };
    const auto add = [&](Vector<float, 4>& to, const Vector<float, 4>& other) {
      for (int i = 0; i < 4; i++) to.at[i] += other.at[i];
    };
    Vector<float, 4> kept[KEPT], others[KEPT];
#pragma unroll
    for (int j = 0; j < KEPT; j++)
      if (j * STEP < width) read(j * STEP + lane * 4, kept[j], others[j]);
    sync_warp();
    instructions(width / 32);
#pragma unroll
    for (int j = 0; j < KEPT; j++)
      if (j * STEP < width) add(kept[j], others[j]);
    const auto each = [&](auto take) {
#pragma unroll
      for (int j = 0; j < KEPT; j++)
        if (j * STEP < width) take(j * STEP + lane * 4, kept[j]);
#pragma unroll 1
      for (int k = KEPT * STEP + lane * 4; k < width; k += STEP) {
        Vector<float, 4> v, other;
        read(k, v, other);
        add(v, other);
        take(k, v);
      }
    };
    float mean = 0, scale = 0;
    instructions(width / 32);
    each([&](int, const Vector<float, 4>& v) {
      mean += (v.at[0] + v.at[1]) + (v.at[2] + v.at[3]);  // the values beyond the channels are 0
    });
    mean = sum_lanes(mean) / channels;
    instructions(2 * width / 32);
    each([&](int k, const Vector<float, 4>& v) {
      for (int i = 0; i < 4; i++)
        if (k + i < channels) scale += (v.at[i] - mean) * (v.at[i] - mean);
    });
    scale = sum_lanes(scale);
    instructions(2 * width / 32);
    const float by = 1 / sqrtf(scale / channels + 1e-5f);
    each([&](int k, const Vector<float, 4>& v) {
      Vector<T, 4> y;
      for (int i = 0; i < 4; i++) y.at[i] = from_float<T>(k + i < channels ? (v.at[i] - mean) * by : 0.0f);
      if (k < width) store_vector(scratch.staged, row * scratch.stride + k, y);
    });
  }
}

// The mean of a row's channels, and the sum of the squares of what they differ by from it.
struct Spread {
  float mean, squares;
};

// Returns the spread of a row of so many channels, of which each warp has some: their number, their sum, and the sum of
// the squares of what they differ by from their own mean. It is added up in the order of warps (Chan, Golub and LeVeque,
// 1983). memory: (WARPS, 4), which nobody else reads or writes before the next sync_block.
template <int WARPS>
DEVICE Spread spread_of_block(float count, float sum, float squares, int channels, Shared<float> memory) {
  if (thread() % 32 == 0)
    store_vector(memory, thread() / 32 * 4, Vector<float, 4>{count, sum, count > 0 ? sum / count : 0.0f, squares});
  sync_block();
  Vector<float, 4> of[WARPS];
#pragma unroll
  for (int w = 0; w < WARPS; w++) of[w] = load_vector<4>(memory, w * 4);
  instructions(5 * WARPS);
  Spread all{0, 0};
#pragma unroll
  for (int w = 0; w < WARPS; w++) all.mean += of[w].at[1];
  all.mean /= channels;
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    const float off = of[w].at[2] - all.mean;
    all.squares += of[w].at[3] + of[w].at[0] * off * off;
  }
  return all;
}

// Adds up the residual stream into h, and sends its norms, or itself without `normed`, in the weights' type, to rows of
// `norms` from `to` on. This is done once for all blocks, which have rows of their own: many rows are then read in half
// the bytes. memory: (4 WARPS + C',).
template <int WARPS, class T>
DEVICE void send_norms(const Stream& stream, const Rows& rows, bool normed, int to, Shared<float> memory) {
  const Params& p = stream.p;
  const Global<float> h(p.h), rest(p.rest);
  const Global<T> norms(p.norms);
  const int width = stream.width(), parts = stream.sent();
  const bool sent = sends(p, stream.after);
#pragma unroll 1
  for (int row = block(); row < rows.count(); row += blocks()) {
    constexpr int EACH = 3;  // tiles that a block may send in one go
    const int last = width / TILE - 1, spots = parts * (last / EACH + 1);
    section(AWAIT);
#pragma unroll 1
    for (int spot = thread(); spot < spots; spot += WARPS * 32) {
      const int tile = divide(spot, parts) * EACH + EACH - 1;
      await_sent<4>(sent, rest, stream.rest_at(spot & (parts - 1), row) + ((tile < last ? tile : last) + 1) * TILE - 4);
    }
    if (spots || row != block()) sync_block();  // all warps have read what is known of the row before
    section(NORM);
    float count_sum[2] = {};  // of this lane's channels, then of the warp's
#pragma unroll 1
    for (int begin = thread() / 32 * 128; begin < width; begin += WARPS * 128) {
      const int k = begin + thread() % 32 * 4;
      const auto place = [&](int i) -> int64_t { return i < parts && k < width ? stream.rest_at(i, row) + k : -1; };
      Vector<float, 4> v{}, sums[MOST_PARTS];
      if (k < width) v = load_vector<4>(h, stream.at(row) + k);
      look_for(sent, rest, sums, place);
      receive(sent, rest, sums, place);
      if (k >= width) continue;
      instructions(20);
#pragma unroll
      for (int i = 0; i < MOST_PARTS; i++) {
        if (i >= parts) continue;
        instructions(4);
        for (int j = 0; j < 4; j++) v.at[j] += sums[i].at[j];
        empty<4>(rest, place(i));
      }
      if (parts) store_vector(h, stream.at(row) + k, v);
      store_vector(memory, 4 * WARPS + k, v);
      count_sum[0] += k + 4 < p.channels ? 4 : k < p.channels ? p.channels - k : 0;
      count_sum[1] += (v.at[0] + v.at[1]) + (v.at[2] + v.at[3]);  // the values beyond the channels are 0
    }
    float less = 0, by = 1;
    if (normed) {
      sum_lanes(count_sum);
      const float mean = count_sum[0] > 0 ? count_sum[1] / count_sum[0] : 0.0f;
      float squares = 0;
#pragma unroll 1
      for (int k = thread() * 4; k < width; k += WARPS * 128) {
        const Vector<float, 4> v = load_vector<4>(memory, 4 * WARPS + k);
        instructions(12);
        for (int i = 0; i < 4; i++)
          if (k + i < p.channels) squares += (v.at[i] - mean) * (v.at[i] - mean);
      }
      const Spread found = spread_of_block<WARPS>(count_sum[0], count_sum[1], sum_lanes(squares), p.channels, memory);
      less = found.mean;
      by = 1 / sqrtf(found.squares / p.channels + 1e-5f);
    }
#pragma unroll 1
    for (int k = thread() * 4; k < width; k += WARPS * 128) {
      const Vector<float, 4> v = load_vector<4>(memory, 4 * WARPS + k);
      Vector<T, 4> y;
      for (int i = 0; i < 4; i++) y.at[i] = from_float<T>(k + i < p.channels ? (v.at[i] - less) * by : 0.0f);
      send_vector(norms, stream.at(to + row) + k, y);
    }
  }
}

// The residual stream itself.
template <int WARPS, class T>
DEVICE void stage_stream(const Stream& stream, const Scratch<T>& scratch, int first, int count) {
  const int vectors = stream.width() / 4;
#pragma unroll 1
  for (int i = thread(); i < count * vectors; i += WARPS * 32) {
    const int row = divide(i, vectors), k = (i - row * vectors) * 4;
    Vector<float, 4> v = load_vector<4>(Global<float>(stream.p.h), stream.at(first + row) + k), other{};
    if (stream.rests()) other = load_vector<4>(Global<float>(stream.p.rest), stream.rest_at(0, first + row) + k);
    Vector<T, 4> y;
    for (int j = 0; j < 4; j++) y.at[j] = from_float<T>(v.at[j] + other.at[j]);
    store_vector(scratch.staged, row * scratch.stride + k, y);
  }
}

// Columns [k0, k0 + k) of a buffer that is in the weights' type already, and has so many columns.
template <int WARPS, class T>
DEVICE void stage_ready(const Buffer& buffer, int columns, const Scratch<T>& scratch, int first, int count, int k0,
                        int k) {
  const Global<T> from(buffer);
  stage_rows<WARPS, 16 / sizeof(T)>(from, whole_tiles(columns), first, count, k0, k, [&](int row, int column, auto v) {
    constexpr int V = 16 / sizeof(T);
    if (k0 + column + V > columns)  // beyond the columns nobody has written
      for (int i = 0; i < V; i++)
        if (k0 + column + i >= columns) v.at[i] = from_float<T>(0.0f);
    store_vector(scratch.staged, row * scratch.stride + column, v);
  });
}

// Columns [k0, k0 + k) of a buffer that others send, of `width` columns. sent: whether they do. by_rows: whether they
// send whole rows, or else tiles of columns, of which the last row is the last. With the first share of the columns all of
// them are awaited.
template <int WARPS, class T>
DEVICE void stage_sent(bool sent, const Buffer& buffer, int width, bool by_rows, const Scratch<T>& scratch, int first,
                       int count, int k0, int k, Share share) {
  constexpr int V = 16 / sizeof(T), AT_ONCE = 12;
  const Global<T> from(buffer);
  const int half = first_half(k / TILE) * TILE, first_thread = share == REST ? MULTIPLIERS<4, WARPS> * 32 : 0;
  const int begins = share == REST ? half : 0, ends = share == FIRST ? half : k, threads = WARPS * 32 - first_thread;
  const int vectors = (ends - begins) / V, step_rows = divide(threads, vectors), step = threads - step_rows * vectors;
  int row = divide(thread() - first_thread, vectors), column = thread() - first_thread - row * vectors;
  const auto at = [&](int row, int column) -> int64_t {
    return row >= 0 && row < count ? static_cast<int64_t>(first + row) * width + k0 + column * V : -1;
  };
  if (share != REST) {
    section(AWAIT);
    const int spots = by_rows ? count : k / TILE;
#pragma unroll 1
    for (int spot = thread(); spot < spots; spot += WARPS * 32)  // what each sender sends last
      await_sent<V>(sent, from, by_rows ? at(spot, k / V - 1) : at(count - 1, (spot + 1) * (TILE / V) - 1));
    sync_block();
    section(STAGING);
  }
#pragma unroll 1
  for (int begin = 0; begin < count * vectors; begin += AT_ONCE * threads) {
    Vector<T, V> values[AT_ONCE];
    int places[AT_ONCE];  // row and column in one register
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      places[u] = row << 16 | (begins / V + column);
      row += step_rows;
      column += step;
      if (column >= vectors) {
        column -= vectors;
        row++;
      }
    }
    instructions(5 * AT_ONCE);
    const auto place = [&](int u) { return at(places[u] >> 16, places[u] & 0xffff); };
    look_for(sent, from, values, place);
    receive(sent, from, values, place);
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++)
      if (const int to = places[u] >> 16; to < count)
        store_vector(scratch.staged, to * scratch.stride + (places[u] & 0xffff) * V, values[u]);
  }
}

// Columns [k0, k0 + k) of the attended values, from the parts that blocks left of them.
template <int WARPS, int V, class T>
DEVICE void stage_attended(const Params& p, const Rows& rows, const Scratch<T>& scratch, int first, int count, int k0,
                           int k) {
  const int vectors = k / V;
#pragma unroll 1
  for (int i = thread(); i < count * vectors; i += WARPS * 32) {
    const int row = divide(i, vectors), column = (i - row * vectors) * V;
    instructions(30);
    Vector<T, V> y{};
    if (k0 + column < p.channels) y = attended<V, T, false>(p, rows, 0, first + row, k0 + column);
    store_vector(scratch.staged, row * scratch.stride + column, y);
  }
}

// The tokens: as they are where a pass begins, and then those that follow from the parameters. The block that has the
// first tile of proj_in stores them.
template <int WARPS, class T>
DEVICE void stage_tokens(const Params& p, const Rows& rows, const Scratch<T>& scratch, int first, int count, bool begin,
                         bool keeps) {
  const Global<float> input(p.input), x(p.x), log_dets(p.log_det);
  const int lane = thread() % 32, width = whole_tiles(p.token_dim);
  for (int row = thread() / 32; row < count; row += WARPS) {
    const int position = first + row, token = rows.token_at(position);
    const int64_t place = rows.place(position, token);
#pragma unroll 1
    for (int d = p.token_dim + lane; d < width; d += 32) stage_value(scratch, row, d, 0.0f);
    if (begin) {
#pragma unroll 1
      for (int d = lane; d < p.token_dim; d += 32 * TOKEN_AT_ONCE) {
        Loaded<float> values[TOKEN_AT_ONCE] = {};
#pragma unroll
        for (int u = 0; u < TOKEN_AT_ONCE; u++)
          if (token >= 0 && d + u * 32 < p.token_dim) values[u] = load(input, place * p.token_dim + d + u * 32);
#pragma unroll
        for (int u = 0; u < TOKEN_AT_ONCE; u++)
          if (d + u * 32 < p.token_dim) stage_value(scratch, row, d + u * 32, values[u]);
      }
      continue;
    }
    const float log_det = next_token(p, rows, position, token - 1, Nothing(), [&](int d, float value, float, float) {
      stage_value(scratch, row, d, value);
      if (keeps) store(x, place * p.token_dim + d, value);
    });
    if (keeps && lane == 0) store(log_dets, place, log_det);
  }
}

}  // namespace tarflow
