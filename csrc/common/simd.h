// Vectors for the inner loops of the CPU kernels. Compiled once for each instruction set, in a
// namespace of its name (PYNAR_ISA), so that no two translation units share an inline function
// compiled for different processors; for the same reason nothing here uses the standard library.
//
// Simd<T> holds kLanes values of the accumulation type T. Loads convert from the storage types.
// NaN goes through every operation except max(a, b), which returns b where either is NaN.
#pragma once

#ifndef PYNAR_ISA
#error "common/simd.h is for the parts of a file that are compiled per instruction set"
#endif

#include "common/scalar.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pynar::PYNAR_ISA {

// Coefficients of 2^f on [-1/2, 1/2] for the least relative error, 9e-8, with 2^0 exactly 1.
constexpr float kExp2Coefficients[6] = {
    1.f, 6.931470037e-01f, 2.402224243e-01f, 5.550733581e-02f, 9.671512991e-03f, 1.326472731e-03f};
// Arguments of exp2() are raised to this, which keeps results normal: 2^-125 stands for zero.
constexpr float kExp2Lowest = -125.f;

// Any type, any processor: a short array that the compiler turns into vectors where it can.
template <typename T>
struct Simd {
  static constexpr int kLanes = 8;
  T lane[kLanes];

  static Simd broadcast(T x) {
    Simd v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = x;
    return v;
  }
  template <typename Storage>
  static Simd load(const Storage* p) {
    Simd v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = to_accumulation(p[i]);
    return v;
  }
};

template <typename T>
inline Simd<T> add(Simd<T> a, Simd<T> b) {
  for (int i = 0; i < Simd<T>::kLanes; ++i) a.lane[i] += b.lane[i];
  return a;
}

template <typename T>
inline Simd<T> sub(Simd<T> a, Simd<T> b) {
  for (int i = 0; i < Simd<T>::kLanes; ++i) a.lane[i] -= b.lane[i];
  return a;
}

template <typename T>
inline Simd<T> mul(Simd<T> a, Simd<T> b) {
  for (int i = 0; i < Simd<T>::kLanes; ++i) a.lane[i] *= b.lane[i];
  return a;
}

template <typename T>
inline Simd<T> max(Simd<T> a, Simd<T> b) {
  for (int i = 0; i < Simd<T>::kLanes; ++i)
    a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}

// Whether any lane of a is greater than that of b; false where either is NaN.
template <typename T>
inline bool any_greater(Simd<T> a, Simd<T> b) {
  int any = 0;
  for (int i = 0; i < Simd<T>::kLanes; ++i) any |= a.lane[i] > b.lane[i];
  return any != 0;
}

template <typename T>
inline T reduce_max(Simd<T> a) {
  T m = a.lane[0];
  for (int i = 1; i < Simd<T>::kLanes; ++i) m = a.lane[i] > m ? a.lane[i] : m;
  return m;
}

template <typename T>
inline T reduce_add(Simd<T> a) {
  for (int n = Simd<T>::kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) a.lane[i] += a.lane[i + n];
  }
  return a.lane[0];
}

// exp(x - shift), for x <= shift or NaN; results below 2^-125 come out as 2^-125.
inline Simd<float> exp_shifted(Simd<float> x, Simd<float> shift);

inline Simd<double> exp_shifted(Simd<double> x, Simd<double> shift) {
  for (int i = 0; i < Simd<double>::kLanes; ++i) {
    x.lane[i] = __builtin_exp(x.lane[i] - shift.lane[i]);
  }
  return x;
}

constexpr float kLog2E = 1.44269504f;

#if defined(__AVX512F__)

template <>
struct Simd<float> {
  static constexpr int kLanes = 16;
  __m512 v;

  static Simd broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Simd load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Simd load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static Simd load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
};

template <>
inline Simd<float> add(Simd<float> a, Simd<float> b) {
  return {_mm512_add_ps(a.v, b.v)};
}
template <>
inline Simd<float> sub(Simd<float> a, Simd<float> b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
template <>
inline Simd<float> mul(Simd<float> a, Simd<float> b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
template <>
inline Simd<float> max(Simd<float> a, Simd<float> b) {
  return {_mm512_max_ps(a.v, b.v)};
}
template <>
inline bool any_greater(Simd<float> a, Simd<float> b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0;
}
template <>
inline float reduce_max(Simd<float> a) {
  return _mm512_reduce_max_ps(a.v);
}
template <>
inline float reduce_add(Simd<float> a) {
  return _mm512_reduce_add_ps(a.v);
}

inline Simd<float> exp_shifted(Simd<float> x, Simd<float> shift) {
  const float* c = kExp2Coefficients;
  __m512 y = _mm512_mul_ps(_mm512_sub_ps(x.v, shift.v), _mm512_set1_ps(kLog2E));
  y = _mm512_max_ps(_mm512_set1_ps(kExp2Lowest), y);
  const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(y, n);
  __m512 p = _mm512_set1_ps(c[5]);
  for (int i = 4; i >= 0; --i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c[i]));
  return {_mm512_scalef_ps(p, n)};
}

#elif defined(__AVX2__)

template <>
struct Simd<float> {
  static constexpr int kLanes = 8;
  __m256 v;

  static Simd broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static Simd load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Simd load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static Simd load(const Half* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
};

template <>
inline Simd<float> add(Simd<float> a, Simd<float> b) {
  return {_mm256_add_ps(a.v, b.v)};
}
template <>
inline Simd<float> sub(Simd<float> a, Simd<float> b) {
  return {_mm256_sub_ps(a.v, b.v)};
}
template <>
inline Simd<float> mul(Simd<float> a, Simd<float> b) {
  return {_mm256_mul_ps(a.v, b.v)};
}
template <>
inline Simd<float> max(Simd<float> a, Simd<float> b) {
  return {_mm256_max_ps(a.v, b.v)};
}
template <>
inline bool any_greater(Simd<float> a, Simd<float> b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)) != 0;
}
template <>
inline float reduce_max(Simd<float> a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
template <>
inline float reduce_add(Simd<float> a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

inline Simd<float> exp_shifted(Simd<float> x, Simd<float> shift) {
  const float* c = kExp2Coefficients;
  __m256 y = _mm256_mul_ps(_mm256_sub_ps(x.v, shift.v), _mm256_set1_ps(kLog2E));
  y = _mm256_max_ps(_mm256_set1_ps(kExp2Lowest), y);
  const __m256 n = _mm256_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(y, n);
  __m256 p = _mm256_set1_ps(c[5]);
  for (int i = 4; i >= 0; --i) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(c[i]));
  // p lies in [0.7, 1.5] and n in [-125, 0], so adding n to the exponent field stays in range; a
  // NaN has all ones there, and an n of 0x80000000 shifted left leaves it alone.
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent))};
}

#else

inline Simd<float> exp_shifted(Simd<float> x, Simd<float> shift) {
  const float* c = kExp2Coefficients;
  // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, whose value the low bits hold.
  constexpr float kRound = 12582912.f;
  for (int i = 0; i < Simd<float>::kLanes; ++i) {
    float y = (x.lane[i] - shift.lane[i]) * kLog2E;
    y = kExp2Lowest > y ? kExp2Lowest : y;
    const float rounded = y + kRound;
    const float f = y - (rounded - kRound);
    const float p = ((((c[5] * f + c[4]) * f + c[3]) * f + c[2]) * f + c[1]) * f + c[0];
    uint32_t p_bits;
    uint32_t rounded_bits;
    memcpy(&p_bits, &p, sizeof(p_bits));
    memcpy(&rounded_bits, &rounded, sizeof(rounded_bits));
    // For a NaN both bit patterns are its own; the low bits of a quiet NaN are zero as a rule, but
    // a payload must not turn it into a number.
    const float scaled = float_from_bits(p_bits + (rounded_bits << 23));
    x.lane[i] = y == y ? scaled : y;
  }
  return x;
}

#endif

}  // namespace pynar::PYNAR_ISA
