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

// (h − mean) / std for rows [first, first + count). A warp takes a row, and keeps as much of it as registers allow.
template <int WARPS, class T>
DEVICE void stage_normed(const Params& p, const Scratch<T>& scratch, int first, int count) {
  constexpr int KEPT = 8, STEP = 128;
  const Global<float> h(p.h);
  const int width = whole_tiles(p.channels), lane = thread() % 32;
  for (int row = thread() / 32; row < count; row += WARPS) {
    const auto read = [&](int k) {
      Vector<float, 4> v{};
      if (k < width) v = load_vector<4>(h, static_cast<int64_t>(first + row) * width + k);
      return v;
    };
    Vector<float, 4> kept[KEPT];
#pragma unroll
    for (int j = 0; j < KEPT; j++)
      if (j * STEP < width) kept[j] = read(j * STEP + lane * 4);
    const auto each = [&](auto take) {
#pragma unroll
      for (int j = 0; j < KEPT; j++)
        if (j * STEP < width) take(j * STEP + lane * 4, kept[j]);
      for (int k = KEPT * STEP; k < width; k += STEP) take(k + lane * 4, read(k + lane * 4));
    };
    instructions(3 * width / 32);
    float sum = 0, squares = 0;
    each([&](int, const Vector<float, 4>& v) {
      sum += v.at[0] + v.at[1] + v.at[2] + v.at[3];
    });  // the values beyond the channels are 0
    const float mean = sum_lanes(sum) / p.channels;
    each([&](int k, const Vector<float, 4>& v) {
      for (int i = 0; i < 4; i++)
        if (k + i < p.channels) squares += (v.at[i] - mean) * (v.at[i] - mean);
    });
    const float scale = 1 / sqrtf(sum_lanes(squares) / p.channels + 1e-5f);
    each([&](int k, const Vector<float, 4>& v) {
      Vector<T, 4> y;
      for (int i = 0; i < 4; i++) y.at[i] = from_float<T>(k + i < p.channels ? (v.at[i] - mean) * scale : 0.0f);
      if (k < width) store_vector(scratch.staged, row * scratch.stride + k, y);
    });
  }
}

// The residual stream h itself.
template <int WARPS, class T>
DEVICE void stage_stream(const Params& p, const Scratch<T>& scratch, int first, int count) {
  const Global<float> h(p.h);
  const int width = whole_tiles(p.channels), vectors = width / 4;
#pragma unroll 1
  for (int i = thread(); i < count * vectors; i += WARPS * 32) {
    const int row = i / vectors, k = i % vectors * 4;
    instructions(20);
    const auto v = load_vector<4>(h, static_cast<int64_t>(first + row) * width + k);
    for (int j = 0; j < 4; j++) stage_value(scratch, row, k + j, v.at[j]);
  }
}

// The attended values.
template <int WARPS, int V, class T>
DEVICE void stage_attended(const Params& p, const Rows& rows, const Scratch<T>& scratch, int first, int count) {
  const int vectors = whole_tiles(p.channels) / V;
#pragma unroll 1
  for (int i = thread(); i < count * vectors; i += WARPS * 32) {
    const int row = i / vectors, k = i % vectors * V;
    instructions(20);
    Vector<float, V> y{};
    if (k < p.channels) y = attended<V>(p, rows, first + row, k);
    for (int j = 0; j < V; j++) stage_value(scratch, row, k + j, y.at[j]);
  }
}

// The columns [k0, k0 + k) of the hidden layer.
template <int WARPS, class T>
DEVICE void stage_hidden(const Params& p, const Scratch<T>& scratch, int first, int count, int k0, int k) {
  constexpr int V = 16 / sizeof(T);
  const Global<T> hidden(p.hidden);
  const int width = whole_tiles(p.hidden_dim);
#pragma unroll 1
  for (int i = thread(); i < count * (k / V); i += WARPS * 32) {
    const int row = i / (k / V), column = i % (k / V) * V;
    instructions(20);
    store_vector(scratch.staged, row * scratch.stride + column,
                 load_vector<V>(hidden, static_cast<int64_t>(first + row) * width + k0 + column));
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
      for (int d = lane; d < p.token_dim; d += 32)
        stage_value(scratch, row, d, token < 0 ? 0.0f : load(input, place * p.token_dim + d));
      continue;
    }
    const float log_det = next_token(p, rows, position, token - 1, [&](int d, float value, float) {
      stage_value(scratch, row, d, value);
      if (keeps) store(x, place * p.token_dim + d, value);
    });
    if (keeps && lane == 0) store(log_dets, place, log_det);
  }
}

}  // namespace tarflow
