// The stream of weights that a block works through, some slots ahead of the work.
//
// Weights do not depend on activations, so each block fetches the tiles that it is to multiply next, of this phase and
// of those after it, while it waits for other blocks. A slot holds what one product takes of a tile: 16 outputs and at
// most slot_k inputs.
//
// With gates one thread asks for a whole slot. Where the blocks of a pair have the same tiles, for a group of rows each,
// each of them fetches one half, for both: the weights come out of the L2 cache once. A slot is filled again when both have
// freed it. Both fetch the same in the same order, and one that waits for the other is ahead of it, so that neither waits
// for ever.
#pragma once

#include "layers.cuh"
#include "pair.cuh"

namespace tarflow {

template <class T, int WARPS, bool GATED>
class Ring {
 public:
  // Elements that a slot takes besides: its gates, of what has come to it and of the blocks that have freed it.
  static constexpr int TAIL = GATED ? 16 / sizeof(T) : 0;

  // jobs: (most_jobs, 2), what this block fetches for each token. gates: the same memory.
  DEVICE Ring(const Params& p, Shared<T> memory, Shared<int> jobs, Shared<Gate> gates)
      : p_(p), memory_(memory), jobs_(jobs), gates_(gates), held_(load(jobs, 1) == 0 ? NEVER : 0) {}

  // Begins, before all else.
  DEVICE void open() {
    if constexpr (GATED) {
      if (thread() == 0) {
        for (int i = 0; i < p_.slots; i++) {
          make_gate(gates_, gate_of(i * stride()), 1);
          make_gate(gates_, gate_of(i * stride()) + 1, 2);
        }
        publish_gates();
      }
      sync();
    }
    fill();
  }

  // Fetches into the slots that are free. Returns the number of groups of copies.
  DEVICE int fill() { return fill_some(p_.slots); }

  // Fetches into so many slots, if they are free. Where the L2 cache is the bound, all that are free would come in the way
  // of what is sent next.
  DEVICE int fill_some(int count) {
    int i = 0;
    for (; i < count && ahead_ + held_ < p_.slots; i++) fetch();
    return GATED ? 0 : i;
  }

  // Returns the next slot's first element when this thread's part of it has come. After sync_block all of it can be read.
  DEVICE int take() {
    if (ahead_ == 0) fill();
    ahead_--;
    held_++;
    if constexpr (GATED)
      pass_gate(gates_, gate_of(take_), laps_ & 1);
    else
      wait_copies(ahead_ < 7 ? ahead_ : 7);
    const int slot = take_;
    advance(take_, 1);
    return slot;
  }

  // Frees the slots that were taken, but for the last `kept`. All warps must have read them.
  DEVICE void release(int kept = 0) {
    if (held_ == NEVER) return;
    if constexpr (GATED)
      if (p_.pairs && thread() == 0)
        for (; held_ > kept; held_--) {
          const int slot = take_ - held_ * stride();
          arrive_at_both(gates_, gate_of(slot < 0 ? slot + p_.slots * stride() : slot) + 1);
        }
    held_ = kept;
  }

  // Whether nothing more has been fetched than was taken.
  DEVICE bool empty() const { return ahead_ == 0; }

  // Ends, when nothing is to be taken any more: no copy may come to a block that has ended.
  DEVICE void drain() {
    if constexpr (GATED) {
      sync_block();
      release();
      fill();  // as the other of the pair does, whose halves they are
      for (; ahead_ > 0; ahead_--) {
        pass_gate(gates_, gate_of(take_), laps_ & 1);
        advance(take_, 1);
      }
      sync();
    } else {
      wait_copies(0);
    }
  }

  DEVICE Shared<T> slots() const { return memory_; }

  // Returns the first element of the slot that comes so many after this one, fewer than there are.
  DEVICE int following(int slot, int count = 1) const {
    const int size = stride(), all = p_.slots * size, next = slot + count * size;
    return next < all ? next : next - all;
  }

 private:
  static constexpr int NEVER = 1 << 16;

  DEVICE int stride() const { return p_.slot_k * TILE + TAIL; }
  // Returns the number of a slot's first gate.
  DEVICE int gate_of(int slot) const {
    return (slot + p_.slot_k * TILE) * static_cast<int>(sizeof(T)) / static_cast<int>(sizeof(Gate));
  }

  DEVICE void sync() const {
    if (p_.pairs)
      sync_pair();
    else
      sync_block();
  }

  // Goes on to the next slot. lap: the bit of laps_.
  DEVICE void advance(int& slot, int lap) {
    slot = following(slot);
    if constexpr (GATED)
      if (slot == 0) laps_ ^= lap;
  }

  DEVICE void fetch() {
    constexpr int vector = 16 / sizeof(T), of_tile = TILE * TILE;
    const Global<const T> weights(p_.weights);
    const int64_t from = static_cast<int64_t>(load(jobs_, 2 * job_)) * of_tile;
    const int tiles = load(jobs_, 2 * job_ + 1);
    if constexpr (GATED) {
      if (thread() == 0) {
        const int gate = gate_of(fill_);
        if (p_.pairs) pass_gate(gates_, gate + 1, ~laps_ >> 1 & 1);
        const int rank = block() & 1, half = tiles / 2;
        const int first = p_.pairs && rank ? half : 0, last = p_.pairs && !rank ? half : tiles;
        promise(gates_, gate, tiles * of_tile * static_cast<int>(sizeof(T)));
        if (first < last)
          copy_bulk(memory_, fill_ + first * of_tile, weights, from + first * of_tile, (last - first) * of_tile, gates_,
                    gate, p_.pairs);
      }
    } else {
#pragma unroll 2
      for (int i = thread() * vector; i < tiles * of_tile; i += WARPS * 32 * vector)
        copy_async(memory_, fill_ + i, weights, from + i);
      commit_copies();
    }
    advance(fill_, 2);
    ahead_++;
    job_++;
    if (job_ == p_.most_jobs || load(jobs_, 2 * job_ + 1) == 0) job_ = 0;
  }

  const Params& p_;
  Shared<T> memory_;
  Shared<int> jobs_;
  Shared<Gate> gates_;
  int job_ = 0;  // the job that is fetched next
  int fill_ = 0, take_ = 0;  // the first elements of the slots that are next
  int laps_ = 0;  // whether all were taken an odd number of times, and filled
  // The numbers of slots that were fetched and not taken, and taken and not freed, or NEVER in a block that has no tile of
  // any layer.
  int ahead_ = 0, held_;
};

}  // namespace tarflow
