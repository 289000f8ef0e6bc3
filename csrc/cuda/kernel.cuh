// The kernel: all steps of a flow block's pass in one launch, with a barrier of the grid between phases.
//
//   for each token:  proj_in | LayerNorm, qkv | attention | proj, + | LayerNorm, fc1, GELU | fc2, + | … | proj_out
//
// where | is a barrier: 5 L + 2 a token. The affine update of a token is part of the next token's proj_in. Every output has
// one block that computes it, so nothing is added atomically and a pass gives the same bits each time.
#pragma once

#include "frontier.cuh"
#include "grid.cuh"
#include "inputs.cuh"
#include "kernel.h"

#ifndef TARFLOW_WARPS
#define TARFLOW_WARPS 8
#endif

namespace tarflow {

template <class T, int NT, int WARPS>
struct Pass {
  const Params& p;
  Rows rows;
  Grid grid;
  Shared<int> work;
  Scratch<T> scratch;
  Ring<T, WARPS> ring;

  DEVICE bool done(Phase phase) const { return !(p.left_out >> phase & 1); }

  DEVICE void barrier() {
    grid.sync([&] { ring.fill(); });
  }

  template <class Stage, class Finish>
  DEVICE void product(Phase phase, int layer, int count, Stage stage, Finish finish) {
    const Linear of = linear_of(p, phase, layer);
    if (done(phase))
      linear<NT, WARPS>(p, of, count, ring, work, scratch, stage, finish);
    else
      skip(p, of, ring, work);
  }

  // The tokens' embeddings into h: proj_in(x) + position + class.
  DEVICE void embed(bool begin) {
    const Global<float> h(p.h);
    const Global<const float> position(p.position), classes(p.class_rows);
    const int width = whole_tiles(p.channels);
    const bool keeps = load(work, 0) == 0 && load(work, 1) > 0;
    product(
        EMBED, 0, p.positions,
        [&](int first, int count, int, int) { stage_tokens<WARPS>(p, rows, scratch, first, count, begin, keeps); },
        [&](int n, int i, float y) {
          const bool inside = n < p.channels;
          const int token = rows.token_at(i) < 0 ? 0 : rows.token_at(i);
          if (inside) y += constant(position, static_cast<int64_t>(token) * p.channels + n);
          for (int row = i; row < rows.count(); row += p.positions) {
            float value = y;
            if (inside && p.class_rows.count)
              value += constant(classes, static_cast<int64_t>(rows.cache_row(row)) * p.channels + n);
            store(h, static_cast<int64_t>(row) * width + n, value);
          }
        });
  }

  DEVICE void qkv(int layer) {
    const Global<float> queries(p.queries);
    const Global<T> cache(p.keys_values);
    product(
        QKV, layer, rows.count(),
        [&](int first, int count, int, int) { stage_normed<WARPS>(p, scratch, first, count); },
        [&](int n, int row, float y) {
          const int which = n / p.channels, channel = n % p.channels;
          if (which == 0) {
            store(queries, static_cast<int64_t>(row) * whole_tiles(p.channels) + channel, y);
          } else if (which < 3 && rows.token(row) >= 0) {
            const int head = channel / p.head_dim, c = channel % p.head_dim;
            store(cache, rows.cached(layer, which - 1, row, head) + rows.token(row) * p.head_dim + c, from_float<T>(y));
          }
        });
  }

  DEVICE void attention(int layer) {
    constexpr int V = 16 / sizeof(T);
    if (!done(ATTENTION)) return;
    if (p.head_dim % V == 0)
      attend<T, V, WARPS>(p, rows, layer, scratch.sums);
    else
      attend<T, 1, WARPS>(p, rows, layer, scratch.sums);
  }

  // h += y, which a layer's tile and no other thread does to an element.
  DEVICE auto add() {
    return [this](int n, int row, float y) {
      const Global<float> h(p.h);
      const int64_t at = static_cast<int64_t>(row) * whole_tiles(p.channels) + n;
      store(h, at, load(h, at) + y);
    };
  }

  DEVICE void proj(int layer) {
    product(
        PROJ, layer, rows.count(),
        [&](int first, int count, int, int) {
          if (p.head_dim % 4 == 0)
            stage_attended<WARPS, 4>(p, rows, scratch, first, count);
          else
            stage_attended<WARPS, 1>(p, rows, scratch, first, count);
        },
        add());
  }

  DEVICE void fc1(int layer) {
    const Global<T> hidden(p.hidden);
    product(
        FC1, layer, rows.count(),
        [&](int first, int count, int, int) { stage_normed<WARPS>(p, scratch, first, count); },
        [&](int n, int row, float y) {
          const float gelu = 0.5f * y * (1 + erff(y * 0.70710678f));
          store(hidden, static_cast<int64_t>(row) * whole_tiles(4 * p.channels) + n, from_float<T>(gelu));
        });
  }

  DEVICE void fc2(int layer) {
    product(
        FC2, layer, rows.count(),
        [&](int first, int count, int k0, int k) { stage_hidden<WARPS>(p, scratch, first, count, k0, k); }, add());
  }

  DEVICE void proj_out() {
    const Global<float> parameters(p.parameters);
    product(
        PROJ_OUT, 0, rows.count(),
        [&](int first, int count, int, int) { stage_stream<WARPS>(p, scratch, first, count); },
        [&](int n, int row, float y) {
          store(parameters, static_cast<int64_t>(row) * whole_tiles(p.out_dim) + n, y);
        });
  }

  DEVICE void step(bool begin) {
    embed(begin);
    barrier();
#pragma unroll 1
    for (int layer = 0; layer < p.layers; layer++) {
      qkv(layer);
      grid.sync([&] {
        ring.fill();
        prefetch_keys<T, WARPS>(p, rows, layer);
      });
      attention(layer);
      barrier();
      proj(layer);
      barrier();
      fc1(layer);
      barrier();
      fc2(layer);
      barrier();
    }
    proj_out();
    barrier();
  }

  DEVICE void run() {
    ring.fill();
    if (p.mode == FRONTIER) {
      int passes = 0;
      for (; passes < p.most && look<WARPS>(p, rows); passes++) {
        step(true);
        advance<WARPS>(p, rows, scratch.sums);
        barrier();
      }
      if (block() == 0 && thread() == 0) store(Global<int>(p.passes), 0, passes);
    } else {
      for (bool begin = true;; begin = false) {
        step(begin);
        if (p.mode == FIXED_POINT || rows.next + 2 >= p.stop) break;
        rows.next++;
      }
      update<WARPS>(p, rows);
    }
    ring.drain();
  }
};

// Shared memory: tokens of the positions; work and jobs of this block; sums, or what attention needs; X; the ring. As in
// cuda_plan.py.
template <class T, int NT, int WARPS>
KERNEL void pass_kernel(CONSTANT_PARAMS p) {
  const int layers = 4 * p.layers + 2, work_bytes = divide_up(4 * MOST_ROWS + 8 * (layers + p.most_jobs), 16) * 16;
  const Shared<int> tokens = shared<int>(0, MOST_ROWS), work = shared<int>(4 * MOST_ROWS, 2 * layers);
  const Shared<int> jobs = shared<int>(4 * MOST_ROWS + 8 * layers, 2 * p.most_jobs);
  const int products = NT * WARPS * 128, parts = divide_up(WARPS * (p.head_dim + 2), 4) * 4;
  const int sums = products > parts ? products : parts, stride = p.slot_k + 8;
  const Scratch<T> scratch{shared<T>(work_bytes + 4 * sums, p.staged_rows * stride), stride,
                           shared<float>(work_bytes, sums)};
  const int ring = work_bytes + 4 * sums + p.staged_rows * stride * static_cast<int>(sizeof(T));
  for (int i = thread(); i < p.positions; i += WARPS * 32) store(tokens, i, p.token[i]);
  for (int i = thread(); i < 2 * layers; i += WARPS * 32)
    store(work, i, constant(Global<const int>(p.work), (i / 2 * blocks() + block()) * 2 + i % 2));
  for (int i = thread(); i < 2 * p.most_jobs; i += WARPS * 32)
    store(jobs, i, constant(Global<const int>(p.jobs), block() * p.most_jobs * 2 + i));
  // Rows that no token fills are multiplied too, and columns beyond a layer's own.
  for (int i = thread(); i < p.staged_rows * stride; i += WARPS * 32) store(scratch.staged, i, from_float<T>(0.0f));
  sync_block();
  Pass<T, NT, WARPS> pass{p,       {p, tokens, p.start - 1}, Grid(p), work,
                          scratch, {p, shared<T>(ring, p.slots * p.slot_k * TILE), jobs}};
  pass.run();
}

template <class T, int WARPS = TARFLOW_WARPS>
Instances instances_of(const char* dtype) {
  return {{{dtype, 8, WARPS, pass_kernel<T, 1, WARPS>},
           {dtype, 16, WARPS, pass_kernel<T, 2, WARPS>},
           {dtype, 32, WARPS, pass_kernel<T, 4, WARPS>},
           {dtype, 64, WARPS, pass_kernel<T, 8, WARPS>}}};
}

}  // namespace tarflow
