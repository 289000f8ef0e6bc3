// The stream of weights that a block works through, some slots ahead of the work.
//
// Weights do not depend on activations, so each block fetches the tiles that it is to multiply next, of this phase and
// of those after it, while it waits for other blocks. A slot holds what one product takes of a tile: 16 outputs and at
// most slot_k inputs.
#pragma once

#include "layers.cuh"

namespace tarflow {

template <class T, int WARPS>
class Ring {
 public:
  // jobs: (most_jobs, 2), what this block fetches for each token.
  DEVICE Ring(const Params& p, Shared<T> memory, Shared<int> jobs)
      : p_(p), memory_(memory), jobs_(jobs), held_(load(jobs, 1) == 0 ? p.slots : 0) {}

  // Fetches into the slots that are free. Returns their number, that of the groups of copies.
  DEVICE int fill() { return fill_some(p_.slots); }

  // Fetches into so many slots, if they are free. Where the L2 cache is the bound, all that are free would come in the way
  // of what is sent next.
  DEVICE int fill_some(int count) {
    int i = 0;
    for (; i < count && ahead_ + held_ < p_.slots; i++) fetch();
    return i;
  }

  // Returns the next slot's first element when this thread's part of it has come. After sync_block all of it can be read.
  DEVICE int take() {
    if (ahead_ == 0) fill();
    ahead_--;
    held_++;
    wait_copies(ahead_ < 7 ? ahead_ : 7);
    const int slot = take_;
    take_ = following(take_);
    return slot;
  }

  // Frees the slots that were taken, but for the last `kept`. All warps must have read them.
  DEVICE void release(int kept = 0) { held_ = kept; }

  // Whether nothing more has been fetched than was taken.
  DEVICE bool empty() const { return ahead_ == 0; }

  DEVICE void drain() const { wait_copies(0); }

  DEVICE Shared<T> slots() const { return memory_; }

  // Returns the first element of the slot that comes so many after this one, fewer than there are.
  DEVICE int following(int slot, int count = 1) const {
    const int size = p_.slot_k * TILE, all = p_.slots * size, next = slot + count * size;
    return next < all ? next : next - all;
  }

 private:
  DEVICE void fetch() {
    constexpr int vector = 16 / sizeof(T), size = TILE * TILE;
    const Global<const T> weights(p_.weights);
    const int64_t from = static_cast<int64_t>(load(jobs_, 2 * job_)) * size;
    const int count = load(jobs_, 2 * job_ + 1) * size;
#pragma unroll 2
    for (int i = thread() * vector; i < count; i += WARPS * 32 * vector)
      copy_async(memory_, fill_ + i, weights, from + i);
    commit_copies();
    fill_ = following(fill_);
    ahead_++;
    job_++;
    if (job_ == p_.most_jobs || load(jobs_, 2 * job_ + 1) == 0) job_ = 0;
  }

  const Params& p_;
  Shared<T> memory_;
  Shared<int> jobs_;
  int job_ = 0;              // the job that is fetched next
  int fill_ = 0, take_ = 0;  // the first elements of the slots that are next
  // The numbers of slots that were fetched and not taken, and taken and not freed. A block that has no tile of any layer
  // never frees a slot, and has none.
  int ahead_ = 0, held_;
};

}  // namespace tarflow
