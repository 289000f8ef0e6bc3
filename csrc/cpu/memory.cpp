#include "memory.h"

#include <cstdlib>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef _WIN32
#include <malloc.h>
#endif

namespace tarflow {

namespace {

// Allocates memory; bytes is a multiple of alignment.
void* allocate_aligned(size_t alignment, size_t bytes) {
#ifdef _WIN32
  return _aligned_malloc(bytes, alignment);
#else
  return std::aligned_alloc(alignment, bytes);
#endif
}

}  // namespace

void Free::operator()(void* p) const {
#ifdef _WIN32
  _aligned_free(p);
#else
  std::free(p);
#endif
}

Memory allocate(size_t bytes) {
  constexpr size_t huge = size_t{2} << 20;
  const size_t alignment = bytes >= huge ? huge : 64;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  void* p = allocate_aligned(alignment, bytes);
  if (p == nullptr) throw std::bad_alloc();
  prefer_huge_pages(p, bytes);
  return Memory(p);
}

void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t huge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + huge - 1) / huge * huge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / huge * huge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // no more than a hint
#endif
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

int64_t padded_stride(int64_t n) { return round_up(n, 32) + 16; }

}  // namespace tarflow
