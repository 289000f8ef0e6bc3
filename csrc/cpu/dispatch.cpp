#include "dispatch.h"

#include <algorithm>
#include <stdexcept>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace tarflow {

namespace {

// Returns whether this process may use AMX's tile registers, for which Linux has to be asked first. No other system that
// the engine is built for gives them to whoever does not ask in ways of its own.
[[maybe_unused]] bool tiles_usable() {
#if TARFLOW_EMULATED  // check/amx.sh
  return true;
#elif defined(__x86_64__) && defined(__linux__)
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d = 0;
  if (!__builtin_cpu_supports("avx512bf16") || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d & bf16) || !(d & tile)) return false;
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

// Returns whether an ARM processor has products of bf16. Windows does not tell.
[[maybe_unused]] bool arm_bf16_usable() {
#if defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long bf16 = 1ul << 14;  // HWCAP2_BF16
  return getauxval(AT_HWCAP2) & bf16;
#elif defined(__aarch64__) && defined(__APPLE__)
  int found = 0;
  size_t size = sizeof found;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &size, nullptr, 0) == 0 && found;
#else
  return false;
#endif
}

}  // namespace

std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> found{{kernels_portable, true}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (kernels_avx2) found.push_back({kernels_avx2, avx2});
  if (kernels_avx512) found.push_back({kernels_avx512, avx512});
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
  if (kernels_avx512_bf16) found.push_back({kernels_avx512_bf16, pairs});
  // Intel's processors make a dot product of 512 bits every other cycle, and four fused multiply-adds meanwhile, which
  // do twice as much, and round no activations. AMD's make as many of one as of the other.
  if (__builtin_cpu_is("intel") && kernels_avx512 && kernels_avx512_bf16) std::swap(found.back(), found.end()[-2]);
  static const bool tiles = tiles_usable();
  if (kernels_amx_bf16) found.push_back({kernels_amx_bf16, tiles});
#elif defined(__aarch64__)
  if (kernels_neon_bf16) found.push_back({kernels_neon_bf16, arm_bf16_usable()});
#endif
  return found;
}

const Kernels& kernels_named(const std::string& name) {
  for (const InstructionSet& set : instruction_sets())
    if (name == set.kernels->name && set.usable) return *set.kernels;
  throw std::invalid_argument("no instruction set " + name + " here");
}

}  // namespace tarflow
