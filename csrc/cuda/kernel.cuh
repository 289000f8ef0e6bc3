// The kernel: all steps of a flow block's pass in one launch, with a barrier of the grid between phases.
//
//   for each token:  proj_in | LayerNorm, qkv | attention | proj, + | LayerNorm, fc1, GELU | fc2, + | … | proj_out
//
// where | is a barrier, 5 L + 2 a token, and one more a layer where the attention's parts are added up in a step of their
// own. Of more than 16 rows, LayerNorm is a step of its own as well, and only proj_in, qkv and proj_out end with a
// barrier, L + 2 a token: all else is sent (see sent.cuh). The affine update of a token is part of the next token's
// proj_in. Every output has one block that computes it, so nothing is added atomically and a pass gives the same bits each
// time.
#pragma once

#include "frontier.cuh"
#include "grid.cuh"
#include "inputs.cuh"
#include "kernel.h"
#include "window.cuh"

#ifndef TARFLOW_WARPS
#define TARFLOW_WARPS 8
#endif

namespace tarflow {

// There is one copy of each part, whichever phases it serves: the code of all phases together would not fit in a
// multiprocessor's instruction cache several times over.
template <class T, int NT, int WARPS>
struct Pass {
  static constexpr bool WINDOWS = sizeof(T) == 2 && NT > 1;  // whether rows can attend together
  static constexpr bool SENDS = NT > 2;  // whether LayerNorm is a step of its own, and data are sent
  static constexpr bool GATED = SENDS && GATES;  // whether the ring has gates

  const Params& p;
  Rows rows;
  Grid grid;
  Shared<int> work;
  Scratch<T> scratch;
  Shared<float> parts;  // of the attention, or what a parallel pass found; in the place of `scratch`
  Shared<T> keys;  // of windows, in the same memory
  Shared<float> biases;  // of all tiles of this block: no load of them is to wait behind the weights
  Ring<T, WARPS, GATED> ring;
  int turn = 0;  // which half of the memory that others read is used until the next barrier; 0 where nothing is sent
  int since = 0;  // the groups of weights that were asked for in the last meanwhile

  // Stages the input of a phase's product. begin: the first token of a pass is there; the others follow from
  // parameters.
  DEVICE void stage(Phase phase, int layer, bool begin, int first, int count, int k0, int k, Share share) {
    if (phase == EMBED) return stage_tokens<WARPS>(p, rows, scratch, first, count, begin, has_first(first));
    if constexpr (SENDS) {
      // LayerNorm and the sum of the attention's parts are never left out.
      const bool sent = phase == FC2 ? sends(p, FC1) : phase != PROJ || p.merges || sends(p, ATTENTION);
      const Buffer& from = phase == PROJ ? p.attended : phase == FC2 ? p.hidden : p.norms;
      const int side = phase == FC1 ? 2 + turn : turn, width = whole_tiles(phase == FC2 ? p.hidden_dim : p.channels);
      stage_sent<WARPS>(sent, from, width, phase != FC2, scratch, side * MOST_ROWS + first, count, k0, k, share);
    } else if (phase == FC2) {
      stage_ready<WARPS>(p.hidden, p.hidden_dim, scratch, first, count, k0, k);
    } else if (phase == PROJ && (p.splits == 1 || p.merges)) {
      stage_ready<WARPS>(p.attended, p.channels, scratch, first, count, k0, k);
    } else if (phase == PROJ && p.head_dim % 4 == 0) {
      stage_attended<WARPS, 4>(p, rows, scratch, first, count, k0, k);
    } else if (phase == PROJ) {
      stage_attended<WARPS, 1>(p, rows, scratch, first, count, k0, k);
    } else if (phase == PROJ_OUT) {
      stage_stream<WARPS>(stream(phase, layer), scratch, first, count);
    } else {
      stage_normed<WARPS>(stream(phase, layer), scratch, first, count);
    }
  }

  // Returns whether this block has the first tile of proj_in for the group of a row.
  DEVICE bool has_first(int row) const {
    const int unit = row < p.group_rows ? 0 : linear_of(p, EMBED, 0).tiles, first = load(work, 0);
    return first <= unit && unit < first + load(work, 1);
  }

  // Returns the residual stream as it is where a phase begins.
  DEVICE Stream stream(Phase phase, int layer) const {
    return {p, phase == FC1 || phase == FC2 ? PROJ : layer == 0 ? EMBED : FC2};
  }

  // Loads what `finish` needs besides output n of a row, of a part of the inputs.
  DEVICE LoadedStream before(Phase phase, int layer, int part, int n, int row) {
    LoadedStream of;
    if (phase == EMBED && n < p.channels) {
      const int token = rows.token_at(row) < 0 ? 0 : rows.token_at(row);
      of.h = constant(Global<const float>(p.position), static_cast<int64_t>(token) * p.channels + n);
    }
    if (!SENDS && (phase == PROJ || phase == FC2) && part == 0) of.load_from(stream(phase, layer), row, n);
    return of;
  }

  // Does with output n of a row, or a part's sum, what its phase does.
  DEVICE void finish(Phase phase, int layer, int part, int n, int row, float y, const LoadedStream& loaded) {
    switch (phase) {
      case EMBED: return embedded(n, row, y + loaded.h);
      case QKV: return queried(layer, n, row, y);
      case FC1: {
        instructions(30);
        const float gelu = 0.5f * y * (1 + erff(y * 0.70710678f));
        const Global<T> hidden(p.hidden);
        const int64_t at = turn_row(turn, row) * whole_tiles(p.hidden_dim) + n;
        if constexpr (SENDS)
          return send(hidden, at, from_float<T>(gelu));
        else
          return store(hidden, at, from_float<T>(gelu));
      }
      case PROJ_OUT:
        return store(Global<float>(p.parameters), static_cast<int64_t>(row) * whole_tiles(p.out_dim) + n, y);
      default: {
        const Stream after{p, phase};
        if constexpr (SENDS) return send(Global<float>(p.rest), after.rest_at(part, row) + n, y);
        if (part > 0) return store(Global<float>(p.rest), after.rest_at(part - 1, row) + n, y);
        return store(Global<float>(p.h), after.at(row) + n, loaded.sum() + y);  // as one thread takes each element
      }
    }
  }

  // h = proj_in(x) + position + class, in each branch
  DEVICE void embedded(int n, int i, float y) {
    const Global<float> h(p.h);
    const Global<const float> classes(p.class_rows);
    const bool has_class = n < p.channels && p.class_rows.count;
    Loaded<float> of_class[2] = {};
#pragma unroll
    for (int b = 0; b < 2; b++)
      if (b < p.branches && has_class)
        of_class[b] = constant(classes, static_cast<int64_t>(rows.cache_row(i + b * p.positions)) * p.channels + n);
#pragma unroll
    for (int b = 0; b < 2; b++)
      if (b < p.branches)
        store(h, static_cast<int64_t>(i + b * p.positions) * whole_tiles(p.channels) + n, y + of_class[b]);
  }

  // Stores queries, and puts keys and values into the cache.
  DEVICE void queried(int layer, int n, int row, float y) {
    const Global<T> cache(p.keys_values);
    const int which = (n >= p.channels) + (n >= 2 * p.channels) + (n >= 3 * p.channels);
    const int channel = n - which * p.channels;
    instructions(10);
    if (which == 0) {
      const int64_t at =
          turn_row(SENDS ? 1 - turn : 0, row) * whole_tiles(p.channels) + channel;  // it is read in the next turn
      if (WINDOWS && p.tiles)
        store(Global<T>(p.queries), at, from_float<T>(y));
      else
        store(Global<float>(p.queries), at, y);
    } else if (which < 3 && rows.token(row) >= 0) {
      const int head = divide(channel, p.head_dim), c = channel - head * p.head_dim;
      store(cache, rows.cached(layer, which - 1, row, head) + rows.token(row) * p.head_dim + c, from_float<T>(y));
    }
  }

  DEVICE void attention(int layer) {
    section(ATTEND);
    if constexpr (WINDOWS)
      if (p.tiles) return attend_windows<T, WARPS, SENDS>(p, rows, layer, turn, parts, keys, since);
    constexpr int V = 16 / sizeof(T);
    if (p.head_dim % V == 0)
      attend<T, V, WARPS, SENDS>(p, rows, layer, turn, parts);
    else
      attend<T, 1, WARPS, SENDS>(p, rows, layer, turn, parts);
  }

  DEVICE void phase_of(Phase phase, int layer, bool begin) {
    const bool skipped = p.skip_phases >> phase & 1;
    section(phase, OTHER);
    if (phase == ATTENTION) {
      if (!skipped) attention(layer);
      return;
    }
    const Linear of = linear_of(p, phase, layer);
    if (skipped) return skip<WARPS, GATED>(p, of, ring, work);
    const bool shares = SENDS && phase != EMBED;
    linear<NT, WARPS, GATED>(p, of, phase == EMBED ? p.positions : rows.count(), ring, work, scratch, biases, shares,
                             [&](int first, int count, int k0, int k, Share share) {
      stage(phase, layer, begin, first, count, k0, k, share);
    }, [&](int part, int n, int row) { return before(phase, layer, part, n, row); },
                             [&](int part, int n, int row, float y, const LoadedStream& loaded) {
      finish(phase, layer, part, n, row, y, loaded);
    });
  }

  // Ends a phase, or, as PHASES, a step of its own: what it has left is for all blocks, and its shared memory for others.
  DEVICE void end(Phase after, int layer) {
    const auto meanwhile = [&] {
      if (p.sums_in_slots) ring.release();  // the sums have been read
      if constexpr (WINDOWS)
        if (p.tiles && after == QKV && !(p.skip_phases >> ATTENTION & 1)) copy_window<T, WARPS>(p, rows, layer, keys);
      since = SENDS ? ring.fill_some(after == PHASES || after == ATTENTION ? 2 : 1) : ring.fill();
      const int of_layer = after == FC1 ? layer + 1 : layer;  // after proj others may still wait for memory
      const bool early = after == EMBED || after == FC1;
      if (!(early || after == QKV) || of_layer == p.layers) return;
      if constexpr (WINDOWS)
        if (p.tiles) {
          if (early) prefetch_window<T, WARPS>(p, rows, of_layer);
          return;
        }
      prefetch_keys<T, WARPS>(p, rows, of_layer, early);
    };
    if constexpr (SENDS) {
      if (after != EMBED && after != QKV && after != PROJ_OUT) {
        sync_block();
        section(FETCH);
        return meanwhile();
      }
    }
    grid.sync(meanwhile);
    if constexpr (SENDS) next_turn();
  }

  // Begins a turn, in which what others have read in the one before is emptied.
  DEVICE void next_turn() {
    turn = 1 - turn;
    empty_turn(1 - turn);
  }

  // Empties what others have read in a turn, of all rows.
  DEVICE void empty_turn(int of) {
    const int count = rows.count(), width = whole_tiles(p.channels), hidden = whole_tiles(p.hidden_dim);
    empty_all<WARPS>(Global<T>(p.hidden), turn_row(of, 0) * hidden, count * hidden);
    empty_all<WARPS>(Global<T>(p.attended), turn_row(of, 0) * width, count * width);
    empty_all<WARPS>(Global<T>(p.norms), turn_row(of, 0) * width, count * width);
    empty_all<WARPS>(Global<T>(p.norms), turn_row(2 + of, 0) * width, count * width);
    if (p.merges) empty_all<WARPS>(Global<float>(p.partials), statistics(p, rows, of), statistics_size(p, rows));
  }

  // Empties all that is sent before the first of it is.
  DEVICE void begin_turns() {
    const int width = whole_tiles(p.channels), sums = static_cast<int>(statistics(p, rows, 0));
    const Global<float> rest(p.rest);
#pragma unroll 1
    for (int i = 0; i < MOST_PARTS; i++) {
      empty_all<WARPS>(rest, Stream{p, PROJ}.rest_at(i, 0), rows.count() * width);
      empty_all<WARPS>(rest, Stream{p, FC2}.rest_at(i, 0), rows.count() * width);
    }
    if (p.merges) empty_all<WARPS>(Global<float>(p.partials), 0, sums);
    empty_turn(1 - turn);
    empty_turn(turn);
    grid.sync([] {});
  }

  // Evaluates the transformer.
  DEVICE void step(bool begin) {
    int layer = 0;
    Phase phase = EMBED;
#pragma unroll 1
    while (true) {
      phase_of(phase, layer, begin);
      end(phase, layer);
      if (phase == ATTENTION && p.merges) {
        section(MERGE);
        if (p.head_dim % 4 == 0)
          merge<T, 4, WARPS, SENDS>(p, rows, turn);
        else
          merge<T, 1, WARPS, SENDS>(p, rows, turn);
        end(PHASES, layer);
      }
      if constexpr (SENDS)
        if (phase == EMBED || phase == PROJ || phase == FC2) {
          section(NORM);
          const int to = (phase == PROJ ? 2 + turn : turn) * MOST_ROWS;
          send_norms<WARPS, T>(Stream{p, phase}, rows, phase != FC2 || layer + 1 < p.layers, to, parts);
          end(PHASES, layer);
        }
      if (phase == PROJ_OUT) break;
      if (phase == FC2) layer++;
      phase = phase == FC2 ? (layer < p.layers ? QKV : PROJ_OUT) : static_cast<Phase>(phase + 1);
    }
  }

  // Returns how many tokens, or passes, are done.
  DEVICE int steps() const { return rows.next + 1 - p.start; }

  DEVICE void run() {
    ring.open();
    if constexpr (SENDS) begin_turns();
#pragma unroll 1
    for (bool begin = true;; begin = p.mode == FRONTIER) {
      if (p.mode == FRONTIER && (steps() == p.max_passes || !look<WARPS>(p, rows))) break;
      if constexpr (WINDOWS)
        if (p.tiles) count_keys<WARPS>(p, rows);
      step(begin);
      section(PHASES, UPDATE);
      if (p.mode == FRONTIER) {
        advance<WARPS>(p, rows, parts);
        rows.next++;
        grid.sync([&] { ring.fill(); });
      } else if (p.mode == FIXED_POINT || rows.next + 2 >= p.stop) {
        update<WARPS>(p, rows);
        break;
      } else {
        rows.next++;
      }
    }
    if (p.mode == FRONTIER && block() == 0 && thread() == 0) store(Global<int>(p.passes), 0, steps());
    ring.drain();
  }
};

// Finds the tiles: runs of at most WINDOW_ROWS positions of one sample.
DEVICE void find_tiles(const Params& p, Shared<int> tiles) {
  int count = 0, first = 0;
  for (int i = 0; i <= p.positions; i++) {
    if (i > 0 && i < p.positions && i - first < WINDOW_ROWS && p.sample[i] == p.sample[first]) continue;
    store(tiles, count++, i);
    first = i;
  }
}

// Shared memory has tokens of the positions, and their tiles; work and jobs of this block; biases; sums, unless they go
// into slots of the ring, and X, or what attention needs; and the ring with its gates, as plan.py counts.
template <class T, int NT, int WARPS>
KERNEL void pass_kernel(CONSTANT_PARAMS p) {
  const int positions = divide_up(4 * (MOST_ROWS + 3 * p.tiles + 1), 16) * 16;  // bytes of tokens and tiles
  const int layers = 4 * p.layers + 2, jobs_bytes = positions + divide_up(12 * layers, 16) * 16;
  const int tables = divide_up(jobs_bytes + 8 * p.most_jobs, 16) * 16;
  const int work_bytes = tables + 4 * TILE * p.bias_tiles;
  const Shared<int> tokens = shared<int>(0, MOST_ROWS), tiles = shared<int>(4 * MOST_ROWS, 3 * p.tiles + 1);
  const Shared<int> work = shared<int>(positions, 3 * layers);
  const Shared<int> jobs = shared<int>(jobs_bytes, 2 * p.most_jobs);
  const Shared<float> biases = shared<float>(tables, p.bias_tiles * TILE);
  const int sums = p.sums_in_slots ? 0 : ABREAST<NT, T> * NT * MULTIPLIERS<NT, WARPS> * 128, stride = p.staged_k + 8;
  const int product_bytes = 4 * sums + p.staged_rows * stride * static_cast<int>(sizeof(T));
  const int alone = WARPS * part_floats(p.head_dim), together = p.tiles ? WARPS * TILE * WINDOW_ROW : 0;
  const int needed = 4 * (alone > together ? alone : together);
  const int shared_bytes = product_bytes > needed ? product_bytes : needed, ring = work_bytes + shared_bytes;
  const int ring_size = p.slots * (p.slot_k * TILE + decltype(Pass<T, NT, WARPS>::ring)::TAIL);
  const Scratch<T> scratch{shared<T>(work_bytes + 4 * sums, p.staged_rows * stride), stride,
                           p.sums_in_slots ? shared<float>(ring, ring_size * static_cast<int>(sizeof(T)) / 4)
                                           : shared<float>(work_bytes, sums)};
  for (int i = thread(); i < p.positions; i += WARPS * 32) store(tokens, i, p.token[i]);
  if (thread() == 0 && p.tiles) find_tiles(p, tiles);
  for (int i = thread(); i < 2 * layers; i += WARPS * 32)
    store(work, i / 2 * 3 + i % 2, constant(Global<const int>(p.work), (i / 2 * blocks() + block()) * 2 + i % 2));
  for (int i = thread(); i < 2 * p.most_jobs; i += WARPS * 32)
    store(jobs, i, constant(Global<const int>(p.jobs), block() * p.most_jobs * 2 + i));
  // Rows that no token fills are multiplied too, and columns beyond a layer's own.
  for (int i = thread(); i < p.staged_rows * stride; i += WARPS * 32) store(scratch.staged, i, from_float<T>(0.0f));
  sync_block();
  for (int i = 0, tile = 0; i < layers; i++) {
    const Linear layer = linear_at(p, i);
    const int first = load(work, 3 * i), count = load(work, 3 * i + 1);
    if (thread() == 0) store(work, 3 * i + 2, tile);
    for (int j = thread(); j < count * TILE && p.bias_tiles; j += WARPS * 32) {
      const Unit unit(layer, first + j / TILE);
      if (unit.part > 0) continue;  // the other parts have none
      store(biases, tile * TILE + j,
            constant(Global<const float>(p.biases), layer.biases + unit.tile * TILE + j % TILE));
    }
    tile += count;
  }
  sync_block();
  Pass<T, NT, WARPS> pass{
      p,
      {p, tokens, tiles, p.start - 1},
      Grid(p),
      work,
      scratch,
      shared<float>(work_bytes, shared_bytes / 4),
      shared<T>(work_bytes, p.room * 2 * WINDOW_ROW),
      biases,
      {p, shared<T>(ring, ring_size), jobs, shared<Gate>(ring, ring_size * static_cast<int>(sizeof(T)) / 8)}};
  pass.run();
}

template <class T, int WARPS = TARFLOW_WARPS>
Instances instances_of(const char* dtype) {
  return {{{dtype, 8, WARPS, pass_kernel<T, 1, WARPS>},
           {dtype, 16, WARPS, pass_kernel<T, 2, WARPS>},
           {dtype, MOST_ROWS, WARPS, pass_kernel<T, GROUP_ROWS / 8, WARPS>}}};
}

}  // namespace tarflow
