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

constexpr int64_t GROUP_ROWS = 400;       // enough for weights to be packed on the way at a few percent
// Multiplications of a product below which another thread is not worth its wait at the barriers: on a quiet machine it
// gains little, and beside other processes it takes many times as long as one thread alone.
constexpr int64_t THREAD_WORK = 1 << 22;

// How a batch is divided: teams of threads, each of which takes one group of samples after the other.
struct Division {
  int64_t teams, size, samples;  // threads of a team, samples of a group
};

// Threads that take the same group through the blocks, and what the group needs.
struct Team {
  Team(const DensityGroup& like, const Division& division, int64_t blocks, bool gradient, size_t operand)
      : group(like),
        barrier(static_cast<int>(division.size)),
        workers(division.size),
        bytes(lay_out(Arena(), division, blocks, gradient, operand)) {
    group.rows = 0;  // nothing is there yet
  }

  // Operands are cleared: where the channels are odd, no column fills the second half of the last pair of bf16.
  void fetch_memory(const Division& division, int64_t blocks, bool gradient, size_t operand) {
    memory = allocate(bytes);
    lay_out(Arena(memory.get()), division, blocks, gradient, operand);
    if (group.sizes.channels % 2 == 0) return;
    std::memset(group.attended, 0, group.rows * group.channel_stride * operand);
    if (gradient) std::memset(group.d_qkv, 0, group.rows * group.qkv_stride * operand);
  }

  size_t lay_out(Arena arena, const Division& division, int64_t blocks, bool gradient, size_t operand) {
    DensityGroup& g = group;
    const int64_t rows = g.rows = division.samples * (g.sizes.tokens - 1), cs = g.channel_stride;
    const int64_t softmax = division.samples * g.heads * 3 * g.row_stride, layers = g.sizes.layers;
    g.gathered = arena.take(rows * g.in_stride);
    g.out = arena.take(rows * g.out_stride);
    g.token_log_det = arena.take(rows);
    g.normed = arena.take<void>(rows * cs, operand);
    g.attended = arena.take<void>(rows * cs, operand);
    g.hidden = arena.take<void>(rows * g.hidden_stride, operand);
    traces.assign(blocks * layers, {});
    scales.assign(blocks, nullptr);
    if (gradient) {
      g.d_stream = arena.take(rows * cs);
      g.d_normed = arena.take(rows * cs);
      g.d_attended = arena.take(rows * cs);
      g.operand = arena.take<void>(rows * cs, operand);
      g.d_qkv = arena.take<void>(rows * g.qkv_stride, operand);
    }
    // With a gradient every layer of every block keeps its own; without one all share the same.
    for (int64_t k = 0; k < blocks; k++) {
      if (k > 0 && !gradient) {
        std::copy_n(traces.begin(), layers, traces.begin() + k * layers);
        scales[k] = scales[0];
        continue;
      }
      scales[k] = arena.take(rows * g.in_stride);
      float* stream = arena.take(rows * cs);
      for (int64_t i = 0; i < layers; i++) {
        Trace& t = traces[k * layers + i];
        if (i > 0 && !gradient) {
          t = traces[0];
          continue;
        }
        t.in = stream;
        t.mid = gradient ? arena.take(rows * cs) : stream;
        t.out = stream = gradient ? arena.take(rows * cs) : stream;
        t.qkv = arena.take(rows * g.qkv_stride);
        t.softmax = arena.take(softmax);
        t.norm = arena.take(rows * 4);
        t.slope = gradient ? arena.take(rows * g.hidden_stride) : nullptr;
      }
    }
    const int64_t width = 32, deepest = std::max({4 * g.sizes.channels, g.out_dim, g.sizes.token_dim}) + 1;
    const int64_t head = (g.row_stride + width) * round_up(g.sizes.head_dim, width);
    for (size_t rank = 0; rank < workers.size(); rank++) {
      DensityWorker& w = workers[rank];
      w.rank = static_cast<int64_t>(rank);
      w.size = static_cast<int64_t>(workers.size());
      w.barrier = &barrier;
      w.panel = arena.take(deepest * width);
      for (int i = 0; i < 4; i++) w.packed[i] = i < 2 || gradient ? arena.take(head) : nullptr;
      for (int i = 0; i < 2; i++) w.scores[i] = i < 1 || gradient ? arena.take(QUERIES * g.row_stride) : nullptr;
    }
    return arena.used();
  }

  DensityGroup group;
  Barrier barrier;
  std::vector<DensityWorker> workers;
  std::vector<Trace> traces;  // [block][layer]
  std::vector<float*> scales;  // by block, see DensityGroup::scale
  size_t bytes;
  Memory memory;
  int64_t next = 0;  // the group that the leader has taken
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
  g.hidden_stride = padded_stride(4 * s.channels);
  g.out_stride = padded_stride(g.out_dim);
  g.row_stride = padded_stride(s.tokens - 1);
  g.attention_scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  g.log_det = batch.log_det;
  g.gradient = batch.gradient;
  return g;
}

// As many teams as divide the threads, if none has more than a third above its share of the samples. A team of several
// threads waits at its barriers, and one that is the only one never does.
Division divide(const DensityGroup& g, int64_t samples, int threads, int64_t most_bytes,
                const std::function<size_t(const Division&)>& bytes) {
  const int64_t rows = g.sizes.tokens - 1, C = g.sizes.channels;
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

bool density_pass(const Sizes& sizes, const std::vector<DensityBlock>& blocks, const DensityBatch& batch, bool bf16,
                  const Kernels& kernels, int threads, int64_t most_bytes, int64_t& bytes, const Caller::Hook& hook) {
  const int64_t B = batch.samples, K = static_cast<int64_t>(blocks.size()), values = sizes.tokens * sizes.token_dim;
  threads = Pool::at_hand(threads);
  bytes = 0;
  std::fill_n(batch.log_det, B, 0.0);
  if (sizes.tokens == 1) {  // it passes unchanged
    for (int64_t k = 0; k < K; k++) std::copy_n(batch.x, B * values, batch.outputs + k * B * values);
    if (batch.gradient) std::transform(batch.x, batch.x + B * values, batch.gradient, [](float x) { return -x; });
    return true;
  }
  const DensityGroup like = shape(sizes, batch);
  const bool gradient = batch.gradient != nullptr;
  const size_t operand = bf16 && kernels.bf16_operands ? sizeof(uint16_t) : sizeof(float);
  const auto each = [&](const Division& d) { return Team(like, d, K, gradient, operand).bytes; };
  const Division division = divide(like, B, threads, most_bytes, each);
  const int64_t groups = (B + division.samples - 1) / division.samples;
  std::vector<std::unique_ptr<Team>> teams;
  for (int64_t i = 0; i < division.teams; i++) {
    teams.push_back(std::make_unique<Team>(like, division, K, gradient, operand));
    teams.back()->fetch_memory(division, K, gradient, operand);
    bytes += static_cast<int64_t>(teams.back()->bytes);
  }

  const DensityKernels& steps = *kernels.density;
  std::atomic<int64_t> next{0};
  Caller caller(hook);

  const auto job = [&](int thread) {
    Team& team = *teams[thread / division.size];
    const DensityWorker& w = team.workers[thread % division.size];
    unsigned parity = 0;
    // Whether to go on: the leader's word, so that all of a team stop at the same step.
    const auto proceed = [&] {
      if (thread == 0) caller.attend();
      if (w.rank == 0) team.stop[parity] = caller.stopped();
      if (w.size > 1) team.barrier.wait();
      return !team.stop[std::exchange(parity, parity ^ 1)];
    };
    // Its own copy of what is known of the group: which block is at hand changes.
    const auto through = [&](DensityGroup g) {
      const auto at_block = [&](int64_t k) {
        g.x = k == 0 ? batch.x : batch.outputs + (k - 1) * B * values;
        g.z = batch.outputs + k * B * values;
        g.scale = team.scales[k];
        return team.traces.data() + k * sizes.layers;
      };
      for (int64_t k = 0; k < K; k++) {
        const Trace* trace = at_block(k);
        g.stream = trace[0].in;
        steps.embed(g, blocks[k], w);
        for (int64_t i = 0; i < sizes.layers; i++) {
          if (!proceed()) return false;
          steps.layer[bf16](g, blocks[k].layer[i], trace[i], w);
        }
        g.stream = trace[sizes.layers - 1].out;
        steps.transform(g, blocks[k], w);
      }
      if (!gradient) return true;
      const int64_t begin = g.first * values, count = g.samples * values;
      const int64_t from = begin + count * w.rank / w.size, to = begin + count * (w.rank + 1) / w.size;
      std::transform(g.z + from, g.z + to, batch.gradient + from, [](float z) { return -z; });
      if (w.size > 1) team.barrier.wait();
      for (int64_t k = K - 1; k >= 0; k--) {
        const Trace* trace = at_block(k);
        steps.transform_backward(g, blocks[k], w);
        for (int64_t i = sizes.layers - 1; i >= 0; i--) {
          if (!proceed()) return false;
          steps.layer_backward[bf16](g, blocks[k].layer[i], trace[i], w);
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
      DensityGroup g = team.group;
      g.first = B * group / groups;
      g.samples = B * (group + 1) / groups - g.first;
      g.rows = g.samples * (sizes.tokens - 1);
      if (!through(g)) return;
    }
  };
  Pool::instance().run(static_cast<int>(division.teams * division.size), job, [&] {
    caller.attend();
    return !caller.stopped();
  });
  return caller.finish();
}

}  // namespace tarflow
