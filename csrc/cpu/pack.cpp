#include "pack.h"

#include <cstring>

namespace tarflow {

namespace {

uint16_t to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// A weight W (out, in) and its bias, with the weight γ and bias β of the LayerNorm before it, which are folded in:
// W (γ ∘ n + β) + b = (W γ) n + (W β + b).
struct Matrix {
  const float *weight, *bias;
  int64_t in;
  const float *gamma, *beta;
};

// row(c) is the row of W that becomes column c of the panels, or −1; column(k) is the column of W for k, or −1.
template <class Row, class Column>
Linear pack_linear(Arena& arena, const Matrix& m, int64_t columns, int64_t k, int64_t width, int64_t together,
                   const Row& row, const Column& column) {
  const bool bf16 = together > 1;
  Linear l{nullptr, nullptr, round_up(k, together), (columns + width - 1) / width};
  void* weight = arena.take<void>(l.panels * l.k * width, bf16 ? 2 : 4);
  float* bias = arena.take(l.panels * width);
  l.weight = weight;
  l.bias = bias;
  if (!arena.filling()) return l;
  for (int64_t c = 0; c < l.panels * width; c++) {
    const int64_t r = c < columns ? row(c) : -1;
    double b = r < 0 ? 0.0 : m.bias[r];
    for (int64_t i = 0; i < l.k; i++) {
      const int64_t from = r < 0 || i >= k ? -1 : column(i);
      float w = from < 0 ? 0.0f : m.weight[r * m.in + from];
      if (from >= 0 && m.beta) b += static_cast<double>(w) * m.beta[from];
      if (from >= 0 && m.gamma) w *= m.gamma[from];
      const int64_t at = (c / width * l.k + i / together * together) * width + c % width * together + i % together;
      if (bf16)
        static_cast<uint16_t*>(weight)[at] = to_bf16(w);
      else
        static_cast<float*>(weight)[at] = w;
    }
    bias[c] = static_cast<float>(b);
  }
  return l;
}

void fill(Arena& arena, Block& block, std::vector<Layer>& layers, const Sizes& s, const Source& source, int64_t width,
          int64_t together) {
  const int64_t C = s.channels, F = s.hidden, H = block.heads, d = block.head_dim, unit = block.unit_panels * width;
  const auto same = [](int64_t i) { return i; };
  const auto qkv_row = [&](int64_t c) {
    const int64_t head = c / unit / 3, which = c / unit % 3, offset = c % unit;
    return offset < s.head_dim ? which * C + head * s.head_dim + offset : -1;
  };
  const auto attended = [&](int64_t k) { return k % d < s.head_dim ? k / d * s.head_dim + k % d : -1; };

  block.in = pack_linear(arena, {source.in_weight, source.in_bias, s.token_dim, nullptr, nullptr}, C, s.token_dim,
                         width, 1, same, same);
  float* position = arena.take(s.tokens * block.channel_stride);
  block.position = position;
  if (arena.filling()) {
    std::memset(position, 0, s.tokens * block.channel_stride * sizeof(float));
    for (int64_t t = 0; t < s.tokens; t++)
      std::memcpy(position + t * block.channel_stride, source.position + t * C, C * sizeof(float));
  }
  for (int64_t i = 0; i < s.layers; i++) {
    const LayerSource l = arena.filling() ? source.layer(i) : LayerSource{};
    layers[i].qkv = pack_linear(arena, {l.qkv_weight, l.qkv_bias, C, l.norm1_weight, l.norm1_bias}, 3 * H * unit, C,
                                width, together, qkv_row, same);
    layers[i].proj = pack_linear(arena, {l.proj_weight, l.proj_bias, C, nullptr, nullptr}, C, H * d, width, together,
                                 same, attended);
    layers[i].fc1 = pack_linear(arena, {l.fc1_weight, l.fc1_bias, C, l.norm2_weight, l.norm2_bias}, F, C, width,
                                together, same, same);
    layers[i].fc2 =
        pack_linear(arena, {l.fc2_weight, l.fc2_bias, F, nullptr, nullptr}, C, F, width, together, same, same);
  }
  block.out = pack_linear(arena, {source.out_weight, source.out_bias, C, nullptr, nullptr}, block.out_dim, C, width, 1,
                          same, same);
}

}  // namespace

Memory pack(Block& block, std::vector<Layer>& layers, const Sizes& sizes, const Source& source, int64_t panel_width,
            int64_t together, size_t& bytes) {
  Arena counted;
  fill(counted, block, layers, sizes, source, panel_width, together);
  bytes = counted.used();
  Memory memory = allocate(bytes);
  Arena arena(memory.get());
  fill(arena, block, layers, sizes, source, panel_width, together);
  return memory;
}

}  // namespace tarflow
