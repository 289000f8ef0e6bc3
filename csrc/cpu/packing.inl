// Matrices in torch's layout become panels as `tile` reads them: [k / n][NB][n], with n = M::together. Elements beyond
// the last column, or beyond the last k of those that lie together, are zero.

// Loads n values, and zeros up to a whole vector.
INLINE vf load_some(const float* p, int64_t n) {
  if (n >= VW) return load(p);
  float t[VW] = {};
  for (int64_t i = 0; i < n; i++) t[i] = p[i];
  return load(t);
}

template <class A>
INLINE void store_some(A* p, vf x, int64_t n) {
  if (n >= VW) return store(p, x);
  A t[VW];
  store(t, x);
  for (int64_t i = 0; i < n; i++) p[i] = t[i];
}

// Exchanges the lanes of a whose number has the bit `Step` with the lanes of b whose number does not.
template <int Step, int... Lane>
INLINE void exchange(vf& a, vf& b) {
#ifdef __clang__
  const vf low = __builtin_shufflevector(a, b, (Lane & Step ? VW + (Lane ^ Step) : Lane)...);
  const vf high = __builtin_shufflevector(a, b, (Lane & Step ? VW + Lane : Lane ^ Step)...);
#else
  const vf low = __builtin_shuffle(a, b, vi{(Lane & Step ? VW + (Lane ^ Step) : Lane)...});
  const vf high = __builtin_shuffle(a, b, vi{(Lane & Step ? VW + Lane : Lane ^ Step)...});
#endif
  a = low, b = high;
}

// Transposes a square of VW vectors: its rows become its columns.
template <int Step = 1>
INLINE void transpose(vf* v) {
  if constexpr (Step < VW) {
    UNROLL for (int i = 0; i < VW; i++)
      if (!(i & Step)) {
#if VW == 16
        exchange<Step, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(v[i], v[i + Step]);
#elif VW == 8
        exchange<Step, 0, 1, 2, 3, 4, 5, 6, 7>(v[i], v[i + Step]);
#else
        exchange<Step, 0, 1, 2, 3>(v[i], v[i + Step]);
#endif
      }
    transpose<2 * Step>(v);
  }
}

// Stores two k of half a panel, for bf16.
INLINE void store_pair(bf16* to, vf even, vf odd) {
  const vu pair = to_bf16(even) | (to_bf16(odd) << 16);
  __builtin_memcpy(to, &pair, sizeof pair);
}

// Stores half a panel, four k of each column.
INLINE void store_fours(bf16* to, const vf* column) {
  UNROLL for (int c = 0; c < VW; c++) store(to + c * 4, column[c]);
}

// Packs w (columns, k), whose rows are ld apart: column c of the panel is row c of w. columns <= NB.
template <class M>
void pack_rows(const float* w, int64_t ld, int64_t columns, int64_t k, typename M::weight* out) {
  for (int half = 0; half < 2; half++) {
    const int64_t used = columns - half * VW;
    for (int64_t i = 0; i < k; i += VW) {
      vf v[VW];
      UNROLL for (int c = 0; c < VW; c++) v[c] = c < used ? load_some(w + (half * VW + c) * ld + i, k - i) : vf{};
      if constexpr (M::together == 4) {
        store_fours(out + i * NB + half * NB * 2, v);
        continue;
      }
      transpose(v);
      if constexpr (M::together == 1) {
        UNROLL for (int j = 0; j < VW; j++)
          if (i + j < k) store(out + (i + j) * NB + half * VW, v[j]);
      } else {
        UNROLL for (int j = 0; j < VW; j += 2)
          if (i + j < k) store_pair(out + (i + j) * NB + half * NB, v[j], v[j + 1]);
      }
    }
  }
}

// Packs w (k, columns), which the panel has in the same order. columns <= NB.
template <class M>
void pack_columns(const float* w, int64_t ld, int64_t columns, int64_t k, typename M::weight* out) {
  for (int64_t i = 0; i < k; i += M::together)
    for (int half = 0; half < 2; half++) {
      const float* from = w + i * ld + half * VW;
      const int64_t used = columns - half * VW > 0 ? columns - half * VW : 0;
      const vf first = load_some(from, used);
      if constexpr (M::together == 1) {
        store(out + i * NB + half * VW, first);
      } else if constexpr (M::together == 2) {
        store_pair(out + i * NB + half * NB, first, i + 1 < k ? load_some(from + ld, used) : vf{});
      } else {
        vf v[VW] = {first};
        UNROLL for (int j = 1; j < VW; j++)
          if (i + j < k) v[j] = load_some(from + j * ld, used);
        transpose(v);
        store_fours(out + i * NB + half * NB * 2, v);
      }
    }
}
