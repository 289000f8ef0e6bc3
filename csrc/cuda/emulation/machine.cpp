#include "machine.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibers.h"
#include "memory.h"

namespace tarflow::emulation {

namespace {

int multiprocessors = 3;
int64_t shared_limit = 227 << 10;
uint64_t seed = 0;

// All that take part wait for the last one, who does what there is to do and lets the others go on.
struct Meeting {
  std::string call;
  std::vector<int> waiting;  // fibers
};

struct Warp {
  Meeting meeting;
  float values[2][32];  // of this call and the one before, which slower lanes have still to read
  LaneTiles tiles[32];  // of this call
};

struct Block {
  Meeting meeting;
  std::unique_ptr<Memory> memory;
  std::unique_ptr<unsigned char[]> bytes;
  int64_t size;
  Clock clock{}, learnt{};  // what is known, and what will be after the next sync_block
};

struct Stream : Thread {
  std::vector<std::vector<Copy>> groups{1};  // of copies; the last one is not committed
};

struct Region {  // of memory that buffers lie in, which may overlap
  uintptr_t begin, end;
  std::unique_ptr<Memory> memory;
};

struct Known {
  Buffer buffer;
  int region = -1;
  enum { UNUSED, CONSTANT, WRITTEN } use = UNUSED;
};

struct Machine {
  int blocks, threads;
  std::vector<Stream> streams;
  std::vector<Block> block;
  std::vector<Warp> warps;
  std::vector<Region> regions;
  std::vector<Known> buffers;
  std::vector<Clock> signals;  // what was known when the counter reached each number
  std::vector<std::pair<unsigned, int>> awaiting;  // number, fiber
  std::string fault;
};

Fibers fibers;
std::unique_ptr<Machine> machine;

Stream& self() { return machine->streams[fibers.running()]; }
Block& own_block() { return machine->block[self().block]; }
Warp& own_warp() { return machine->warps[fibers.running() / 32]; }

// last(): what the last of so many does.
template <class Last>
void meet(Meeting& meeting, const std::string& call, int size, Last last) {
  if (meeting.waiting.empty()) meeting.call = call;
  if (meeting.call != call) fault(self(), "lanes of a warp make different calls, " + meeting.call + " and " + call + ",");
  if (static_cast<int>(meeting.waiting.size()) + 1 < size) {
    meeting.waiting.push_back(fibers.running());
    fibers.sleep();
    return;
  }
  last();
  for (int fiber : meeting.waiting) fibers.wake(fiber);
  meeting.waiting.clear();
}

std::string name_of(const Place& place) {
  const std::string name = place.buffer < 0 ? "shared memory" : machine->buffers[place.buffer].buffer.name;
  return name + " at byte " + std::to_string(2 * place.cell);
}

void check(const Place& place, bool writes, bool coming = false) {
  Memory* memory = nullptr;
  int64_t cell = place.cell;
  if (place.buffer < 0) {
    memory = own_block().memory.get();
  } else {
    Known& known = machine->buffers[place.buffer];
    if (known.use == Known::CONSTANT && writes) fault(self(), name_of(place) + " is read as a constant, and written");
    if (writes) known.use = Known::WRITTEN;
    Region& region = machine->regions[known.region];
    if (!region.memory) region.memory = std::make_unique<Memory>((region.end - region.begin) / 2, false);
    memory = region.memory.get();
    cell += (reinterpret_cast<uintptr_t>(known.buffer.data) - region.begin) / 2;
  }
  for (int i = 0; i < place.cells; i++) try {
      if (writes)
        memory->write(self(), own_block().clock, cell + i, coming);
      else
        memory->read(self(), own_block().clock, cell + i);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(name_of({place.buffer, place.cell + i, 1}) + ": " + error.what());
    }
}

// The memory that each buffer lies in; those that overlap are one.
void join_regions(Machine& m) {
  for (const Known& known : m.buffers) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(known.buffer.data);
    Region region{begin, begin + 4 * static_cast<uintptr_t>(known.buffer.count), nullptr};  // 4: bytes, at most
    if (known.buffer.count) m.regions.push_back(std::move(region));
  }
  std::sort(m.regions.begin(), m.regions.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
  std::vector<Region> joined;
  for (Region& region : m.regions) {
    if (!joined.empty() && region.begin < joined.back().end)
      joined.back().end = std::max(joined.back().end, region.end);
    else
      joined.push_back(std::move(region));
  }
  m.regions = std::move(joined);
  for (Known& known : m.buffers)
    for (size_t i = 0; i < m.regions.size() && known.buffer.count; i++)
      if (reinterpret_cast<uintptr_t>(known.buffer.data) >= m.regions[i].begin) known.region = static_cast<int>(i);
}

// Where those wait that wait for ever.
std::string stuck(const Machine& m) {
  std::string text = "deadlock:";
  for (int i = 0; i < m.blocks; i++)
    if (!m.block[i].meeting.waiting.empty())
      text += " " + std::to_string(m.block[i].meeting.waiting.size()) + " threads of block " + std::to_string(i) + " at sync_block;";
  for (size_t i = 0; i < m.warps.size(); i++)
    if (!m.warps[i].meeting.waiting.empty())
      text += " " + std::to_string(m.warps[i].meeting.waiting.size()) + " lanes of warp " + std::to_string(i) + " at " +
              m.warps[i].meeting.call + ";";
  for (const auto& [number, fiber] : m.awaiting)
    text += " block " + std::to_string(fiber / m.threads) + " for signal " + std::to_string(number) + ";";
  return text;
}

[[noreturn]] void out_of_bounds(const std::string& name, int64_t i, int n, int64_t count) {
  fault(self(), name + ": out of bounds, " + std::to_string(i) + " … " + std::to_string(i + n - 1) + " of " +
                    std::to_string(count) + ",");
}

}  // namespace

const Thread& current() { return self(); }
int grid_blocks() { return machine->blocks; }

void sync_block() {
  Block& block = own_block();
  meet(block.meeting, "sync_block", machine->threads, [&] {
    for (int i = 0; i < machine->threads; i++) machine->streams[self().block * machine->threads + i].epoch++;
    for (int i = 0; i < MOST_BLOCKS; i++) block.clock[i] = std::max(block.clock[i], block.learnt[i]);
  });
}

float shuffle_xor(float value, int mask) {
  Warp& warp = own_warp();
  Stream& own = self();
  const int lane = own.index % 32;
  float* values = warp.values[own.warp_epoch % 2];
  values[lane] = value;
  meet(warp.meeting, "shuffle_xor of " + std::to_string(mask), 32, [] {});
  own.warp_epoch++;
  return values[lane ^ mask];
}

void multiply_tiles(const LaneTiles& tiles) {
  Warp& warp = own_warp();
  Stream& own = self();
  warp.tiles[own.index % 32] = tiles;
  meet(warp.meeting, "multiply_tiles", 32, [&] {
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
          const float a = warp.tiles[row % 8 * 4 + k % 8 / 2].a[k / 8 * 4 + row / 8 * 2 + k % 2];
          warp.tiles[lane].sums[i] += a * warp.tiles[column * 4 + k % 8 / 2].b[k / 8 * 2 + k % 2];
        }
      }
  });
  own.warp_epoch++;
}

int buffer_index(const char* name) {
  for (size_t i = 0; i < machine->buffers.size(); i++)
    if (machine->buffers[i].buffer.name == name) return static_cast<int>(i);
  fault(self(), "a buffer that is none of the launch's,");
}

unsigned char* shared_memory(int byte, int64_t bytes) {
  if (byte < 0 || byte % 16 || byte + bytes > own_block().size) out_of_bounds("shared memory", byte, bytes, own_block().size);
  return own_block().bytes.get() + byte;
}

Place global_place(int buffer, int64_t count, int64_t i, int n, int size) {
  const Buffer& known = machine->buffers[buffer].buffer;
  if (i < 0 || i + n > count) out_of_bounds(known.name, i, n, count);
  if ((reinterpret_cast<uintptr_t>(known.data) + i * size) % (n * size)) fault(self(), std::string(known.name) + ": not aligned,");
  return {buffer, i * size / 2, n * size / 2};
}

Place shared_place(int begin, int count, int64_t i, int n, int size) {
  if (i < 0 || i + n > count) out_of_bounds("shared memory from byte " + std::to_string(begin), i, n, count);
  const int64_t byte = begin + i * size;
  if (byte % (n * size)) fault(self(), "shared memory at byte " + std::to_string(byte) + ": not aligned,");
  return {-1, byte / 2, n * size / 2};
}

void read(const Place& place) { check(place, false); }
void write(const Place& place) { check(place, true); }

void read_constant(const Place& place) {
  Known& known = machine->buffers[place.buffer];
  if (known.use == Known::WRITTEN) fault(self(), name_of(place) + " was written, and is read as a constant");
  known.use = Known::CONSTANT;
}

// What a copy brings is not there before it is waited for, and what was there is lost.
void copy(const Place& place, void* to, const void* from) {
  check(place, true, true);
  std::memset(to, 0xff, 16);
  self().groups.back().push_back({to, from, place.cell});
}

void commit_copies() { self().groups.emplace_back(); }

void wait_copies(int pending) {
  Stream& own = self();
  if (pending < 0 || pending > 7) fault(own, "wait_copies of " + std::to_string(pending));
  const int arriving = static_cast<int>(own.groups.size()) - 1 - pending;
  for (int i = 0; i < arriving; i++)
    for (const Copy& copy : own.groups[i]) {
      std::memcpy(copy.to, copy.from, 16);
      for (int j = 0; j < 8; j++) own_block().memory->arrive(own, copy.cell + j);
    }
  if (arriving > 0) own.groups.erase(own.groups.begin(), own.groups.begin() + arriving);
}

void signal(unsigned* counter) {
  const Block& block = own_block();
  std::vector<Clock>& signals = machine->signals;
  Clock known = signals.empty() ? Clock{} : signals.back();
  for (int i = 0; i < MOST_BLOCKS; i++) known[i] = std::max(known[i], block.clock[i]);
  known[self().block] = std::max(known[self().block], self().epoch);
  signals.push_back(known);
  ++*counter;
  for (auto waits = machine->awaiting.begin(); waits != machine->awaiting.end();) {
    if (waits->first > *counter) {
      ++waits;
      continue;
    }
    fibers.wake(waits->second);
    waits = machine->awaiting.erase(waits);
  }
}

void await(unsigned* counter, unsigned number) {
  if (*counter < number) {
    machine->awaiting.push_back({number, fibers.running()});
    fibers.sleep();
  }
  if (number == 0) return;
  Clock& learnt = own_block().learnt;
  for (int i = 0; i < MOST_BLOCKS; i++) learnt[i] = std::max(learnt[i], machine->signals[number - 1][i]);
}

void set_device(int count, int64_t bytes) {
  if (count < 1 || count > MOST_BLOCKS) throw std::invalid_argument("1 to 8 multiprocessors");
  multiprocessors = count;
  shared_limit = bytes;
}
void set_seed(uint64_t number) { seed = number; }
int device_multiprocessors() { return multiprocessors; }
int64_t device_shared_bytes() { return shared_limit; }

void run_grid(const Params& params, int blocks, int threads, int64_t shared_bytes, const std::function<void()>& body) {
  if (blocks > multiprocessors) throw std::runtime_error("more blocks than the device has multiprocessors");
  if (shared_bytes > shared_limit) throw std::runtime_error("more shared memory than a block can have");
  machine = std::make_unique<Machine>();
  Machine& m = *machine;
  m.blocks = blocks;
  m.threads = threads;
  m.streams.resize(blocks * threads);
  m.block.resize(blocks);
  m.warps.resize(blocks * threads / 32);
  for (int i = 0; i < blocks * threads; i++) static_cast<Thread&>(m.streams[i]) = {i / threads, i % threads, 0, 0};
  for (Block& block : m.block) {
    block.memory = std::make_unique<Memory>(shared_bytes / 2, true);
    block.bytes.reset(new unsigned char[shared_bytes]);
    std::memset(block.bytes.get(), 0xff, shared_bytes);
    block.size = shared_bytes;
  }
#define TARFLOW_FIELD(field) m.buffers.push_back({params.field});
  TARFLOW_BUFFERS(TARFLOW_FIELD)
#undef TARFLOW_FIELD
  join_regions(m);

  std::mt19937_64 random(seed);
  const auto draw = [&](int n) { return static_cast<int>(random() % n); };
  const auto run = [&](int) {
    try {
      body();
      if (self().groups.size() > 1 || !self().groups[0].empty()) fault(self(), "copies that nobody waited for");
    } catch (const std::exception& error) {
      m.fault = error.what();
      fibers.stop();
    }
  };
  const bool ended = fibers.run(blocks * threads, run, draw);
  if (m.fault.empty() && !ended) m.fault = stuck(m);
  const std::string found = m.fault;
  machine.reset();
  if (!found.empty()) throw std::runtime_error("emulation: " + found);
}

}  // namespace tarflow::emulation
