// The host side of device.cuh, which has the same names and meanings and checks every access. Where a promise is
// broken, the launch ends with an error that says who did what.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "machine.h"
#include "numbers.h"

#define DEVICE inline
#define KERNEL
#define CONSTANT_PARAMS const Params

namespace tarflow {

DEVICE int thread() { return emulation::here->index; }
DEVICE int block() { return emulation::here->block->index; }
DEVICE int blocks() { return emulation::machine->blocks; }

DEVICE void sync_block() { emulation::machine->sync_block(); }

// It orders no memory here, so that nothing comes to lean on that.
DEVICE void sync_warp() {
  emulation::issue_sunk();
  emulation::machine->meet("sync_warp", 0, nullptr, nullptr, [](emulation::Warp&) {});
}

DEVICE void section(Section section) { emulation::enter(-1, section); }
DEVICE void section(Phase phase, Section section) { emulation::enter(phase, section); }
DEVICE void instructions(int count) { emulation::instructions(count); }

#ifdef TARFLOW_TIMED

// The elements of a vector, which are waited for at their first use.
template <class T, int N>
struct Elements {
  T values[N];
  emulation::Ready ready = {};

  T& operator[](int i) { return emulation::await(ready), values[i]; }
  const T& operator[](int i) const { return emulation::await(ready), values[i]; }
};

template <class T, int N>
struct Vector {
  Elements<T, N> at;
};

// A number that was loaded, which is waited for where it becomes a T.
template <class T>
struct Loaded {
  Vector<T, 1> value;
  operator T() const { return value.at[0]; }
};

#else

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

template <class T>
using Loaded = T;

#endif

namespace emulation {

inline void shuffle(Warp& warp) {
  for (int lane = 0; lane < 32; lane++) std::memcpy(warp.taken[lane], warp.given[lane ^ warp.detail], sizeof(float));
}

}  // namespace emulation

DEVICE Loaded<float> shuffle_xor(float value, int mask) {
  if (mask < 0 || mask > 31) throw std::runtime_error("shuffle_xor by " + std::to_string(mask) + ": 0 … 31");
  float other;
  emulation::await_sums(nullptr);
  emulation::instructions(2);  // and what takes the result
  emulation::machine->meet("shuffle_xor", mask, &value, &other, emulation::shuffle);
#ifdef TARFLOW_TIMED
  return {{{{other}, {emulation::here->time.now + emulation::gpu.shuffle_latency, emulation::ON_SHARED}}}};
#else
  return other;
#endif
}

namespace emulation {

inline void find_first(Warp& warp) {
  int first = 0;
  while (first < 32 && !*static_cast<const bool*>(warp.given[first])) first++;
  for (int lane = 0; lane < 32; lane++) *static_cast<int*>(warp.taken[lane]) = first;
}

}  // namespace emulation

DEVICE int first_lane(bool flag) {
  int first;
  emulation::instructions(4);
  emulation::machine->meet("first_lane", 0, &flag, &first, emulation::find_first);
  return first;
}

// The type of an argument that a template does not deduce from.
template <class T>
struct Given {
  using Type = T;
};

template <class T>
struct Global {
  T* data;
  int64_t count;
  const char* name;
  DEVICE explicit Global(const Buffer& buffer)
      : data(static_cast<T*>(buffer.data)), count(buffer.count), name(buffer.name) {}
};

template <class T>
struct Shared {
  T* data;
  int count;
};

template <class T>
DEVICE Shared<T> shared(int byte, int count) {
  if (byte < 0 || byte % 16 || count < 0 || byte + count * int64_t{sizeof(T)} > emulation::machine->shared_bytes)
    throw std::runtime_error("shared(" + std::to_string(byte) + ", " + std::to_string(count) + ") of elements of " +
                             std::to_string(sizeof(T)) + " bytes: the block has " +
                             std::to_string(emulation::machine->shared_bytes) + ", arrays begin at multiples of 16");
  return {reinterpret_cast<T*>(emulation::here->block->shared + byte), count};
}

namespace emulation {

template <class T>
View view(Global<T> memory) {
  static_assert(sizeof(T) % GRANULE == 0);
  auto* data = const_cast<std::remove_const_t<T>*>(memory.data);
  return {memory.name, reinterpret_cast<unsigned char*>(data), memory.count, sizeof(T), false};
}

template <class T>
View view(Shared<T> memory) {
  static_assert(sizeof(T) % GRANULE == 0);
  return {"shared memory", reinterpret_cast<unsigned char*>(memory.data), memory.count, sizeof(T), true};
}

#ifdef TARFLOW_TIMED
template <class T, int N>
void set_ready(Vector<T, N>& value) {
  value.at.ready = here->time.ready;
}
template <class T>
void set_ready(Loaded<T>& value) {
  set_ready(value.value);
}
template <class T, int N>
void await_value(const Vector<T, N>& value) {
  await(value.at.ready);
}
#else
template <class Value>
void set_ready(Value&) {}
template <class Value>
void await_value(const Value&) {}
#endif

// Returns elements [i, i + N) as a Value of their whole size.
template <class Value, int N, class Memory>
Value read(Memory from, int64_t i, Use how) {
  Value value;
  std::memcpy(static_cast<void*>(&value), use(view(from), i, N, how), N * sizeof *from.data);
  set_ready(value);
  return value;
}

template <int N, class Memory, class Value>
void write(Memory to, int64_t i, const Value& value) {
  std::memcpy(use(view(to), i, N, WRITE), &value, N * sizeof *to.data);
}

}  // namespace emulation

template <class T>
DEVICE Loaded<T> constant(Global<const T> from, int64_t i) {
  return emulation::read<Loaded<T>, 1>(from, i, emulation::CONSTANT_READ);
}

template <class T>
DEVICE Loaded<T> load(Global<T> from, int64_t i) {
  return emulation::read<Loaded<T>, 1>(from, i, emulation::READ);
}

template <int N, class T>
DEVICE Vector<T, N> load_vector(Global<T> from, int64_t i) {
  static_assert(N * sizeof(T) <= 16);
  return emulation::read<Vector<T, N>, N>(from, i, emulation::READ);
}

template <class T>
DEVICE void store(Global<T> to, int64_t i, typename Given<T>::Type value) {
  emulation::write<1>(to, i, value);
}

template <class T>
DEVICE Loaded<T> load(Shared<T> from, int i) {
  return emulation::read<Loaded<T>, 1>(from, i, emulation::READ);
}

template <int N, class T>
DEVICE Vector<T, N> load_vector(Shared<T> from, int i) {
  return emulation::read<Vector<T, N>, N>(from, i, emulation::READ);
}

template <class T>
DEVICE void store(Shared<T> to, int i, typename Given<T>::Type value) {
  emulation::write<1>(to, i, value);
}

template <int N, class T>
DEVICE void store_vector(Shared<T> to, int i, const Vector<T, N>& value) {
  emulation::await_value(value);
  emulation::write<N>(to, i, value);
}

template <int N, class T>
DEVICE void store_vector(Global<T> to, int64_t i, const Vector<T, N>& value) {
  emulation::await_value(value);
  emulation::write<N>(to, i, value);
}

namespace emulation {

inline void exchange_rows(Warp& warp) {
  for (int lane = 0; lane < 32; lane++)
    for (int m = 0; m < warp.detail; m++)
      static_cast<int*>(warp.taken[lane])[m] = *static_cast<const int*>(warp.given[m * 8 + lane / 4]);
}

}  // namespace emulation

template <int N, class T>
DEVICE void load_matrices(Vector<T, 2> (&to)[N], Shared<T> from, int i) {
  static_assert(sizeof(T) == 2 && (N == 2 || N == 4));
  if (i % 8) throw std::runtime_error("load_matrices: row at " + std::to_string(i) + ", not a multiple of 8");
  int rows[4];
  emulation::machine->meet("load_matrices", N, &i, rows, emulation::exchange_rows);
  emulation::instructions(2);
  for (int m = 0; m < N; m++)
    to[m] = emulation::read<Vector<T, 2>, 2>(from, rows[m] + thread() % 4 * 2, emulation::MATRIX_READ);
}

template <class T>
DEVICE void prefetch(Global<T> from, int64_t i) {
  emulation::use(emulation::view(from), i, 1, emulation::HINT);
}

template <class T, class From>
DEVICE void copy_async(Shared<T> to, int i, Global<From> from, int64_t j) {
  static_assert(std::is_same_v<std::remove_const_t<From>, T>);
  const auto how = std::is_const_v<From> ? emulation::CONSTANT_READ : emulation::COPY_READ;
  emulation::machine->copy({emulation::view(to), emulation::view(from), i, j, how, {}});
}

DEVICE void commit_copies() { emulation::machine->commit_copies(); }
DEVICE void wait_copies(int pending) { emulation::machine->wait_copies(pending); }

// The counter is only for signal and await, so its memory has no stamps.
DEVICE void signal(Global<unsigned> counter) {
  emulation::use(emulation::view(counter), 0, 1, emulation::HINT);
  emulation::machine->signal(counter.data);
}
DEVICE void await(Global<unsigned> counter, unsigned number) {
  emulation::use(emulation::view(counter), 0, 1, emulation::HINT);
  emulation::machine->await(counter.data, number);
}

namespace emulation {

// Returns elements [i, i + N). Whoever looks again goes on when some more of them have come; in the model of time each look
// has its time, and finds nothing before that of the sending.
template <int N, class T>
Vector<T, N> look(Global<T> from, int64_t i, bool waits) {
  if (waits) machine->await_sent(view(from), i, N);
  auto value = read<Vector<T, N>, N>(from, i, LOOK);
  if (TIMED && here->time.early) std::memset(static_cast<void*>(&value), 0xff, N * sizeof(T));
  return value;
}

template <class T>
bool is_empty(const T& value) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(&value);
  return std::all_of(bytes, bytes + sizeof value, [](unsigned char byte) { return byte == 0xff; });
}

// Returns a number as a GPU's arithmetic would give it: all of its NaNs are this one, and a host's are not.
template <class T>
T canonical(T value) {
  if constexpr (std::is_same_v<T, float>) return value != value ? bits_as<float>(0x7fffffffu) : value;
  return value;
}

}  // namespace emulation

template <class T>
DEVICE void send(Global<T> to, int64_t i, typename Given<T>::Type value) {
  value = emulation::canonical<T>(value);
  emulation::machine->send(emulation::view(to), i, 1, &value);
}

template <int N, class T>
DEVICE void send_vector(Global<T> to, int64_t i, const Vector<T, N>& value) {
  static_assert(N * sizeof(T) == 8 || N * sizeof(T) == 16);
  emulation::await_value(value);
  T values[N];
  for (int j = 0; j < N; j++) values[j] = emulation::canonical<T>(value.at[j]);
  emulation::machine->send(emulation::view(to), i, N, values);
}

template <int N, class T>
DEVICE void empty(Global<T> to, int64_t i) {
  static_assert(N * sizeof(T) == 4 || N * sizeof(T) == 16);
  std::memset(emulation::use(emulation::view(to), i, N, emulation::EMPTY), 0xff, N * sizeof(T));
}

template <int N, class T>
DEVICE Vector<T, N> look(Global<T> from, int64_t i, bool waits) {
  static_assert(N * sizeof(T) == 4 || N * sizeof(T) == 8 || N * sizeof(T) == 16);
  return emulation::look<N>(from, i, waits);
}

template <int N, class T>
DEVICE bool any_empty(const Vector<T, N>& value) {
  emulation::instructions(N * static_cast<int>(sizeof(T)) / 4 * (sizeof(T) == 4 ? 1 : 2));
  bool any = false;
  for (int j = 0; j < N; j++) any |= emulation::is_empty(value.at[j]);
  return any;
}

class Patience {
 public:
  DEVICE void again() {}  // a wait in vain is a deadlock, which the machine finds
};

namespace emulation {

// The elements that a lane has of A and then of B, as in device.cuh.
struct Tiles {
  float a[8], b[4];
};

inline void multiply(Warp& warp) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const auto& tiles = *static_cast<const Tiles*>(warp.given[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; i++) a[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = tiles.a[i];
    for (int i = 0; i < 4; i++) b[2 * t + i % 2 + i / 2 * 8][g] = tiles.b[i];
  }
#ifdef TARFLOW_TIMED
  Thread* const first = here - here->index % 32;  // lane 0 of this warp
  const double passed = tensor(*here->block, here->index / 32, here->time.now);
#endif
  for (int lane = 0; lane < 32; lane++) {
    auto* sums = static_cast<float*>(warp.taken[lane]);
#ifdef TARFLOW_TIMED
    multiplied(first[lane], sums, passed + gpu.tensor_latency);
#endif
    for (int i = 0; i < 4; i++)
      for (int k = 0; k < 16; k++) sums[i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
  }
}

template <class T>
void multiply_tiles(float (&sums)[4], const Vector<T, 8>& a, const Vector<T, 2>& b0, const Vector<T, 2>& b1) {
  Tiles tiles;
  for (int i = 0; i < 8; i++) tiles.a[i] = to_float(a.at[i]);
  for (int i = 0; i < 2; i++) tiles.b[i] = to_float(b0.at[i]), tiles.b[2 + i] = to_float(b1.at[i]);
  instructions(1);
  await_sums(sums);
  machine->meet("multiply_tiles", 0, &tiles, sums, multiply);
}

}  // namespace emulation

DEVICE void multiply_tiles(float (&sums)[4], const Vector<bf16, 8>& a, const Vector<bf16, 2>& b0,
                           const Vector<bf16, 2>& b1) {
  emulation::multiply_tiles(sums, a, b0, b1);
}
DEVICE void multiply_tiles(float (&sums)[4], const Vector<fp16, 8>& a, const Vector<fp16, 2>& b0,
                           const Vector<fp16, 2>& b1) {
  emulation::multiply_tiles(sums, a, b0, b1);
}

}  // namespace tarflow
