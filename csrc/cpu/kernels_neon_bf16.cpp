// The kernels for 64-bit ARM with BF16 (Armv8.6-A): 128-bit vectors, and products of bf16 by BFMMLA and BFDOT.
#if defined(__aarch64__) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#define NAME "neon_bf16"
#define KERNELS kernels_neon_bf16
#define VW 4
#define ACCUMULATORS 24
#define TARFLOW_DOT 1
#define TARFLOW_MMLA 1
#define ACTIVATION uint16_t
#include "kernels.inl"
#else
#include "kernels.h"
namespace tarflow {
extern const Kernels* const kernels_neon_bf16;
const Kernels* const kernels_neon_bf16 = nullptr;
}  // namespace tarflow
#endif
