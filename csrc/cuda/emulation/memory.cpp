#include "memory.h"

#ifndef TARFLOW_TIMED  // else it is that of timing.cpp

#include <stdexcept>
#include <string>

#include "machine.h"

namespace tarflow::emulation {
namespace {

const char* const USES[] = {"reads",       "writes",   "reads as constant", "copies to", "prefetches",       "reads",
                            "copies from", "sends to", "empties",           "looks at",  "copies in bulk to"};

std::string element(const View& view, int64_t i) {
  std::string text = std::string(view.name) + "[" + std::to_string(i) + "] of " + std::to_string(view.count);
  if (view.shared) text += " at byte " + std::to_string(view.data - here->block->shared);
  return text;
}

std::string who(int block, int thread) {
  return "block " + std::to_string(block) + " thread " + std::to_string(thread);
}

[[noreturn]] void fail(const char* what, const View& view, int64_t i, Use how) {
  throw std::runtime_error(std::string(what) + " " + element(view, i) + ": " + who(here->block->index, here->index) +
                           " " + USES[how]);
}

// Describes the granule that is so many bytes after element i.
[[noreturn]] void race(const View& view, int64_t i, int byte, Use how, const Stamp& other, const char* did) {
  throw std::runtime_error("race on " + element(view, i + byte / view.size) + ": " + who(other.block, other.thread) +
                           (other.flags & Stamp::MANY ? " and others " : " ") + did + ", " +
                           who(here->block->index, here->index) + " " + USES[how]);
}

// Returns whether what that thread did comes before what the running one does.
bool ordered(const Stamp& stamp) {
  if (stamp.epoch < here->block->clock[stamp.block]) return true;
  return stamp.block == here->block->index && stamp.thread == here->index && !(stamp.flags & Stamp::MANY);
}

// Of a copy that a thread asks for behind a gate, what came before the gate counts as well.
bool before_copy(const Stamp& stamp) {
  return ordered(stamp) || (!here->seen.empty() && stamp.epoch < here->seen[stamp.block]);
}

const char* written(const Stamp& stamp) {
  return stamp.flags & Stamp::COMING  ? "waits for a copy to it"
         : stamp.flags & Stamp::SENT  ? "sent to it"
         : stamp.flags & Stamp::EMPTY ? "emptied it"
                                      : "wrote";
}

}  // namespace

unsigned char* use(const View& view, int64_t i, int n, Use how) {
  if (i < 0 || i > view.count - n) fail("out of bounds:", view, i, how);
  const int bytes = n * view.size;
  unsigned char* at = view.data + i * view.size;
  if (i % n || reinterpret_cast<uintptr_t>(at) % bytes) fail("not aligned:", view, i, how);
  if (how == HINT) return at;

  Block& block = *here->block;
  const int readers = view.shared ? 1 : machine->blocks, stride = 1 + readers + !view.shared;
  Stamp* stamps =
      view.shared ? block.stamps.get() + (at - block.shared) / GRANULE * stride : machine->global_stamps.at(at);
  const Stamp now{block.clock[block.index], static_cast<uint16_t>(here->index), static_cast<uint8_t>(block.index), 0};
  for (int byte = 0; byte < bytes; byte += GRANULE, stamps += stride) {
    Stamp& writer = stamps[0];
    if (how == CONSTANT_READ) {
      if (writer.epoch) race(view, i, byte, how, writer, "wrote");
      writer.flags = Stamp::CONSTANT;
      continue;
    }
    Stamp& reader = stamps[view.shared ? 1 : 1 + block.index];
    const bool again = reader.epoch == now.epoch;
    if (how == SEND) {
      if (!(writer.flags & Stamp::EMPTY)) fail("not empty:", view, i + byte / view.size, how);
      if (!ordered(writer)) race(view, i, byte, how, writer, "emptied");
      writer = now;
      writer.flags = Stamp::SENT;
      continue;
    }
    if (how == LOOK) {
      const Stamp& emptied = stamps[1 + readers];
      if (!emptied.epoch) fail("never emptied:", view, i + byte / view.size, how);
      if (!ordered(emptied)) race(view, i, byte, how, emptied, "emptied");
      const uint8_t got = writer.flags & Stamp::SENT ? Stamp::GOT : 0;
      const uint8_t others = again && reader.thread != now.thread ? Stamp::MANY : again ? reader.flags : 0;
      reader = now;
      reader.flags = others | got;
      continue;
    }
    // Who is the only one to have got what was sent may empty the place.
    const bool got = how == EMPTY && writer.flags & Stamp::SENT && reader.flags & Stamp::GOT &&
                     !(reader.flags & Stamp::MANY) && reader.thread == now.thread;
    if ((!ordered(writer) && !got) || writer.flags & Stamp::COMING) race(view, i, byte, how, writer, written(writer));
    if (how == READ || how == MATRIX_READ || how == COPY_READ) {
      if (view.shared && !writer.epoch) fail("never written:", view, i + byte / view.size, how);
      const uint8_t others = again && reader.thread != now.thread ? Stamp::MANY : again ? reader.flags : 0;
      reader = now;
      reader.flags = others;
    } else {
      if (writer.flags & Stamp::CONSTANT) fail("constant for the launch:", view, i + byte / view.size, how);
      for (int r = 1; r <= readers; r++)
        if (!ordered(stamps[r])) race(view, i, byte, how, stamps[r], "read");
      writer = now;
      if (how == COPY) writer.flags = Stamp::COMING;
      if (how != EMPTY) continue;
      writer.flags = Stamp::EMPTY;
      stamps[1 + readers] = now;
      for (int r = 1; r <= readers; r++) stamps[r] = {};
    }
  }
  return at;
}

void begin_bulk(Block& block, const View& view, unsigned char* to, int bytes) {
  const int64_t place = to - block.shared, first = place - (view.data - here->block->shared);
  Stamp* stamps = block.stamps.get() + place / GRANULE * 2;
  for (int byte = 0; byte < bytes; byte += GRANULE, stamps += 2) {
    const int64_t i = (first + byte) / view.size;
    for (const Stamp* stamp : {&stamps[0], &stamps[1]})
      if (!before_copy(*stamp) || stamp->flags & Stamp::COMING)
        race(view, i, 0, BULK, *stamp, stamp == stamps ? written(*stamp) : "read");
    const Stamp& writer = stamps[0];
    if (writer.epoch && !(writer.flags & Stamp::COPIED) &&
        writer.epoch > machine->thread_of(writer.block, writer.thread).fenced)
      race(view, i, 0, BULK, writer, "wrote without a fence");
    stamps[0] = {here->block->clock[here->block->index], static_cast<uint16_t>(here->index),
                 static_cast<uint8_t>(here->block->index), Stamp::COMING | Stamp::COPIED};
  }
}

}  // namespace tarflow::emulation

#endif  // TARFLOW_TIMED
