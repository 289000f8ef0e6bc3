// The density pass and the gradient of its log-density, for many rows at a time. Weights are read where torch has them:
// each panel is brought into the order of `tile` on the way, and serves all rows before the next one is.
//
// One thread sums each element of a product over k from end to end, as in a step of the inverse, so that neither the
// number of rows nor that of threads changes a result.

constexpr int64_t MOST_ROWS = ACCUMULATORS / 2;  // the most rows of a tile of one panel

// Asks for part i of n of the panel of weights that comes next, which lies in no order that the processor would
// foresee, and beyond the caches near by. weight, ld, k: as for `multiply`, from the panel's first column on.
template <bool Transposed>
INLINE void fetch_panel(const float* weight, int64_t ld, int64_t k, int64_t i, int64_t n) {
  constexpr int64_t line = 64 / sizeof(float), across = NB < line ? 1 : NB / line;
  const int64_t lines = Transposed ? NB * ld / line : k * across;
  for (int64_t at = lines * i / n; at < lines * (i + 1) / n; at++)
    __builtin_prefetch(Transposed ? weight + at * line : weight + at / across * ld + at % across * line);
}

// y = a Wᵀ or a W for this worker's share of the tiles. W: (columns, k) if it is to be transposed, else (k, columns);
// ld: its row's length; bias (columns,) or null. finish(row, rows, column, y, bias): a tile y (rows, NB) and the bias
// of its columns, both 0 beyond the last column.
template <class M, bool Transposed, class Finish>
void multiply(const typename M::act* a, int64_t stride, int64_t rows, const float* weight, int64_t ld, int64_t columns,
              int64_t k, const float* bias, const DensityWorker& w, const Finish& finish) {
  auto* panel = static_cast<typename M::weight*>(w.panel);
#if TARFLOW_AMX
  constexpr int64_t most = M::depth == 2 ? 2 * HIGH : MOST_ROWS;
  if (M::depth == 2) begin_tiles(rows < HIGH ? rows : HIGH);
#else
  constexpr int64_t most = MOST_ROWS;
#endif
  const int64_t panels = (columns + NB - 1) / NB, blocks = (rows + most - 1) / most;
  const int64_t padded = (k + M::together - 1) / M::together * M::together;
  const int64_t end = panels * blocks * (w.rank + 1) / w.size;
  alignas(64) float y[ACCUMULATORS * VW];
  alignas(64) float shift[NB];
  for (int64_t item = panels * blocks * w.rank / w.size; item < end;) {
    const int64_t column = item / blocks * NB, used = columns - column < NB ? columns - column : NB;
    if (Transposed) pack_rows<M>(weight + column * ld, ld, used, k, panel);
    else pack_columns<M>(weight + column, ld, used, k, panel);
    for (int64_t c = 0; c < NB; c++) shift[c] = bias && c < used ? bias[column + c] : 0.0f;
    int64_t b = item % blocks;
    const int64_t last = blocks - b < end - item ? blocks : b + end - item;
    for (item += last - b; b < last; b++) {
      const int64_t row = rows * b / blocks, count = rows * (b + 1) / blocks - row;
      if (column + NB < columns)
        fetch_panel<Transposed>(weight + (column + NB) * (Transposed ? ld : 1), ld, k, b, blocks);
#if TARFLOW_AMX
      if constexpr (M::depth == 2) {
        panel_in_tiles(a + row * stride, stride, count, panel, padded, [&](int64_t r, int64_t n, const float* sums) {
          finish(row + r, n, column, sums, shift);
        });
        continue;
      }
#endif
      choose_tile<M>(count, 1)(a + row * stride, stride, panel, 0, padded, true, streaming(panel), y);
      finish(row, count, column, y, shift);
    }
  }
#if TARFLOW_AMX
  if (M::depth == 2) end_tiles();
#endif
}

// Returns the row of the batch's (B, T, D) tensors that has token `token` of a sample, counted in the block's order.
INLINE int64_t place(const DensityGroup& g, const DensityBlock& b, int64_t sample, int64_t token) {
  const int64_t T = g.sizes.tokens;
  return (g.first + sample) * T + (b.order ? b.order[token] : token);
}

INLINE void meet(const DensityWorker& w) {
  if (w.size > 1) wait_at(w.barrier);
}

struct Range {
  int64_t begin, end;
};

INLINE Range share(int64_t n, const DensityWorker& w) { return {n * w.rank / w.size, n * (w.rank + 1) / w.size}; }

// stream = proj_in(x) + position + class
void density_embed(const DensityGroup& g, const DensityBlock& b, const DensityWorker& w) {
  const int64_t D = g.sizes.token_dim, C = g.sizes.channels, n = g.sizes.tokens - 1;
  const Range rows = share(g.rows, w);
  for (int64_t r = rows.begin; r < rows.end; r++)
    __builtin_memcpy(g.gathered + r * g.in_stride, g.x + place(g, b, r / n, r % n) * D, D * sizeof(float));
  meet(w);
  multiply<F32, true>(g.gathered, g.in_stride, g.rows, b.in_weight, D, C, D, b.in_bias, w,
                      [&](int64_t row, int64_t count, int64_t column, const float* y, const float* bias) {
    for (int64_t i = 0; i < count; i++) {
      const int64_t sample = (row + i) / n, token = (row + i) % n;
      const float* position = b.position + (b.order ? b.order[token] : token) * C;
      const float* label = b.embedding ? b.embedding + (g.first + sample) * C : nullptr;
      for (int64_t c = column, j = i * NB; c < column + NB && c < C; c += VW, j += VW) {
        vf h = load(y + j) + load(bias + c - column) + load_some(position + c, C - c);
        if (label) h += load_some(label + c, C - c);
        store(g.stream + (row + i) * g.channel_stride + c, h);
      }
    }
  });
  meet(w);
}

// out = γ (h − mean) / sqrt(variance + 1e-5) + β, zero from n on to the end of the vector. statistics: mean and
// 1 / sqrt(variance + 1e-5).
template <class A>
void norm(const float* h, int64_t n, const float* gamma, const float* beta, A* out, float* statistics) {
  vf a[2] = {}, square[2] = {};
  for (int64_t i = 0; i < n; i += VW) a[i / VW % 2] += load(h + i);  // h is zero from n on
  const float mean = sum(a[0] + a[1]) / (float)n;
  for (int64_t i = 0; i < n; i += VW) {
    const vf centred = lanes() < (int32_t)(n - i) ? load(h + i) - mean : vf{};
    square[i / VW % 2] += centred * centred;
  }
  const float scale = 1.0f / __builtin_sqrtf(sum(square[0] + square[1]) / (float)n + 1e-5f);
  for (int64_t i = 0; i < n; i += VW) {
    const vf y = (load(h + i) - mean) * scale * load_some(gamma + i, n - i) + load_some(beta + i, n - i);
    store(out + i, lanes() < (int32_t)(n - i) ? y : vf{});
  }
  statistics[0] = mean, statistics[1] = scale;
}

// d_h += the gradient through `norm`: (g − mean(g) − ĥ mean(g ĥ)) / σ with g = γ d_out and ĥ = (h − mean) / σ.
void norm_backward(const float* h, int64_t n, const float* gamma, const float* statistics, const float* d_out,
                   float* d_h) {
  const float mean = statistics[0], scale = statistics[1];
  vf total = vf{}, along = vf{};
  for (int64_t i = 0; i < n; i += VW) {
    const vf d = load(d_out + i) * load_some(gamma + i, n - i);  // d is zero from n on
    total += d;
    along += d * ((load(h + i) - mean) * scale);
  }
  const float first = sum(total) / (float)n, second = sum(along) / (float)n;
  for (int64_t i = 0; i < n; i += VW) {
    const vf d = load(d_out + i) * load_some(gamma + i, n - i);
    const vf change = scale * (d - first - (load(h + i) - mean) * scale * second);
    store(d_h + i, load(d_h + i) + (lanes() < (int32_t)(n - i) ? change : vf{}));
  }
}

// One head of one sample: its rows of q, k and v, which worker has packed what of them, and the softmax's numbers for
// each query.
struct Head {
  const float *q, *k, *v;
  int64_t stride, rows, d, first;  // first is the group's row of token 0
  float *highest, *inverse, *along;
};

INLINE Head head_of(const DensityGroup& g, const Trace& t, int64_t sample, int64_t head) {
  const int64_t C = g.sizes.channels, d = g.sizes.head_dim, n = g.sizes.tokens - 1;
  const float* q = t.qkv + sample * n * g.qkv_stride + head * d;
  float* softmax = t.softmax + (sample * g.heads + head) * 3 * g.row_stride;
  return {q, q + C, q + 2 * C, g.qkv_stride, n, d, sample * n, softmax, softmax + g.row_stride,
          softmax + 2 * g.row_stride};
}

// Calls item(sample, head, begin, end, anew) for this worker's share of the blocks of rows of all heads; anew: whether
// it is the first block of this head.
template <class Item>
void for_blocks_of_heads(const DensityGroup& g, const DensityWorker& w, const Item& item) {
  const int64_t n = g.sizes.tokens - 1, blocks = (n + QUERIES - 1) / QUERIES;
  const Range items = share(g.samples * g.heads * blocks, w);
  for (int64_t i = items.begin; i < items.end; i++) {
    const int64_t block = i % blocks, head = i / blocks % g.heads, sample = i / blocks / g.heads;
    item(sample, head, n * block / blocks, n * (block + 1) / blocks, i == items.begin || block == 0);
  }
}

// scores (rows, row_stride) = a bᵀ for `rows` rows of a against rows [begin, end) of b, which are packed by pack_rows
// from row 0 on; begin: a multiple of NB. Column c stands at scores[c].
void scores_of(const float* a, const float* packed, const Head& h, int64_t rows, int64_t begin, int64_t end,
               int64_t row_stride, float* scores) {
  const int64_t blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
  alignas(64) float y[ACCUMULATORS * VW];
  for (int64_t column = begin; column < end; column += NB)
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t row = rows * b / blocks, count = rows * (b + 1) / blocks - row;
      const float* panel = packed + column * h.d;
      choose_tile<F32>(count, 1)(a + row * h.stride, h.stride, panel, 0, h.d, true, streaming(panel), y);
      for (int64_t i = 0; i < count; i++)
        for (int half = 0; half < 2; half++)
          store(scores + (row + i) * row_stride + column + half * VW, load(y + i * NB + half * VW));
    }
}

// Calls finish(row, column, y, n) with the vector y of columns [column, column + n) of row `row` of weights (rows,
// row_stride) · b. Rows [begin, end) of b are packed by pack_columns, in panels of `all` rows.
template <class Finish>
void weighted(const float* weights, int64_t row_stride, const float* packed, int64_t all, const Head& h, int64_t rows,
              int64_t begin, int64_t end, const Finish& finish) {
  const int64_t blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
  alignas(64) float y[ACCUMULATORS * VW];
  for (int64_t column = 0; column < h.d; column += NB)
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t row = rows * b / blocks, count = rows * (b + 1) / blocks - row;
      const float* panel = packed + column * all + begin * NB;
      choose_tile<F32>(count, 1)(weights + row * row_stride + begin, row_stride, panel, 0, end - begin, true,
                                 streaming(panel), y);
      for (int64_t i = 0; i < count; i++)
        for (int64_t c = 0; c < NB && column + c < h.d; c += VW)
          finish(row + i, column + c, load(y + i * NB + c), h.d - column - c);
    }
}

// Packs rows [begin, end) of b in the order of `scores_of`.
INLINE void pack_for_scores(const float* b, const Head& h, int64_t begin, int64_t end, float* packed) {
  for (int64_t row = begin; row < end; row += NB)
    pack_rows<F32>(b + row * h.stride, h.stride, end - row < NB ? end - row : NB, h.d, packed + row * h.d);
}

// Packs rows [begin, end) of b in the order of `weighted`, in panels of `all` rows.
INLINE void pack_for_weighted(const float* b, const Head& h, int64_t begin, int64_t end, int64_t all, float* packed) {
  for (int64_t column = 0; column < h.d; column += NB)
    pack_columns<F32>(b + begin * h.stride + column, h.stride, h.d - column < NB ? h.d - column : NB, end - begin,
                      packed + column * all + begin * NB);
}

INLINE int64_t whole_panels(int64_t rows) { return (rows + NB - 1) / NB * NB; }

// attended = softmax(q kᵀ / √d, causal) v
template <class M>
void density_attention(const DensityGroup& g, const Trace& t, const DensityWorker& w) {
  using A = typename M::act;
  float *keys = w.packed[0], *values = w.packed[1], *scores = w.scores[0];
  int64_t packed = 0;
  for_blocks_of_heads(g, w, [&](int64_t sample, int64_t head, int64_t begin, int64_t end, bool anew) {
    const Head h = head_of(g, t, sample, head);
    const int64_t wanted = whole_panels(end) < h.rows ? whole_panels(end) : h.rows;  // no query sees a later key
    if (anew) packed = 0;
    pack_for_scores(h.k, h, packed, wanted, keys);
    pack_for_weighted(h.v, h, packed, wanted, h.rows, values);
    packed = wanted;
    scores_of(h.q + begin * h.stride, keys, h, end - begin, 0, end, g.row_stride, scores);
    for (int64_t i = begin; i < end; i++) {
      float* s = scores + (i - begin) * g.row_stride;
      vf most = splat(-__builtin_inff()), total = vf{};
      for (int64_t j = 0; j <= i; j += VW) {
        const vf x = lanes() <= (int32_t)(i - j) ? g.attention_scale * load(s + j) : splat(-__builtin_inff());
        store(s + j, x);
        most = vmax(most, x);
      }
      const float highest = largest(most);
      for (int64_t j = 0; j <= i; j += VW) {
        const vf p = exp_negative(load(s + j) - highest);
        store(s + j, p);
        total += p;
      }
      for (int64_t j = i / VW * VW + VW; j < end; j += VW) store(s + j, vf{});
      h.highest[i] = highest;
      h.inverse[i] = 1.0f / sum(total);
    }
    A* out = static_cast<A*>(g.attended) + (h.first + begin) * g.channel_stride + head * h.d;
    weighted(scores, g.row_stride, values, h.rows, h, end - begin, 0, end,
             [&](int64_t row, int64_t column, vf y, int64_t n) {
      store_some(out + row * g.channel_stride + column, y * h.inverse[begin + row], n);
    });
  });
}

// P = exp(q kᵀ / √d − highest) · inverse for a query and a key that it sees; else 0.
INLINE vf probability(const DensityGroup& g, vf score, vf highest, vf inverse, vi seen) {
  const vf p = exp_negative(g.attention_scale * score - highest) * inverse;
  return seen ? p : vf{};
}

// dP = d_attended vᵀ, dS = P (dP − Σ P dP) / √d, dq = dS k for a block of queries, with Σ_j P_ij dP_ij of each.
template <class M>
void queries_backward(const DensityGroup& g, const Trace& t, const DensityWorker& w) {
  using A = typename M::act;
  float *keys = w.packed[0], *values = w.packed[1], *weights = w.packed[2];
  int64_t packed = 0;
  for_blocks_of_heads(g, w, [&](int64_t sample, int64_t head, int64_t begin, int64_t end, bool anew) {
    const Head h = head_of(g, t, sample, head);
    Head d = h;  // d has the same rows of d_attended
    d.stride = g.channel_stride;
    const float* d_out = g.d_attended + h.first * d.stride + head * h.d;
    const int64_t wanted = whole_panels(end) < h.rows ? whole_panels(end) : h.rows;
    if (anew) packed = 0;
    pack_for_scores(h.k, h, packed, wanted, keys);
    pack_for_scores(h.v, h, packed, wanted, values);
    pack_for_weighted(h.k, h, packed, wanted, h.rows, weights);
    packed = wanted;
    scores_of(h.q + begin * h.stride, keys, h, end - begin, 0, end, g.row_stride, w.scores[0]);
    scores_of(d_out + begin * d.stride, values, d, end - begin, 0, end, g.row_stride, w.scores[1]);
    for (int64_t i = begin; i < end; i++) {
      float *p = w.scores[0] + (i - begin) * g.row_stride, *dp = w.scores[1] + (i - begin) * g.row_stride;
      vf total = vf{};
      for (int64_t j = 0; j < end; j += VW) {
        const vf y = probability(g, load(p + j), splat(h.highest[i]), splat(h.inverse[i]), lanes() <= (int32_t)(i - j));
        store(p + j, y);
        total += y * load(dp + j);
      }
      h.along[i] = sum(total);
      for (int64_t j = 0; j < end; j += VW)
        store(p + j, load(p + j) * (load(dp + j) - h.along[i]) * g.attention_scale);
    }
    A* out = static_cast<A*>(g.d_qkv) + (h.first + begin) * g.qkv_stride + head * h.d;
    weighted(w.scores[0], g.row_stride, weights, h.rows, h, end - begin, 0, end,
             [&](int64_t row, int64_t column, vf y, int64_t n) {
      store_some(out + row * g.qkv_stride + column, y, n);
    });
  });
}

// dk = dSᵀ q and dv = Pᵀ d_attended for a block of keys.
template <class M>
void keys_backward(const DensityGroup& g, const Trace& t, const DensityWorker& w) {
  using A = typename M::act;
  const int64_t C = g.sizes.channels;
  for_blocks_of_heads(g, w, [&](int64_t sample, int64_t head, int64_t begin, int64_t end, bool anew) {
    const Head h = head_of(g, t, sample, head);
    Head d = h;
    d.stride = g.channel_stride;
    const float* d_out = g.d_attended + h.first * d.stride + head * h.d;
    const int64_t from = begin / NB * NB;  // no earlier query sees these keys
    if (anew) {
      pack_for_scores(h.q, h, from, h.rows, w.packed[0]);
      pack_for_scores(d_out, d, from, h.rows, w.packed[1]);
      pack_for_weighted(h.q, h, from, h.rows, h.rows, w.packed[2]);
      pack_for_weighted(d_out, d, from, h.rows, h.rows, w.packed[3]);
    }
    scores_of(h.k + begin * h.stride, w.packed[0], h, end - begin, from, h.rows, g.row_stride, w.scores[0]);
    scores_of(h.v + begin * h.stride, w.packed[1], h, end - begin, from, h.rows, g.row_stride, w.scores[1]);
    for (int64_t j = begin; j < end; j++) {
      float *p = w.scores[0] + (j - begin) * g.row_stride, *dp = w.scores[1] + (j - begin) * g.row_stride;
      for (int64_t i = from; i < h.rows; i += VW) {
        const vi seen = (lanes() >= (int32_t)(j - i)) & (lanes() < (int32_t)(h.rows - i));
        const vf y = probability(g, load(p + i), load(h.highest + i), load(h.inverse + i), seen);
        const vf change = y * (load(dp + i) - load(h.along + i)) * g.attention_scale;
        store(p + i, y);
        store(dp + i, seen ? change : vf{});
      }
    }
    A* out = static_cast<A*>(g.d_qkv) + (h.first + begin) * g.qkv_stride + head * h.d;
    weighted(w.scores[1], g.row_stride, w.packed[2], h.rows, h, end - begin, from, h.rows,
             [&](int64_t row, int64_t column, vf y, int64_t n) {
      store_some(out + row * g.qkv_stride + C + column, y, n);
    });
    weighted(w.scores[0], g.row_stride, w.packed[3], h.rows, h, end - begin, from, h.rows,
             [&](int64_t row, int64_t column, vf y, int64_t n) {
      store_some(out + row * g.qkv_stride + 2 * C + column, y, n);
    });
  });
}

template <class M>
void density_layer(const DensityGroup& g, const LayerSource& l, const Trace& t, const DensityWorker& w) {
  using A = typename M::act;
  const int64_t C = g.sizes.channels, F = g.sizes.hidden, cs = g.channel_stride;
  A *normed = static_cast<A*>(g.normed), *attended = static_cast<A*>(g.attended), *hidden = static_cast<A*>(g.hidden);
  const Range rows = share(g.rows, w);

  for (int64_t r = rows.begin; r < rows.end; r++)
    norm(t.in + r * cs, C, l.norm1_weight, l.norm1_bias, normed + r * cs, t.norm + 4 * r);
  meet(w);
  multiply<M, true>(normed, cs, g.rows, l.qkv_weight, C, 3 * C, C, l.qkv_bias, w,
                    [&](int64_t row, int64_t count, int64_t column, const float* y, const float* bias) {
    for (int64_t i = 0; i < count; i++)
      for (int64_t c = 0; c < NB; c += VW)
        store(t.qkv + (row + i) * g.qkv_stride + column + c, load(y + i * NB + c) + load(bias + c));
  });
  meet(w);
  density_attention<M>(g, t, w);
  meet(w);
  const auto add = [&](const float* from, float* to) {
    return [=](int64_t row, int64_t count, int64_t column, const float* y, const float* bias) {
      for (int64_t i = 0; i < count; i++)
        for (int64_t c = 0; c < NB; c += VW) {
          const int64_t at = (row + i) * cs + column + c;
          store(to + at, load(from + at) + (load(y + i * NB + c) + load(bias + c)));
        }
    };
  };
  multiply<M, true>(attended, cs, g.rows, l.proj_weight, C, C, C, l.proj_bias, w, add(t.in, t.mid));
  meet(w);
  for (int64_t r = rows.begin; r < rows.end; r++)
    norm(t.mid + r * cs, C, l.norm2_weight, l.norm2_bias, normed + r * cs, t.norm + 4 * r + 2);
  meet(w);
  multiply<M, true>(normed, cs, g.rows, l.fc1_weight, C, F, C, l.fc1_bias, w,
                    [&](int64_t row, int64_t count, int64_t column, const float* y, const float* bias) {
    for (int64_t i = 0; i < count; i++)
      for (int64_t c = 0; c < NB; c += VW) {
        const vf x = load(y + i * NB + c) + load(bias + c);
        const int64_t at = (row + i) * g.hidden_stride + column + c;
        store(hidden + at, gelu(x));
        if (t.slope) store(t.slope + at, gelu_slope(x));
      }
  });
  meet(w);
  multiply<M, true>(hidden, g.hidden_stride, g.rows, l.fc2_weight, F, C, F, l.fc2_bias, w, add(t.mid, t.out));
  meet(w);
}

// Returns d_stream as the operand of a product. Where operands are fp32, it is one itself.
template <class M>
INLINE const typename M::act* operand(const DensityGroup& g) {
  if constexpr (sizeof(typename M::act) == sizeof(float)) return g.d_stream;
  else return static_cast<const typename M::act*>(g.operand);
}

// Rounds rows of d_stream that have changed to the operand's type.
template <class M>
INLINE void round_operand(const DensityGroup& g, Range rows) {
  if constexpr (sizeof(typename M::act) != sizeof(float))
    for (int64_t r = rows.begin; r < rows.end; r++)
      for (int64_t c = 0; c < g.sizes.channels; c += VW) {
        const int64_t at = r * g.channel_stride + c;
        store(static_cast<typename M::act*>(g.operand) + at, load(g.d_stream + at));
      }
}

// to = y, tile after tile
template <class T>
auto keep(T* to, int64_t stride) {
  return [=](int64_t row, int64_t count, int64_t column, const float* y, const float*) {
    for (int64_t i = 0; i < count; i++)
      for (int64_t c = 0; c < NB; c += VW) store(to + (row + i) * stride + column + c, load(y + i * NB + c));
  };
}

// Turns d_stream from the gradient of the layer's output into that of its input.
template <class M>
void density_layer_backward(const DensityGroup& g, const LayerSource& l, const Trace& t, const DensityWorker& w) {
  using A = typename M::act;
  const int64_t C = g.sizes.channels, F = g.sizes.hidden, cs = g.channel_stride;
  A *d_hidden = static_cast<A*>(g.hidden), *d_qkv = static_cast<A*>(g.d_qkv);
  const Range rows = share(g.rows, w);

  round_operand<M>(g, rows);
  meet(w);
  multiply<M, false>(operand<M>(g), cs, g.rows, l.fc2_weight, F, F, C, nullptr, w,
                     [&](int64_t row, int64_t count, int64_t column, const float* y, const float*) {
    for (int64_t i = 0; i < count; i++)
      for (int64_t c = 0; c < NB; c += VW) {
        const int64_t at = (row + i) * g.hidden_stride + column + c;
        store(d_hidden + at, load(y + i * NB + c) * load(t.slope + at));
      }
  });
  meet(w);
  multiply<M, false>(d_hidden, g.hidden_stride, g.rows, l.fc1_weight, C, C, F, nullptr, w, keep(g.d_normed, cs));
  meet(w);
  for (int64_t r = rows.begin; r < rows.end; r++)
    norm_backward(t.mid + r * cs, C, l.norm2_weight, t.norm + 4 * r + 2, g.d_normed + r * cs, g.d_stream + r * cs);
  round_operand<M>(g, rows);
  meet(w);
  multiply<M, false>(operand<M>(g), cs, g.rows, l.proj_weight, C, C, C, nullptr, w, keep(g.d_attended, cs));
  meet(w);
  queries_backward<M>(g, t, w);
  meet(w);
  keys_backward<M>(g, t, w);
  meet(w);
  multiply<M, false>(d_qkv, g.qkv_stride, g.rows, l.qkv_weight, C, C, 3 * C, nullptr, w, keep(g.d_normed, cs));
  meet(w);
  for (int64_t r = rows.begin; r < rows.end; r++)
    norm_backward(t.in + r * cs, C, l.norm1_weight, t.norm + 4 * r, g.d_normed + r * cs, g.d_stream + r * cs);
  meet(w);
}

// z_0 = x_0 and z_{i+1} = (x_{i+1} − xb_i) exp(−xa_i), (xa, xb) = proj_out(stream).
void density_transform(const DensityGroup& g, const DensityBlock& b, const DensityWorker& w) {
  const int64_t D = g.sizes.token_dim, C = g.sizes.channels, n = g.sizes.tokens - 1, shift = g.sizes.affine ? D : 0;
  multiply<F32, true>(g.stream, g.channel_stride, g.rows, b.out_weight, C, g.out_dim, C, b.out_bias, w,
                      [&](int64_t row, int64_t count, int64_t column, const float* y, const float* bias) {
    for (int64_t i = 0; i < count; i++)
      for (int64_t c = 0; c < NB; c += VW)
        store(g.out + (row + i) * g.out_stride + column + c, load(y + i * NB + c) + load(bias + c));
  });
  meet(w);
  const Range rows = share(g.rows, w);
  for (int64_t r = rows.begin; r < rows.end; r++) {
    const float* out = g.out + r * g.out_stride;
    const int64_t at = place(g, b, r / n, r % n + 1) * D;
    float log_det = 0.0f;
    for (int64_t i = 0; i < D; i++) {
      const float scale = g.sizes.affine ? __builtin_expf(-out[i]) : 1.0f;
      g.z[at + i] = (g.x[at + i] - out[shift + i]) * scale;
      g.scale[r * g.in_stride + i] = scale;
      if (g.sizes.affine) log_det -= out[i];
    }
    g.token_log_det[r] = log_det;
    if (r % n == 0) {
      const int64_t first = place(g, b, r / n, 0) * D;
      __builtin_memcpy(g.z + first, g.x + first, D * sizeof(float));
    }
  }
  meet(w);
  if (w.rank == 0)
    for (int64_t r = 0; r < g.rows; r++) g.log_det[g.first + r / n] += g.token_log_det[r];
}

// With log p = −Σ xa + …, dxa = −dz · z − 1, dxb = −dz · exp(−xa), dx = dz · exp(−xa). Turns the gradient of z into
// d_stream and that part of the gradient of x that does not lead through the transformer.
void density_transform_backward(const DensityGroup& g, const DensityBlock& b, const DensityWorker& w) {
  const int64_t D = g.sizes.token_dim, C = g.sizes.channels, n = g.sizes.tokens - 1, shift = g.sizes.affine ? D : 0;
  const Range rows = share(g.rows, w);
  for (int64_t r = rows.begin; r < rows.end; r++) {
    float* out = g.out + r * g.out_stride;
    const int64_t at = place(g, b, r / n, r % n + 1) * D;
    for (int64_t i = 0; i < D; i++) {
      const float d_z = g.gradient[at + i], d_x = d_z * g.scale[r * g.in_stride + i];
      if (g.sizes.affine) out[i] = -d_z * g.z[at + i] - 1.0f;
      out[shift + i] = -d_x;
      g.gradient[at + i] = d_x;
    }
  }
  meet(w);
  multiply<F32, false>(g.out, g.out_stride, g.rows, b.out_weight, C, C, g.out_dim, nullptr, w,
                       keep(g.d_stream, g.channel_stride));
  meet(w);
}

// Adds that part of the gradient of x that leads through the transformer.
void density_embed_backward(const DensityGroup& g, const DensityBlock& b, const DensityWorker& w) {
  const int64_t D = g.sizes.token_dim, C = g.sizes.channels, n = g.sizes.tokens - 1;
  multiply<F32, false>(g.d_stream, g.channel_stride, g.rows, b.in_weight, D, D, C, nullptr, w,
                       [&](int64_t row, int64_t count, int64_t column, const float* y, const float*) {
    for (int64_t i = 0; i < count; i++) {
      float* to = g.gradient + place(g, b, (row + i) / n, (row + i) % n) * D;
      for (int64_t c = 0; c < NB && column + c < D; c++) to[column + c] += y[i * NB + c];
    }
  });
  meet(w);
}

const DensityKernels density_table = {density_embed,
                                      density_transform,
                                      density_transform_backward,
                                      density_embed_backward,
                                      {density_layer<F32>, density_layer<BF16>},
                                      {density_layer_backward<F32>, density_layer_backward<BF16>}};
