// Products of bf16 in AMX's eight tile registers, which have 16 rows of 64 bytes: sums of 16 rows × 16 columns, 32 k of 16
// rows, or 32 k of half a panel, which lie in it as AMX wants them. Here too every element is summed over k from end to
// end, in one order whatever the rows.

constexpr int64_t HIGH = 16, DEEP = 32;  // rows of a tile, and k

#if TARFLOW_EMULATED
#include "check/tiles.inl"
#else
struct alignas(64) TileShapes {
  uint8_t palette, start_row, unused[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Registers 0 to 3 are sums, and 4 and 5 rows, of which a tile has `rows`; 6 and 7 are columns.
INLINE void begin_tiles(int64_t rows) {
  TileShapes shapes{};
  shapes.palette = 1;
  for (int i = 0; i < 8; i++) {
    shapes.row_bytes[i] = 64;
    shapes.rows[i] = static_cast<uint8_t>(i < 6 ? rows : HIGH);
  }
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}

INLINE void end_tiles() { asm volatile("tilerelease"); }

template <int T>
INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

template <int T>
INLINE void load_tile(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(T) : "memory");
}

template <int T>
INLINE void store_tile(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(T) : "memory");
}

template <int Sums, int Rows, int Columns>
INLINE void multiply_tile() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Rows), "i"(Columns));
}
#endif

// The sums of one tile of rows and half a panel or more of columns, or of two of each, in registers while k runs.
// Tall, Wide: tiles of rows and of columns, 2 and 2, 1 and 2, or 1 and 4. a: where each tall tile begins. out: HIGH rows
// of Wide vectors for each of these; sums go on from there unless this begins them. panel: elements of a panel.
// meanwhile() is called once for each DEEP k: vectors compute beside tiles.
template <int Tall, int Wide, class Meanwhile>
INLINE void multiply_tiles(const bf16* const (&a)[2], int64_t stride, const bf16* w, int64_t panel, int64_t k,
                           bool begins, const Meanwhile& meanwhile, float* out) {
  constexpr int64_t row = Wide * VW * sizeof(float), pair = 2 * NB * sizeof(bf16);
  float* const second = out + (Tall == 2 ? HIGH * Wide * VW : 2 * VW);  // of registers 2 and 3
  if (begins) {
    clear_tile<0>(), clear_tile<1>();
    if constexpr (Tall * Wide == 4) clear_tile<2>(), clear_tile<3>();
  } else {
    load_tile<0>(out, row), load_tile<1>(out + VW, row);
    if constexpr (Tall * Wide == 4) load_tile<2>(second, row), load_tile<3>(second + VW, row);
  }
  for (int64_t i = 0; i < k; i += DEEP, w += DEEP * NB) {
    load_tile<4>(a[0] + i, stride * sizeof(bf16));
    load_tile<6>(w, pair);
    multiply_tile<0, 4, 6>();
    load_tile<7>(w + 2 * VW, pair);
    multiply_tile<1, 4, 7>();
    if constexpr (Tall == 2) {
      load_tile<5>(a[1] + i, stride * sizeof(bf16));
      multiply_tile<2, 5, 6>();
      multiply_tile<3, 5, 7>();
    }
    if constexpr (Wide == 4) {
      load_tile<6>(w + panel, pair);
      multiply_tile<2, 4, 6>();
      load_tile<7>(w + panel + 2 * VW, pair);
      multiply_tile<3, 4, 7>();
    }
    meanwhile();
  }
  store_tile<0>(out, row), store_tile<1>(out + VW, row);
  if constexpr (Tall * Wide == 4) store_tile<2>(second, row), store_tile<3>(second + VW, row);
}

// Adds what is left of k after whole tiles of it to `rows` rows of sums, by dot products. wide: panels.
INLINE void add_rest(const bf16* a, int64_t stride, int64_t rows, const bf16* w, int64_t panel, int64_t wide, int64_t k,
                     bool begins, float* out) {
  for (int64_t r = 0, some; r < rows; r += some) {
    some = ACCUMULATORS / 2 / wide < rows - r ? ACCUMULATORS / 2 / wide : rows - r;
    choose_tile<BF16>(some, wide)(a + r * stride, stride, w, panel, k, begins, streaming(w), out + r * wide * NB);
  }
}

// Calls finish(row, rows, y) with the sums y of one panel for each of one or two tiles of rows, as begin_tiles was told.
// The second begins early enough to be whole, and has some rows that the first has too.
template <class Finish>
void panel_in_tiles(const bf16* a, int64_t stride, int64_t rows, const bf16* w, int64_t k, const Finish& finish) {
  const int64_t high = rows < HIGH ? rows : HIGH, second = rows - high, whole = k / DEEP * DEEP;
  alignas(64) float y[2 * HIGH * NB];
  const bf16* const from[2] = {a, a + second * stride};
  const auto nothing = [] {};
  if (second) multiply_tiles<2, 2>(from, stride, w, 0, whole, true, nothing, y);
  else multiply_tiles<1, 2>(from, stride, w, 0, whole, true, nothing, y);
  if (whole < k)
    for (int t = 0; t < (second ? 2 : 1); t++)
      add_rest(from[t] + whole, stride, high, w + whole * NB, 0, 1, k - whole, false, y + t * HIGH * NB);
  finish(0, high, y);
  if (second) finish(high, second, y + (HIGH + high - second) * NB);
}

// The sums of a panel or two, which are finished a few rows at a time while the tiles have those of the next. Of `rows`
// rows the last tile has `twice` that the one before has too.
template <class Finish>
struct Finishing {
  const Finish& finish;
  const int64_t rows, twice;
  const float* y;
  int64_t column, columns, done;

  __attribute__((noinline)) void until(int64_t stop) {
    const int64_t last = rows + twice - HIGH;  // where the last tile begins, had it no row twice
    while (done < stop) {
      const int64_t end = done < last && last < stop ? last : stop, at = done < last ? done : done + twice;
      finish(done, end - done, column, columns, y + at * columns);
      done = end;
    }
  }
};

// Does what `product` does. The last tile of rows begins early enough to be whole, and has some of them once more.
template <class Finish>
void product_in_tiles(const Linear& l, const bf16* a, int64_t stride, int64_t rows, const Worker& worker,
                      const Finish& finish) {
  const int64_t first = l.panels * worker.rank / worker.size, last = l.panels * (worker.rank + 1) / worker.size;
  const int64_t high = rows < HIGH ? rows : HIGH, tiles = (rows + HIGH - 1) / HIGH;
  const int64_t whole = l.k / DEEP * DEEP, panel = l.k * NB;
  const int64_t pieces = tiles > 2 ? (panel * 2 + worker.near_bytes - 1) / worker.near_bytes : 1;
  const int64_t deepest = (whole + DEEP * pieces - 1) / (DEEP * pieces) * DEEP;
  const auto begin_of = [&](int64_t t) { return t * HIGH < rows - high ? t * HIGH : rows - high; };
  alignas(64) float sums[2][GROUP_ROWS * NB];
  Finishing<Finish> before{finish, rows, (tiles - 1) * HIGH + high - rows, nullptr, 0, 0, rows};
  begin_tiles(high);
  for (int64_t p = first, wide, parity = 0; p < last; p += wide, parity ^= 1) {
    wide = tiles == 1 && p + 1 < last ? 2 : 1;
    const auto* weight = static_cast<const bf16*>(l.weight) + p * panel;
    float* const y = sums[parity];
    const int64_t steps = whole / DEEP * ((tiles + 1) / 2);
    int64_t step = 0;
    const auto finish_some = [&] { before.until(rows * ++step / steps); };
    for (int64_t k = 0, depth; k < whole; k += depth) {
      depth = deepest < whole - k ? deepest : whole - k;
      for (int64_t t = 0; t < tiles; t += 2) {
        const int64_t next = t + 1 < tiles ? t + 1 : t;
        const bf16* const from[2] = {a + begin_of(t) * stride + k, a + begin_of(next) * stride + k};
        float* to = y + t * HIGH * NB;
        const bf16* now = weight + k * NB;
        if (next != t) multiply_tiles<2, 2>(from, stride, now, panel, depth, k == 0, finish_some, to);
        else if (wide == 1) multiply_tiles<1, 2>(from, stride, now, panel, depth, k == 0, finish_some, to);
        else multiply_tiles<1, 4>(from, stride, now, panel, depth, k == 0, finish_some, to);
      }
    }
    if (whole < l.k)
      for (int64_t t = 0; t < tiles; t++)
        add_rest(a + begin_of(t) * stride + whole, stride, high, weight + whole * NB, panel, wide, l.k - whole,
                 whole == 0, y + t * HIGH * wide * NB);
    before.until(rows);
    before.y = y, before.column = p * NB, before.columns = wide * NB, before.done = 0;
  }
  before.until(rows);
  end_tiles();
}
