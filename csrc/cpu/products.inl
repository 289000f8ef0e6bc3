// Y = X Wᵀ for few rows, the one product of decoding. A tile of R rows × P panels stays in registers while k runs once
// from end to end. Every element of Y is summed in that one order, so that neither the number of rows nor the division
// of the columns among threads can change a result.

constexpr int NB = 2 * VW;  // the columns of a panel

struct F32 {
  using weight = float;
  using act = float;  // the type of a product's rows
  static constexpr int depth = 1;     // k to a lane
  static constexpr int together = 1;  // k of a column that lie together in a panel
};

// bf16 weights have two k to a lane. With the dot-product instruction, activations are rounded to bf16 too; without it,
// weights are widened in registers and activations stay fp32.
struct BF16 {
  using weight = bf16;
  using act = ACTIVATION;
  static constexpr int depth = 2;
#if TARFLOW_MMLA
  static constexpr int together = 4;
#else
  static constexpr int together = 2;
#endif
};

#define UNROLL _Pragma("GCC unroll 16")

// What a tile asks the L2 cache for while it computes: a share of the weights that come after its own, because the
// processor's prefetchers stop at the end of a page, and wait for a core that streams little and computes much.
constexpr int64_t STEP = NB * 4;                // bytes that a step over k takes of a panel, in fp32 and in bf16
constexpr int64_t LINE = STEP < 64 ? STEP : 64;  // of which a request is made for each such part

struct Ahead {
  const char* at;  // the first of P parts, which are as far apart as the panels
  int64_t pace;    // bytes between two requests, LINE for as many as are taken
};

// Returns the requests for a panel that is read once from end to end.
INLINE Ahead streaming(const void* weight) { return {static_cast<const char*>(weight) + 4096, LINE}; }

template <int P>
INLINE void fetch_ahead(Ahead& ahead, int64_t panel) {
  constexpr int64_t lines = STEP / LINE;
  UNROLL for (int64_t line = 0; line < lines; line++) {
    UNROLL for (int j = 0; j < P; j++) __builtin_prefetch(ahead.at + j * panel);
    ahead.at += ahead.pace;
  }
}

#if TARFLOW_MMLA
template <int R, int P>
void tile_of_pairs(const bf16* a, int64_t stride, const bf16* w, int64_t panel, int64_t k, bool begins, Ahead ahead,
                   float* out);
#endif

// out (R, 2·P vectors) = a Wᵀ over k, added to what is there unless this begins the sums.
template <class M, int R, int P>
void tile(const typename M::act* a, int64_t stride, const typename M::weight* w, int64_t panel, int64_t k, bool begins,
          Ahead ahead, float* out) {
#if TARFLOW_MMLA
  if constexpr (M::depth == 2) return tile_of_pairs<R, P>(a, stride, w, panel, k, begins, ahead, out);
#endif
  vf acc[R][2 * P];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int j = 0; j < 2 * P; j++) acc[r][j] = begins ? vf{} : load(out + (r * 2 * P + j) * VW);
  constexpr bool fetches = R >= 4;  // fewer rows wait for memory alone, and the processor sees that
  // Three rows share a pointer. With one for each row, compilers run out of registers, and fetch the rest from vector
  // registers through a port that multiplies.
  const typename M::act* from[(R + 2) / 3];
  UNROLL for (int j = 0; j < (R + 2) / 3; j++) from[j] = a + 3 * j * stride;
  const auto advance = [&] {
    UNROLL for (int j = 0; j < (R + 2) / 3; j++) {
      from[j] += M::depth;
      asm("" : "+r"(from[j]));
    }
  };
  if constexpr (M::depth == 1) {
    for (int64_t i = 0; i < k; i++, w += NB) {
      if constexpr (fetches) fetch_ahead<P>(ahead, panel * sizeof *w);
      vf column[2 * P];
      UNROLL for (int j = 0; j < 2 * P; j++) column[j] = load(w + (j / 2) * panel + (j % 2) * VW);
      UNROLL for (int r = 0; r < R; r++) {
        vf x = splat(from[r / 3][r % 3 * stride]);
        UNROLL for (int j = 0; j < 2 * P; j++) acc[r][j] += x * column[j];
      }
      advance();
    }
  } else {
    for (int64_t i = 0; i < k; i += 2, w += 2 * NB) {
      if constexpr (fetches) fetch_ahead<P>(ahead, panel * sizeof *w);
#if TARFLOW_DOT
      vu column[2 * P];
      UNROLL for (int j = 0; j < 2 * P; j++) column[j] = load_u32(w + (j / 2) * panel + (j % 2) * 2 * VW);
      UNROLL for (int r = 0; r < R; r++) {
        const vu x = splat_pair(from[r / 3] + r % 3 * stride);
        UNROLL for (int j = 0; j < 2 * P; j++) acc[r][j] = add_dots(acc[r][j], x, column[j]);
      }
#else
      constexpr bool tall = R >= 4;
      UNROLL for (int half = 0; half < 2; half++) {
        vf column[2 * P];
        UNROLL for (int j = 0; j < 2 * P; j++) {
          vu pair = load_u32(w + (j / 2) * panel + (j % 2) * 2 * VW);
          column[j] = tall ? half_beside_products(pair, half) : half ? high_half(pair) : low_half(pair);
        }
        UNROLL for (int r = 0; r < R; r++) {
          vf x = splat(from[r / 3][r % 3 * stride + half]);
          UNROLL for (int j = 0; j < 2 * P; j++) acc[r][j] += x * column[j];
        }
        if constexpr (tall) asm("" : "+r"(w));  // pairs are loaded again: no registers are left to keep them
      }
#endif
      advance();
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int j = 0; j < 2 * P; j++) store(out + (r * 2 * P + j) * VW, acc[r][j]);
}

template <class M>
using Tile = void (*)(const typename M::act*, int64_t, const typename M::weight*, int64_t, int64_t, bool, Ahead,
                      float*);

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

#if TARFLOW_AMX
template <class Finish>
void product_in_tiles(const Linear& l, const bf16* a, int64_t stride, int64_t rows, const Worker& worker,
                      const Finish& finish);
#endif

// Calls finish(row, rows, column, columns, y) for every tile y (rows, columns) of this worker's share of the columns.
// rows: at most GROUP_ROWS. If they are more than a tile has, all pass over as many k of a panel as stay in the L1
// cache, before any passes over the next; their sums so far wait in memory, which changes no bit of them.
template <class M, class Finish>
void product(const Linear& l, const typename M::act* a, int64_t stride, int64_t rows, const Worker& worker,
             const Finish& finish) {
#if TARFLOW_AMX
  if constexpr (M::depth == 2) return product_in_tiles(l, a, stride, rows, worker, finish);
#endif
  using W = typename M::weight;
  const int64_t first = l.panels * worker.rank / worker.size, last = l.panels * (worker.rank + 1) / worker.size;
  constexpr int64_t most = ACCUMULATORS / 2;
  const int64_t blocks = (rows + most - 1) / most, tallest = (rows + blocks - 1) / blocks;
  // Two panels give few rows enough independent sums; with four, hardware prefetchers lose track (−10%).
  const int64_t widest = 4 * tallest <= ACCUMULATORS ? 2 : 1;
  const int64_t panel = l.k * NB, bytes = panel * sizeof(W);
  const int64_t pieces = blocks > 1 ? (bytes + worker.near_bytes - 1) / worker.near_bytes : 1;
  constexpr int64_t some = BF16::together;
  const int64_t deepest = (l.k + some * pieces - 1) / (some * pieces) * some;  // all pieces about equal
  const auto* weight = static_cast<const W*>(l.weight);
  alignas(64) float y[GROUP_ROWS * NB];
  for (int64_t p = first, wide; p < last; p += wide) {
    wide = widest < last - p ? widest : last - p;
    for (int64_t k = 0, depth; k < l.k; k += depth) {
      depth = deepest < l.k - k ? deepest : l.k - k;
      const bool ends = k + depth == l.k;
      const W *now = weight + p * panel + k * NB, *next = now + depth * NB;
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t row = rows * b / blocks, count = rows * (b + 1) / blocks - row;
        const Ahead shared{reinterpret_cast<const char*>(next + depth * NB * b / blocks), LINE / blocks};
        const Ahead ahead = blocks > 1 ? shared : streaming(now);
        const auto* from = a + row * stride + k;
        float* to = y + row * wide * NB;
        choose_tile<M>(count, wide)(from, stride, now, panel, depth, k == 0, ahead, to);
        if (ends) finish(row, count, p * NB, wide * NB, to);
      }
    }
  }
}
