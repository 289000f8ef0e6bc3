// The caches of the machine that this runs on, as its system describes them.
#pragma once

#include <cstdint>
#include <string>

namespace tarflow {

// A cache's bytes, and the logical cores that share it.
struct Cache {
  int64_t bytes, cores;
};

constexpr double MEETING_SECONDS = 1.5e-6;  // what most processors with caches of their own for each core take

struct Machine {
  Cache l1, l2, l3;    // of data; l3 is l2 where the system knows no third level
  double meeting = MEETING_SECONDS;  // seconds at a barrier, and to fetch what other threads have written meanwhile
  std::string source;  // what described them, "guessed" where nothing did

  // Returns the bytes of a cache that one of its cores has if all of them want some.
  static int64_t share(const Cache& cache) { return cache.bytes / cache.cores; }
};

// Returns the caches that a folder of Linux's /sys/devices/system/cpu/cpuN/cache describes; of a level that it does not
// describe, or describes with nonsense, bytes are 0.
Machine read_sysfs(const std::string& folder);

// Returns this machine's caches: Linux's sysfs or else sysconf, macOS's sysctl, Windows's
// GetLogicalProcessorInformation. A level that they leave out has the size of a small machine's: L1 32 KiB, L2 512 KiB,
// L3 16 MiB for four cores if L2 was left out too.
const Machine& this_machine();

}  // namespace tarflow
