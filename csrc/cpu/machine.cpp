#include "machine.h"

#include <algorithm>
#include <fstream>
#ifdef _WIN32
#define NOMINMAX
#include <windows.h>

#include <vector>
#else
#include <unistd.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

namespace tarflow {

namespace {

Cache* level_of(Machine& machine, int64_t level) {
  return level == 1 ? &machine.l1 : level == 2 ? &machine.l2 : level == 3 ? &machine.l3 : nullptr;
}

std::string line_of(const std::string& path) {
  std::string line;
  std::ifstream file(path);
  std::getline(file, line);
  return line;
}

// Returns the number at the beginning of a text, times 2¹⁰ or 2²⁰ if K or M follows it; 0 where there is none.
int64_t number_in(const std::string& text) {
  int64_t found = 0;
  size_t at = 0;
  for (; at < text.size() && text[at] >= '0' && text[at] <= '9' && found < int64_t{1} << 40; at++)
    found = found * 10 + (text[at] - '0');
  const char unit = at < text.size() ? text[at] : ' ';
  return unit == 'K' ? found << 10 : unit == 'M' ? found << 20 : found;
}

// Returns how many cores a list such as "0-3,8" names, at least one.
int64_t cores_in(const std::string& list) {
  int64_t count = 0;
  for (size_t at = 0; at < list.size();) {
    const size_t end = std::min(list.find(',', at), list.size()), dash = list.find('-', at);
    const int64_t first = number_in(list.substr(at)), last = dash < end ? number_in(list.substr(dash + 1)) : first;
    count += last >= first ? last - first + 1 : 0;
    at = end + 1;
  }
  return count > 0 ? count : 1;
}

#if defined(_SC_LEVEL1_DCACHE_SIZE)
void ask_system(Machine& machine) {
  const int names[] = {_SC_LEVEL1_DCACHE_SIZE, _SC_LEVEL2_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE};
  const int64_t cores = sysconf(_SC_NPROCESSORS_CONF);
  bool told = false;
  for (int level = 1; level <= 3; level++) {
    Cache& cache = *level_of(machine, level);
    const int64_t bytes = sysconf(names[level - 1]);
    if (cache.bytes > 0 || bytes <= 0) continue;
    cache = {bytes, level < 3 || cores < 1 ? 1 : cores};
    told = true;
  }
  if (told) machine.source += machine.source.empty() ? "sysconf" : ", sysconf";
}
#elif defined(__APPLE__)
int64_t asked(const char* name) {
  int64_t value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value > 0 ? value : 0;
}

// The first of two names is that of the faster cores, which Apple's own processors have.
int64_t asked(const char* name, const char* other) {
  const int64_t found = asked(name);
  return found ? found : asked(other);
}

void ask_system(Machine& machine) {
  machine.l1 = {asked("hw.perflevel0.l1dcachesize", "hw.l1dcachesize"), 1};
  machine.l2 = {asked("hw.perflevel0.l2cachesize", "hw.l2cachesize"),
                std::max<int64_t>(1, asked("hw.perflevel0.cpusperl2"))};
  machine.l3 = {asked("hw.perflevel0.l3cachesize", "hw.l3cachesize"), std::max<int64_t>(1, asked("hw.physicalcpu"))};
  machine.source = "sysctl";
}
#elif defined(_WIN32)
void ask_system(Machine& machine) {
  DWORD bytes = 0;
  GetLogicalProcessorInformation(nullptr, &bytes);
  std::vector<SYSTEM_LOGICAL_PROCESSOR_INFORMATION> found(bytes / sizeof(SYSTEM_LOGICAL_PROCESSOR_INFORMATION));
  if (found.empty() || !GetLogicalProcessorInformation(found.data(), &bytes)) return;
  for (const auto& each : found) {
    Cache* cache = each.Relationship == RelationCache ? level_of(machine, each.Cache.Level) : nullptr;
    if (cache == nullptr || each.Cache.Type == CacheInstruction || cache->bytes >= each.Cache.Size) continue;
    *cache = {each.Cache.Size, std::max(1, __builtin_popcountll(each.ProcessorMask))};
  }
  machine.source = "GetLogicalProcessorInformation";
}
#else
void ask_system(Machine&) {}
#endif

Machine read_machine() {
  Machine machine = read_sysfs("/sys/devices/system/cpu/cpu0/cache");
  ask_system(machine);
  if (machine.source.empty()) machine.source = "guessed";
  if (machine.l1.bytes <= 0) machine.l1 = {int64_t{32} << 10, 1};
  if (machine.l3.bytes <= 0) machine.l3 = machine.l2.bytes > 0 ? machine.l2 : Cache{int64_t{16} << 20, 4};
  if (machine.l2.bytes <= 0) machine.l2 = {int64_t{512} << 10, 1};
  return machine;
}

}  // namespace

Machine read_sysfs(const std::string& folder) {
  Machine machine{};
  for (int index = 0; index < 8; index++) {
    const std::string entry = folder + "/index" + std::to_string(index) + "/";
    Cache* cache = level_of(machine, number_in(line_of(entry + "level")));
    const int64_t bytes = number_in(line_of(entry + "size"));
    if (cache == nullptr || bytes <= 0 || line_of(entry + "type") == "Instruction") continue;
    *cache = {bytes, cores_in(line_of(entry + "shared_cpu_list"))};
    machine.source = "sysfs";
  }
  return machine;
}

const Machine& this_machine() {
  static const Machine machine = read_machine();
  return machine;
}

}  // namespace tarflow
