#include "engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <utility>

#include "pack.h"
#include "threads.h"

namespace tarflow {

namespace {

constexpr int64_t TEAM_ROWS = 8;    // threads that would have fewer rows each share rows and divide columns
constexpr int64_t LEAST_ROWS = 12;

// Returns the bytes of the last-level cache, or a modest guess where the system does not tell.
int64_t last_level_cache() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
  int64_t kilobytes = 0;
  return file >> kilobytes && kilobytes > 0 ? kilobytes << 10 : int64_t{16} << 20;
}

struct Share {
  int64_t first, count;
};

// Returns part i of n items that are divided into `parts` parts of about the same size.
Share part(int64_t n, int64_t i, int64_t parts) { return {n * i / parts, n * (i + 1) / parts - n * i / parts}; }

// The rows of a pass, sample after sample. A sequential pass has a row for each sample, which goes through its window
// in as many steps. A parallel pass has a row for each token, with a copy of what it reads, as x is written meanwhile.
struct Plan {
  Plan(const Block& b, const Batch& batch, bool sequential) : steps(sequential ? batch.stop[0] - batch.start[0] : 1) {
    for (int64_t sample = 0; sample < batch.samples; sample++) {
      const int64_t start = batch.start[sample], stop = sequential ? start + 1 : batch.stop[sample];
      for (int64_t token = start - 1; token < stop - 1; token++)
        rows.push_back({sample, token, batch.x + (sample * b.tokens + token) * b.token_dim});
      first.push_back(count());
    }
    if (sequential) return;
    copies = allocate(count() * b.token_dim * sizeof(float));
    float* to = static_cast<float*>(copies.get());
    for (Row& row : rows) {
      std::memcpy(to, row.input, b.token_dim * sizeof(float));
      row.input = std::exchange(to, to + b.token_dim);
    }
  }

  int64_t count() const { return static_cast<int64_t>(rows.size()); }

  // Returns part i of n, of about as many rows as any other. No sample is divided, as its tokens depend on one another.
  Share part(int64_t i, int64_t n) const {
    const auto begin = [&](int64_t at) {
      const int64_t ideal = count() * at / n;
      const auto above = std::lower_bound(first.begin(), first.end(), ideal);
      return above != first.begin() && ideal - above[-1] < *above - ideal ? above[-1] : *above;
    };
    return {begin(i), begin(i + 1) - begin(i)};
  }

  int64_t largest_part(int64_t n) const {
    int64_t most = 0;
    for (int64_t i = 0; i < n; i++) most = std::max(most, part(i, n).count);
    return most;
  }

  const int64_t steps;
  std::vector<Row> rows;
  std::vector<int64_t> first{0};  // the first row of each sample, and the end
  Memory copies;
};

// A team is the threads that work on the same rows, with their scratch.
struct Team {
  Team(const Block& b, int64_t rows, int64_t size) : barrier(static_cast<int>(size)), workers(size) {
    const int64_t shared = rows * (b.channel_stride + 2 * b.attention_stride + b.hidden_stride + b.out_stride);
    const int64_t near = NEAR_BYTES / int64_t{sizeof(float)};
    const int64_t own = rows * (b.channel_stride + b.in_stride) + round_up(b.head_dim, 16) + near;
    memory = allocate((shared + size * own) * sizeof(float));
    float* at = static_cast<float*>(memory.get());
    const auto take = [&](int64_t n) { return std::exchange(at, at + n); };
    Worker all{};
    all.size = size;
    all.barrier = &barrier;
    all.stream = take(rows * b.channel_stride);
    all.query = take(rows * b.attention_stride);
    all.attended = take(rows * b.attention_stride);
    all.hidden = take(rows * b.hidden_stride);
    all.out = take(rows * b.out_stride);
    for (int64_t rank = 0; rank < size; rank++) {
      all.rank = rank;
      all.normed = take(rows * b.channel_stride);
      all.gathered = take(rows * b.in_stride);
      all.scratch = take(round_up(b.head_dim, 16));
      all.near = take(near);
      workers[rank] = all;
    }
  }

  Barrier barrier;
  std::vector<Worker> workers;
  Memory memory;
  std::atomic<bool> stop[2] = {};  // what the leader decided before an even and an odd step
};

}  // namespace

Engine::Engine(const Sizes& s, const Source& source, bool bf16, const Kernels& kernels)
    : layers_(s.layers), step_(bf16 ? kernels.step_bf16 : kernels.step_f32) {
  const int64_t width = 2 * kernels.vector;
  block_.channels = s.channels;
  block_.heads = s.channels / s.head_dim;
  block_.head_dim = round_up(s.head_dim, 16);
  block_.unit_panels = round_up(block_.head_dim, width) / width;
  block_.tokens = s.tokens;
  block_.key_tokens = round_up(s.tokens, kernels.vector);
  block_.token_dim = s.token_dim;
  block_.out_dim = s.affine ? 2 * s.token_dim : s.token_dim;
  block_.layers = s.layers;
  block_.affine = s.affine;
  block_.bf16 = bf16;
  block_.attention_scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  block_.channel_stride = padded_stride(s.channels);
  block_.attention_stride = padded_stride(block_.heads * block_.head_dim);
  block_.hidden_stride = padded_stride(s.hidden);
  block_.out_stride = padded_stride(block_.out_dim);
  block_.in_stride = padded_stride(s.token_dim);
  memory_ = pack(block_, layers_, s, source, width, packed_bytes_);
  block_.layer = layers_.data();
}

int64_t Engine::cache_elements() const {
  return block_.layers * block_.heads * 2 * block_.key_tokens * block_.head_dim;
}

bool Engine::run(const Batch& batch, bool sequential, int threads, const Caller::Hook& hook) const {
  threads = Pool::at_hand(threads);
  const Plan plan(block_, batch, sequential);
  const int64_t branches = batch.guidance ? 2 : 1, steps = plan.steps;
  // Where the weights fit in the cache but the keys and values do not, fewer rows go through all tokens at a time.
  static const int64_t cache = last_level_cache() * 2 / 5;  // at the end of a pass a row has twice the average, and
                                                            // cores that share the cache want some of it
  const int64_t row_bytes = cache_elements() * (block_.bf16 ? 2 : 4) / 2;  // on average half of the tokens are there
  const int64_t weights = static_cast<int64_t>(packed_bytes_);
  int64_t most_rows = GROUP_ROWS;
  if (sequential && weights < cache)
    most_rows = std::clamp((cache - weights) / std::max<int64_t>(row_bytes, 1), LEAST_ROWS, GROUP_ROWS);

  // As many teams as divide the threads have at least TEAM_ROWS rows each, and none more than a third above its share.
  const auto suits = [&](int64_t n) {
    return threads % n == 0 && std::min(plan.count() * branches, most_rows) / n >= TEAM_ROWS &&
           plan.largest_part(n) * n * 3 <= plan.count() * 4;
  };
  int64_t teams = threads;
  while (teams > 1 && !suits(teams)) teams--;
  const int64_t most = std::max<int64_t>(most_rows / teams / branches, 1);
  std::vector<std::unique_ptr<Team>> team;
  std::vector<int64_t> groups(teams);
  for (int64_t i = 0; i < teams; i++) {
    const int64_t count = plan.part(i, teams).count;
    groups[i] = (count + most - 1) / most;
    const int64_t largest = (count + groups[i] - 1) / std::max<int64_t>(groups[i], 1);
    team.push_back(std::make_unique<Team>(block_, largest * branches, threads / teams));
  }
  if (batch.change)  // no row writes beyond the end of its sample's window
    for (int64_t sample = 0; sample < batch.samples; sample++)
      for (float* moved : {batch.change, batch.residual})
        std::fill(moved + sample * batch.widest + batch.stop[sample] - batch.start[sample],
                  moved + (sample + 1) * batch.widest, 0.0f);

  Caller caller(hook);
  const auto job = [&](int thread) {
    const int64_t t = thread / (threads / teams);
    Team& mine = *team[t];
    const Worker& worker = mine.workers[thread % (threads / teams)];
    const Share all = plan.part(t, teams);
    unsigned parity = 0;
    for (int64_t group = 0; group < groups[t]; group++) {
      const Share some = part(all.count, group, groups[t]);
      const Row* row = plan.rows.data() + all.first + some.first;
      for (int64_t step = 0; step < steps; step++, parity ^= 1) {
        if (worker.rank == 0) mine.stop[parity].store(caller.stopped());
        step_(block_, batch, worker, row, some.count, step);
        if (thread == 0) caller.attend((group * steps + step + 1) / groups[t]);
        if (mine.stop[parity].load()) return;
      }
    }
  };
  Pool::instance().run(threads, job, [&] {
    caller.attend();
    return !caller.stopped();
  });
  return caller.finish(steps);
}

}  // namespace tarflow
