// Products of bf16 by ARM's BFMMLA, which multiplies four k of two rows with four k of two columns and adds to 2 × 2
// sums: twice as many multiply-adds as a dot product of pairs has. Panels lie as it wants them, four k of a column
// together, and rows come in pairs. It adds two k to a sum, and then the two others, so that here too every element is
// summed over k from end to end, in one order whatever the rows.

static_assert(VW == 4 && BF16::together == 4, "a vector has two columns of four k");

// Returns four k of a row, and of the next one or zeros.
INLINE bfloat16x8_t two_rows(const bf16* row, int64_t stride, bool next) {
  const uint16x4_t first = vld1_u16(row), second = next ? vld1_u16(row + stride) : uint16x4_t{};
  return (bfloat16x8_t)vcombine_u16(first, second);
}

// Turns four columns of one row and of the next into two columns of both rows and the two others, and back.
INLINE void exchange_halves(vf& a, vf& b) {
  const float64x2_t x = (float64x2_t)a, y = (float64x2_t)b;
  a = (vf)vzip1q_f64(x, y), b = (vf)vzip2q_f64(x, y);
}

// Does what `tile` does; k: a multiple of four. The last of an odd number of rows has zeros beside it.
template <int R, int P>
void tile_of_pairs(const bf16* a, int64_t stride, const bf16* w, int64_t panel, int64_t k, bool begins, Ahead ahead,
                   float* out) {
  constexpr int pairs = (R + 1) / 2;
  vf acc[pairs][4 * P] = {};  // [p][c] is rows 2p and 2p + 1 × columns 2c and 2c + 1
  const auto exchange = [&]() INLINE_LAMBDA {
    UNROLL for (int p = 0; p < pairs; p++)
      UNROLL for (int c = 0; c < 4 * P; c += 2) exchange_halves(acc[p][c], acc[p][c + 1]);
  };
  if (!begins) {
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int j = 0; j < 2 * P; j++) acc[r / 2][2 * j + r % 2] = load(out + (r * 2 * P + j) * VW);
  }
  exchange();  // of zeros too: where these take another way, Clang copies sums in every step
  const bf16* from[pairs];
  UNROLL for (int p = 0; p < pairs; p++) from[p] = a + 2 * p * stride;
  for (int64_t i = 0; i < k; i += 4, w += 4 * NB) {
    if constexpr (R >= 4) {  // as in `tile`, whose step is two k
      fetch_ahead<P>(ahead, panel * sizeof *w);
      ahead.at += ahead.pace;
    }
    UNROLL for (int j = 0; j < P; j++) {
      bfloat16x8_t columns[4];
      UNROLL for (int c = 0; c < 4; c++) columns[c] = (bfloat16x8_t)vld1q_u16(w + j * panel + c * 2 * VW);
      UNROLL for (int p = 0; p < pairs; p++) {
        const bfloat16x8_t rows = two_rows(from[p], stride, 2 * p + 1 < R);
        vf* sums = acc[p] + 4 * j;
        UNROLL for (int c = 0; c < 4; c++) sums[c] = (vf)vbfmmlaq_f32((float32x4_t)sums[c], rows, columns[c]);
        // Tall tiles leave no registers for the next rows before these are multiplied, and compilers would load them.
        asm volatile("" ::"w"(sums[0]), "w"(sums[1]), "w"(sums[2]), "w"(sums[3]) : "memory");
      }
    }
    UNROLL for (int p = 0; p < pairs; p++) from[p] += 4;
  }
  exchange();
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int j = 0; j < 2 * P; j++) store(out + (r * 2 * P + j) * VW, acc[r / 2][2 * j + r % 2]);
}
