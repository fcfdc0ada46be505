// What common/simd.h has for AVX2, FMA and F16C.
#pragma once

namespace pynar::PYNAR_ISA {

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

}  // namespace pynar::PYNAR_ISA
