// The kernel: all steps of a flow block's pass in one launch, with a barrier of the grid between phases.
//
//   for each token:  proj_in | LayerNorm, qkv | attention | proj, + | LayerNorm, fc1, GELU | fc2, + | … | proj_out
//
// where | is a barrier: 5 L + 2 a token. The affine update of a token is part of the next token's proj_in. Every output
// has one block that computes it, so nothing is added atomically and a pass gives the same bits each time.
#pragma once

#include "frontier.cuh"
#include "grid.cuh"
#include "inputs.cuh"
#include "kernel.h"

#ifndef TARFLOW_WARPS
#define TARFLOW_WARPS 8
#endif

namespace tarflow {

// There is one copy of each part, whichever phases it serves: the code of all phases together would not fit in a
// multiprocessor's instruction cache several times over.
template <class T, int NT, int WARPS>
struct Pass {
  const Params& p;
  Rows rows;
  Grid grid;
  Shared<int> work;
  Scratch<T> scratch;
  Ring<T, WARPS> ring;

  // Stages the input of a phase's product. begin: the first token of a pass is there; the others follow from
  // parameters.
  DEVICE void stage(Phase phase, bool begin, int first, int count, int k0, int k) {
    switch (phase) {
      case EMBED: {
        const bool keeps = load(work, 0) == 0 && load(work, 1) > 0;
        return stage_tokens<WARPS>(p, rows, scratch, first, count, begin, keeps);
      }
      case PROJ:
        return p.head_dim % 4 == 0 ? stage_attended<WARPS, 4>(p, rows, scratch, first, count)
                                   : stage_attended<WARPS, 1>(p, rows, scratch, first, count);
      case FC2: return stage_hidden<WARPS>(p, scratch, first, count, k0, k);
      case PROJ_OUT: return stage_stream<WARPS>(p, scratch, first, count);
      default: return stage_normed<WARPS>(p, scratch, first, count);
    }
  }

  // Does with output n of a row what its phase does.
  DEVICE void finish(Phase phase, int layer, int n, int row, float y) {
    switch (phase) {
      case EMBED: return embedded(n, row, y);
      case QKV: return queried(layer, n, row, y);
      case FC1: {
        instructions(30);
        const float gelu = 0.5f * y * (1 + erff(y * 0.70710678f));
        return store(Global<T>(p.hidden), static_cast<int64_t>(row) * whole_tiles(p.hidden_dim) + n,
                     from_float<T>(gelu));
      }
      case PROJ_OUT:
        return store(Global<float>(p.parameters), static_cast<int64_t>(row) * whole_tiles(p.out_dim) + n, y);
      default: {  // h += y, as one thread takes each element
        const Global<float> h(p.h);
        const int64_t at = static_cast<int64_t>(row) * whole_tiles(p.channels) + n;
        store(h, at, load(h, at) + y);
      }
    }
  }

  // h = proj_in(x) + position + class, in each branch
  DEVICE void embedded(int n, int i, float y) {
    const Global<float> h(p.h);
    const Global<const float> position(p.position), classes(p.class_rows);
    const bool inside = n < p.channels;
    const int token = rows.token_at(i) < 0 ? 0 : rows.token_at(i);
    if (inside) y += constant(position, static_cast<int64_t>(token) * p.channels + n);
    for (int row = i; row < rows.count(); row += p.positions) {
      float value = y;
      if (inside && p.class_rows.count)
        value += constant(classes, static_cast<int64_t>(rows.cache_row(row)) * p.channels + n);
      store(h, static_cast<int64_t>(row) * whole_tiles(p.channels) + n, value);
    }
  }

  // Stores queries, and puts keys and values into the cache.
  DEVICE void queried(int layer, int n, int row, float y) {
    const Global<T> cache(p.keys_values);
    const int which = n / p.channels, channel = n % p.channels;
    instructions(60);
    if (which == 0) {
      store(Global<float>(p.queries), static_cast<int64_t>(row) * whole_tiles(p.channels) + channel, y);
    } else if (which < 3 && rows.token(row) >= 0) {
      const int head = channel / p.head_dim, c = channel % p.head_dim;
      store(cache, rows.cached(layer, which - 1, row, head) + rows.token(row) * p.head_dim + c, from_float<T>(y));
    }
  }

  DEVICE void attention(int layer) {
    section(ATTEND);
    constexpr int V = 16 / sizeof(T);
    if (p.head_dim % V == 0)
      attend<T, V, WARPS>(p, rows, layer, scratch.sums);
    else
      attend<T, 1, WARPS>(p, rows, layer, scratch.sums);
  }

  DEVICE void phase_of(Phase phase, int layer, bool begin) {
    const bool skipped = p.skip_phases >> phase & 1;
    section(phase, OTHER);
    if (phase == ATTENTION) {
      if (!skipped) attention(layer);
      return;
    }
    const Linear of = linear_of(p, phase, layer);
    if (skipped) return skip(p, of, ring, work);
    linear<NT, WARPS>(p, of, phase == EMBED ? p.positions : rows.count(), ring, work, scratch,
                      [&](int first, int count, int k0, int k) { stage(phase, begin, first, count, k0, k); },
                      [&](int n, int row, float y) { finish(phase, layer, n, row, y); });
  }

  DEVICE void barrier(Phase phase, int layer) {
    grid.sync([&] {
      ring.fill();
      if (phase == QKV) prefetch_keys<T, WARPS>(p, rows, layer);
    });
  }

  // Evaluates the transformer.
  DEVICE void step(bool begin) {
    int layer = 0;
    Phase phase = EMBED;
#pragma unroll 1
    while (true) {
      phase_of(phase, layer, begin);
      barrier(phase, layer);
      if (phase == PROJ_OUT) break;
      if (phase == FC2) layer++;
      phase = phase == FC2 ? (layer < p.layers ? QKV : PROJ_OUT) : static_cast<Phase>(phase + 1);
    }
  }

  DEVICE void run() {
    int passes = 0;
    ring.fill();
#pragma unroll 1
    for (bool begin = true;; begin = p.mode == FRONTIER) {
      if (p.mode == FRONTIER && (passes == p.max_passes || !look<WARPS>(p, rows))) break;
      step(begin);
      passes++;
      section(PHASES, UPDATE);
      if (p.mode == FRONTIER) {
        advance<WARPS>(p, rows, scratch.sums);
        barrier(PHASES, 0);
      } else if (p.mode == FIXED_POINT || rows.next + 2 >= p.stop) {
        update<WARPS>(p, rows);
        break;
      } else {
        rows.next++;
      }
    }
    if (p.mode == FRONTIER && block() == 0 && thread() == 0) store(Global<int>(p.passes), 0, passes);
    ring.drain();
  }
};

// Shared memory has tokens of the positions; work and jobs of this block; sums, or what attention needs; X; and the
// ring, as plan.py counts.
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
  Pass<T, NT, WARPS> pass{
      p, {p, tokens, p.start - 1}, Grid(p), work, scratch, {p, shared<T>(ring, p.slots * p.slot_k * TILE), jobs}};
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
