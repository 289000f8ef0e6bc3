// A check of the engine without Python, for machines that are emulated and for ThreadSanitizer: a block of random weights
// gives the same bits by one thread and by three, to two callers at once, for the caches of this machine and for tiny
// ones, token by token and in windows. It prints the sum of the results of every instruction set that is usable, to be
// compared across machines.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../dispatch.h"
#include "../engine.h"

using namespace tarflow;

namespace {

using Values = std::vector<float>;

constexpr int64_t TOKENS = 9, DIM = 4, CHANNELS = 64, LAYERS = 2, HIDDEN = 256, SAMPLES = 23;
const Machine TINY{{8 << 10, 1}, {32 << 10, 1}, {128 << 10, 64}, 0.0, "made up"};

// Returns n values between −scale and scale.
Values draw(int64_t n, float scale) {
  static std::mt19937 random(1);
  Values out(n);
  for (float& x : out) x = scale * (static_cast<int32_t>(random()) / 2147483648.0f);
  return out;
}

struct Weights {
  Values in = draw(CHANNELS * DIM, 0.5f), in_bias = draw(CHANNELS, 0.2f), position = draw(TOKENS * CHANNELS, 0.3f);
  Values out = draw(2 * DIM * CHANNELS, 0.05f), out_bias = draw(2 * DIM, 0.1f);
  Values norm = draw(CHANNELS, 1.0f), bias = draw(HIDDEN, 0.1f), qkv = draw(3 * CHANNELS * CHANNELS, 0.2f);
  Values proj = draw(CHANNELS * CHANNELS, 0.2f), fc1 = draw(HIDDEN * CHANNELS, 0.2f),
         fc2 = draw(CHANNELS * HIDDEN, 0.1f);

  Source source() const {
    const LayerSource layer{norm.data(), bias.data(), qkv.data(), bias.data(), proj.data(), bias.data(),
                            norm.data(), bias.data(), fc1.data(), bias.data(), fc2.data(),  bias.data()};
    return {in.data(), in_bias.data(), position.data(), out.data(), out_bias.data(), [=](int64_t) { return layer; }};
  }
};

// Returns x. A window pass is repeated until the last token is made of final ones.
Values inverse(const Engine& engine, const Values& z, bool sequential, int threads) {
  const size_t bytes = engine.cache_elements() * SAMPLES * sizeof(float);
  const Memory cache = allocate(bytes);
  std::memset(cache.get(), 0xff, bytes);  // NaNs
  Values x = z, log_det(SAMPLES * TOKENS);
  const std::vector<int64_t> start(SAMPLES, 1), stop(SAMPLES, TOKENS);
  Batch batch{};
  batch.z = z.data(), batch.x = x.data(), batch.token_log_det = log_det.data();
  batch.start = start.data(), batch.stop = stop.data(), batch.samples = SAMPLES, batch.widest = TOKENS;
  batch.keys_values = cache.get(), batch.unguided_scale = 1.0f;
  for (int64_t pass = 0; pass < (sequential ? 1 : TOKENS - 1); pass++)
    engine.run(batch, sequential, threads, [](int64_t) { return true; });
  return x;
}

}  // namespace

int main() {
  const Sizes sizes{TOKENS, DIM, CHANNELS, LAYERS, 16, HIDDEN, 1};
  const Weights weights;
  const Values z = draw(SAMPLES * TOKENS * DIM, 1.0f);
  bool same = true;
  for (const InstructionSet& set : instruction_sets()) {
    for (const bool bf16 : {false, true}) {
      if (!set.usable) continue;
      const Engine engine(sizes, weights.source(), bf16, *set.kernels, this_machine());
      const Engine tiny(sizes, weights.source(), bf16, *set.kernels, TINY);
      const Values wanted = inverse(engine, z, true, 1);
      double sum = 0;
      for (const float x : wanted) sum += x;
      bool equal = std::isfinite(sum);
      Values beside;
      std::thread caller([&] { beside = inverse(engine, z, false, 3); });
      const Values meanwhile = inverse(tiny, z, true, 3);
      caller.join();
      for (const Values& got : {inverse(tiny, z, true, 1), meanwhile, beside, inverse(tiny, z, false, 2)})
        equal = equal && std::memcmp(got.data(), wanted.data(), got.size() * sizeof(float)) == 0;
      std::printf("%-12s %s  sum %.5f  %s\n", set.kernels->name, bf16 ? "bf16" : "fp32", sum, equal ? "" : "DIFFERS");
      same = same && equal;
    }
  }
  return same ? 0 : 1;
}
