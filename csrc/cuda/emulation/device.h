// The host side of device.cuh: the same names for a host compiler, on emulated threads, with every access checked.
#pragma once

#include <cmath>
#include <cstring>

#include "machine.h"

#define DEVICE inline
#define KERNEL
#define CONSTANT_PARAMS const Params

namespace tarflow {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  _Float16 value;
};

inline int thread() { return emulation::current().index; }
inline int block() { return emulation::current().block; }
inline int blocks() { return emulation::grid_blocks(); }

inline void sync_block() { emulation::sync_block(); }
inline float shuffle_xor(float value, int mask) { return emulation::shuffle_xor(value, mask); }

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

template <class T>
struct Global {
  T* data;
  int64_t count;
  int buffer;
  explicit Global(const Buffer& from)
      : data(static_cast<T*>(from.data)), count(from.count), buffer(emulation::buffer_index(from.name)) {}
};

// begin: its first byte in the block's shared memory.
template <class T>
struct Shared {
  T* data;
  int count, begin;
};

template <class T>
Shared<T> shared(int byte, int count) {
  return {reinterpret_cast<T*>(emulation::shared_memory(byte, static_cast<int64_t>(count) * sizeof(T))), count, byte};
}

template <int N = 1, class T>
emulation::Place place(Global<T> memory, int64_t i) {
  return emulation::global_place(memory.buffer, memory.count, i, N, sizeof(T));
}

template <int N = 1, class T>
emulation::Place place(Shared<T> memory, int i) {
  return emulation::shared_place(memory.begin, memory.count, i, N, sizeof(T));
}

template <class T>
T constant(Global<const T> from, int64_t i) {
  emulation::read_constant(place(from, i));
  return from.data[i];
}

template <class T>
T load(Global<T> from, int64_t i) {
  emulation::read(place(from, i));
  return from.data[i];
}

template <int N, class T>
Vector<T, N> load_vector(Global<T> from, int64_t i) {
  emulation::read(place<N>(from, i));
  Vector<T, N> value;
  std::memcpy(&value, from.data + i, sizeof(value));
  return value;
}

template <class T>
void store(Global<T> to, int64_t i, T value) {
  emulation::write(place(to, i));
  to.data[i] = value;
}

template <class T>
T load(Shared<T> from, int i) {
  emulation::read(place(from, i));
  return from.data[i];
}

template <int N, class T>
Vector<T, N> load_vector(Shared<T> from, int i) {
  emulation::read(place<N>(from, i));
  Vector<T, N> value;
  std::memcpy(&value, from.data + i, sizeof(value));
  return value;
}

template <class T>
void store(Shared<T> to, int i, T value) {
  emulation::write(place(to, i));
  to.data[i] = value;
}

template <int N, class T>
void store_vector(Shared<T> to, int i, const Vector<T, N>& value) {
  emulation::write(place<N>(to, i));
  std::memcpy(to.data + i, &value, sizeof(value));
}

template <class T>
void prefetch(Global<T> from, int64_t i) {
  place(from, i);
}

template <class T>
void copy_async(Shared<T> to, int i, Global<const T> from, int64_t j) {
  constexpr int N = 16 / sizeof(T);
  emulation::read_constant(place<N>(from, j));
  emulation::copy(place<N>(to, i), to.data + i, from.data + j);
}

inline void commit_copies() { emulation::commit_copies(); }
inline void wait_copies(int pending) { emulation::wait_copies(pending); }

inline void signal(Global<unsigned> counter) { emulation::signal(counter.data); }
inline void await(Global<unsigned> counter, unsigned number) { emulation::await(counter.data, number); }

inline float to_float(float value) { return value; }
inline float to_float(fp16 value) { return static_cast<float>(value.value); }
inline float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline fp16 from_float<fp16>(float value) {
  return {static_cast<_Float16>(value)};
}
template <>
inline bf16 from_float<bf16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 64)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}

// A lane's part of a product, in fp32: the warp computes it when all lanes are there.
template <class T>
void multiply_tiles(float (&sums)[4], const Vector<T, 8>& a, const Vector<T, 2>& b0, const Vector<T, 2>& b1) {
  emulation::LaneTiles tiles;
  for (int i = 0; i < 8; i++) tiles.a[i] = to_float(a.at[i]);
  for (int i = 0; i < 2; i++) tiles.b[i] = to_float(b0.at[i]), tiles.b[2 + i] = to_float(b1.at[i]);
  tiles.sums = sums;
  emulation::multiply_tiles(tiles);
}

}  // namespace tarflow
