// Who touched which memory when: a race detector by happened-before, whatever order the threads have run in.
//
// Time is counted in epochs: of a block, the number of its sync_blocks; of a warp, the calls that all its lanes took part
// in. What a thread did is seen by the threads of its block from their next epoch on, by the lanes of its warp after their
// next common call, and by another block as far as its clock reaches: what that has learnt by signal and await.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "machine.h"

namespace tarflow::emulation {

using Clock = std::array<uint32_t, MOST_BLOCKS>;  // of each block, the epochs below this are seen

// What is known of two bytes.
struct Cell {
  uint32_t write_epoch, write_warp_epoch;
  uint32_t read_warp_epoch;
  uint16_t writer, reader;  // 1 + thread of the grid, 0 for nobody; a reader may be MANY
  uint16_t read_warp;       // 1 + warp of the grid; may be MANY
  bool coming;              // written by a copy that was not waited for
  uint32_t read_epochs[MOST_BLOCKS];  // 1 + the last epoch in which each block read it
};

class Memory {
 public:
  // Some memory of which nothing is known; empty: reading it before it is written is a fault.
  Memory(int64_t cells, bool empty);

  void read(const Thread& thread, const Clock& clock, int64_t cell);
  void write(const Thread& thread, const Clock& clock, int64_t cell, bool coming = false);
  void arrive(const Thread& thread, int64_t cell);  // of what is coming

 private:
  struct Free {
    void operator()(Cell* cells) const;
  };
  std::unique_ptr<Cell[], Free> cells_;
  bool empty_;
};

// Throws std::runtime_error: what was found, and the thread that did it.
[[noreturn]] void fault(const Thread& thread, const std::string& what);

}  // namespace tarflow::emulation
