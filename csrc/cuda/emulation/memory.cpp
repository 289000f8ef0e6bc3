#include "memory.h"

#include <cstdlib>
#include <stdexcept>

namespace tarflow::emulation {

namespace {

constexpr int THREADS = 1024;  // of a block, at most
constexpr uint16_t MANY = 0xffff;

int id(const Thread& thread) { return thread.block * THREADS + thread.index; }
int warp(const Thread& thread) { return id(thread) / 32; }

std::string text(int id) {
  return "block " + std::to_string(id / THREADS) + " thread " + std::to_string(id % THREADS);
}

// Whether a thread sees what another has done at that time.
bool seen(const Thread& thread, const Clock& clock, int other, uint32_t epoch, uint32_t warp_epoch) {
  const int block = other / THREADS;
  if (block != thread.block) return epoch < clock[block];
  return other == id(thread) || epoch < thread.epoch || (other / 32 == warp(thread) && warp_epoch < thread.warp_epoch);
}

}  // namespace

void fault(const Thread& thread, const std::string& what) { throw std::runtime_error(what + " by " + text(id(thread))); }

void Memory::Free::operator()(Cell* cells) const { std::free(cells); }

// Pages of zeros, which cost nothing until they are touched.
Memory::Memory(int64_t cells, bool empty)
    : cells_(static_cast<Cell*>(std::calloc(cells + 1, sizeof(Cell)))), empty_(empty) {
  if (!cells_) throw std::bad_alloc();
}

void Memory::read(const Thread& thread, const Clock& clock, int64_t at) {
  Cell& cell = cells_[at];
  if (cell.coming) fault(thread, "read before its copy was waited for");
  if (!cell.writer && empty_) fault(thread, "read before anybody wrote it");
  if (cell.writer && !seen(thread, clock, cell.writer - 1, cell.write_epoch, cell.write_warp_epoch))
    fault(thread, "race: written by " + text(cell.writer - 1) + " and read");
  uint32_t& epoch = cell.read_epochs[thread.block];
  const bool first = epoch != thread.epoch + 1 || !cell.reader || (cell.read_warp - 1) / (THREADS / 32) != thread.block;
  epoch = thread.epoch + 1;
  const uint16_t reader = static_cast<uint16_t>(id(thread) + 1), of_warp = static_cast<uint16_t>(warp(thread) + 1);
  if (first || (cell.read_warp == of_warp && cell.read_warp_epoch < thread.warp_epoch)) {
    cell.reader = reader;
    cell.read_warp = of_warp;
    cell.read_warp_epoch = thread.warp_epoch;
    return;
  }
  if (cell.reader != reader) cell.reader = MANY;
  if (cell.read_warp != of_warp) cell.read_warp = MANY;
}

void Memory::write(const Thread& thread, const Clock& clock, int64_t at, bool coming) {
  Cell& cell = cells_[at];
  if (cell.coming) fault(thread, "written while a copy to it was under way");
  if (cell.writer && !seen(thread, clock, cell.writer - 1, cell.write_epoch, cell.write_warp_epoch))
    fault(thread, "race: written by " + text(cell.writer - 1) + " and written");
  for (int block = 0; block < MOST_BLOCKS; block++) {
    if (!cell.read_epochs[block]) continue;
    const uint32_t epoch = cell.read_epochs[block] - 1;
    bool before = block == thread.block ? epoch < thread.epoch : epoch < clock[block];
    if (!before && block == thread.block)  // by this thread alone, or by its warp before a common call
      before = cell.reader == id(thread) + 1 ||
               (cell.read_warp == warp(thread) + 1 && cell.read_warp_epoch < thread.warp_epoch);
    if (!before) fault(thread, "race: read in block " + std::to_string(block) + " and written");
  }
  cell.writer = static_cast<uint16_t>(id(thread) + 1);
  cell.write_epoch = thread.epoch;
  cell.write_warp_epoch = thread.warp_epoch;
  cell.coming = coming;
}

void Memory::arrive(const Thread& thread, int64_t at) {
  cells_[at].coming = false;
  cells_[at].write_epoch = thread.epoch;
  cells_[at].write_warp_epoch = thread.warp_epoch;
}

}  // namespace tarflow::emulation
