// The inputs of each linear layer's product: their rows are prepared in shared memory, in the weights' type.
#pragma once

#include "affine.cuh"
#include "attention.cuh"
#include "linear.cuh"

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
  const int vectors = k / V, step_rows = STRIDE / vectors, step = STRIDE - step_rows * vectors;
  int row = thread() / vectors, column = thread() - row * vectors;
  instructions(60);  // the two divisions
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

// (h − mean) / std for `count` rows from row `first` on, of which this warp takes `from` and every `stride`-th after it,
// ROWS at a time, as far as registers allow. put(row, k, vector) stores 4 elements.
template <int ROWS, class T, class Put>
DEVICE void normalise(const Params& p, int first, int count, int from, int stride, Put put) {
  constexpr int KEPT = 6, STEP = 128;
  const Global<float> h(p.h);
  const int width = whole_tiles(p.channels), lane = thread() % 32;
#pragma unroll 1
  for (int begin = from; begin < count; begin += stride * ROWS) {
    const auto read = [&](int row, int k) {
      Vector<float, 4> v{};
      if (k < width && row < count) v = load_vector<4>(h, static_cast<int64_t>(first + row) * width + k);
      return v;
    };
    Vector<float, 4> kept[ROWS][KEPT];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int j = 0; j < KEPT; j++)
        if (j * STEP < width) kept[r][j] = read(begin + r * stride, j * STEP + lane * 4);
    sync_warp();
    const auto each = [&](int r, auto take) {
#pragma unroll
      for (int j = 0; j < KEPT; j++)
        if (j * STEP < width) take(j * STEP + lane * 4, kept[r][j]);
#pragma unroll 1
      for (int k = KEPT * STEP; k < width; k += STEP) take(k + lane * 4, read(begin + r * stride, k + lane * 4));
    };
    float mean[ROWS], scale[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      instructions(width / 32);
      mean[r] = 0;
      each(r, [&](int, const Vector<float, 4>& v) {
        mean[r] += (v.at[0] + v.at[1]) + (v.at[2] + v.at[3]);
      });  // the values beyond the channels are 0
    }
    sum_lanes<ROWS>(mean);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      instructions(2 * width / 32);
      mean[r] /= p.channels;
      scale[r] = 0;
      each(r, [&](int k, const Vector<float, 4>& v) {
        for (int i = 0; i < 4; i++)
          if (k + i < p.channels) scale[r] += (v.at[i] - mean[r]) * (v.at[i] - mean[r]);
      });
    }
    sum_lanes<ROWS>(scale);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      instructions(2 * width / 32);
      const float by = 1 / sqrtf(scale[r] / p.channels + 1e-5f);
      each(r, [&](int k, const Vector<float, 4>& v) {
        Vector<T, 4> y;
        for (int i = 0; i < 4; i++) y.at[i] = from_float<T>(k + i < p.channels ? (v.at[i] - mean[r]) * by : 0.0f);
        const int row = begin + r * stride;
        if (k < width && row < count) put(row, k, y);
      });
    }
  }
}

// The same, which each block makes of all rows that it multiplies.
template <int WARPS, int ROWS, class T>
DEVICE void stage_normed(const Params& p, const Scratch<T>& scratch, int first, int count) {
  normalise<ROWS, T>(p, first, count, thread() / 32, WARPS, [&](int row, int k, const Vector<T, 4>& y) {
    store_vector(scratch.staged, row * scratch.stride + k, y);
  });
}

// The same, once for all blocks, which divide the rows among them: many rows are then read in half the bytes.
template <int WARPS, class T>
DEVICE void keep_norms(const Params& p, const Rows& rows) {
  const Global<T> norms(p.norms);
  const int width = whole_tiles(p.channels);
  normalise<1, T>(
      p, 0, rows.count(), block() + thread() / 32 * blocks(), WARPS * blocks(),
      [&](int row, int k, const Vector<T, 4>& y) { store_vector(norms, static_cast<int64_t>(row) * width + k, y); });
}

// The residual stream h itself.
template <int WARPS, class T>
DEVICE void stage_stream(const Params& p, const Scratch<T>& scratch, int first, int count) {
  const int width = whole_tiles(p.channels);
  stage_rows<WARPS, 4>(Global<float>(p.h), width, first, count, 0, width,
                       [&](int row, int column, const Vector<float, 4>& v) {
    Vector<T, 4> y;
    for (int i = 0; i < 4; i++) y.at[i] = from_float<T>(v.at[i]);
    store_vector(scratch.staged, row * scratch.stride + column, y);
  });
}

// Columns [k0, k0 + k) of a buffer that is in the weights' type already, and has so many columns.
template <int WARPS, class T>
DEVICE void stage_ready(const Buffer& buffer, int columns, const Scratch<T>& scratch, int first, int count, int k0,
                        int k) {
  constexpr int V = 16 / sizeof(T);
  const Global<T> from(buffer);
  stage_rows<WARPS, V>(from, whole_tiles(columns), first, count, k0, k, [&](int row, int column, Vector<T, V> v) {
    if (k0 + column + V > columns)  // beyond the columns nobody has written
      for (int i = 0; i < V; i++)
        if (k0 + column + i >= columns) v.at[i] = from_float<T>(0.0f);
    store_vector(scratch.staged, row * scratch.stride + column, v);
  });
}

// The attended values, from the parts that blocks left of them.
template <int WARPS, int V, class T>
DEVICE void stage_attended(const Params& p, const Rows& rows, const Scratch<T>& scratch, int first, int count) {
  const int vectors = whole_tiles(p.channels) / V;
#pragma unroll 1
  for (int i = thread(); i < count * vectors; i += WARPS * 32) {
    const int row = i / vectors, k = i % vectors * V;
    instructions(60);
    Vector<T, V> y{};
    if (k < p.channels) y = attended<V, T>(p, rows, first + row, k);
    store_vector(scratch.staged, row * scratch.stride + k, y);
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
