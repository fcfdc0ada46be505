// Storage types of 16 bits and what they accumulate in. Included by host code, by device code under
// nvcc and NVRTC, and by the host harness, so it needs no CUDA header.
#pragma once

#if defined(__CUDACC_RTC__)
// NVRTC brings no standard headers along.
using int32_t = int;
using uint32_t = unsigned int;
using uint16_t = unsigned short;
using int64_t = long;
using uint64_t = unsigned long;
static_assert(sizeof(int64_t) == 8);
#else
#include <cstdint>
#include <cstring>
#endif

#if defined(__CUDACC__)
#define PYNAR_HOST_DEVICE __host__ __device__
#else
#define PYNAR_HOST_DEVICE
#endif

namespace pynar {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <typename T>
struct AccumulationType {
  using type = float;
};
template <>
struct AccumulationType<double> {
  using type = double;
};
template <typename T>
using accumulation_t = typename AccumulationType<T>::type;

PYNAR_HOST_DEVICE inline float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

PYNAR_HOST_DEVICE inline uint32_t bits_from_float(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}

PYNAR_HOST_DEVICE inline float to_accumulation(float x) {
  return x;
}
PYNAR_HOST_DEVICE inline double to_accumulation(double x) {
  return x;
}

PYNAR_HOST_DEVICE inline float to_accumulation(BFloat16 x) {
  return float_from_bits(static_cast<uint32_t>(x.bits) << 16);
}

PYNAR_HOST_DEVICE inline float to_accumulation(Half x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  // Moving the exponent field up and scaling by 2^112 re-biases it and makes subnormals normal;
  // infinities and NaNs, all ones in the exponent, need theirs set.
  const float scaled = float_from_bits(magnitude) * float_from_bits(0x77800000);
  uint32_t bits;
  memcpy(&bits, &scaled, sizeof(bits));
  if ((x.bits & 0x7c00) == 0x7c00) bits = magnitude | 0x7f800000;
  return float_from_bits(bits | sign);
#endif
}

// The nearest value of a storage type, ties to even: from_accumulation<T>(x).
template <typename T>
PYNAR_HOST_DEVICE inline T from_accumulation(accumulation_t<T> x) {
  return x;
}

template <>
PYNAR_HOST_DEVICE inline BFloat16 from_accumulation<BFloat16>(float x) {
  const uint32_t bits = bits_from_float(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
PYNAR_HOST_DEVICE inline Half from_accumulation<Half>(float x) {
#if defined(__CUDA_ARCH__)
  Half value;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
  return value;
#else
  const uint32_t bits = bits_from_float(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520, from where on the nearest is infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // 2^-14: a step of 1/2's is that of a subnormal result
    half = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
#endif
}

}  // namespace pynar
