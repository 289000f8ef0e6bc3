// The attention of one query to the cached keys of its row and head, by online softmax over chunks of 128 keys.

constexpr int CHUNK = 128;

// s[b·VW + lane] = q · key, for N blocks of VW keys. Keys lie transposed, so that no sum runs across lanes. Each block
// has two sums, to hide their latency. d: a multiple of 16.
template <class M, int N>
INLINE void scores(const typename M::act* q, const typename M::weight* keys, int64_t d, float* s) {
  vf acc[2][N];
  UNROLL for (int b = 0; b < N; b++) acc[0][b] = acc[1][b] = vf{};
  const int64_t block = d * VW;
  for (int64_t i = 0; i < d; i += 2 * M::depth, q += 2 * M::depth, keys += 2 * M::depth * VW) {
    UNROLL for (int half = 0; half < 2; half++) {
      const auto* from = keys + half * M::depth * VW;
      if constexpr (M::depth == 1) {
        vf x = splat(q[half]);
        UNROLL for (int b = 0; b < N; b++) acc[half][b] += x * load(from + b * block);
      } else {
#if TARFLOW_DOT
        const vu x = splat_pair(q + 2 * half);
        UNROLL for (int b = 0; b < N; b++) acc[half][b] = add_dots(acc[half][b], x, load_u32(from + b * block));
#else
        vf x0 = splat(q[2 * half]), x1 = splat(q[2 * half + 1]);
        UNROLL for (int b = 0; b < N; b++) {
          vu pair = load_u32(from + b * block);
          acc[half][b] += x0 * low_half(pair);
          acc[half][b] += x1 * high_half(pair);
        }
#endif
      }
    }
  }
  UNROLL for (int b = 0; b < N; b++) store(s + b * VW, acc[0][b] + acc[1][b]);
}

// out[0 … N·VW) = out · keep + Σ_j p_j V_j over `keys` keys. In fp32, p is fp32 and V is [key][d]; in bf16, p is M::act
// and V is [key / 2][d][2]. Even and odd keys, or pairs, are summed apart, to hide the latency of the sums.
template <class M, int N>
INLINE void weigh(const typename M::act* p, const typename M::weight* values, int64_t d, int64_t keys, float keep,
                  float* out) {
  vf even[N], odd[N];
  UNROLL for (int v = 0; v < N; v++) even[v] = keep * load(out + v * VW), odd[v] = vf{};
  const int64_t pair = M::depth * d;
  const auto add = [&](vf* acc, const typename M::act* q, const typename M::weight* from, uint32_t mask) INLINE_LAMBDA {
    if constexpr (M::depth == 1) {
      UNROLL for (int v = 0; v < N; v++) acc[v] += q[0] * load(from + v * VW);
    } else {
#if TARFLOW_DOT
      const vu x = splat_pair(q);
      UNROLL for (int v = 0; v < N; v++) acc[v] = add_dots(acc[v], x, load_u32(from + v * 2 * VW) & mask);
#else
      UNROLL for (int v = 0; v < N; v++) {
        vu two = load_u32(from + v * 2 * VW) & mask;
        acc[v] += q[0] * low_half(two);
        acc[v] += q[1] * high_half(two);
      }
#endif
    }
  };
  int64_t j = 0;
  for (; j + 2 * M::depth <= keys; j += 2 * M::depth, p += 2 * M::depth, values += 2 * pair) {
    add(even, p, values, ~0u);
    add(odd, p + M::depth, values + pair, ~0u);
  }
  if (j + M::depth <= keys) {
    add(even, p, values, ~0u);
    j += M::depth, p += M::depth, values += pair;
  }
  if (j < keys) add(odd, p, values, 0xffffu);  // the second key of the pair is not yet written and must not count
  UNROLL for (int v = 0; v < N; v++) store(out + v * VW, even[v] + odd[v]);
}

// out (d,) = softmax(scale · q Kᵀ) V over the first `count` keys. d: a multiple of 16. scratch: d floats.
template <class M>
void attend(const typename M::act* q, const typename M::weight* keys, const typename M::weight* values, int64_t d,
            int64_t count, float scale, float* scratch, typename M::act* out) {
  alignas(64) float s[CHUNK];
  alignas(64) typename M::act weights[CHUNK];
  for (int64_t v = 0; v < d; v += VW) store(scratch + v, vf{});
  float highest = -__builtin_inff();
  vf total = vf{};
  for (int64_t start = 0; start < count; start += CHUNK) {
    const int64_t n = count - start < CHUNK ? count - start : CHUNK, blocks = (n + VW - 1) / VW;
    int64_t b = 0;
    for (; b + 4 <= blocks; b += 4) scores<M, 4>(q, keys + (start + b * VW) * d, d, s + b * VW);
    const auto* rest = keys + (start + b * VW) * d;
    if (blocks - b == 3) scores<M, 3>(q, rest, d, s + b * VW);
    if (blocks - b == 2) scores<M, 2>(q, rest, d, s + b * VW);
    if (blocks - b == 1) scores<M, 1>(q, rest, d, s + b * VW);
    vf most = splat(-__builtin_inff());
    for (b = 0; b < blocks; b++) {
      vf x = scale * load(s + b * VW);
      x = lanes() < (int32_t)(n - b * VW) ? x : splat(-__builtin_inff());  // keys beyond are not yet written
      store(s + b * VW, x);
      most = vmax(most, x);
    }
    const float chunk_highest = largest(most), before = highest;
    highest = chunk_highest > before ? chunk_highest : before;
    const float keep = start == 0 ? 0.0f : __builtin_expf(before - highest);
    total = total * keep;
    for (b = 0; b < blocks; b++) {
      vf p = exp_negative(load(s + b * VW) - highest);
      store(weights + b * VW, p);
      total += p;
    }
    int64_t v = 0;
    const auto* from = values + start * d;
    for (; v + 4 * VW <= d; v += 4 * VW) weigh<M, 4>(weights, from + v * M::depth, d, n, keep, scratch + v);
    for (; v < d; v += VW) weigh<M, 1>(weights, from + v * M::depth, d, n, keep, scratch + v);
  }
  const float inverse = 1.0f / sum(total);
  for (int64_t v = 0; v < d; v += VW) store(out + v, inverse * load(scratch + v));
}
