#include "engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "pack.h"
#include "threads.h"

namespace tarflow {

namespace {

struct Share {
  int64_t first, count;
};

}  // namespace

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

namespace {

// A team is the threads that work on the same rows, with their scratch.
struct Team {
  Team(const Block& b, int64_t rows, int64_t size, int64_t near_bytes)
      : barrier(static_cast<int>(size)), workers(size) {
    const int64_t shared = rows * (b.channel_stride + 2 * b.attention_stride + b.hidden_stride + b.out_stride);
    const int64_t own = rows * (b.channel_stride + b.in_stride) + round_up(b.head_dim, 16);
    memory = allocate((shared + size * own) * sizeof(float));
    float* at = static_cast<float*>(memory.get());
    const auto take = [&](int64_t n) { return std::exchange(at, at + n); };
    Worker all{};
    all.size = size;
    all.barrier = &barrier;
    all.near_bytes = near_bytes;
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
      workers[rank] = all;
    }
  }

  Barrier barrier;
  std::vector<Worker> workers;
  Memory memory;
  std::atomic<bool> stop[2] = {};  // what the leader decided before an even and an odd step
};

}  // namespace

Engine::Engine(const Sizes& s, const Source& source, bool bf16, const Kernels& kernels, const Machine& machine)
    : layers_(s.layers), passes_(bf16 ? kernels.bf16 : kernels.f32), machine_(machine), lanes_(kernels.vector) {
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
  memory_ = pack(block_, layers_, s, source, width, passes_.together, packed_bytes_);
  block_.layer = layers_.data();
}

int64_t Engine::cache_elements() const {
  return block_.layers * block_.heads * 2 * block_.key_tokens * block_.head_dim;
}

Schedule Engine::schedule(const Batch& batch, bool sequential, int threads) const {
  return schedule(Plan(block_, batch, sequential), batch, sequential, threads);
}

Schedule Engine::schedule(const Plan& plan, const Batch& batch, bool sequential, int threads) const {
  const double element = block_.bf16 ? 2 : 4;
  double tokens = 0;  // seen in a step of a sequential pass, on average; those of a window share theirs
  if (sequential) tokens = (batch.start[0] + batch.stop[0]) / 2.0;
  return choose_schedule({machine_, lanes_, passes_.tile_rows, passes_.multiplies, block_.heads, block_.layers,
                          block_.hidden_stride, static_cast<double>(packed_bytes_), element,
                          tokens / block_.key_tokens * cache_elements() * element, batch.guidance ? 2 : 1, plan.steps,
                          threads, [&](int64_t n) { return plan.largest_part(n); }});
}

bool Engine::run(const Batch& batch, bool sequential, int threads, const Caller::Hook& hook) const {
  const Plan plan(block_, batch, sequential);
  const int64_t branches = batch.guidance ? 2 : 1, steps = plan.steps;
  const Schedule chosen = schedule(plan, batch, sequential, Pool::at_hand(threads));
  const int64_t teams = chosen.teams, near_bytes = near();
  const int64_t whole = tile_rows() / std::gcd(tile_rows(), branches);  // samples whose rows are whole tiles
  std::vector<std::unique_ptr<Team>> team;
  std::vector<int64_t> groups(teams), group_size(teams);
  for (int64_t i = 0; i < teams; i++) {
    const int64_t count = plan.part(i, teams).count, most = std::max<int64_t>(chosen.group_rows / branches, 1);
    groups[i] = (count + most - 1) / most;
    // Groups are about equal, and whole tiles but for the last.
    group_size[i] = groups[i] > 1 ? std::min(round_up((count + groups[i] - 1) / groups[i], whole), most) : count;
    team.push_back(std::make_unique<Team>(block_, group_size[i] * branches, chosen.size, near_bytes));
  }
  if (batch.change)  // no row writes beyond the end of its sample's window
    for (int64_t sample = 0; sample < batch.samples; sample++)
      for (float* moved : {batch.change, batch.residual})
        std::fill(moved + sample * batch.widest + batch.stop[sample] - batch.start[sample],
                  moved + (sample + 1) * batch.widest, 0.0f);

  Caller caller(hook);
  const auto job = [&](int thread) {
    const int64_t t = thread / chosen.size;
    Team& mine = *team[t];
    const Worker& worker = mine.workers[thread % chosen.size];
    const Share all = plan.part(t, teams);
    unsigned parity = 0;
    for (int64_t group = 0; group < groups[t]; group++) {
      const int64_t first = group * group_size[t], count = std::min(group_size[t], all.count - first);
      const Row* row = plan.rows.data() + all.first + first;
      for (int64_t step = 0; step < steps; step++, parity ^= 1) {
        if (worker.rank == 0) mine.stop[parity].store(caller.stopped());
        passes_.step(block_, batch, worker, row, count, step);
        if (thread == 0) caller.attend((group * steps + step + 1) / groups[t]);
        if (mine.stop[parity].load()) return;
      }
    }
  };
  Pool::instance().run(static_cast<int>(teams * chosen.size), job, [&] {
    caller.attend();
    return !caller.stopped();
  });
  return caller.finish(steps);
}

}  // namespace tarflow
