// The gates and the bulk copies of pair.h. What a bulk copy brings comes when somebody has passed its gate, and not
// before.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "machine.h"

namespace tarflow::emulation {
namespace {

[[noreturn]] void fail(const char* call, const std::string& why) {
  throw std::runtime_error(std::string(call) + ": " + why + ": block " + std::to_string(here->block->index) +
                           " thread " + std::to_string(here->index));
}

int64_t place_of(const View& gates, int i, const char* call) {
  if (i < 0 || i >= gates.count) fail(call, "gate " + std::to_string(i) + " of " + std::to_string(gates.count));
  return gates.data + static_cast<int64_t>(i) * gates.size - here->block->shared;
}

// Brings what has come through the gate. For other threads it was written in this epoch.
void bring_in(GateState& gate) {
  Block& block = *here->block;
  const auto has_come = [&](const Bulk& copy) { return copy.opening < gate.openings; };
  for (const Bulk& copy : gate.coming) {
    if (!has_come(copy)) continue;
    std::memcpy(copy.to, copy.from, copy.bytes);
    Stamp* stamps = block.stamps.get() + (copy.to - block.shared) / GRANULE * 2;
    for (int g = 0; !TIMED && g < copy.bytes / GRANULE; g++)
      stamps[g * 2] = {block.clock[block.index], static_cast<uint16_t>(here->index), static_cast<uint8_t>(block.index),
                       Stamp::COPIED};
  }
  gate.coming.erase(std::remove_if(gate.coming.begin(), gate.coming.end(), has_come), gate.coming.end());
}

}  // namespace

GateState& Machine::gate_of(Block& block, const View& gates, int i, const char* call) {
  const auto found = block.gates.find(place_of(gates, i, call));
  if (found == block.gates.end() || (&block != here->block && !found->second.published))
    fail(call, "there is no gate " + std::to_string(i) + " in block " + std::to_string(block.index));
  return found->second;
}

Block& Machine::other(const char* call) {
  const int of = here->block->index ^ 1;
  if (of >= blocks) fail(call, "this block is in no pair");
  Block& block = block_[of];
  const Thread* first = &thread_[of * threads];
  const auto ended = [](const Thread& thread) { return thread.waits && !std::strcmp(thread.waits, "its end"); };
  if (std::all_of(first, first + threads, ended)) fail(call, "block " + std::to_string(of) + " has ended");
  return block;
}

void Machine::make_gate(const View& gates, int i, int arrivals) {
  const int64_t place = place_of(gates, i, "make_gate");
  if (arrivals < 1 || place % 8) fail("make_gate", "arrivals, or the place");
  GateState gate{};
  gate.needed = arrivals;
  gate.clock = gate.opened = Clock(blocks, 1);
  if (!here->block->gates.try_emplace(place, gate).second) fail("make_gate", "it has been made before");
}

void Machine::publish_gates() {
  for (auto& [place, gate] : here->block->gates) gate.published = true;
}

void Machine::open_if_all_there(GateState& gate) {
  if (gate.arrived < gate.needed || gate.promised != gate.given) return;
  gate.openings++;
  gate.arrived = 0;
  gate.promised = gate.given = 0;
  gate.opened = gate.clock;
  gate.was_ready = gate.ready;
  gate.was_path = gate.path;
  for (int fiber : gate.waiting) fibers_.wake(fiber);
  gate.waiting.clear();
}

void Machine::arrive_at(GateState& gate, int64_t promised, double latency) {
  if (!gate.published) fail("arrive", "the gate has not been published");
  gate.arrived++;
  gate.promised += promised;
  join(gate.clock, here->block->clock);
#ifdef TARFLOW_TIMED
  tarflow::emulation::instructions(2);
  if (const double at = here->time.now + latency; at > gate.ready.at) {
    gate.ready = {at, ON_SENT};
    gate.path = here->time.path;
  }
#else
  (void)latency;
#endif
  open_if_all_there(gate);
}

void Machine::promise(const View& gates, int i, int bytes) {
  arrive_at(gate_of(*here->block, gates, i, "promise"), bytes, 0);
}

void Machine::arrive_at_both(const View& gates, int i) {
  for (Block* block : {here->block, &other("arrive_at_both")}) {
    GateState& gate = gate_of(*block, gates, i, "arrive_at_both");
    arrive_at(gate, 0, block == here->block ? gpu.shared_latency : gpu.pair_latency);
  }
}

void Machine::pass_gate(const View& gates, int i, int odd) {
  GateState& gate = gate_of(*here->block, gates, i, "pass_gate");
  while (gate.openings % 2 == odd) {
    gate.waiting.push_back(here->fiber);
    pause("pass_gate", i);
  }
  bring_in(gate);
  if (here->seen.empty()) here->seen = Clock(blocks, 1);
  join(here->seen, gate.opened);
#ifdef TARFLOW_TIMED
  pass(gate.was_ready, gate.was_path);
#endif
}

void Machine::copy_bulk(const View& to, int64_t i, const View& from, int64_t j, int count, const View& gates, int gate,
                        bool both) {
  const int bytes = count * to.size, each = 16 / from.size;
  if (count < 1 || bytes % 16 || i < 0 || i > to.count - count) fail("copy_bulk", "out of bounds, or not aligned");
  for (int k = 0; !TIMED && k < count; k += each) use(from, j + k, each, CONSTANT_READ);
  unsigned char *const own = to.data + i * to.size, *const source = from.data + j * from.size;
  if ((own - here->block->shared) % 16) fail("copy_bulk", "not aligned");
  const std::vector<Block*> targets =
      both ? std::vector<Block*>{here->block, &other("copy_bulk")} : std::vector<Block*>{here->block};
#ifdef TARFLOW_TIMED
  const Ready ready = fetch_bulk(source, bytes, targets.back()->index);
#endif
  for (Block* block : targets) {
    unsigned char* const at = block->shared + (own - here->block->shared);
    GateState& state = gate_of(*block, gates, gate, "copy_bulk");
    if (!TIMED) begin_bulk(*block, to, at, bytes);
    if (!TIMED) std::memset(at, 0xff, bytes);
    state.coming.push_back({at, source, bytes, state.openings});
    state.given += bytes;
#ifdef TARFLOW_TIMED
    if (ready.at > state.ready.at) state.ready = ready;
#endif
    open_if_all_there(state);
  }
}

void Machine::fence_copies() { here->fenced = here->block->clock[here->block->index]; }

void Machine::sync_pair() {
  const int first = here->block->index / 2 * 2;
  other("sync_pair");
  issue_sunk();
  int& arrived = in_pair_[first / 2];
  if (++arrived < 2 * threads) return pause("sync_pair");
  arrived = 0;
  together(&thread_[first * threads], 2 * threads, gpu.pair_latency, ON_SYNC);
  Block &a = block_[first], &b = block_[first + 1];
  join(a.next_clock, b.next_clock);
  b.next_clock = a.next_clock;
  for (Block* block : {&a, &b})
    for (int of : {first, first + 1}) block->next_clock[of] = std::max(a.clock[of], b.clock[of]) + 1;
  a.clock = a.next_clock;
  b.clock = b.next_clock;
  for (int fiber = first * threads; fiber < (first + 2) * threads; fiber++)
    if (fiber != here->fiber) fibers_.wake(fiber);
  yield();
}

void Machine::check_gates() const {
  for (const Block& block : block_)
    for (const auto& [place, gate] : block.gates)
      if (!gate.coming.empty())
        throw std::runtime_error("bulk copies that nobody waited for: to block " + std::to_string(block.index));
}

}  // namespace tarflow::emulation
