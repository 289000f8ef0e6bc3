#include "density_pass.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>

#include "memory.h"
#include "threads.h"

namespace tarflow {

namespace {

constexpr int64_t GROUP_ROWS = 400;       // enough for the packing of weights on the way to take a few percent
// With fewer multiplications in a product, another thread is not worth its wait at the barriers. On a quiet machine it
// gains little, and beside other processes it takes many times as long as one thread alone.
constexpr int64_t THREAD_WORK = 1 << 22;

// The division of a batch among teams of threads, each of which takes one group of samples after the other.
struct Division {
  int64_t teams, size, samples;  // the number of teams, threads of a team, samples of a group
};

// A team is the threads that take the same group of samples through the blocks, with the memory that the group needs.
struct Team {
  Team(const std::vector<DensityGroup>& like, const Division& division, bool gradient, size_t operand)
      : blocks(like),
        barrier(static_cast<int>(division.size)),
        workers(division.size),
        bytes(lay_out(Arena(), division, gradient, operand)) {}

  void fetch_memory(const Division& division, bool gradient, size_t operand) {
    memory = allocate(bytes);
    lay_out(Arena(memory.get()), division, gradient, operand);
  }

  size_t lay_out(Arena arena, const Division& division, bool gradient, size_t operand) {
    const int64_t rows = division.samples * (blocks[0].sizes.tokens - 1);
    const auto most = [&](const auto& size) {
      int64_t n = 0;
      for (const DensityGroup& g : blocks) n = std::max<int64_t>(n, size(g));
      return n;
    };
    const auto widest = [&](int64_t DensityGroup::* stride) {
      return rows * most([&](const DensityGroup& g) { return g.*stride; });
    };
    const auto softmax = [&](const DensityGroup& g) { return division.samples * g.heads * 3 * g.row_stride; };

    // This memory is used by one block after the other.
    const int64_t width = widest(&DensityGroup::channel_stride), qkv = widest(&DensityGroup::qkv_stride);
    const int64_t hidden = widest(&DensityGroup::hidden_stride), values = rows * blocks[0].in_stride;
    DensityGroup shared{};
    shared.gathered = arena.take(values);
    shared.out = arena.take(widest(&DensityGroup::out_stride));
    shared.token_log_det = arena.take(rows);
    shared.normed = arena.take<void>(width, operand);
    shared.attended = arena.take<void>(width, operand);
    shared.hidden = arena.take<void>(hidden, operand);
    if (gradient) {
      shared.d_stream = arena.take(width);
      shared.d_normed = arena.take(width);
      shared.d_attended = arena.take(width);
      shared.operand = arena.take<void>(width, operand);
      shared.d_qkv = arena.take<void>(qkv, operand);
    } else {
      shared.scale = arena.take(values);
      shared.stream = arena.take(width);
    }
    const Trace only =
        gradient ? Trace{}
                 : Trace{shared.stream,        shared.stream, shared.stream, arena.take(qkv), arena.take(most(softmax)),
                         arena.take(rows * 4), nullptr};

    // With a gradient every layer of every block keeps its own trace; without one all share the same.
    traces.assign(blocks.size(), {});
    for (size_t k = 0; k < blocks.size(); k++) {
      DensityGroup& g = blocks[k];
      for (auto field : {&DensityGroup::gathered, &DensityGroup::out, &DensityGroup::token_log_det,
                         &DensityGroup::d_stream, &DensityGroup::d_normed, &DensityGroup::d_attended})
        g.*field = shared.*field;
      for (auto field : {&DensityGroup::normed, &DensityGroup::attended, &DensityGroup::hidden, &DensityGroup::operand,
                         &DensityGroup::d_qkv})
        g.*field = shared.*field;
      g.scale = gradient ? arena.take(values) : shared.scale;
      traces[k].assign(g.sizes.layers, only);
      if (!gradient) continue;
      const int64_t cs = rows * g.channel_stride;
      float* stream = arena.take(cs);
      for (Trace& t : traces[k]) {
        t.in = stream;
        t.mid = arena.take(cs);
        t.out = stream = arena.take(cs);
        t.qkv = arena.take(rows * g.qkv_stride);
        t.softmax = arena.take(softmax(g));
        t.norm = arena.take(rows * 4);
        t.slope = arena.take(rows * g.hidden_stride);
      }
    }

    const int64_t panel = 32;
    const auto deepest = [](const DensityGroup& g) {
      return std::max({g.sizes.hidden, 3 * g.sizes.channels, g.out_dim, g.sizes.token_dim}) + 1;
    };
    const auto head = [&](const DensityGroup& g) { return (g.row_stride + panel) * round_up(g.sizes.head_dim, panel); };
    for (size_t rank = 0; rank < workers.size(); rank++) {
      DensityWorker& w = workers[rank];
      w.rank = static_cast<int64_t>(rank);
      w.size = static_cast<int64_t>(workers.size());
      w.barrier = &barrier;
      w.panel = arena.take(most(deepest) * panel);
      for (int i = 0; i < 4; i++) w.packed[i] = i < 2 || gradient ? arena.take(most(head)) : nullptr;
      for (int i = 0; i < 2; i++)
        w.scores[i] = i < 1 || gradient ? arena.take(QUERIES * blocks[0].row_stride) : nullptr;
    }
    return arena.used();
  }

  std::vector<DensityGroup> blocks;  // the group as each block is given it
  Barrier barrier;
  std::vector<DensityWorker> workers;
  std::vector<std::vector<Trace>> traces;  // [block][layer]
  size_t bytes;
  Memory memory;
  int64_t next = 0;  // the group of samples that the leader has taken
  bool stop[2] = {};  // what the leader decided before an even and an odd step
};

DensityGroup shape(const Sizes& s, const DensityBatch& batch) {
  DensityGroup g{};
  g.sizes = s;
  g.heads = s.channels / s.head_dim;
  g.out_dim = s.affine ? 2 * s.token_dim : s.token_dim;
  g.in_stride = padded_stride(s.token_dim);
  g.channel_stride = padded_stride(s.channels);
  g.qkv_stride = padded_stride(3 * s.channels);
  g.hidden_stride = padded_stride(s.hidden);
  g.out_stride = padded_stride(g.out_dim);
  g.row_stride = padded_stride(s.tokens - 1);
  g.attention_scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  g.log_det = batch.log_det;
  g.gradient = batch.gradient;
  return g;
}

// There are as many teams as divide the threads so that none has more than a third above its share of the samples. A
// team of several threads waits at its barriers, and a single thread never does.
Division divide(const std::vector<DensityGroup>& blocks, int64_t samples, int threads, int64_t most_bytes,
                const std::function<size_t(const Division&)>& bytes) {
  const int64_t rows = blocks[0].sizes.tokens - 1;
  int64_t C = 0;
  for (const DensityGroup& g : blocks) C = std::max(C, g.sizes.channels);
  const auto suits = [&](int64_t teams) {
    const int64_t each = (samples + teams - 1) / teams;
    return threads % teams == 0 && teams <= samples && each * teams * 3 <= samples * 4;
  };
  const auto of = [&](int64_t teams) {
    const int64_t each = (samples + teams - 1) / teams;
    const int64_t groups = std::max<int64_t>((each * rows + GROUP_ROWS / 2) / GROUP_ROWS, 1);
    const int64_t some = (each + groups - 1) / groups;
    return Division{teams, std::clamp<int64_t>(some * rows * C * C / THREAD_WORK, 1, threads / teams), some};
  };
  int64_t teams = threads;
  while (!suits(teams)) teams--;
  Division d = of(teams);
  while (d.samples * d.teams > 1 && static_cast<int64_t>(bytes(d)) * d.teams > most_bytes) {
    if (d.samples > 1) {
      d.samples = (d.samples + 1) / 2;
    } else {
      do teams--;
      while (!suits(teams));
      d = of(teams);
      d.samples = 1;
    }
  }
  return d;
}

}  // namespace

bool density_pass(const std::vector<DensityBlock>& blocks, const DensityBatch& batch, bool bf16, const Kernels& kernels,
                  int threads, int64_t most_bytes, int64_t& bytes, const Caller::Hook& hook) {
  const int64_t B = batch.samples, K = static_cast<int64_t>(blocks.size()), tokens = blocks[0].sizes.tokens;
  const int64_t values = tokens * blocks[0].sizes.token_dim;
  threads = Pool::at_hand(threads);
  bytes = 0;
  std::fill_n(batch.log_det, B, 0.0);
  if (tokens == 1) {  // a single token passes unchanged
    for (int64_t k = 0; k < K; k++) std::copy_n(batch.x, B * values, batch.outputs + k * B * values);
    if (batch.gradient) std::transform(batch.x, batch.x + B * values, batch.gradient, [](float x) { return -x; });
    return true;
  }
  std::vector<DensityGroup> like;
  for (const DensityBlock& block : blocks) like.push_back(shape(block.sizes, batch));
  const bool gradient = batch.gradient != nullptr;
  const size_t operand = bf16 && kernels.bf16_operands ? sizeof(uint16_t) : sizeof(float);
  const auto each = [&](const Division& d) { return Team(like, d, gradient, operand).bytes; };
  const Division division = divide(like, B, threads, most_bytes, each);
  const int64_t groups = (B + division.samples - 1) / division.samples;
  std::vector<std::unique_ptr<Team>> teams;
  for (int64_t i = 0; i < division.teams; i++) {
    teams.push_back(std::make_unique<Team>(like, division, gradient, operand));
    teams.back()->fetch_memory(division, gradient, operand);
    bytes += static_cast<int64_t>(teams.back()->bytes);
  }

  const DensityKernels& steps = *kernels.density;
  std::atomic<int64_t> next{0};
  Caller caller(hook);

  const auto job = [&](int thread) {
    Team& team = *teams[thread / division.size];
    const DensityWorker& w = team.workers[thread % division.size];
    unsigned parity = 0;
    // The leader decides whether to go on, so that all threads of a team stop at the same step.
    const auto proceed = [&] {
      if (thread == 0) caller.attend();
      if (w.rank == 0) team.stop[parity] = caller.stopped();
      if (w.size > 1) team.barrier.wait();
      return !team.stop[std::exchange(parity, parity ^ 1)];
    };
    const auto through = [&](int64_t first, int64_t samples) {
      // Each thread has a copy of its own of what the block at hand is given.
      const auto at_block = [&](int64_t k) {
        DensityGroup g = team.blocks[k];
        g.first = first;
        g.samples = samples;
        g.rows = samples * (tokens - 1);
        g.x = k == 0 ? batch.x : batch.outputs + (k - 1) * B * values;
        g.z = batch.outputs + k * B * values;
        // Where channels are no multiple of the k that lie together, no column fills what is left of the last ones.
        if (w.rank == 0 && g.sizes.channels % kernels.bf16.together) {
          std::memset(g.attended, 0, g.rows * g.channel_stride * operand);
          if (gradient) std::memset(g.d_qkv, 0, g.rows * g.qkv_stride * operand);
        }
        return g;
      };
      for (int64_t k = 0; k < K; k++) {
        DensityGroup g = at_block(k);
        const std::vector<Trace>& traces = team.traces[k];
        g.stream = traces.front().in;
        steps.embed(g, blocks[k], w);
        for (size_t i = 0; i < traces.size(); i++) {
          if (!proceed()) return false;
          steps.layer[bf16](g, blocks[k].layer[i], traces[i], w);
        }
        g.stream = traces.back().out;
        steps.transform(g, blocks[k], w);
      }
      if (!gradient) return true;
      const float* z = batch.outputs + (K - 1) * B * values;
      const int64_t begin = first * values, count = samples * values;
      const int64_t from = begin + count * w.rank / w.size, to = begin + count * (w.rank + 1) / w.size;
      std::transform(z + from, z + to, batch.gradient + from, [](float z) { return -z; });
      if (w.size > 1) team.barrier.wait();
      for (int64_t k = K - 1; k >= 0; k--) {
        const DensityGroup g = at_block(k);
        const std::vector<Trace>& traces = team.traces[k];
        steps.transform_backward(g, blocks[k], w);
        for (size_t i = traces.size(); i-- > 0;) {
          if (!proceed()) return false;
          steps.layer_backward[bf16](g, blocks[k].layer[i], traces[i], w);
        }
        steps.embed_backward(g, blocks[k], w);
      }
      return true;
    };
    for (;;) {
      if (w.rank == 0) team.next = next.fetch_add(1);
      if (w.size > 1) team.barrier.wait();
      const int64_t group = team.next;
      if (group >= groups) return;
      const int64_t first = B * group / groups;
      if (!through(first, B * (group + 1) / groups - first)) return;
    }
  };
  Pool::instance().run(static_cast<int>(division.teams * division.size), job, [&] {
    caller.attend();
    return !caller.stopped();
  });
  return caller.finish();
}

}  // namespace tarflow
