// A check of the engine without Python, for machines that are emulated and for ThreadSanitizer: a block of random weights
// gives the same bits by one thread and by three, to two callers at once, for the caches of this machine and for tiny
// ones, token by token and in windows, for few samples and for all; a NaN stays in its sample. The density pass gives the
// same bits by one thread and by three, and takes x back to z. Every instruction set is about where the first one is in
// fp32. It prints how far each is off, and the sum of its results, to be compared across machines.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../density_pass.h"
#include "../dispatch.h"
#include "../engine.h"

using namespace tarflow;

namespace {

using Values = std::vector<float>;

// Channels and hidden units are no multiple of what any instruction set multiplies at once.
constexpr int64_t TOKENS = 9, DIM = 4, HEAD = 17, CHANNELS = 2 * HEAD, LAYERS = 2, HIDDEN = 265, SAMPLES = 23;
constexpr Sizes SIZES{TOKENS, DIM, CHANNELS, LAYERS, HEAD, HIDDEN, 1};
const Machine TINY{{8 << 10, 1}, {64 << 10, 1}, {128 << 10, 64}, 0.0, "made up"};

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

  LayerSource layer() const {
    return {norm.data(), bias.data(), qkv.data(), bias.data(), proj.data(), bias.data(),
            norm.data(), bias.data(), fc1.data(), bias.data(), fc2.data(),  bias.data()};
  }
  Source source() const {
    return {in.data(),  in_bias.data(),  position.data(),
            out.data(), out_bias.data(), [each = layer()](int64_t) { return each; }};
  }
};

// Returns x of the first samples. A window pass is repeated until the last token is made of final ones.
Values inverse(const Engine& engine, const Values& all, bool sequential, int threads, int64_t samples = SAMPLES) {
  const Values z(all.begin(), all.begin() + samples * TOKENS * DIM);
  const size_t bytes = engine.cache_elements() * samples * sizeof(float);
  const Memory cache = allocate(bytes);
  std::memset(cache.get(), 0xff, bytes);  // NaNs
  Values x = z, log_det(samples * TOKENS);
  const std::vector<int64_t> start(samples, 1), stop(samples, TOKENS);
  Batch batch{};
  batch.z = z.data(), batch.x = x.data(), batch.token_log_det = log_det.data();
  batch.start = start.data(), batch.stop = stop.data(), batch.samples = samples, batch.widest = TOKENS;
  batch.keys_values = cache.get(), batch.unguided_scale = 1.0f;
  for (int64_t pass = 0; pass < (sequential ? 1 : TOKENS - 1); pass++)
    engine.run(batch, sequential, threads, [](int64_t) { return true; });
  return x;
}

// Returns z of all samples, and the gradient of their log-density.
Values density(const Weights& w, const Kernels& kernels, bool bf16, const Values& x, int threads) {
  const std::vector<LayerSource> layers(LAYERS, w.layer());
  const DensityBlock block{SIZES,   w.in.data(),   w.in_bias.data(), w.position.data(), w.out.data(), w.out_bias.data(),
                           nullptr, layers.data(), nullptr};
  Values out(2 * x.size());
  std::vector<double> log_det(SAMPLES);
  int64_t bytes = 0;
  density_pass({block}, {SAMPLES, x.data(), out.data(), log_det.data(), out.data() + x.size()}, bf16, kernels, threads,
               int64_t{1} << 30, bytes, [](int64_t) { return true; });
  return out;
}

// Returns whether a NaN in the first token of one sample is in every token that follows it, and in no other sample.
bool keeps_nan(const Engine& engine, const Values& z, const Values& wanted) {
  constexpr size_t each = TOKENS * DIM, poisoned = 4;
  Values with_nan = z;
  with_nan[poisoned * each] = std::nanf("");
  const Values got = inverse(engine, with_nan, true, 1);
  bool right = true;
  for (size_t i = 0; i < got.size(); i++) {
    if (i / each != poisoned)
      right = right && got[i] == wanted[i];
    else if (i % each >= DIM)
      right = right && std::isnan(got[i]);
  }
  return right;
}

bool same(const Values& a, const Values& b) { return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0; }

// Returns by how much of b's norm a is off.
double off(const Values& a, const Values& b) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < b.size(); i++) error += std::pow(a[i] - b[i], 2), norm += std::pow(b[i], 2);
  return std::sqrt(error / norm);
}

}  // namespace

int main() {
  const Weights weights;
  const Values z = draw(SAMPLES * TOKENS * DIM, 1.0f);
  Values plain, plain_density;
  bool right = true;
  for (const InstructionSet& set : instruction_sets()) {
    for (const bool bf16 : {false, true}) {
      if (!set.usable) continue;
      const Engine engine(SIZES, weights.source(), bf16, *set.kernels, this_machine());
      const Engine tiny(SIZES, weights.source(), bf16, *set.kernels, TINY);
      const Values wanted = inverse(engine, z, true, 1);
      Values beside;
      std::thread caller([&] { beside = inverse(engine, z, false, 3); });
      const Values meanwhile = inverse(tiny, z, true, 3);
      caller.join();
      bool equal = true;
      for (const Values& got : {inverse(tiny, z, true, 1), meanwhile, beside, inverse(tiny, z, false, 2)})
        equal = equal && same(wanted, got);
      for (const int64_t samples : {1, 2, 3, 5, 7, 11, 13})
        equal = equal && same(inverse(engine, z, true, 1, samples), wanted);
      const Values dense = density(weights, *set.kernels, bf16, wanted, 1);
      equal = equal && same(dense, density(weights, *set.kernels, bf16, wanted, 3));

      if (plain.empty()) plain = wanted, plain_density = dense;
      const double error = off(wanted, plain) + off(dense, z) + off(dense, plain_density);
      const bool near = error < (bf16 ? 1e-2 : 1e-5) && keeps_nan(engine, z, wanted);
      double sum = 0;
      for (const float x : wanted) sum += x;
      std::printf("%-12s %s  sum %.5f  off by %.0e  %s%s\n", set.kernels->name, bf16 ? "bf16" : "fp32", sum, error,
                  equal ? "" : "DIFFERS ", near ? "" : "WRONG");
      right = right && equal && near;
    }
  }
  return right ? 0 : 1;
}
