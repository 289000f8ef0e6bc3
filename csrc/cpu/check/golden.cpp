// A check of the engine against the published code, without Python: every block of the golden cases, which
// tests/golden/flat.py writes as plain numbers, by every instruction set in fp32, by one thread and by two. It prints how
// far each is off, and fails beyond 2e-4.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../dispatch.h"
#include "../engine.h"

using namespace tarflow;

namespace {

using Values = std::vector<float>;

constexpr double ALLOWED = 2e-4;  // GOLDEN in tests/tolerances.py

struct Problem {
  int64_t tokens, token_dim, channels, layers, head_dim, hidden, affine, samples, guided, guide_a, guide_b, embedded;

  Sizes sizes() const { return {tokens, token_dim, channels, layers, head_dim, hidden, affine}; }
  int64_t rows() const { return guided ? 2 * samples : samples; }
  int64_t values() const { return samples * tokens * token_dim; }
};

struct Reader {
  std::FILE* file;
  bool whole = true;

  Values take(int64_t n) {
    Values out(n);
    whole = std::fread(out.data(), sizeof(float), n, file) == static_cast<size_t>(n) && whole;
    return out;
  }
};

// Returns the largest difference from the published x, infinite where a value is not finite.
double run(const Problem& p, const Engine& engine, const Values& embedding, const Values& guidance,
           float unguided_scale, const Values& z, const Values& wanted, int threads) {
  const size_t bytes = engine.cache_elements() * p.rows() * sizeof(float);
  const Memory cache = allocate(bytes);
  std::memset(cache.get(), 0xff, bytes);  // NaNs
  Values x = z, log_det(p.samples * p.tokens);
  const std::vector<int64_t> start(p.samples, 1), stop(p.samples, p.tokens);
  Batch batch{};
  batch.z = z.data(), batch.x = x.data(), batch.token_log_det = log_det.data();
  batch.start = start.data(), batch.stop = stop.data(), batch.samples = p.samples, batch.widest = p.tokens;
  batch.keys_values = cache.get(), batch.unguided_scale = unguided_scale;
  batch.embedding = p.embedded ? embedding.data() : nullptr;
  batch.guidance = p.guided ? guidance.data() : nullptr;
  batch.guide_a = p.guide_a, batch.guide_b = p.guide_b;
  engine.run(batch, true, threads, [](int64_t) { return true; });
  double error = 0;
  for (size_t i = 0; i < x.size(); i++)
    error = std::isfinite(x[i]) ? std::max(error, std::fabs(double(x[i]) - wanted[i])) : INFINITY;
  return error;
}

}  // namespace

int main(int count, char** arguments) {
  Reader reader{count == 2 ? std::fopen(arguments[1], "rb") : nullptr};
  if (reader.file == nullptr) return std::puts("golden FILE: expected one that tests/golden/flat.py wrote"), 2;
  const std::vector<InstructionSet> sets = instruction_sets();
  std::vector<double> worst(sets.size());
  int blocks = 0;
  for (Problem p; std::fread(&p, sizeof p, 1, reader.file) == 1; blocks++) {
    const int64_t C = p.channels, D = p.token_dim, F = p.hidden, out = p.affine ? 2 * D : D;
    const Values in = reader.take(C * D), in_bias = reader.take(C), position = reader.take(p.tokens * C);
    const Values last = reader.take(out * C), last_bias = reader.take(out);
    std::vector<std::vector<Values>> layers(p.layers);
    for (auto& layer : layers)
      for (const int64_t n : {C, C, 3 * C * C, 3 * C, C * C, C, C, C, F * C, F, C * F, C})
        layer.push_back(reader.take(n));
    const auto layer = [&](int64_t i) {
      const auto& w = layers[i];
      return LayerSource{w[0].data(), w[1].data(), w[2].data(), w[3].data(), w[4].data(),  w[5].data(),
                         w[6].data(), w[7].data(), w[8].data(), w[9].data(), w[10].data(), w[11].data()};
    };
    const float unguided_scale = reader.take(1)[0];
    const Values embedding = reader.take(p.embedded ? p.rows() * padded_stride(C) : 0);
    const Values guidance = reader.take(p.guided ? p.tokens - 1 : 0);
    const Values z = reader.take(p.values()), wanted = reader.take(p.values());
    if (!reader.whole) return std::puts("the file ends within a block"), 2;
    const Source source{in.data(), in_bias.data(), position.data(), last.data(), last_bias.data(), layer};
    for (size_t i = 0; i < sets.size(); i++) {
      if (!sets[i].usable) continue;
      const Engine engine(p.sizes(), source, false, *sets[i].kernels, this_machine());
      for (const int threads : {1, 2})
        worst[i] = std::max(worst[i], run(p, engine, embedding, guidance, unguided_scale, z, wanted, threads));
    }
  }
  bool right = blocks > 0;
  for (size_t i = 0; i < sets.size(); i++) {
    if (!sets[i].usable) continue;
    std::printf("%-12s fp32  %d golden blocks off by %.0e%s\n", sets[i].kernels->name, blocks, worst[i],
                worst[i] <= ALLOWED ? "" : "  WRONG");
    right = right && worst[i] <= ALLOWED;
  }
  return right ? 0 : 1;
}
