// The kernels for AVX-512: 512-bit vectors.
#if defined(__AVX512F__)
#define NAME "avx512"
#define KERNELS kernels_avx512
#define VW 16
#define ACCUMULATORS 24
#define TARFLOW_DOT 0
#define ACTIVATION float
#include "kernels.inl"
#else
#include "kernels.h"
namespace tarflow {
extern const Kernels* const kernels_avx512;
const Kernels* const kernels_avx512 = nullptr;
}  // namespace tarflow
#endif
