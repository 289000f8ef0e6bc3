// The kernels for any machine: 128-bit vectors, SSE2 on x86-64, NEON with fused multiply-add on aarch64.
#ifdef __aarch64__
#define NAME "neon"
#define ACCUMULATORS 24
#else
#define NAME "portable"
#define ACCUMULATORS 12
#endif
#define KERNELS kernels_portable
#define VW 4
#define TARFLOW_DOT 0
#define ACTIVATION float
#include "kernels.inl"
