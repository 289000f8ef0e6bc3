// All that the kernel uses of CUDA. nvcc compiles what is below; the emulation (emulation/device.h) has the same names
// for a host compiler, and checks every access.
//
// Memory is reached only through Global and Shared, by `load`, `store` and their vectors. Indices count elements.
#pragma once

#include "params.h"

#ifdef TARFLOW_EMULATION
#include "emulation/device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#define DEVICE __device__ __forceinline__
#define KERNEL __global__
#define CONSTANT_PARAMS const __grid_constant__ Params

namespace tarflow {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// The place of a thread in its block of WARPS · 32 threads, and in a grid that is on the device all at once.
DEVICE int thread() { return threadIdx.x; }
DEVICE int block() { return blockIdx.x; }
DEVICE int blocks() { return gridDim.x; }

DEVICE void sync_block() { __syncthreads(); }

// Lets no lane go on before all have come, and no load move to the other side: ptxas would move loads down to their
// first uses, of which each then waits for the one before it. Every lane of the warp takes part.
DEVICE void sync_warp() { __syncwarp(); }

// These tell the emulation's model of time (emulation/timing.h) where a thread is, and how many instructions it runs
// besides those of this file. They are nothing on a GPU.
DEVICE void section(Section) {}
DEVICE void section(Phase, Section) {}
DEVICE void instructions(int) {}

// One half of a word of 32 bits.
template <class T>
struct Half {
  unsigned& word;
  int shift;

  DEVICE operator T() const {
    const auto bits = static_cast<unsigned short>(word >> shift);
    return *reinterpret_cast<const T*>(&bits);
  }
  DEVICE void operator=(T value) {
    word = (word & 0xffff0000u >> shift) | static_cast<unsigned>(*reinterpret_cast<unsigned short*>(&value)) << shift;
  }
  DEVICE void operator=(const Half& other) { *this = static_cast<T>(other); }
};

// Elements of 16 bits, two in a word: where the compiler sees them one by one, each takes a register of its own from
// its load on.
template <class T, int N>
struct Halves {
  unsigned words[N / 2];

  DEVICE Half<T> operator[](int i) { return {words[i / 2], i % 2 * 16}; }
  DEVICE T operator[](int i) const { return Half<T>{const_cast<unsigned&>(words[i / 2]), i % 2 * 16}; }
};

// A vector that is loaded on a condition is first set to zero. PTX has no values that are undefined: what was not loaded
// would be what the turn before left, and keep its registers through the whole token loop.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  std::conditional_t<sizeof(T) == 2 && N % 2 == 0, Halves<T, N>, T[N]> at;
};

// A number on its way: the code that holds it as this type, or as a Vector, need not wait for it before its first use.
template <class T>
using Loaded = T;

template <class T>
struct Global {
  T* data;
  DEVICE explicit Global(const Buffer& buffer) : data(static_cast<T*>(buffer.data)) {}
};

template <class T>
struct Shared {
  T* data;
};

// Returns the value of the lane whose number differs by `mask`. Every lane of the warp takes part.
DEVICE Loaded<float> shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Returns the first lane of the warp whose `flag` is set, or 32. Every lane of the warp takes part.
DEVICE int first_lane(bool flag) {
  const unsigned lanes = __ballot_sync(0xffffffffu, flag);
  return lanes ? __ffs(lanes) - 1 : 32;
}

// Returns `count` elements of the block's dynamic shared memory, from this byte on, a multiple of 16.
template <class T>
DEVICE Shared<T> shared(int byte, int count) {
  extern __shared__ __align__(16) unsigned char memory[];
  return {reinterpret_cast<T*>(memory + byte)};
}

// Reads memory that nobody writes during the launch.
template <class T>
DEVICE T constant(Global<const T> from, int64_t i) {
  return __ldg(from.data + i);
}

// Reads memory that other blocks write, and so not from this multiprocessor's own cache. A half is read by load_vector:
// its own __ldcg is assembly that the compiler may take to be the same before and after a barrier.
template <class T>
DEVICE T load(Global<T> from, int64_t i) {
  static_assert(std::is_arithmetic_v<T>);
  return __ldcg(from.data + i);
}

// Reads N elements, which are 2, 4, 8 or 16 bytes. i: a multiple of N.
template <int N, class T>
DEVICE Vector<T, N> load_vector(Global<T> from, int64_t i) {
  constexpr int bytes = N * static_cast<int>(sizeof(T));
  static_assert(bytes == 2 || bytes == 4 || bytes == 8 || bytes == 16);
  union {
    Vector<T, N> vector;
    unsigned short two;
    unsigned four;
    uint2 eight;
    uint4 sixteen;
  } value;
  const T* at = from.data + i;
  if constexpr (bytes == 2) value.two = __ldcg(reinterpret_cast<const unsigned short*>(at));
  if constexpr (bytes == 4) value.four = __ldcg(reinterpret_cast<const unsigned*>(at));
  if constexpr (bytes == 8) value.eight = __ldcg(reinterpret_cast<const uint2*>(at));
  if constexpr (bytes == 16) value.sixteen = __ldcg(reinterpret_cast<const uint4*>(at));
  return value.vector;
}

template <class T>
DEVICE void store(Global<T> to, int64_t i, T value) {
  to.data[i] = value;
}

template <class T>
DEVICE T load(Shared<T> from, int i) {
  return from.data[i];
}

template <int N, class T>
DEVICE Vector<T, N> load_vector(Shared<T> from, int i) {
  return *reinterpret_cast<const Vector<T, N>*>(from.data + i);
}

template <class T>
DEVICE void store(Shared<T> to, int i, T value) {
  to.data[i] = value;
}

// The whole vector in one store, which a copy of a struct of small elements is not. 4, 8 or 16 bytes.
template <int N, class T>
DEVICE void store_vector(T* to, const Vector<T, N>& value) {
  constexpr int bytes = N * static_cast<int>(sizeof(T));
  static_assert(bytes == 2 || bytes == 4 || bytes == 8 || bytes == 16);
  if constexpr (bytes == 2) *to = value.at[0];
  if constexpr (bytes == 4) *reinterpret_cast<unsigned*>(to) = *reinterpret_cast<const unsigned*>(&value);
  if constexpr (bytes == 8) *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(&value);
  if constexpr (bytes == 16) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&value);
}
// 16 bytes are asked for in assembly, as the compiler may take a vector apart that it has seen in parts.
template <int N, class T>
DEVICE void store_vector(Shared<T> to, int i, const Vector<T, N>& value) {
  if constexpr (N * sizeof(T) < 16) return store_vector(to.data + i, value);
  const auto& words = reinterpret_cast<const unsigned (&)[4]>(value);
  asm volatile(
      "st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to.data + i))),
      "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
}
template <int N, class T>
DEVICE void store_vector(Global<T> to, int64_t i, const Vector<T, N>& value) {
  store_vector(to.data + i, value);
}

// Reads N matrices of 8 × 8 by a whole warp: a lane gets row lane / 4, columns 2 (lane % 4) and the one after it, of
// each. i: the first element of row lane % 8 of matrix lane / 8 % N, a multiple of 8.
template <int N, class T>
DEVICE void load_matrices(Vector<T, 2> (&to)[N], Shared<T> from, int i) {
  static_assert(sizeof(T) == 2 && (N == 2 || N == 4));
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(from.data + i));
  unsigned* at = reinterpret_cast<unsigned*>(to);
  if constexpr (N == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(at[0]), "=r"(at[1])
                 : "r"(address)
                 : "memory");
  if constexpr (N == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(at[0]), "=r"(at[1]), "=r"(at[2]), "=r"(at[3])
                 : "r"(address)
                 : "memory");
}

// Asks for the line of an element to be brought into the cache that all multiprocessors share. This is a hint.
template <class T>
DEVICE void prefetch(Global<T> from, int64_t i) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from.data + i));
}

// Copies 16 bytes, past this multiprocessor's own cache. i, j: multiples of so many elements. The copy has come when a
// wait_copies of the same thread has returned, and other threads can see it after the next sync_block. Until then nobody
// may write what is copied.
template <class T, class From>
DEVICE void copy_async(Shared<T> to, int i, Global<From> from, int64_t j) {
  static_assert(std::is_same_v<std::remove_const_t<From>, T>);
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to.data + i));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from.data + j) : "memory");
}

// Makes a group of the copies that this thread has asked for since the last commit.
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Waits until at most so many of this thread's groups, the last ones, have not come. pending: 0 … 7.
DEVICE void wait_copies(int pending) {
  switch (pending) {
    // clang-format off
#define TARFLOW_WAIT(n) \
  case n:               \
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory"); \
    break;
    TARFLOW_WAIT(1) TARFLOW_WAIT(2) TARFLOW_WAIT(3) TARFLOW_WAIT(4) TARFLOW_WAIT(5) TARFLOW_WAIT(6) TARFLOW_WAIT(7)
#undef TARFLOW_WAIT
    default: asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
  // clang-format on
}

// counter += 1, after all that this block did before its last sync_block. One thread of the block calls it.
DEVICE void signal(Global<unsigned> counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter.data) : "memory");
}

// Ends the launch with an error when a wait has been in vain for too long, as the device would otherwise be lost to all
// who use it.
class Patience {
 public:
  // A wait calls it after each look that found nothing.
  DEVICE void again() {
    constexpr unsigned long long MOST = 2'000'000'000;  // nanoseconds, where a barrier takes a thousand
    constexpr unsigned GLANCES = 1 << 14;               // looks between two looks at the clock
    if (++glances_ % GLANCES) return;
    unsigned long long now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    if (began_ == 0) began_ = now;
    if (now - began_ > MOST) asm volatile("trap;");
  }

 private:
  unsigned glances_ = 0;
  unsigned long long began_ = 0;
};

// Waits for the counter to reach a number. After the block's next sync_block, all that other blocks did before they
// signalled can be seen. One thread of the block calls it.
DEVICE void await(Global<unsigned> counter, unsigned number) {
  for (Patience patience;; patience.again()) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter.data) : "memory");
    if (static_cast<int>(value - number) >= 0) return;
  }
}

// What follows is for data that say themselves that they have come, so that nobody needs a barrier to read them. An
// element whose bits are all ones is empty: a NaN that is never sent, as arithmetic gives another one, and conversions to
// 16 bits 0x7fff. A place is emptied; then one thread sends to it; then any number look whether it has come, and get it
// when it has. No other memory is ordered by that. The emptying has to come before the sending and the looking, and after
// all uses of what was there before, by barriers of the grid; or the only reader empties the place when it has got what
// was there.

// Sends an element.
template <class T>
DEVICE void send(Global<T> to, int64_t i, T value) {
  if constexpr (sizeof(T) == 2)
    asm volatile("st.relaxed.gpu.global.b16 [%0], %1;" ::"l"(to.data + i),
                 "h"(reinterpret_cast<const unsigned short&>(value))
                 : "memory");
  else
    asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(to.data + i), "r"(reinterpret_cast<const unsigned&>(value))
                 : "memory");
}

// Sends N elements, 8 or 16 bytes. i: a multiple of N.
template <int N, class T>
DEVICE void send_vector(Global<T> to, int64_t i, const Vector<T, N>& value) {
  constexpr int bytes = N * static_cast<int>(sizeof(T));
  static_assert(bytes == 8 || bytes == 16);
  const unsigned* words = reinterpret_cast<const unsigned*>(&value);
  if constexpr (bytes == 8)
    asm volatile("st.relaxed.gpu.global.v2.b32 [%0], {%1, %2};" ::"l"(to.data + i), "r"(words[0]), "r"(words[1])
                 : "memory");
  else
    asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to.data + i), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

// Empties N elements, 4 or 16 bytes. i: a multiple of N.
template <int N, class T>
DEVICE void empty(Global<T> to, int64_t i) {
  constexpr int bytes = N * static_cast<int>(sizeof(T));
  static_assert(bytes == 4 || bytes == 16);
  if constexpr (bytes == 4)
    asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(to.data + i), "r"(~0u) : "memory");
  else
    asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %1, %1, %1};" ::"l"(to.data + i), "r"(~0u) : "memory");
}

// Looks for N elements, 4, 8 or 16 bytes. i: a multiple of N. waits: whether the caller looks again until all have come.
template <int N, class T>
DEVICE Vector<T, N> look(Global<T> from, int64_t i, bool waits) {
  constexpr int bytes = N * static_cast<int>(sizeof(T));
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  Vector<T, N> value;
  unsigned* at = reinterpret_cast<unsigned*>(&value);
  if constexpr (bytes == 4)
    asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(at[0]) : "l"(from.data + i) : "memory");
  else if constexpr (bytes == 8)
    asm volatile("ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2];"
                 : "=r"(at[0]), "=r"(at[1])
                 : "l"(from.data + i)
                 : "memory");
  else
    asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(at[0]), "=r"(at[1]), "=r"(at[2]), "=r"(at[3])
                 : "l"(from.data + i)
                 : "memory");
  return value;
}

// Returns whether an element of these is empty.
template <int N, class T>
DEVICE bool any_empty(const Vector<T, N>& value) {
  const unsigned* words = reinterpret_cast<const unsigned*>(&value);
  unsigned found = 0;
#pragma unroll
  for (int w = 0; w < N * static_cast<int>(sizeof(T)) / 4; w++)
    if constexpr (sizeof(T) == 4)
      found = max(found, words[w]);
    else  // the subtraction borrows from a half's top bit where its complement is 0
      found |= (~words[w] - 0x00010001u) & words[w] & 0x80008000u;
  return sizeof(T) == 4 ? found == 0xffffffffu : found != 0;
}

template <class T>
DEVICE T from_float(float value);
template <>
DEVICE float from_float<float>(float value) {
  return value;
}
template <>
DEVICE bf16 from_float<bf16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
DEVICE fp16 from_float<fp16>(float value) {
  return __float2half_rn(value);
}

// a / b, not to the last bit.
DEVICE float quotient(float a, float b) { return __fdividef(a, b); }

DEVICE float to_float(float value) { return value; }
DEVICE float to_float(bf16 value) { return __bfloat162float(value); }
DEVICE float to_float(fp16 value) { return __half2float(value); }
DEVICE float to_float(const Half<bf16>& value) {
  return __uint_as_float(value.shift ? value.word & 0xffff0000u : value.word << 16);
}

// sums += A B on tensor cores, by a whole warp, with A 16 × 16, B 16 × 8 and sums 16 × 8. With g = lane / 4 and
// t = lane % 4, the operands of a lane are
// a: A[g][2t, 2t+1], A[g+8][2t, 2t+1], A[g][2t+8, 2t+9], A[g+8][2t+8, 2t+9];
// b: B[2t, 2t+1][g], B[2t+8, 2t+9][g]; sums: [g][2t, 2t+1], [g+8][2t, 2t+1].
DEVICE void multiply_tiles(float (&sums)[4], const Vector<bf16, 8>& a, const Vector<bf16, 2>& b0,
                           const Vector<bf16, 2>& b1) {
  const auto& A = a.at.words;
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(b0.at.words[0]), "r"(b1.at.words[0]));
}
DEVICE void multiply_tiles(float (&sums)[4], const Vector<fp16, 8>& a, const Vector<fp16, 2>& b0,
                           const Vector<fp16, 2>& b1) {
  const auto& A = a.at.words;
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(b0.at.words[0]), "r"(b1.at.words[0]));
}

}  // namespace tarflow

#endif  // TARFLOW_EMULATION
