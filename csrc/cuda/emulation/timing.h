// A model of time on top of the emulation: how long a launch would take on a GPU, and along which path.
//
// It is a model, and what it says is no measurement. Each thread has a clock in cycles of the multiprocessor:
// - An instruction takes a slot of its warp's scheduler, and CYCLES before the next one of its thread.
// - A load is issued where the source has it. Its value is needed at its first use, which the types Vector and Loaded
//   of device.h see; until then the thread goes on. With Gpu::sinks a load of global memory is issued at its first use
//   or the next sync_warp or sync_block, whichever comes first: a compiler may move it there, and no further.
// - A load takes the latency of the level that has the data, after its bytes have passed each level above: an L2 cache
//   that forgets the least recently used, the memory behind it, the port of the multiprocessor, shared memory. Each
//   level has so many bytes a cycle; whoever asks for more waits (Server).
// - Lanes that ask for the same 32 bytes at about the same time ask once.
// - What is sent can be seen when it is in the L2 cache: a look that is there before finds nothing, and takes as long.
// - Where threads meet, all go on from the clock of the last one. A thread's path is by what the time was spent along
//   the chain of the last ones, from the launch's beginning to now: of the thread that ends last, the critical path.
// There is no model of bank conflicts, of registers, of instruction fetches, or of arithmetic but for conversions and
// what the kernel declares by `instructions`.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "../params.h"

namespace tarflow {

namespace emulation {

struct Block;
struct Thread;

// The parameters of a GPU, in cycles and bytes a cycle. Where a source is a paper, its table's figure is for the H100.
struct Gpu {
  double clock = 1.83e9;  // Hz. NVIDIA, H100 whitepaper: 989.4 TFLOP/s dense bf16 = 132 · 4096 FLOP a cycle · clock
  double dram = 4.3e12;  // bytes/s: 90 % of the data sheets' 4.8e12 of an H200; 3.0e12 of an H100's 3.35e12 (assumed)
  double l2 = 5.6e12;  // bytes/s. Chips and Cheese, "Nvidia's H100: Funny L2, and Tons of Bandwidth", 2023: 5.5 … 7e12
  double l2_bytes = 50e6 * 0.8;  // the whitepaper's 50 MB, less what hashing into two partitions loses (assumed)
  double port = 64;  // bytes a cycle from L2 to a multiprocessor (CUDA profiler's l1tex peak, since Volta)
  double shared = 128;  // bytes a cycle: 32 banks of 4 bytes (CUDA programming guide)
  double l1_latency = 41, shared_latency = 29, l2_latency = 263,
         dram_latency = 479;  // Luo et al., arXiv 2402.13499, H100
  double tensor_cycles = 6.5;  // an m16n8k16 on one of four tensor cores: 4 at the peak of wgmma, of which mma.sync
  // attains 62 % (same paper)
  double tensor_latency = 33;  // the same paper's mma.sync m16n8k16, fp32 sums
  double shuffle_latency = 24;  // as of shared memory, which it shares the path of, less the address (assumed)
  double cycles = 2;  // an instruction of one warp: dependent ones take 4 (Luo et al.), about two overlap (assumed)
  double sync_latency = 30;  // bar.sync once the last warp has come (assumed: one trip through shared memory)
  double pair_latency = 180;  // from one multiprocessor to another's shared memory (Luo et al., H100)
  double fence = 1000;  // MEMBAR.GPU. The least certain figure: with it a barrier without skew takes about
  // 0.8 µs, between its trips to L2 (0.5 µs) and 1.1 µs of the review
  bool sinks = false;  // whether loads may sink to their first use
};

// What time was spent on.
enum Cause : uint8_t { ISSUE, ON_SHARED, ON_L2, ON_DRAM, ON_TENSOR, ON_SYNC, ON_BARRIER, ON_SENT, CAUSES };

struct Sent;

// When a value is there, and what it comes from.
struct Ready {
  double at = 0;
  Cause cause = ISSUE;
  int sunk = -1;  // the number of its load if that was not yet issued
  const Sent* sent = nullptr;  // what it waited for, where another block sent it
};

// A resource that passes so much a cycle, in bins of time, so that threads need not ask in the order of their clocks.
class Server {
 public:
  explicit Server(double rate = 1, int width = 32) : rate_(rate), width_(width) {}
  double take(double now, double amount);  // returns when the last of it has passed

 private:
  size_t next_free(size_t bin);

  double rate_;
  int width_;
  std::vector<float> left_;
  std::vector<uint32_t> next_;
};

constexpr int CELLS = (PHASES + 1) * SECTIONS;

struct Path {
  float spent[CELLS] = {}, causes[CAUSES] = {};
};

// When something was sent, by its sender's clock and path, and when it can be seen in the L2 cache.
struct Sent {
  double now = 0, seen = 0;
  Path path;
};

// A thread's clock.
struct Time {
  static constexpr int RECENT = 32;
  struct Sunk {
    const unsigned char* at;
    int bytes, number;
    Ready ready;
    bool issued;
  };

  double now = 0;
  int cell = OTHER;
  Ready ready;  // of the value of the last use
  double flights[RECENT] = {};  // when its last loads come
  int flight = 0, sunk = 0;
  bool early = false;  // whether the last look found nothing yet
  const unsigned char* in_vain[RECENT] = {};  // what the last looks that found nothing were for
  int vain = 0;
  Sunk waiting[RECENT] = {};
  const void* sums[RECENT] = {};  // sums on tensor cores, and when they are there
  double sums_at[RECENT] = {};
  int sums_count = 0;
  Path path;
};

#ifdef TARFLOW_TIMED

constexpr bool TIMED = true;
void instructions(double count);
void await(const Ready& ready);
Ready sink(const unsigned char* at, int bytes);  // a load whose issue waits
void issue_sunk();  // issues all that wait
// Returns when a bulk copy comes to the running thread's block and to another one, or the same.
Ready fetch_bulk(const unsigned char* from, int bytes, int other);
void pass(const Ready& ready,
          const Path& path);  // through a gate, which the last arrival with this path opened, or a copy
void await_sums(const void* of);  // nullptr: all
void multiplied(Thread& thread, const void* of, double at);
double tensor(const Block& block, int warp, double now);
void together(Thread* first, int count, double latency, Cause cause);
void enter(int phase, int section);
double signal_time();  // returns when a signal of the running thread is at the counter
void await_signal(double at, const Path& path);  // of the last signal that is waited for
void begin_timing(int blocks, int threads);
void end_timing(const std::vector<Thread>& threads);

#else

constexpr bool TIMED = false;
inline void instructions(double) {}
inline void await_sums(const void*) {}
inline void issue_sunk() {}
inline void together(Thread*, int, double, Cause) {}
inline void enter(int, int) {}
inline void begin_timing(int, int) {}
inline void end_timing(const std::vector<Thread>&) {}

#endif

extern Gpu gpu;

}  // namespace emulation
}  // namespace tarflow
