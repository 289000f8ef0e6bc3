#include "machine.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace tarflow::emulation {

Machine* machine = nullptr;
Thread* here = nullptr;

void join(Clock& clock, const Clock& other) {
  for (size_t b = 0; b < clock.size(); b++) clock[b] = std::max(clock[b], other[b]);
}

namespace {

constexpr size_t ALIGNMENT = 128;  // bytes that shared memory is aligned to
constexpr int POISON = 0xff;       // NaN in every floating-point type

// Marks a copy as come: for other threads it was written in this epoch. Until now nobody may have written what it is of.
void arrive(Coming& copy) {
  Block& block = *here->block;
  if (!TIMED && copy.how == COPY_READ) use(copy.from, copy.j, 16 / copy.from.size, COPY_READ);
  unsigned char* at = copy.to.data + copy.i * copy.to.size;
  std::memcpy(at, copy.from.data + copy.j * copy.from.size, 16);
  Stamp* stamps = block.stamps.get() + (at - block.shared) / GRANULE * 2;
  for (int g = 0; g < 16 / GRANULE; g++) {
    stamps[g * 2].epoch = block.clock[block.index];
    stamps[g * 2].flags = Stamp::COPIED;
  }
}

}  // namespace

Machine::Machine(int blocks, int threads, int64_t shared_bytes, uint64_t seed)
    : blocks(blocks),
      threads(threads),
      shared_bytes(shared_bytes),
      global_stamps(blocks),
      fibers_(blocks * threads, seed, TIMED, [this] { return stuck(); }),
      block_(blocks),
      thread_(blocks * threads),
      in_pair_((blocks + 1) / 2) {
  emulation::machine = this;
  for (int b = 0; b < blocks; b++) {
    Block& block = block_[b];
    block.index = b;
    block.clock = block.next_clock = Clock(blocks, 1);
    block.warps.resize(threads / 32);
    const size_t size = shared_bytes + ALIGNMENT;
    block.memory.reset(new unsigned char[size]);
    std::memset(block.memory.get(), POISON, size);
    block.shared = block.memory.get() + ALIGNMENT - reinterpret_cast<uintptr_t>(block.memory.get()) % ALIGNMENT;
    block.stamps = make_stamps(shared_bytes / GRANULE + 1, 1);
    for (int t = 0; t < threads; t++) {
      Thread& thread = thread_[b * threads + t];
      thread.index = t;
      thread.fiber = b * threads + t;
      thread.block = &block;
    }
  }
}

Machine::~Machine() { emulation::machine = nullptr; }

void Machine::run(const std::function<void()>& kernel) {
  begin_timing(blocks, threads);
  fibers_.run([&](int fiber) {
    Thread* me = here = &thread_[fiber];
    kernel();
    if (!me->copies.empty())
      throw std::runtime_error("copies that nobody waited for: block " + std::to_string(me->block->index) + " thread " +
                               std::to_string(me->index) + " has " + std::to_string(me->copies.size()) + " at its end");
    me->waits = "its end";
  });
  check_gates();
  end_timing(thread_);
}

void Machine::pause(const char* waits, int64_t detail) {
  Thread* me = here;
  me->waits = waits;
  me->detail = detail;
  fibers_.pause();
  here = me;
  me->waits = nullptr;
}

void Machine::yield() {
  Thread* me = here;
  fibers_.yield();
  here = me;
}

void Machine::sync_block() {
  Block& block = *here->block;
  issue_sunk();
  if (++block.arrived < threads) return pause("sync_block");
  block.arrived = 0;
  together(&thread_[block.index * threads], threads, gpu.sync_latency, ON_SYNC);
  block.next_clock[block.index]++;
  block.clock = block.next_clock;
  const int first = block.index * threads;
  for (int fiber = first; fiber < first + threads; fiber++)
    if (fiber != here->fiber) fibers_.wake(fiber);
  yield();
}

Machine::Counter& Machine::counter(uint32_t* address) {
  return counters_.try_emplace(address, Counter{*address, {Clock(blocks, 1)}, {}}).first->second;
}

void Machine::signal(uint32_t* address) {
  Counter& of = counter(address);
  auto& signalled = of.signalled;
#ifdef TARFLOW_TIMED
  const double at = signal_time();
  if (of.times.empty() || at >= of.times.back().first)
    of.times.emplace_back(at, here->time.path);
  else
    of.times.push_back(of.times.back());
#endif
  signalled.push_back(signalled.back());
  join(signalled.back(), here->block->clock);
  ++*address;
  for (int fiber : awaiting_) fibers_.wake(fiber);
  awaiting_.clear();
  yield();
}

void Machine::await(uint32_t* address, uint32_t number) {
  Counter& of = counter(address);
  while (static_cast<int32_t>(*address - number) < 0) {
    awaiting_.push_back(here->fiber);
    pause("await", number);
  }
  // Only the first `number` signals count, not others that happen to have come as well.
  const auto signals = static_cast<int32_t>(number - of.initial);
  if (signals > 0) join(here->block->next_clock, of.signalled.at(signals));
#ifdef TARFLOW_TIMED
  if (signals > 0) await_signal(of.times.at(signals - 1).first, of.times.at(signals - 1).second);
#endif
}

void Machine::send(const View& to, int64_t i, int n, const void* value) {
  unsigned char* at = use(to, i, n, SEND);
  std::memcpy(at, value, n * to.size);
  for (int j = 0; j < n; j++) {
    const auto found = looking_.find(at + j * to.size);
    if (found == looking_.end()) continue;
    for (int fiber : found->second) fibers_.wake(fiber);
    looking_.erase(found);
  }
}

void Machine::await_sent(const View& from, int64_t i, int n) {
  if (i < 0 || i > from.count - n) return;  // which `use` says
  for (int j = 0; j < n; j++) {
    const unsigned char* at = from.data + (i + j) * from.size;
    if (!std::all_of(at, at + from.size, [](unsigned char byte) { return byte == 0xff; })) continue;
    looking_[at].push_back(here->fiber);
    pause("look");
    if (!TIMED) return;
  }
}

void Machine::meet(const char* call, int detail, const void* given, void* taken, void (*finish)(Warp&)) {
  Block& block = *here->block;
  Warp& warp = block.warps[here->index / 32];
  const int lane = here->index % 32;
  if (warp.arrived == 0) {
    warp.at = call;
    warp.detail = detail;
  } else if (std::strcmp(warp.at, call) || warp.detail != detail) {
    throw std::runtime_error("a warp in two calls: block " + std::to_string(block.index) + " thread " +
                             std::to_string(here->index) + " in " + call + " (" + std::to_string(detail) +
                             "), others in " + warp.at + " (" + std::to_string(warp.detail) + ")");
  }
  warp.given[lane] = given;
  warp.taken[lane] = taken;
  if (++warp.arrived < 32) return pause(call, detail);
  warp.arrived = 0;
  together(&thread_[here->fiber - lane], 32, 0, ON_SYNC);
  finish(warp);
  for (int fiber = here->fiber - lane, l = 0; l < 32; l++)
    if (l != lane) fibers_.wake(fiber + l);
  yield();
}

void Machine::copy(Coming copy) {
  use(copy.from, copy.j, 16 / copy.from.size, copy.how);
  copy.ready = here->time.ready;
  std::memset(use(copy.to, copy.i, 16 / copy.to.size, COPY), POISON, 16);
  here->copies.push_back(copy);
}

void Machine::commit_copies() {
  size_t grouped = 0;
  for (int size : here->groups) grouped += size;
  here->groups.push_back(static_cast<int>(here->copies.size() - grouped));
}

void Machine::wait_copies(int pending) {
  if (pending < 0 || pending > 7) throw std::runtime_error("wait_copies(" + std::to_string(pending) + "): 0 … 7");
  while (static_cast<int>(here->groups.size()) > pending) {
    for (int i = 0; i < here->groups.front(); i++) {
      arrive(here->copies.front());
#ifdef TARFLOW_TIMED
      tarflow::emulation::await(here->copies.front().ready);
#endif
      here->copies.pop_front();
    }
    here->groups.pop_front();
  }
}

// Returns where the threads of each block are, those that wait for the same thing together.
std::string Machine::stuck() const {
  std::string text = "deadlock:";
  for (int first = 0, end; first < blocks * threads; first = end) {
    const Thread& thread = thread_[first];
    const auto same = [&](const Thread& other) { return other.waits == thread.waits && other.detail == thread.detail; };
    for (end = first + 1; end % threads && same(thread_[end]);) end++;
    text += "\n  block " + std::to_string(thread.block->index) + " thread " + std::to_string(thread.index);
    if (end - first > 1) text += " … " + std::to_string(thread.index + end - first - 1);
    text += std::string(" at ") + (thread.waits ? thread.waits : "work");
    if (thread.detail) text += "(" + std::to_string(thread.detail) + ")";
  }
  return text;
}

}  // namespace tarflow::emulation
