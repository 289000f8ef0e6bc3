// Aligned memory, and how rows of activations are spaced in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace tarflow {

struct Free {
  void operator()(void* p) const;
};
using Memory = std::unique_ptr<void, Free>;

// Returns 64-byte aligned memory, not cleared, in huge pages where there are any and the size is worth it.
Memory allocate(size_t bytes);

// Asks the system to back memory that has not been touched yet with huge pages.
void prefer_huge_pages(void* memory, size_t bytes);

int64_t round_up(int64_t n, int64_t multiple);

// Returns a stride for rows of n elements: a whole number of vectors of every width, and never a power of two, since
// rows must not share the sets of the L1 cache.
int64_t padded_stride(int64_t n);

// An arena hands out parts of a piece of memory, each 64-byte aligned; without one, it counts how long it has to be.
class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  template <class T = float>
  T* take(int64_t count, size_t element = sizeof(T)) {
    char* at = base_ ? base_ + used_ : nullptr;
    used_ += (count * element + 63) / 64 * 64;
    return reinterpret_cast<T*>(at);
  }

  size_t used() const { return used_; }
  bool filling() const { return base_ != nullptr; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace tarflow
