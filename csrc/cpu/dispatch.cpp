#include "dispatch.h"

#include <algorithm>
#include <stdexcept>

namespace tarflow {

std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> found{{kernels_portable, true}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (kernels_avx2) found.push_back({kernels_avx2, avx2});
  if (kernels_avx512) found.push_back({kernels_avx512, avx512});
  if (kernels_avx512_bf16) found.push_back({kernels_avx512_bf16, avx512 && __builtin_cpu_supports("avx512bf16")});
  // Intel's processors make a dot product of 512 bits every other cycle, and four fused multiply-adds meanwhile, which
  // do twice as much, and round no activations. AMD's make as many of one as of the other.
  if (__builtin_cpu_is("intel") && kernels_avx512 && kernels_avx512_bf16) std::swap(found.back(), found.end()[-2]);
#endif
  return found;
}

const Kernels& kernels_named(const std::string& name) {
  for (const InstructionSet& set : instruction_sets())
    if (name == set.kernels->name && set.usable) return *set.kernels;
  throw std::invalid_argument("no instruction set " + name + " here");
}

}  // namespace tarflow
