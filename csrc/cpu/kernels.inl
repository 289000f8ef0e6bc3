// All hot loops of a step, compiled once for every instruction set. The including file defines
//   KERNELS       the name of the table that it fills,    NAME  what it is called,
//   VW            fp32 lanes of a vector,                 ACCUMULATORS  registers for a tile's sums,
//   TARFLOW_DOT   1 where bf16 dot products exist,        ACTIVATION    float, or uint16_t with TARFLOW_DOT,
//   TARFLOW_AMX   1 where AMX has them too,               TARFLOW_MMLA  1 where ARM's BFMMLA does more.
// No standard header with inline functions is included here: see kernels.h.

#include "density.h"
#include "kernels.h"
#include "masked.h"

namespace tarflow {
namespace {

#include "vectors.inl"
#include "products.inl"
#if TARFLOW_AMX
#include "amx.inl"
#endif
#if TARFLOW_MMLA
#include "mmla.inl"
#endif
#include "attention.inl"
#include "packing.inl"
#include "density.inl"
#include "spline.inl"
#include "masked.inl"
#include "affine_coupling.inl"

// out = (h − mean) / sqrt(variance + 1e-5), zero from n on to the end of the vector; the norm's own weight and bias
// are in the product that follows.
template <class A>
void normalise(const float* h, int64_t n, A* out) {
  const int64_t whole = n / VW * VW;
  const vi in_tail = lanes() < (int32_t)(n - whole);
  vf a[4] = {}, square[4] = {};
  int64_t i = 0;
  for (; i + 4 * VW <= whole; i += 4 * VW)
    UNROLL for (int j = 0; j < 4; j++) a[j] += load(h + i + j * VW);
  for (; i < whole; i += VW) a[0] += load(h + i);
  if (whole < n) a[1] += in_tail ? load(h + whole) : vf{};
  const float mean = sum((a[0] + a[1]) + (a[2] + a[3])) / (float)n;
  for (i = 0; i + 4 * VW <= whole; i += 4 * VW)
    UNROLL for (int j = 0; j < 4; j++) {
      vf centred = load(h + i + j * VW) - mean;
      square[j] += centred * centred;
    }
  for (; i < whole; i += VW) {
    vf centred = load(h + i) - mean;
    square[0] += centred * centred;
  }
  if (whole < n) {
    vf centred = in_tail ? load(h + whole) - mean : vf{};
    square[1] += centred * centred;
  }
  const float variance = sum((square[0] + square[1]) + (square[2] + square[3])) / (float)n;
  const float scale = 1.0f / __builtin_sqrtf(variance + 1e-5f);
  for (i = 0; i < whole; i += VW) store(out + i, (load(h + i) - mean) * scale);
  if (whole < n) store(out + whole, in_tail ? (load(h + whole) - mean) * scale : vf{});
}

// The rows that `step` works on: row r < count is the conditional branch of row[r], and row count + r the other branch.
struct Rows {
  const Block& block;
  const Batch& batch;
  const Worker& worker;
  const Row* row;
  int64_t count, ahead;

  int64_t branches() const { return batch.guidance ? 2 : 1; }
  int64_t all() const { return count * branches(); }
  int64_t cache_row(int64_t r) const { return r < count ? row[r].sample : batch.samples + row[r - count].sample; }
  int64_t position(int64_t r) const { return row[r < count ? r : r - count].token + ahead; }
  void meet() const {
    if (worker.size > 1) wait_at(worker.barrier);
  }
};

// Returns the keys of one (layer, cache row, head), which its values follow.
template <class W>
INLINE W* keys_of(const Rows& rows, int64_t layer, int64_t cache_row, int64_t head) {
  const Block& b = rows.block;
  const int64_t cache_rows = rows.batch.samples * rows.branches();
  const int64_t index = (layer * cache_rows + cache_row) * b.heads + head;
  return static_cast<W*>(rows.batch.keys_values) + index * 2 * b.key_tokens * b.head_dim;
}

// stream = proj_in(x) + position + class, in both branches
void embed(const Rows& rows) {
  const Block& b = rows.block;
  const Batch& batch = rows.batch;
  const Worker& w = rows.worker;
  for (int64_t r = 0; r < rows.count; r++) {
    const float* x = rows.row[r].input + rows.ahead * b.token_dim;
    __builtin_memcpy(w.gathered + r * b.in_stride, x, b.token_dim * sizeof(float));
  }
  product<F32>(b.in, w.gathered, b.in_stride, rows.count, w,
               [&](int64_t row, int64_t n, int64_t column, int64_t columns, const float* y) {
    for (int64_t branch = 0; branch < rows.branches(); branch++)
      for (int64_t i = 0; i < n; i++) {
        const int64_t r = branch * rows.count + row + i;
        const float* position = b.position + rows.position(r) * b.channel_stride;
        const float* label = batch.embedding ? batch.embedding + rows.cache_row(r) * b.channel_stride : nullptr;
        for (int64_t c = column, j = i * columns; c < column + columns; c += VW, j += VW) {
          vf h = load(y + j) + load(b.in.bias + c) + load(position + c);
          if (label) h += load(label + c);
          store(w.stream + r * b.channel_stride + c, h);
        }
      }
  });
}

template <class M>
void attention(const Rows& rows, int64_t index) {
  using A = typename M::act;
  using W = typename M::weight;
  const Block& b = rows.block;
  const Worker& w = rows.worker;
  const Layer& layer = b.layer[index];
  const int64_t d = b.head_dim, all = rows.all();
  A* query = reinterpret_cast<A*>(w.query);
  A* attended = reinterpret_cast<A*>(w.attended);
  A* normed = reinterpret_cast<A*>(w.normed);

  for (int64_t r = 0; r < all; r++)
    normalise(w.stream + r * b.channel_stride, b.channels, normed + r * b.channel_stride);
  product<M>(layer.qkv, normed, b.channel_stride, all, w,
             [&](int64_t row, int64_t n, int64_t first, int64_t columns, const float* y) {
    for (int64_t column = first; column < first + columns; column += NB) {
      const int64_t panel = column / NB, unit = panel / b.unit_panels, head = unit / 3, which = unit % 3;
      const int64_t offset = panel % b.unit_panels * NB;  // the panel's first column within the head
      const int64_t used = d - offset < NB ? d - offset : NB;
      for (int64_t i = 0; i < n; i++) {
        const float* from = y + i * columns + column - first;
        const int64_t r = row + i, t = rows.position(r);
        vf out[2];
        for (int half = 0; half < 2; half++)
          out[half] = load(from + half * VW) + load(layer.qkv.bias + column + half * VW);
        if (which == 0) {
          for (int64_t c = 0; c < used; c += VW)
            store(query + r * b.attention_stride + head * d + offset + c, out[c / VW]);
          continue;
        }
        W* keys = keys_of<W>(rows, index, rows.cache_row(r), head);
        if (which == 1) {
          W element[NB];
          store(element, out[0]), store(element + VW, out[1]);
          W* to = keys + t / VW * VW * d + offset * VW + t % VW * M::depth;
          for (int64_t c = 0; c < used; c += M::depth)
            __builtin_memcpy(to + c * VW, element + c, M::depth * sizeof(W));
        } else {
          W* to = keys + (b.key_tokens + t / M::depth * M::depth) * d + offset * M::depth;
          for (int64_t c = 0; c < used; c += VW) {
            if constexpr (M::depth == 1) store(to + c, out[c / VW]);
            else store_half(to + 2 * c, out[c / VW], t % 2);
          }
        }
      }
    }
  });

  // A thread that made whole heads attends to them; otherwise all threads meet and divide the heads of all rows.
  const bool by_head = b.heads % w.size == 0;
  if (!by_head) rows.meet();
  const int64_t share = by_head ? b.heads : all * b.heads;
  const int64_t begin = share * w.rank / w.size, end = share * (w.rank + 1) / w.size;
  const auto attend_to = [&](int64_t r, int64_t head) {
    const W* keys = keys_of<W>(rows, index, rows.cache_row(r), head);
    const int64_t offset = r * b.attention_stride + head * d;
    const float scale = b.attention_scale * (r >= rows.count ? rows.batch.unguided_scale : 1.0f);
    attend<M>(query + offset, keys, keys + b.key_tokens * d, d, rows.position(r) + 1, scale, w.scratch,
              attended + offset);
  };
  if (!by_head) {
    for (int64_t item = begin; item < end; item++) attend_to(item / b.heads, item % b.heads);
    return;
  }
  // The rows of a sample share its keys and values, which stay near while all of them attend to one head's.
  for (int64_t first = 0, last; first < all; first = last) {
    for (last = first + 1; last < all && rows.cache_row(last) == rows.cache_row(first);) last++;
    for (int64_t head = begin; head < end; head++)
      for (int64_t r = first; r < last; r++) attend_to(r, head);
  }
}

// stream += W a + bias
template <class M>
void add_to_stream(const Rows& rows, const Linear& l, const float* a, int64_t stride) {
  const Worker& w = rows.worker;
  product<M>(l, reinterpret_cast<const typename M::act*>(a), stride, rows.all(), w,
             [&](int64_t row, int64_t n, int64_t column, int64_t columns, const float* y) {
    for (int64_t i = 0; i < n; i++) {
      float* h = w.stream + (row + i) * rows.block.channel_stride + column;
      for (int64_t c = 0; c < columns; c += VW)
        store(h + c, load(h + c) + (load(y + i * columns + c) + load(l.bias + column + c)));
    }
  });
}

template <class M>
void expand(const Rows& rows, const Linear& l) {
  using A = typename M::act;
  const Block& b = rows.block;
  const Worker& w = rows.worker;
  A* normed = reinterpret_cast<A*>(w.normed);
  for (int64_t r = 0; r < rows.all(); r++)
    normalise(w.stream + r * b.channel_stride, b.channels, normed + r * b.channel_stride);
  product<M>(l, normed, b.channel_stride, rows.all(), w,
             [&](int64_t row, int64_t n, int64_t column, int64_t columns, const float* y) {
    for (int64_t i = 0; i < n; i++) {
      A* to = reinterpret_cast<A*>(w.hidden) + (row + i) * b.hidden_stride + column;
      for (int64_t c = 0; c < columns; c += VW)
        store(to + c, gelu(load(y + i * columns + c) + load(l.bias + column + c)));
    }
  });
}

// out = proj_out(stream)
void project(const Rows& rows) {
  const Block& b = rows.block;
  const Worker& w = rows.worker;
  product<F32>(b.out, w.stream, b.channel_stride, rows.all(), w,
               [&](int64_t row, int64_t n, int64_t column, int64_t columns, const float* y) {
    for (int64_t i = 0; i < n; i++)
      for (int64_t c = 0; c < columns; c += VW)
        store(w.out + (row + i) * b.out_stride + column + c, load(y + i * columns + c) + load(b.out.bias + column + c));
  });
}

// x = z · exp(xa) + xb, with xa and xb guided, for this worker's share of the rows
void transform(const Rows& rows) {
  const Block& b = rows.block;
  const Batch& batch = rows.batch;
  const Worker& w = rows.worker;
  const int64_t D = b.token_dim;
  for (int64_t r = rows.count * w.rank / w.size; r < rows.count * (w.rank + 1) / w.size; r++) {
    const int64_t sample = rows.row[r].sample, next = rows.position(r) + 1;
    const float* out = w.out + r * b.out_stride;
    const float* unguided = out + rows.count * b.out_stride;
    const float g = batch.guidance ? batch.guidance[next - 1] : 0.0f;
    const int64_t shift = b.affine ? D : 0;
    float log_det = 0.0f, change = 0.0f, residual = 0.0f;
    for (int64_t i = 0; i < D; i++) {
      float xa = out[i], xb = out[shift + i];
      if (batch.guidance && batch.guide_a) xa += g * (xa - unguided[i]);
      if (batch.guidance && batch.guide_b) xb += g * (xb - unguided[shift + i]);
      const int64_t at = (sample * b.tokens + next) * D + i;
      const float z = batch.z[at], before = batch.x[at];
      const float x = b.affine ? z * __builtin_expf(xa) + xb : z + xb;
      if (b.affine) log_det += xa;
      const float moved = __builtin_fabsf(x - before);
      change = moved > change || moved != moved ? moved : change;  // a NaN stays
      if (batch.change) {
        const float off = b.affine ? moved * __builtin_expf(-xa) : moved;
        residual = off > residual || off != off ? off : residual;
      }
      batch.x[at] = x;
    }
    batch.token_log_det[sample * b.tokens + next] = log_det;
    if (batch.change) {
      const int64_t at = sample * batch.widest + next - batch.start[sample];
      batch.change[at] = change;
      batch.residual[at] = residual;
    }
  }
}

template <class M>
void step(const Block& block, const Batch& batch, const Worker& worker, const Row* row, int64_t count, int64_t ahead) {
  const Rows rows{block, batch, worker, row, count, ahead};
  embed(rows);
  rows.meet();
  for (int64_t i = 0; i < block.layers; i++) {
    const Layer& layer = block.layer[i];
    attention<M>(rows, i);
    rows.meet();
    add_to_stream<M>(rows, layer.proj, worker.attended, block.attention_stride);
    rows.meet();
    expand<M>(rows, layer.fc1);
    rows.meet();
    add_to_stream<M>(rows, layer.fc2, worker.hidden, block.hidden_stride);
    rows.meet();
  }
  project(rows);
  rows.meet();
  transform(rows);
  rows.meet();
}

void gelu_all(const float* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += VW) store(out + i, gelu(load(x + i)));
}

void gelu_slope_all(const float* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += VW) store(out + i, gelu_slope(load(x + i)));
}

void exp_all(const float* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += VW) store(out + i, exp_negative(load(x + i)));
}

constexpr double MULTIPLIES = 2 * VW;  // two vectors in a cycle, also of pairs: see dispatch.cpp
#if TARFLOW_AMX
constexpr double BF16_MULTIPLIES = HIGH * HIGH * DEEP / 16.0;  // a product of tiles in 16 cycles
constexpr Passes BF16_PASSES{step<BF16>, 2 * HIGH, BF16_MULTIPLIES, BF16::together};
#elif TARFLOW_MMLA
constexpr Passes BF16_PASSES{step<BF16>, MOST_ROWS, 4 * MULTIPLIES, BF16::together};  // of four k to a lane
#else
constexpr Passes BF16_PASSES{step<BF16>, MOST_ROWS, MULTIPLIES, BF16::together};
#endif

const Kernels table = {NAME,
                       VW,
                       TARFLOW_DOT,
                       {step<F32>, MOST_ROWS, MULTIPLIES, F32::together},
                       BF16_PASSES,
                       &density_table,
                       &masked_table,
                       gelu_all,
                       gelu_slope_all,
                       exp_all,
                       spline_all<float>,
                       spline_all<double>,
                       couple<float>,
                       couple<double>};

}  // namespace

extern const Kernels* const KERNELS;
const Kernels* const KERNELS = &table;

}  // namespace tarflow
