// Vectors of VW fp32 lanes in GCC's and Clang's vector extension, and the elementary functions on them.
// Included by kernels.inl inside an anonymous namespace: every instruction set has its own copy.

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

using vf = float __attribute__((vector_size(VW * 4)));
using vi = int32_t __attribute__((vector_size(VW * 4)));
using vu = uint32_t __attribute__((vector_size(VW * 4)));
using vh = uint16_t __attribute__((vector_size(VW * 2)));
using bf16 = uint16_t;

INLINE vf load(const float* p) { vf v; __builtin_memcpy(&v, p, sizeof v); return v; }
INLINE vu load_u32(const void* p) { vu v; __builtin_memcpy(&v, p, sizeof v); return v; }
INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE vf splat(float x) { return x - vf{}; }  // x − 0 is x, −0 too
INLINE vf bits(vu v) { return (vf)v; }
INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }

INLINE vf low_half(vu pair) { return bits(pair << 16); }
INLINE vf high_half(vu pair) { return bits(pair & 0xffff0000u); }

// Returns one half of pairs, by a shuffle where shifts and masks would take what a tall tile has none of to spare: the
// ports that multiply, and registers.
INLINE vf half_beside_products(vu pair, int half) {
#if defined(__AVX2__) && VW == 8
  static constexpr uint32_t order[2][8] = {  // bytes; 0x80 gives zero
      {0x01008080, 0x05048080, 0x09088080, 0x0d0c8080, 0x01008080, 0x05048080, 0x09088080, 0x0d0c8080},
      {0x03028080, 0x07068080, 0x0b0a8080, 0x0f0e8080, 0x03028080, 0x07068080, 0x0b0a8080, 0x0f0e8080}};
  vf out;
  asm("vpshufb %2, %1, %0" : "=x"(out) : "x"(pair), "m"(order[half]));
  return out;
#else
  return half ? high_half(pair) : low_half(pair);
#endif
}

INLINE vf load(const bf16* p) {
  vh v;
  __builtin_memcpy(&v, p, sizeof v);
  return bits(__builtin_convertvector(v, vu) << 16);
}

// Returns the bits of x as bf16, rounded to nearest even; a NaN stays one.
INLINE vu to_bf16(vf x) {
  vu u = (vu)x;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (vu)(x != x ? (vi)vu(vu{} + 0x7fc0u) : (vi)rounded);
}

INLINE void store(bf16* p, vf x) {
#if TARFLOW_DOT && defined(__aarch64__)
  const bfloat16x4_t v = vcvt_bf16_f32((float32x4_t)x);
#elif TARFLOW_DOT && !TARFLOW_EMULATED
  const __m256bh v = _mm512_cvtneps_pbh((__m512)x);
#else
  vh v = __builtin_convertvector(to_bf16(x), vh);
#endif
  __builtin_memcpy(p, &v, sizeof v);
}

#if TARFLOW_DOT
INLINE vu splat_pair(const bf16* p) {
  uint32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return vu{} + pair;
}

// Adds the dot products of pairs of bf16 to a; x86-64 adds those of the odd elements first.
INLINE vf add_dots(vf a, vu x, vu y) {
#if TARFLOW_EMULATED
  a += high_half(x) * high_half(y);
  return a + low_half(x) * low_half(y);
#elif defined(__aarch64__)
  return (vf)vbfdotq_f32((float32x4_t)a, (bfloat16x8_t)x, (bfloat16x8_t)y);
#else
  return (vf)_mm512_dpbf16_ps((__m512)a, (__m512bh)x, (__m512bh)y);
#endif
}
#endif

// Sets the even (half 0) or odd (half 1) elements of 2·VW to x.
INLINE void store_half(bf16* p, vf x, int64_t half) {
  bf16 t[VW];
  store(t, x);
  vh v;
  __builtin_memcpy(&v, t, sizeof v);
  vu u = __builtin_convertvector(v, vu), old = load_u32(p);
  u = half ? (old & 0xffffu) | (u << 16) : (old & 0xffff0000u) | u;
  __builtin_memcpy(p, &u, sizeof u);
}

INLINE vi lanes() {
  vi v;
  for (int i = 0; i < VW; i++) v[i] = i;
  return v;
}

// Sums the lanes in a fixed order: halves are added until one lane is left.
INLINE float sum(vf v) {
  float t[VW];
  store(t, v);
  for (int half = VW / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) t[i] += t[i + half];
  return t[0];
}

INLINE float largest(vf v) {
  float t[VW];
  store(t, v);
  for (int half = VW / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) t[i] = t[i] > t[i + half] ? t[i] : t[i + half];
  return t[0];
}

// exp(x) for x <= 0 (softmax), 0 below −87. x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial for exp(r): the
// minimax fit of degree 6 (least squares in a Chebyshev basis, weights iterated until the error is level), 2e-9.
INLINE vf exp_negative(vf x) {
  const float shift = 12582912.0f;  // 1.5 · 2²³: adding it rounds to an integer, which stands in the low bits
  vf clamped = vmax(x, splat(-87.0f));
  vf n = clamped * 1.44269504f + shift;
  vi exponent = (vi)n << 23;
  n -= shift;
  vf r = clamped - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  vf p = splat(0.00138368318f);
  p = p * r + 0.00837482419f;
  p = p * r + 0.0416682251f;
  p = p * r + 0.166664198f;
  p = p * r + 0.499999911f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  vf y = (vf)((vi)p + exponent);
  y = x < -87.0f ? vf{} : y;
  return x != x ? x : y;
}

// GELU(x) = x Φ(x) = max(x, 0) − G(|x|), G(t) = t/2 · erfc(t/√2), which is below 5e-8 from t = 5.65 on. G is a
// polynomial of degree 17 in u = 2t/5.65 − 1, fitted like the one above to 3.3e-8; with fp32 rounding the result is
// within 2e-7 and half a unit in its last place. (x + |x|)/2 is max(x, 0) that lets a NaN through.
INLINE vf gelu(vf x) {
  vf t = bits((vu)x & 0x7fffffffu);
  vf clamped = t < 5.65f ? t : splat(5.65f);
  vf u = clamped * 0.353982301f - 1.0f;
  vf p = splat(0.0112885265f);
  const float coefficients[] = {-0.01886517f,  -0.0551330596f, 0.123367257f,  0.0712659061f, -0.3378281f,  0.136384472f,
                                0.411654413f,  -0.559486747f,  0.0416508168f, 0.569690287f,  -0.634298623f, 0.189913362f,
                                0.231568828f,  -0.311719358f,  0.176072195f,  -0.0522033684f, 0.00667839171f};
#pragma GCC unroll 17
  for (int i = 0; i < 17; i++) p = p * u + coefficients[i];
  return (x + t) * 0.5f - p;
}

// GELU′(x) = Φ(x) + x φ(x): 1 − G′(x) for x >= 0, else G′(|x|), with G′(t) = ½ erfc(t/√2) − t φ(t) for G as above. A
// polynomial of degree 18 in the same u, fitted in the same way; within 4e-7 in fp32. A NaN stays one.
INLINE vf gelu_slope(vf x) {
  vf t = bits((vu)x & 0x7fffffffu);
  vf u = (t < 5.65f ? t : splat(5.65f)) * 0.353982301f - 1.0f;
  vf p = splat(-0.034772329f);
  const float coefficients[] = {0.0152271707f, 0.220774531f,  -0.165786222f, -0.572077155f, 0.704539359f,  0.602551162f,
                                -1.51239717f,  0.374203324f,  1.49335814f,   -1.73000216f,  0.108490534f,  1.4018209f,
                                -1.34589422f,  0.337042332f,  0.327807963f,  -0.33106187f,  0.124654189f,  -0.0184788797f};
#pragma GCC unroll 18
  for (int i = 0; i < 18; i++) p = p * u + coefficients[i];
  vf y = x < 0.0f ? p : 1.0f - p;
  return x != x ? x : y;
}
