// The device of one launch: its blocks, warps and threads, and where they meet.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "fibers.h"
#include "memory.h"
#include "timing.h"

namespace tarflow::emulation {

struct Warp {
  const char* at = nullptr;  // the call that its lanes meet in
  int detail = 0, arrived = 0;
  const void* given[32];
  void* taken[32];
};

// A bulk copy on its way, for when its gate opens.
struct Bulk {
  unsigned char *to, *from;
  int bytes;
  int64_t opening;  // how often the gate will have been open before
};

// A gate: what it needs to open, what is there of it, and what came before that.
struct GateState {
  int needed;
  bool published = false;
  int arrived = 0;
  int64_t promised = 0, given = 0;  // bytes
  int64_t openings = 0;
  Clock clock, opened;  // of the arrivals, and of those that opened it last
  std::vector<Bulk> coming;
  std::vector<int> waiting;  // fibers
  // Of the model of time: when it opens, its last opening, and the path of the last arrival.
  Ready ready, was_ready;
  Path path, was_path;
};

struct Block {
  int index;
  Clock clock, next_clock;  // the block's clock now, and after its next sync_block
  int arrived = 0;          // threads that have arrived at sync_block
  std::vector<Warp> warps;
  std::unordered_map<int64_t, GateState> gates;  // by their places in shared memory, in bytes
  std::unique_ptr<unsigned char[]> memory;  // the shared memory
  unsigned char* shared;                    // the first aligned byte of memory
  Stamps stamps{nullptr, &std::free};
};

// A copy of 16 bytes on its way into shared memory.
struct Coming {
  View to, from;
  int64_t i, j;
  Use how;  // CONSTANT_READ, or COPY_READ of memory that is written during the launch
  Ready ready;
};

struct Thread {
  int index, fiber;
  Block* block;
  const char* waits = nullptr;  // the call that it waits in, or "its end" where the thread has ended
  int64_t detail = 0;
  std::deque<Coming> copies;  // copies that have not come, the oldest first
  std::deque<int> groups;     // the number of copies in each group; the copies after them are in no group
  Clock seen;                 // what came before the gates that it has passed
  uint32_t fenced = 0;        // the epoch of its last fence_copies
  Time time;                  // of the model of time
};

class Machine {
 public:
  Machine(int blocks, int threads, int64_t shared_bytes, uint64_t seed);
  ~Machine();
  Machine(const Machine&) = delete;
  void run(const std::function<void()>& kernel);

  void sync_block();
  void signal(uint32_t* counter);
  void await(uint32_t* counter, uint32_t number);

  // Sends elements [i, i + n), and lets go on who waits for one of them.
  void send(const View& to, int64_t i, int n, const void* value);
  // Waits, if one of elements [i, i + n) is empty, until some have come; for the model of time, until all have.
  void await_sent(const View& from, int64_t i, int n);

  // Every lane of a warp comes to the same call with the same detail; the last one calls finish(warp) for all.
  void meet(const char* call, int detail, const void* given, void* taken, void (*finish)(Warp&));

  void copy(Coming copy);
  void commit_copies();
  void wait_copies(int pending);

  // These are of pair.cpp.
  void make_gate(const View& gates, int i, int arrivals);
  void publish_gates();
  void promise(const View& gates, int i, int bytes);
  void arrive_at_both(const View& gates, int i);
  void pass_gate(const View& gates, int i, int odd);
  void copy_bulk(const View& to, int64_t i, const View& from, int64_t j, int count, const View& gates, int gate,
                 bool both);
  void fence_copies();
  void sync_pair();
  Thread& thread_of(int block, int index) { return thread_[block * threads + index]; }

  const int blocks, threads;  // blocks of the grid, threads of a block
  const int64_t shared_bytes;
  GlobalStamps global_stamps;

 private:
  struct Counter {
    uint32_t initial;
    std::vector<Clock> signalled;  // what came before the first so many signals, by their number
    // Of the model of time: when the last of so many signals was there, and its path.
    std::vector<std::pair<double, Path>> times;
  };

  Counter& counter(uint32_t* address);
  GateState& gate_of(Block& block, const View& gates, int i, const char* call);
  Block& other(const char* call);  // of the running thread's pair
  void arrive_at(GateState& gate, int64_t promised, double latency);
  void open_if_all_there(GateState& gate);
  void check_gates() const;  // at the end of a launch
  void pause(const char* waits, int64_t detail = 0);
  void yield();
  std::string stuck() const;

  Fibers fibers_;
  std::vector<Block> block_;
  std::vector<Thread> thread_;
  std::unordered_map<uint32_t*, Counter> counters_;
  std::vector<int> in_pair_;  // the threads of each pair that have arrived at sync_pair
  std::vector<int> awaiting_;  // the fibers that wait for a counter
  std::unordered_map<const void*, std::vector<int>> looking_;  // and those that wait for what is to be sent to a place
};

void join(Clock& clock, const Clock& other);  // to the later of both for each block

// Sets the device for later launches. At first it has 3 multiprocessors, on each of which one block runs, and 227 KiB
// for a block. Throws std::runtime_error if there can be no such device.
void set_device(int multiprocessors, int64_t shared_bytes);
// Sets the seed. Each launch after this has another schedule, and the same again after the same seed.
void set_seed(uint64_t seed);

extern Machine* machine;  // the machine of the launch, of which there is one at a time
extern Thread* here;  // the thread that runs

}  // namespace tarflow::emulation
