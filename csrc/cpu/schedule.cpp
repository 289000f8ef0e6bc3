#include "schedule.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace tarflow {

namespace {

// What a core of a server or a laptop does about: no choice needs them to be closer than by a factor of two.
constexpr double HERTZ = 3e9;
constexpr double L2_BYTES = 24, L3_BYTES = 10, MEMORY_BYTES = 4;  // in a cycle, for one core
constexpr double MEMORY_BYTES_OF_ALL = 16;
constexpr double LEVEL = 1.03;        // times within which the model cannot tell two schedules apart
constexpr double USABLE = 0.75;       // of a cache, beside what else passes through it

struct Model {
  const Demand& d;
  int64_t teams, size;

  int64_t threads() const { return teams * size; }

  // Returns the seconds in which each of the threads reads `bytes` of its own out of a working set of `own` bytes, of
  // `all` bytes for all threads. Of what exceeds L3, as much is found there as fits. What goes round in more than L2 has
  // drives itself out: less is found there the more it is, and nothing of twice as much.
  double read(double bytes, double own, double all) const {
    const double near = std::clamp(2 - own / (USABLE * Machine::share(d.machine.l2)), 0.0, 1.0);
    return near * bytes / L2_BYTES / HERTZ + (1 - near) * read_far(bytes, all);
  }

  double read_far(double bytes, double all) const {
    const double l3 = USABLE * Machine::share(d.machine.l3) * std::min(threads(), d.machine.l3.cores);
    const double found = std::min(1.0, l3 / all), memory = std::min(MEMORY_BYTES, MEMORY_BYTES_OF_ALL / threads());
    return bytes * (found / L3_BYTES + (1 - found) / memory) / HERTZ;
  }

  // Returns what a team of `rows` rows expects of a step, in which the other teams have as many.
  Schedule step(int64_t rows) const {
    const double tiles = std::ceil(double(rows) / d.tile_rows), keys = rows * d.row_bytes;
    const double own = (d.weight_bytes + keys) / size, all = d.weight_bytes + keys * teams;
    const double multiplies = (rows + tiles) * d.weight_bytes / d.element_bytes / size;  // a tile costs a row to begin
    const double compute = multiplies / d.multiplies / HERTZ;
    double stream = read(d.weight_bytes / size, own, all);
    // Rows that do not stay in L2 come again for every panel.
    const double activations = double(rows) * d.hidden * sizeof(float), panel = 2 * d.lanes;
    if (activations > USABLE * Machine::share(d.machine.l2))
      stream += multiplies / panel * sizeof(float) / L3_BYTES / HERTZ;
    const int64_t meetings = size == 1 ? 0 : 3 + d.layers * (d.heads % size == 0 ? 4 : 5);
    return {teams, size, rows, std::hypot(compute, stream), read(keys / size, own, all), meetings * d.machine.meeting};
  }

  // Returns what a team of `rows` rows expects of a pass, in groups of at most `group` rows.
  Schedule pass(int64_t rows, int64_t group) const {
    const int64_t whole = rows / group, rest = rows % group;
    const Schedule a = step(group), b = rest ? step(rest) : Schedule{};
    const auto total = [&](double Schedule::* part) { return (whole * a.*part + b.*part) * d.steps; };
    return {teams, size, group, total(&Schedule::products), total(&Schedule::attention), total(&Schedule::waiting)};
  }
};

}  // namespace

int64_t near_bytes(const Machine& machine, int64_t lanes, int64_t tile_rows) {
  constexpr int64_t page = 4096;
  const double with_rows = 1 + tile_rows / (2.0 * lanes);
  return std::max<int64_t>(static_cast<int64_t>(USABLE * machine.l1.bytes / with_rows) / page, 1) * page;
}

Schedule choose_schedule(const Demand& demand) {
  std::vector<Schedule> found;  // with fewer threads first, then more teams, then smaller groups: what is liked better
  for (int64_t used = 1; used <= demand.threads;
       used = used < demand.threads ? std::min(2 * used, demand.threads) : used + 1)
    for (int64_t teams = used; teams >= 1; teams--) {
      const int64_t rows = used % teams == 0 ? demand.largest_part(teams) * demand.branches : 0;
      if (rows == 0) continue;
      const Model model{demand, teams, used / teams};
      for (int64_t group = demand.tile_rows;; group += demand.tile_rows) {
        found.push_back(model.pass(rows, std::min(group, rows)));
        if (group >= rows || group + demand.tile_rows > GROUP_ROWS) break;
      }
    }
  double least = found[0].cost();
  for (const Schedule& each : found) least = std::min(least, each.cost());
  return *std::find_if(found.begin(), found.end(), [&](const Schedule& s) { return s.cost() <= LEVEL * least; });
}

}  // namespace tarflow
