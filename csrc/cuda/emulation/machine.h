// The emulated GPU, as device.h sees it. One launch at a time; every CUDA thread is a fiber (fibers.h).
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "../params.h"

namespace tarflow::emulation {

constexpr int MOST_BLOCKS = 8;

struct Copy {
  void* to;
  const void* from;
  int64_t cell;
};

// Where a thread is. epoch: how many sync_blocks it has passed; warp_epoch: how many calls of its whole warp.
struct Thread {
  int block, index;
  uint32_t epoch, warp_epoch;
};

const Thread& current();
int grid_blocks();

// Calls that all threads of a block, or all lanes of a warp, take part in.
void sync_block();
float shuffle_xor(float value, int mask);
struct LaneTiles {
  float a[8], b[4];
  float* sums;
};
void multiply_tiles(const LaneTiles& tiles);

// Memory. A place is what one access touches: cells of two bytes, of a buffer or (buffer −1) of the block's shared memory.
struct Place {
  int buffer;
  int64_t cell;
  int cells;
};
int buffer_index(const char* name);
unsigned char* shared_memory(int byte, int64_t bytes);
// Elements [i, i + n) of so many; bounds and alignment.
Place global_place(int buffer, int64_t count, int64_t i, int n, int size);
Place shared_place(int begin, int count, int64_t i, int n, int size);
void read(const Place& place);
void write(const Place& place);
void read_constant(const Place& place);

void copy(const Place& place, void* to, const void* from);
void commit_copies();
void wait_copies(int pending);

void signal(unsigned* counter);
void await(unsigned* counter, unsigned number);

// The device, and the order in which threads run.
void set_device(int multiprocessors, int64_t shared_bytes);
void set_seed(uint64_t number);
int device_multiprocessors();
int64_t device_shared_bytes();

// Runs body() on every thread of a grid. Throws std::runtime_error with the first fault that is found.
void run_grid(const Params& params, int blocks, int threads, int64_t shared_bytes, const std::function<void()>& body);

}  // namespace tarflow::emulation
