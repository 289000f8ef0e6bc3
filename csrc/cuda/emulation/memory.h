// A race detector that does not depend on the schedule: it knows who used which memory, and whether two uses can meet.
//
// Each block counts time in epochs, one more after each sync_block. A block's clock says of every block the first epoch
// that it has not seen the end of. What a thread did comes before what another does if the other's block has seen the
// end of that epoch, by a sync_block of its own or by signal and await. Shuffles order no memory, as in CUDA, and nor
// does what is sent: that a place was emptied has to come before its sending and before each look at it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <unordered_map>
#include <vector>

namespace tarflow::emulation {

struct Block;

using Clock = std::vector<uint32_t>;  // an epoch of each block

// A thread in an epoch of its block.
struct Stamp {
  enum : uint8_t {
    MANY = 1,  // others of the reader's block have read it, too
    COMING = 2,  // the writer is a copy that has not come
    CONSTANT = 4,  // nobody may write it
    EMPTY = 8,  // the writer emptied it, or
    SENT = 16,  // sent what is there
    GOT = 32,  // the reader has got what was sent
    COPIED = 64,  // the writer is a copy
  };
  uint32_t epoch;  // 0 where there is no thread yet
  uint16_t thread;
  uint8_t block, flags;
};

constexpr int GRANULE = 2;  // bytes that have stamps of their own, the size of the smallest types

// The stamps of memory, zeroed: for each granule the last writer, and the last reader of each block that can reach it; of
// global memory also who emptied it last.
using Stamps = std::unique_ptr<Stamp[], decltype(&std::free)>;
inline Stamps make_stamps(size_t granules, int readers) {
  Stamps stamps{static_cast<Stamp*>(std::calloc(granules * (1 + readers), sizeof(Stamp))), &std::free};
  if (!stamps) throw std::bad_alloc();
  return stamps;
}

// Stamps of global memory, made when it is first used.
class GlobalStamps {
 public:
  explicit GlobalStamps(int blocks) : blocks_(blocks), recent_(RECENT) {}

  Stamp* at(const void* address) {
    const auto byte = reinterpret_cast<uintptr_t>(address), page = byte / PAGE;
    Recent& recent = recent_[page % RECENT];
    if (recent.page != page || !recent.stamps) recent = {page, find(page)};
    return recent.stamps + byte % PAGE / GRANULE * (2 + blocks_);
  }

 private:
  static constexpr size_t PAGE = 1024, RECENT = 1024;
  struct Recent {
    uintptr_t page = 0;
    Stamp* stamps = nullptr;
  };

  Stamp* find(uintptr_t page) {
    Stamps& stamps = pages_.try_emplace(page, nullptr, &std::free).first->second;
    if (!stamps) stamps = make_stamps(PAGE / GRANULE, blocks_ + 1);
    return stamps.get();
  }

  const int blocks_;
  std::unordered_map<uintptr_t, Stamps> pages_;
  std::vector<Recent> recent_;
};

// Elements as a kernel sees them.
struct View {
  const char* name;
  unsigned char* data;
  int64_t count;
  int size;  // the bytes of an element
  bool shared;
};

enum Use { READ, WRITE, CONSTANT_READ, COPY, HINT, MATRIX_READ, COPY_READ, SEND, EMPTY, LOOK, BULK };

// Returns where elements [i, i + n) are, for the running thread. Throws std::runtime_error if they are outside or not
// aligned to their whole size, or if nothing orders this use and another one.
unsigned char* use(const View& view, int64_t i, int n, Use how);

// Begins a bulk copy of the running thread to so many bytes of a block's shared memory. Throws std::runtime_error if nothing
// orders it and another use, or if what a thread wrote there was not fenced.
void begin_bulk(Block& block, const View& view, unsigned char* to, int bytes);

}  // namespace tarflow::emulation
