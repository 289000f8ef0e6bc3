// AMX's tile registers in plain C++, for machines without them: what amx.inl has of them, with the sums in Intel's order
// (Intel 64 and IA-32 Architectures Software Developer's Manual, TDPBF16PS). Numbers below 2⁻¹²⁶ are kept, not flushed.

struct Register {
  int64_t rows;
  uint32_t row[HIGH][16];  // 64 bytes, of fp32 or of pairs of bf16
};
thread_local Register registers[8];

void begin_tiles(int64_t rows) {
  for (int i = 0; i < 8; i++) {
    registers[i].rows = i < 6 ? rows : HIGH;
    __builtin_memset(registers[i].row, 0xff, sizeof registers[i].row);  // NaNs
  }
}

void end_tiles() {
  for (Register& each : registers) each.rows = 0;
}

template <int T>
void clear_tile() {
  __builtin_memset(registers[T].row, 0, sizeof registers[T].row);
}

template <int T>
void load_tile(const void* from, int64_t row_bytes) {
  for (int64_t r = 0; r < registers[T].rows; r++)
    __builtin_memcpy(registers[T].row[r], static_cast<const char*>(from) + r * row_bytes, 64);
}

template <int T>
void store_tile(void* to, int64_t row_bytes) {
  for (int64_t r = 0; r < registers[T].rows; r++)
    __builtin_memcpy(static_cast<char*>(to) + r * row_bytes, registers[T].row[r], 64);
}

template <int Sums, int Rows, int Columns>
void multiply_tile() {
  for (int64_t r = 0; r < registers[Sums].rows; r++) {
    vf even{}, odd{};
    for (int64_t pair = 0; pair < registers[Columns].rows; pair++) {
      const vu x = vu{} + registers[Rows].row[r][pair], y = load_u32(registers[Columns].row[pair]);
      even += low_half(x) * low_half(y);
      odd += high_half(x) * high_half(y);
    }
    const vf sums = bits(load_u32(registers[Sums].row[r])) + (even + odd);
    __builtin_memcpy(registers[Sums].row[r], &sums, sizeof sums);
  }
}
