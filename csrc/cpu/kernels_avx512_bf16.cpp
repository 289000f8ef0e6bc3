// The kernels for AVX-512 with BF16: 512-bit vectors, and dot products of bf16 pairs.
#if defined(__AVX512BF16__)
#include <immintrin.h>
#define NAME "avx512_bf16"
#define KERNELS kernels_avx512_bf16
#define VW 16
#define ACCUMULATORS 24
#define TARFLOW_DOT 1
#define ACTIVATION uint16_t
#include "kernels.inl"
#else
#include "kernels.h"
namespace tarflow {
extern const Kernels* const kernels_avx512_bf16;
const Kernels* const kernels_avx512_bf16 = nullptr;
}  // namespace tarflow
#endif
