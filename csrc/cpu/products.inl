// Y = X Wᵀ for few rows, the one product of decoding. A tile of R rows × P panels stays in registers while k runs once
// from end to end. Every element of Y is summed in that one order, so that neither the number of rows nor the division
// of the columns among threads can change a result.

constexpr int NB = 2 * VW;  // the columns of a panel

struct F32 {
  using weight = float;
  using act = float;  // the type of a product's rows
  static constexpr int depth = 1;
};

// bf16 weights have two k to a lane. With the dot-product instruction, activations are rounded to bf16 too; without it,
// weights are widened and activations stay fp32.
struct BF16 {
  using weight = bf16;
  using act = ACTIVATION;
  static constexpr int depth = 2;
};

#define UNROLL _Pragma("GCC unroll 16")

// Asks for the weights 4 KiB ahead, because the processor's prefetchers stop at the end of a page, and wait for a core
// that streams little and computes much. There are P panels, `panel` bytes apart, and a step over k takes NB · 4 bytes
// of each.
template <int P>
INLINE void fetch_ahead(const void* weight, int64_t panel) {
  constexpr int64_t ahead = 4096, line = 64;
  for (int j = 0; j < P; j++)
    for (int64_t at = 0; at < NB * 4; at += line)
      __builtin_prefetch(static_cast<const char*>(weight) + j * panel + ahead + at);
}

template <class M, int R, int P>
void tile(const typename M::act* a, int64_t stride, const typename M::weight* w, int64_t panel, int64_t k, float* out) {
  vf acc[R][2 * P];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int j = 0; j < 2 * P; j++) acc[r][j] = vf{};
  constexpr bool fetches = R >= 4;  // fewer rows wait for memory alone, and the processor sees that
  if constexpr (M::depth == 1) {
    for (int64_t i = 0; i < k; i++, w += NB) {
      if constexpr (fetches) fetch_ahead<P>(w, panel * sizeof *w);
      vf column[2 * P];
      UNROLL for (int j = 0; j < 2 * P; j++) column[j] = load(w + (j / 2) * panel + (j % 2) * VW);
      UNROLL for (int r = 0; r < R; r++) {
        vf x = splat(a[r * stride + i]);
        UNROLL for (int j = 0; j < 2 * P; j++) acc[r][j] += x * column[j];
      }
    }
  } else {
    for (int64_t i = 0; i < k; i += 2, w += 2 * NB) {
      if constexpr (fetches) fetch_ahead<P>(w, panel * sizeof *w);
      vu column[2 * P];
      UNROLL for (int j = 0; j < 2 * P; j++) column[j] = load_u32(w + (j / 2) * panel + (j % 2) * 2 * VW);
      UNROLL for (int r = 0; r < R; r++) {
#if TARFLOW_DOT
        int32_t pair;
        __builtin_memcpy(&pair, a + r * stride + i, 4);
        __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
        UNROLL for (int j = 0; j < 2 * P; j++)
          acc[r][j] = (vf)_mm512_dpbf16_ps((__m512)acc[r][j], x, (__m512bh)column[j]);
#else
        vf x0 = splat(a[r * stride + i]), x1 = splat(a[r * stride + i + 1]);
        UNROLL for (int j = 0; j < 2 * P; j++) {
          acc[r][j] += x0 * low_half(column[j]);
          acc[r][j] += x1 * high_half(column[j]);
        }
#endif
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int j = 0; j < 2 * P; j++) store(out + (r * 2 * P + j) * VW, acc[r][j]);
}

template <class M>
using Tile = void (*)(const typename M::act*, int64_t, const typename M::weight*, int64_t, int64_t, float*);

// Computes the tile of `rows` rows and one panel or two, at most ACCUMULATORS / 2 rows where it is one panel.
template <class M, int R = 1>
Tile<M> choose_tile(int64_t rows, int64_t panels) {
  if constexpr (2 * R > ACCUMULATORS) {
    return nullptr;
  } else {
    if (rows != R) return choose_tile<M, R + 1>(rows, panels);
    if constexpr (4 * R <= ACCUMULATORS)
      if (panels == 2) return tile<M, R, 2>;
    return tile<M, R, 1>;
  }
}

// Calls finish(row, rows, column, columns, y) for every tile y (rows, columns) of this worker's share of the columns.
template <class M, class Finish>
void product(const Linear& l, const typename M::act* a, int64_t stride, int64_t rows, const Worker& worker,
             const Finish& finish) {
  const int64_t first = l.panels * worker.rank / worker.size, last = l.panels * (worker.rank + 1) / worker.size;
  constexpr int64_t most = ACCUMULATORS / 2;
  const int64_t blocks = (rows + most - 1) / most, tallest = (rows + blocks - 1) / blocks;
  // Two panels give few rows enough independent sums; with four, hardware prefetchers lose track (−10%).
  const int64_t widest = 4 * tallest <= ACCUMULATORS ? 2 : 1;
  const int64_t panel = l.k * NB;
  const auto* weight = static_cast<const typename M::weight*>(l.weight);
  alignas(64) float y[ACCUMULATORS * VW];
  for (int64_t p = first, wide; p < last; p += wide) {
    wide = widest < last - p ? widest : last - p;
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t row = rows * b / blocks, count = rows * (b + 1) / blocks - row;
      choose_tile<M>(count, wide)(a + row * stride, stride, weight + p * panel, panel, l.k, y);
      finish(row, count, p * NB, wide * NB, y);
    }
  }
}
