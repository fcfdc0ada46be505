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
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pynar::PYNAR_ISA {

// Coefficients of 2^f on [0, 1) for the least relative error with 2^0 exactly 1. kFull: 9e-8.
// kShort: 3e-6, for arguments that came with 11 bits or fewer.
enum class Precision { kFull, kShort };

template <Precision>
struct Exp2;
template <>
struct Exp2<Precision::kFull> {
  static constexpr int kDegree = 5;
  static constexpr float kCoefficients[] = {1.f,
                                            6.931512952e-01f,
                                            2.401644439e-01f,
                                            5.579991266e-02f,
                                            9.017030708e-03f,
                                            1.867130050e-03f};
};
template <>
struct Exp2<Precision::kShort> {
  static constexpr int kDegree = 4;
  static constexpr float kCoefficients[] = {1.f, 6.930448413e-01f, 2.412801981e-01f,
                                            5.224247277e-02f, 1.342668477e-02f};
};

// Where the exponent of a result is set by integer arithmetic, it must stay that of a normal
// number.
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
  template <typename Storage>
  void store(Storage* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = from_accumulation<Storage>(lane[i]);
  }
};

// Reads 16 bytes of each of kLanes rows, that is kCount neighbouring elements, as one vector for
// each element.
template <typename T, typename Storage>
struct Columns {
  static constexpr int kCount = 16 / sizeof(Storage);
  static void load(const Storage* const* rows, int64_t offset, Simd<T> (&out)[kCount]) {
    for (int c = 0; c < kCount; ++c) {
      for (int i = 0; i < Simd<T>::kLanes; ++i) {
        out[c].lane[i] = to_accumulation(rows[i][offset + c]);
      }
    }
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

// a where the mask is negative, and b elsewhere.
template <typename T>
inline Simd<T> where(Simd<T> mask, Simd<T> a, Simd<T> b) {
  for (int i = 0; i < Simd<T>::kLanes; ++i) a.lane[i] = mask.lane[i] < 0 ? a.lane[i] : b.lane[i];
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

// kCount neighbouring elements for each of the kLanes lanes, in any order: 16-bit elements that
// need not be put in order are converted in half the time. For sums and maxima.
template <int kCount, typename T, typename Storage>
inline void load_unordered(const Storage* p, Simd<T> (&out)[kCount]) {
  for (int i = 0; i < kCount; ++i) out[i] = Simd<T>::load(p + i * Simd<T>::kLanes);
}

template <typename T>
inline Simd<T> multiply_add(Simd<T> a, Simd<T> b, Simd<T> c) {
#if defined(__FMA__)
  // Left to itself the compiler rounds the product in some places and not in others.
  for (int i = 0; i < Simd<T>::kLanes; ++i) {
    a.lane[i] = static_cast<T>(__builtin_fma(a.lane[i], b.lane[i], c.lane[i]));
  }
#else
  for (int i = 0; i < Simd<T>::kLanes; ++i) a.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
#endif
  return a;
}

// 2^y, for y below 1 or NaN. Results below 2^-125 may come out as that or anything smaller.
template <Precision kPrecision>
inline Simd<float> exp2(Simd<float> y);

template <Precision>
inline Simd<double> exp2(Simd<double> y) {
  for (int i = 0; i < Simd<double>::kLanes; ++i) y.lane[i] = __builtin_exp2(y.lane[i]);
  return y;
}

template <typename T>
constexpr T kLog2E = static_cast<T>(1.4426950408889634);

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
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(BFloat16* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 undefined = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, undefined, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  void store(Half* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
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
inline Simd<float> where(Simd<float> mask, Simd<float> a, Simd<float> b) {
  const __mmask16 negative = _mm512_cmp_ps_mask(mask.v, _mm512_setzero_ps(), _CMP_LT_OQ);
  return {_mm512_mask_blend_ps(negative, b.v, a.v)};
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

template <>
inline Simd<float> multiply_add(Simd<float> a, Simd<float> b, Simd<float> c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}

template <Precision kPrecision>
inline Simd<float> exp2(Simd<float> y) {
  using E = Exp2<kPrecision>;
  // y - floor(y), 0 for -inf; scalef then multiplies by 2^floor(y).
  const __m512 f = _mm512_reduce_ps(y.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(E::kCoefficients[E::kDegree]);
  for (int i = E::kDegree - 1; i >= 0; --i) {
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(E::kCoefficients[i]));
  }
  return {_mm512_scalef_ps(p, y.v)};
}

template <int kCount>
inline void load_unordered(const BFloat16* p, Simd<float> (&out)[kCount]) {
  static_assert(kCount % 2 == 0);
  for (int i = 0; i < kCount; i += 2) {
    const __m512i pairs = _mm512_loadu_si512(p + i * Simd<float>::kLanes);
    out[i] = {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
    out[i + 1] = {_mm512_castsi512_ps(
        _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
}

// Element i of unit u of 16 bytes of each row: four 4x4 transpositions side by side, of rows i,
// i + 4, i + 8 and i + 12.
inline void load_units(const void* const* rows, int64_t offset, __m512 (&out)[4]) {
  __m512 t[4];
  for (int i = 0; i < 4; ++i) {
    const auto unit = [&](int row) {
      return _mm_loadu_ps(
          reinterpret_cast<const float*>(static_cast<const char*>(rows[row]) + offset));
    };
    t[i] = _mm512_castps128_ps512(unit(i));
    t[i] = _mm512_insertf32x4(t[i], unit(i + 4), 1);
    t[i] = _mm512_insertf32x4(t[i], unit(i + 8), 2);
    t[i] = _mm512_insertf32x4(t[i], unit(i + 12), 3);
  }
  const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(t[0], t[1]));
  const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(t[2], t[3]));
  const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(t[0], t[1]));
  const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(t[2], t[3]));
  out[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
  out[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
  out[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
  out[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
}

template <>
struct Columns<float, float> {
  static constexpr int kCount = 4;
  static void load(const float* const* rows, int64_t offset, Simd<float> (&out)[kCount]) {
    __m512 units[4];
    load_units(reinterpret_cast<const void* const*>(rows), offset * 4, units);
    for (int u = 0; u < 4; ++u) out[u] = {units[u]};
  }
};

template <>
struct Columns<float, BFloat16> {
  static constexpr int kCount = 8;
  static void load(const BFloat16* const* rows, int64_t offset, Simd<float> (&out)[kCount]) {
    __m512 units[4];
    load_units(reinterpret_cast<const void* const*>(rows), offset * 2, units);
    for (int u = 0; u < 4; ++u) {
      const __m512i pair = _mm512_castps_si512(units[u]);
      out[2 * u] = {_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16))};
      out[2 * u + 1] = {_mm512_castsi512_ps(
          _mm512_and_si512(pair, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
    }
  }
};

template <>
struct Columns<float, Half> {
  static constexpr int kCount = 8;
  static void load(const Half* const* rows, int64_t offset, Simd<float> (&out)[kCount]) {
    __m512 units[4];
    load_units(reinterpret_cast<const void* const*>(rows), offset * 2, units);
    for (int u = 0; u < 4; ++u) {
      const __m512i pair = _mm512_castps_si512(units[u]);
      out[2 * u] = {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(pair))};
      out[2 * u + 1] = {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pair, 16)))};
    }
  }
};

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
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(BFloat16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i undefined = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, undefined), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(rounded));
  }
  void store(Half* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Eight integers below 2^16 in 16 bits each.
  static __m128i narrow(__m256i x) {
    return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
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
inline Simd<float> where(Simd<float> mask, Simd<float> a, Simd<float> b) {
  return {_mm256_blendv_ps(b.v, a.v, mask.v)};
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

template <>
inline Simd<float> multiply_add(Simd<float> a, Simd<float> b, Simd<float> c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}

template <Precision kPrecision>
inline Simd<float> exp2(Simd<float> argument) {
  using E = Exp2<kPrecision>;
  const __m256 y = _mm256_max_ps(_mm256_set1_ps(kExp2Lowest), argument.v);
  const __m256 n = _mm256_floor_ps(y);
  const __m256 f = _mm256_sub_ps(y, n);
  __m256 p = _mm256_set1_ps(E::kCoefficients[E::kDegree]);
  for (int i = E::kDegree - 1; i >= 0; --i) {
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(E::kCoefficients[i]));
  }
  // p lies in [1, 2] and n in [-125, 0], so adding n to the exponent field stays in range; a NaN
  // converts to 0x80000000, of which shifting leaves nothing.
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent))};
}

template <int kCount>
inline void load_unordered(const BFloat16* p, Simd<float> (&out)[kCount]) {
  static_assert(kCount % 2 == 0);
  for (int i = 0; i < kCount; i += 2) {
    const __m256i pairs =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i * Simd<float>::kLanes));
    out[i] = {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))};
    out[i + 1] = {_mm256_castsi256_ps(
        _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
}

// Element i of unit u of 16 bytes of each row: two 4x4 transpositions side by side, of rows i and
// i + 4.
inline void load_units(const void* const* rows, int64_t offset, __m256 (&out)[4]) {
  __m256 t[4];
  for (int i = 0; i < 4; ++i) {
    const auto unit = [&](int row) {
      return _mm_loadu_ps(
          reinterpret_cast<const float*>(static_cast<const char*>(rows[row]) + offset));
    };
    t[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(unit(i)), unit(i + 4), 1);
  }
  const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(t[0], t[1]));
  const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(t[2], t[3]));
  const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(t[0], t[1]));
  const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(t[2], t[3]));
  out[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
  out[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
  out[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
  out[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
}

template <>
struct Columns<float, float> {
  static constexpr int kCount = 4;
  static void load(const float* const* rows, int64_t offset, Simd<float> (&out)[kCount]) {
    __m256 units[4];
    load_units(reinterpret_cast<const void* const*>(rows), offset * 4, units);
    for (int u = 0; u < 4; ++u) out[u] = {units[u]};
  }
};

template <>
struct Columns<float, BFloat16> {
  static constexpr int kCount = 8;
  static void load(const BFloat16* const* rows, int64_t offset, Simd<float> (&out)[kCount]) {
    __m256 units[4];
    load_units(reinterpret_cast<const void* const*>(rows), offset * 2, units);
    for (int u = 0; u < 4; ++u) {
      const __m256i pair = _mm256_castps_si256(units[u]);
      out[2 * u] = {_mm256_castsi256_ps(_mm256_slli_epi32(pair, 16))};
      out[2 * u + 1] = {_mm256_castsi256_ps(
          _mm256_and_si256(pair, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
    }
  }
};

template <>
struct Columns<float, Half> {
  static constexpr int kCount = 8;
  static void load(const Half* const* rows, int64_t offset, Simd<float> (&out)[kCount]) {
    __m256 units[4];
    load_units(reinterpret_cast<const void* const*>(rows), offset * 2, units);
    for (int u = 0; u < 4; ++u) {
      const __m256i pair = _mm256_castps_si256(units[u]);
      const __m256i low = _mm256_and_si256(pair, _mm256_set1_epi32(0xffff));
      out[2 * u] = {_mm256_cvtph_ps(Simd<float>::narrow(low))};
      out[2 * u + 1] = {_mm256_cvtph_ps(Simd<float>::narrow(_mm256_srli_epi32(pair, 16)))};
    }
  }
};

#elif defined(__aarch64__)

// Two registers, of which there are twice as many as AVX2 has: the kernels' blocks fit both.
template <>
struct Simd<float> {
  static constexpr int kLanes = 8;
  float32x4_t low, high;

  static Simd broadcast(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static Simd load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static Simd load(const BFloat16* p) {
    const uint16x8_t bits = vld1q_u16(&p->bits);
    const uint16x8_t zero = vdupq_n_u16(0);
    return {vreinterpretq_f32_u16(vzip1q_u16(zero, bits)),
            vreinterpretq_f32_u16(vzip2q_u16(zero, bits))};
  }
  static Simd load(const Half* p) {
    const float16x8_t x = vreinterpretq_f16_u16(vld1q_u16(&p->bits));
    return {vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x)};
  }
  void store(float* p) const {
    vst1q_f32(p, low);
    vst1q_f32(p + 4, high);
  }
  void store(BFloat16* p) const {
    vst1q_u16(&p->bits, vshrn_high_n_u32(vshrn_n_u32(rounded(low), 16), rounded(high), 16));
  }
  void store(Half* p) const {
    const float16x8_t x = vcvt_high_f16_f32(vcvt_f16_f32(low), high);
    vst1q_u16(&p->bits, vreinterpretq_u16_f16(x));
  }
  // Bits of which the upper 16 are those of the nearest BFloat16.
  static uint32x4_t rounded(float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t nearest = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vbslq_u32(vceqq_f32(x, x), nearest, quiet);
  }
};

template <>
inline Simd<float> add(Simd<float> a, Simd<float> b) {
  return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)};
}
template <>
inline Simd<float> sub(Simd<float> a, Simd<float> b) {
  return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)};
}
template <>
inline Simd<float> mul(Simd<float> a, Simd<float> b) {
  return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)};
}
// Not vmaxq_f32(), which gives NaN where either is, nor vmaxnmq_f32(), which gives the other.
template <>
inline Simd<float> max(Simd<float> a, Simd<float> b) {
  return {vbslq_f32(vcgtq_f32(a.low, b.low), a.low, b.low),
          vbslq_f32(vcgtq_f32(a.high, b.high), a.high, b.high)};
}
template <>
inline Simd<float> where(Simd<float> mask, Simd<float> a, Simd<float> b) {
  return {vbslq_f32(vcltzq_f32(mask.low), a.low, b.low),
          vbslq_f32(vcltzq_f32(mask.high), a.high, b.high)};
}
template <>
inline bool any_greater(Simd<float> a, Simd<float> b) {
  return vmaxvq_u32(vorrq_u32(vcgtq_f32(a.low, b.low), vcgtq_f32(a.high, b.high))) != 0;
}
template <>
inline float reduce_max(Simd<float> a) {
  return vmaxnmvq_f32(vmaxnmq_f32(a.low, a.high));
}
template <>
inline float reduce_add(Simd<float> a) {
  return vaddvq_f32(vaddq_f32(a.low, a.high));
}

template <>
inline Simd<float> multiply_add(Simd<float> a, Simd<float> b, Simd<float> c) {
  return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}

template <Precision kPrecision>
inline float32x4_t exp2(float32x4_t argument) {
  using E = Exp2<kPrecision>;
  const float32x4_t y = vmaxq_f32(vdupq_n_f32(kExp2Lowest), argument);
  const float32x4_t n = vrndmq_f32(y);
  const float32x4_t f = vsubq_f32(y, n);
  float32x4_t p = vdupq_n_f32(E::kCoefficients[E::kDegree]);
  for (int i = E::kDegree - 1; i >= 0; --i) {
    p = vfmaq_f32(vdupq_n_f32(E::kCoefficients[i]), p, f);
  }
  // As with AVX2 the sum of the exponents stays in range; a NaN converts to 0.
  const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(n), 23);
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), exponent));
}

template <Precision kPrecision>
inline Simd<float> exp2(Simd<float> y) {
  return {exp2<kPrecision>(y.low), exp2<kPrecision>(y.high)};
}

// The two BFloat16 of each word.
inline float32x4_t first_of_pair(uint32x4_t pair) {
  return vreinterpretq_f32_u32(vshlq_n_u32(pair, 16));
}
inline float32x4_t second_of_pair(uint32x4_t pair) {
  return vreinterpretq_f32_u32(vandq_u32(pair, vdupq_n_u32(0xffff0000u)));
}

// Element i of unit u of 16 bytes of each row: a 4x4 transposition for each half of the rows.
inline void load_units(const void* const* rows, int64_t offset, uint32x4_t (&out)[2][4]) {
  for (int half = 0; half < 2; ++half) {
    const auto unit = [&](int row) {
      const auto* p = static_cast<const uint8_t*>(rows[4 * half + row]) + offset;
      return vreinterpretq_u32_u8(vld1q_u8(p));
    };
    const uint32x4_t low02 = vzip1q_u32(unit(0), unit(2));
    const uint32x4_t low13 = vzip1q_u32(unit(1), unit(3));
    const uint32x4_t high02 = vzip2q_u32(unit(0), unit(2));
    const uint32x4_t high13 = vzip2q_u32(unit(1), unit(3));
    out[half][0] = vzip1q_u32(low02, low13);
    out[half][1] = vzip2q_u32(low02, low13);
    out[half][2] = vzip1q_u32(high02, high13);
    out[half][3] = vzip2q_u32(high02, high13);
  }
}

template <>
struct Columns<float, float> {
  static constexpr int kCount = 4;
  static void load(const float* const* rows, int64_t offset, Simd<float> (&out)[kCount]) {
    uint32x4_t units[2][4];
    load_units(reinterpret_cast<const void* const*>(rows), offset * 4, units);
    for (int u = 0; u < 4; ++u) {
      out[u] = {vreinterpretq_f32_u32(units[0][u]), vreinterpretq_f32_u32(units[1][u])};
    }
  }
};

template <>
struct Columns<float, BFloat16> {
  static constexpr int kCount = 8;
  static void load(const BFloat16* const* rows, int64_t offset, Simd<float> (&out)[kCount]) {
    uint32x4_t units[2][4];
    load_units(reinterpret_cast<const void* const*>(rows), offset * 2, units);
    for (int u = 0; u < 4; ++u) {
      out[2 * u] = {first_of_pair(units[0][u]), first_of_pair(units[1][u])};
      out[2 * u + 1] = {second_of_pair(units[0][u]), second_of_pair(units[1][u])};
    }
  }
};

template <>
struct Columns<float, Half> {
  static constexpr int kCount = 8;
  static void load(const Half* const* rows, int64_t offset, Simd<float> (&out)[kCount]) {
    uint32x4_t units[2][4];
    load_units(reinterpret_cast<const void* const*>(rows), offset * 2, units);
    const auto widen = [](uint16x4_t bits) { return vcvt_f32_f16(vreinterpret_f16_u16(bits)); };
    for (int u = 0; u < 4; ++u) {
      out[2 * u] = {widen(vmovn_u32(units[0][u])), widen(vmovn_u32(units[1][u]))};
      out[2 * u + 1] = {widen(vshrn_n_u32(units[0][u], 16)), widen(vshrn_n_u32(units[1][u], 16))};
    }
  }
};

#else

template <Precision kPrecision>
inline Simd<float> exp2(Simd<float> x) {
  using E = Exp2<kPrecision>;
  // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, whose value the low bits hold;
  // of y - 1/2 that is floor(y), or for an integer y the one below, which does as well.
  constexpr float kRound = 12582912.f;
  for (int i = 0; i < Simd<float>::kLanes; ++i) {
    const float y = kExp2Lowest > x.lane[i] ? kExp2Lowest : x.lane[i];
    const float rounded = (y - 0.5f) + kRound;
    const float f = y - (rounded - kRound);
    float p = E::kCoefficients[E::kDegree];
    for (int k = E::kDegree - 1; k >= 0; --k) p = p * f + E::kCoefficients[k];
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
