// The 16-bit floating-point types of the device, for host compilers that have none. Rounding is to nearest, ties to
// even.
#pragma once

#include <cstdint>
#include <cstring>

namespace tarflow {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

template <class T>
inline T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline bf16 from_float<bf16>(float value) {
  const auto bits = bits_as<uint32_t>(value);
  if (value != value) return {0x7fff};  // as CUDA's conversion does, whichever NaN it is
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline fp16 from_float<fp16>(float value) {
  const uint32_t bits = bits_as<uint32_t>(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  uint32_t half;
  if (size > 0x7f800000) return {0x7fff};
  if (size >= 0x47800000) {
    half = 0x7c00;  // 65536 and more
  } else if (size < 0x38800000) {
    half = bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - bits_as<uint32_t>(0.5f);  // subnormal: the sum rounds it
  } else {
    half = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

// a / b, for positive numbers, as far off as __fdividef may be: by two units in the last place, one way or the other.
inline float quotient(float a, float b) {
  const auto bits = bits_as<uint32_t>(a / b);
  return bits_as<float>(bits & 1 ? bits + 2 : bits - 2);
}

inline float to_float(float value) { return value; }

inline float to_float(bf16 value) { return bits_as<float>(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(fp16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, size = value.bits & 0x7fff;
  if (size >= 0x7c00) return bits_as<float>(sign | 0x7f800000 | size << 13);
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(size << 13) * 0x1p112f));
}

}  // namespace tarflow
