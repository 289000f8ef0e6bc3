// The barrier of the whole grid, whose blocks are all on the device at once.
#pragma once

#include "device.cuh"

namespace tarflow {

class Grid {
 public:
  DEVICE explicit Grid(const Params& p) : counter_(p.barrier) {}

  // After it, every block sees all that any block wrote before. meanwhile() does what needs no other block. A signal waits
  // for all stores of its block, so another warp than the one that signals looks for those of the others.
  template <class Meanwhile>
  DEVICE void sync(Meanwhile meanwhile) {
    sync_block();
    if (thread() == 0) signal(counter_);
    section(FETCH);
    meanwhile();
    section(BARRIER);
    passed_ += blocks();
    if (thread() == 32) await(counter_, passed_);
    sync_block();
  }

 private:
  Global<unsigned> counter_;
  unsigned passed_ = 0;
};

}  // namespace tarflow
