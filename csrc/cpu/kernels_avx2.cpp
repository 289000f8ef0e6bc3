// The kernels for AVX2: 256-bit vectors with fused multiply-add.
#if defined(__AVX2__) && defined(__FMA__)
#define NAME "avx2"
#define KERNELS kernels_avx2
#define VW 8
#define ACCUMULATORS 12
#define TARFLOW_DOT 0
#define ACTIVATION float
#include "kernels.inl"
#else
#include "kernels.h"
namespace tarflow {
extern const Kernels* const kernels_avx2;
const Kernels* const kernels_avx2 = nullptr;
}  // namespace tarflow
#endif
