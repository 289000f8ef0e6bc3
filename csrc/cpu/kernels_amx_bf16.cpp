// The kernels for AVX-512 with AMX: products of bf16 in tile registers, and all else as for AVX-512 with BF16.
#if (defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__)) || TARFLOW_EMULATED
#if !TARFLOW_EMULATED
#include <immintrin.h>
#endif
#define NAME "amx_bf16"
#define KERNELS kernels_amx_bf16
#define VW 16
#define ACCUMULATORS 24
#define TARFLOW_DOT 1
#define TARFLOW_AMX 1
#define ACTIVATION uint16_t
#include "kernels.inl"
#else
#include "kernels.h"
namespace tarflow {
extern const Kernels* const kernels_amx_bf16;
const Kernels* const kernels_amx_bf16 = nullptr;
}  // namespace tarflow
#endif
