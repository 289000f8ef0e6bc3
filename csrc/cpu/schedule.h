// How a pass is divided among threads, groups of rows and pieces of weights, so that it suits the machine's caches. No
// choice changes a bit of the results.
#pragma once

#include <cstdint>
#include <functional>

#include "kernels.h"
#include "machine.h"

namespace tarflow {

// What is to be done. rows: of all teams and both branches; a sequential pass takes them through `steps` tokens.
struct Demand {
  const Machine& machine;
  int64_t lanes, tile_rows;  // of the instruction set
  double multiplies;  // in a cycle
  int64_t heads, layers, hidden;
  double weight_bytes, element_bytes;
  double row_bytes;  // keys and values that a row reads in a step, on average; 0 where rows share them
  int64_t branches, steps, threads;
  std::function<int64_t(int64_t)> largest_part;  // rows of one branch that the busiest of n teams gets
};

struct Schedule {
  int64_t teams, size;  // threads that work are teams · size
  int64_t group_rows;  // of both branches, that a team takes through all tokens at a time; whole tiles, or all it has
  // What the model of the machine expects, in seconds.
  double products, attention, waiting;
  // Threads share rows only where waiting costs less than half of what they save: they are interrupted, too.
  double cost() const { return products + attention + 2 * waiting; }
};

// Returns the bytes of a panel's weights that stay in the L1 cache beside a tile's rows of as many k.
int64_t near_bytes(const Machine& machine, int64_t lanes, int64_t tile_rows);

// Returns the schedule that the model expects to be the fastest; of those that it cannot tell apart, that with the
// fewest threads, the most teams and the smallest groups.
Schedule choose_schedule(const Demand& demand);

}  // namespace tarflow
