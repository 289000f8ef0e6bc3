#include "timing.h"

namespace tarflow::emulation {
Gpu gpu;
}

#ifdef TARFLOW_TIMED

#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "../kernel.h"
#include "machine.h"

namespace tarflow::emulation {
namespace {

constexpr int SECTOR = 32, WARP_SECTORS = 512, SCHEDULERS = 4;
constexpr double TOGETHER = 200;  // cycles within which lanes of a warp are taken to ask at once

// What one warp has asked for, by sector.
struct Asked {
  uintptr_t sector = 0;
  double at = 0;
  Ready ready;
};

struct Line {
  double missed;  // bytes that had come from memory when it was last used
  double ready;
};

struct Totals {
  double dram = 0, l2 = 0, shared = 0;   // bytes
  double waited = 0, flights = 0;        // cycles of threads that waited for loads, and these times loads in flight
  double instructions = 0;               // of warps
};

// The state of all that threads share.
struct Shared_ {
  Server dram, l2;
  std::vector<Server> port, shared, issue, tensor;
  std::vector<Asked> asked;
  std::vector<std::unordered_map<uintptr_t, double>> l1;
  std::unordered_map<uintptr_t, Line> lines;
  std::unordered_map<uintptr_t, Sent> sent;  // the last of what was sent to a sector
  double missed = 0;
  Totals totals[CELLS];
  int warps = 0;
};

Shared_ device_;
std::string report_;

int warp_of(const Thread& thread) { return thread.block->index * device_.warps + thread.index / 32; }

void spend(Time& time, double until, Cause cause) {
  if (until <= time.now) return;
  time.path.spent[time.cell] += static_cast<float>(until - time.now);
  time.path.causes[cause] += static_cast<float>(until - time.now);
  time.now = until;
}

// Brings a sector into the L2 cache, and returns when it is there.
double bring(uintptr_t sector, double now) {
  auto [line, fresh] = device_.lines.try_emplace(sector, Line{-1e30, 0});
  if (device_.missed - line->second.missed > gpu.l2_bytes) {
    device_.missed += SECTOR;
    device_.totals[here->time.cell].dram += SECTOR;
    line->second.ready = device_.dram.take(now, SECTOR) + gpu.dram_latency - gpu.l2_latency;
  }
  line->second.missed = device_.missed;
  return line->second.ready;
}

// Brings the 128 bytes of a line.
void prefetch(uintptr_t sector) {
  for (uintptr_t i = 0; i < 4; i++) bring((sector & ~uintptr_t{3}) + i, here->time.now);
}

// Returns when `bytes` of a sector have come to the running thread's multiprocessor.
Ready fetch(uintptr_t sector, double now, bool cached) {
  Thread& thread = *here;
  Asked& asked =
      device_.asked[static_cast<size_t>(warp_of(thread)) * WARP_SECTORS + (sector * 0x9e3779b97f4a7c15 >> 55)];
  if (asked.sector == sector && std::abs(asked.at - now) < TOGETHER) return asked.ready;
  Totals& totals = device_.totals[thread.time.cell];
  Ready ready;
  auto& l1 = device_.l1[thread.block->index];
  if (cached && l1.count(sector)) {
    ready = {std::max(now + gpu.l1_latency, l1[sector]), ON_L2};
  } else {
    totals.l2 += SECTOR;
    const double passed = std::max(device_.l2.take(now, SECTOR), device_.port[thread.block->index].take(now, SECTOR));
    const double there = bring(sector, now);
    const bool late = there > passed;
    ready = {std::max(passed, there) + gpu.l2_latency, late ? ON_DRAM : ON_L2};
    if (cached) l1[sector] = ready.at;
  }
  asked = {sector, now, ready};
  return ready;
}

Ready fetch_all(const unsigned char* at, int bytes, bool cached) {
  Time& time = here->time;
  const auto first = reinterpret_cast<uintptr_t>(at) / SECTOR,
             last = (reinterpret_cast<uintptr_t>(at) + bytes - 1) / SECTOR;
  Ready ready;
  for (auto sector = first; sector <= last; sector++) {
    const Ready one = fetch(sector, time.now, cached);
    if (one.at > ready.at) ready = one;
  }
  time.flights[time.flight++ % Time::RECENT] = ready.at;
  return ready;
}

// Looks for what was sent to a sector. Whoever finds it after looks in vain has waited for its sender.
Ready look(const unsigned char* at, int bytes) {
  Time& time = here->time;
  Ready ready = fetch_all(at, bytes, false);
  const Sent& sent = device_.sent[reinterpret_cast<uintptr_t>(at) / SECTOR];
  time.early = sent.seen > time.now + gpu.l2_latency / 2;
  if (time.early) {
    time.in_vain[time.vain++ % Time::RECENT] = at;
  } else if (const auto found = std::find(time.in_vain, std::end(time.in_vain), at); found != std::end(time.in_vain)) {
    *found = nullptr;
    ready = {ready.at, ON_SENT, -1, &sent};
  }
  return ready;
}

void issue_one(Time::Sunk& load) {
  if (load.issued) return;
  load.issued = true;
  instructions(2);
  load.ready = fetch_all(load.at, load.bytes, false);
}

void print(std::ostringstream& text, const char* name, const float* values, int count) {
  text << "\"" << name << "\": [";
  for (int i = 0; i < count; i++) text << (i ? ", " : "") << values[i] / gpu.clock * 1e6;
  text << "]";
}

}  // namespace

size_t Server::next_free(size_t bin) {
  while (true) {
    if (bin >= left_.size()) {
      const size_t size = std::max<size_t>(bin + 1, left_.size() * 2);
      for (size_t i = left_.size(); i < size; i++) next_.push_back(static_cast<uint32_t>(i));
      left_.resize(size, static_cast<float>(rate_ * width_));
    }
    if (next_[bin] == bin) return bin;
    next_[bin] = next_[bin] < next_.size() ? next_[next_[bin]] : next_[bin];
    bin = next_[bin];
  }
}

double Server::take(double now, double amount) {
  const double alone = now + amount / rate_;
  size_t bin = next_free(static_cast<size_t>(now / width_));
  double left = amount;
  while (true) {
    const double taken = std::min<double>(left, left_[bin]);
    left -= taken;
    left_[bin] -= static_cast<float>(taken);
    const double filled = (bin + 1 - left_[bin] / (rate_ * width_)) * width_;
    if (left_[bin] < 1e-3f * rate_) {
      next_[bin] = static_cast<uint32_t>(bin + 1);
    }
    // Within the first bin the amount can pass at once, as what is asked for is spread over its cycles.
    if (left <= 1e-6) return bin == static_cast<size_t>(now / width_) ? alone : std::max(alone, filled);
    bin = next_free(bin + 1);
  }
}

void instructions(double count) {
  Thread& thread = *here;
  device_.totals[thread.time.cell].instructions += count / 32;
  Server& scheduler = device_.issue[thread.block->index * SCHEDULERS + thread.index / 32 % SCHEDULERS];
  const double issued = scheduler.take(thread.time.now, count / 32);
  spend(thread.time, std::max(issued, thread.time.now + count * gpu.cycles), ISSUE);
}

void await(const Ready& ready) {
  Time& time = here->time;
  Ready of = ready;
  if (ready.sunk >= 0) {
    Time::Sunk& load = time.waiting[ready.sunk % Time::RECENT];
    if (load.number != ready.sunk) return;  // many loads ago
    issue_one(load);
    of = load.ready;
  }
  if (of.at <= time.now) return;
  if (of.sent) {
    time.now = of.sent->now;
    time.path = of.sent->path;
  }
  if (of.cause == ON_L2 || of.cause == ON_DRAM) {
    int flying = 0;
    for (double at : time.flights) flying += at > time.now;
    Totals& totals = device_.totals[time.cell];
    totals.waited += of.at - time.now;
    totals.flights += flying * (of.at - time.now);
  }
  spend(time, of.at, of.cause);
}

Ready sink(const unsigned char* at, int bytes) {
  Time& time = here->time;
  const int number = time.sunk++;
  Time::Sunk& load = time.waiting[number % Time::RECENT];
  load = {at, bytes, number, {}, false};
  return {0, ON_L2, number};
}

void issue_sunk() {
  Time& time = here->time;
  for (int i = std::max(0, time.sunk - Time::RECENT); i < time.sunk; i++) issue_one(time.waiting[i % Time::RECENT]);
}

void await_sums(const void* of) {
  Time& time = here->time;
  for (int i = 0; i < time.sums_count; i++)
    if (!of || time.sums[i] == of) spend(time, time.sums_at[i], ON_TENSOR);
  if (!of) time.sums_count = 0;
}

void multiplied(Thread& thread, const void* of, double at) {
  Time& time = thread.time;
  int i = 0;
  while (i < time.sums_count && time.sums[i] != of) i++;
  if (i == Time::RECENT) throw std::runtime_error("too many sums on tensor cores for the model of time");
  if (i == time.sums_count) time.sums_count++;
  time.sums[i] = of;
  time.sums_at[i] = at;
}

double tensor(const Block& block, int warp, double now) {
  return device_.tensor[block.index * SCHEDULERS + warp % SCHEDULERS].take(now, gpu.tensor_cycles);
}

void together(Thread* first, int count, double latency, Cause cause) {
  const Thread* last =
      std::max_element(first, first + count, [](const Thread& a, const Thread& b) { return a.time.now < b.time.now; });
  for (Thread* thread = first; thread < first + count; thread++) {
    if (thread->time.now < last->time.now) {
      thread->time.now = last->time.now;
      thread->time.path = last->time.path;
    }
  }
  for (Thread* thread = first; thread < first + count; thread++) spend(thread->time, thread->time.now + latency, cause);
}

void enter(int phase, int section) {
  int& cell = here->time.cell;
  cell = (phase < 0 ? cell / SECTIONS : phase) * SECTIONS + section;
}

double signal_time() {
  Time& time = here->time;
  enter(-1, BARRIER);
  spend(time, time.now + gpu.fence, ON_BARRIER);
  return time.now + gpu.l2_latency / 2;
}

void await_signal(double at, const Path& path) {
  Time& time = here->time;
  const double seen = at + gpu.l2_latency;  // half a round of polling until one finds it, and the way back
  if (at > time.now) {
    time.now = at;
    time.path = path;
  }
  spend(time, std::max(seen, time.now + gpu.l2_latency), ON_BARRIER);
  device_.l1[here->block->index].clear();
}

Ready fetch_bulk(const unsigned char* from, int bytes, int other) {
  instructions(4);
  const double now = here->time.now;
  const int own = here->block->index;
  device_.totals[here->time.cell].l2 += bytes;
  double passed = std::max(device_.l2.take(now, bytes), device_.port[own].take(now, bytes)), there = 0;
  if (other != own) passed = std::max(passed, device_.port[other].take(now, bytes));
  const auto first = reinterpret_cast<uintptr_t>(from) / SECTOR;
  for (int i = 0; i < bytes / SECTOR; i++) there = std::max(there, bring(first + i, now));
  return {std::max(passed, there) + gpu.l2_latency, there > passed ? ON_DRAM : ON_L2};
}

void pass(const Ready& ready, const Path& path) {
  Time& time = here->time;
  instructions(4);
  if (ready.at > time.now && ready.cause == ON_SENT) {
    time.path = path;
    time.now = std::max(time.now, ready.at - gpu.pair_latency);
  }
  spend(time, std::max(ready.at, time.now + gpu.shared_latency), ready.at > time.now ? ready.cause : ON_SHARED);
}

unsigned char* use(const View& view, int64_t i, int n, Use how) {
  if (i < 0 || i > view.count - n) throw std::runtime_error(std::string("out of bounds: ") + view.name);
  unsigned char* at = view.data + i * view.size;
  const int bytes = n * view.size;
  Time& time = here->time;
  if (how == WRITE || how == SEND) await_sums(nullptr);
  if (how == READ && !view.shared && gpu.sinks) {
    time.ready = sink(at, bytes);
    return at;
  }
  if (how != MATRIX_READ) instructions(2);
  Totals& totals = device_.totals[time.cell];
  if (view.shared) {
    const double passed = device_.shared[here->block->index].take(time.now, bytes);
    totals.shared += bytes;
    if (how != WRITE) time.ready = {passed + gpu.shared_latency, ON_SHARED};
  } else if (how == WRITE || how == SEND || how == EMPTY) {
    const auto sector = reinterpret_cast<uintptr_t>(at) / SECTOR;
    const double passed = device_.l2.take(time.now, bytes);
    device_.lines[sector] = {device_.missed, passed};
    totals.l2 += bytes;
    if (how == SEND) {
      Sent& sent = device_.sent[sector];
      const double seen = passed + gpu.l2_latency / 2;
      if (seen > sent.seen) sent = {time.now, seen, time.path};
    }
  } else if (how == HINT) {
    prefetch(reinterpret_cast<uintptr_t>(at) / SECTOR);
  } else {
    time.ready = how == LOOK ? look(at, bytes) : fetch_all(at, bytes, how == CONSTANT_READ && bytes < 16);
  }
  return at;
}

void begin_timing(int blocks, int threads) {
  device_ = Shared_();
  device_.warps = threads / 32;
  device_.dram = Server(gpu.dram / gpu.clock);
  device_.l2 = Server(gpu.l2 / gpu.clock);
  device_.port.assign(blocks, Server(gpu.port));
  device_.shared.assign(blocks, Server(gpu.shared));
  device_.issue.assign(blocks * SCHEDULERS, Server(1));
  device_.tensor.assign(blocks * SCHEDULERS, Server(1));
  device_.asked.assign(static_cast<size_t>(blocks) * device_.warps * WARP_SECTORS, Asked());
  device_.l1.resize(blocks);
}

void end_timing(const std::vector<Thread>& threads) {
  const Thread* last = &threads[0];
  for (const Thread& thread : threads)
    if (thread.time.now > last->time.now) last = &thread;
  std::ostringstream text;
  text << "{\"microseconds\": " << last->time.now / gpu.clock * 1e6 << ", ";
  print(text, "spent", last->time.path.spent, CELLS);
  text << ", ";
  print(text, "causes", last->time.path.causes, CAUSES);
  text << ", \"totals\": [";
  for (int i = 0; i < CELLS; i++) {
    const Totals& t = device_.totals[i];
    text << (i ? ", " : "") << "[" << t.dram << ", " << t.l2 << ", " << t.shared << ", " << t.waited << ", "
         << t.flights << ", " << t.instructions << "]";
  }
  text << "]}";
  report_ = text.str();
}

}  // namespace tarflow::emulation

namespace tarflow {

// The model is of bf16 alone.
Instances float32_instances() { return {{{"", 0, 1, nullptr}, {"", 0, 1, nullptr}, {"", 0, 1, nullptr}}}; }
Instances float16_instances() { return float32_instances(); }

}  // namespace tarflow

#define EXPORT extern "C" __attribute__((visibility("default")))

// Sets a parameter of Gpu by its name. Returns whether there is one.
EXPORT int tarflow_set_gpu(const char* name, double value) {
  using tarflow::emulation::gpu;
  if (!std::strcmp(name, "sinks")) return gpu.sinks = value != 0, 1;
  const std::pair<const char*, double*> fields[] = {
      {"clock", &gpu.clock}, {"dram", &gpu.dram}, {"l2", &gpu.l2}, {"l2_bytes", &gpu.l2_bytes}, {"fence", &gpu.fence}};
  for (const auto& [known, field] : fields)
    if (!std::strcmp(name, known)) return *field = value, 1;
  return 0;
}

// Returns what the model says of the last launch, as JSON: times in µs by (phase, section) and by cause along the critical
// path, and totals of all threads by (phase, section).
EXPORT const char* tarflow_timing() { return tarflow::emulation::report_.c_str(); }

#endif  // TARFLOW_TIMED
