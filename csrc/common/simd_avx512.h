// What common/simd.h has for AVX-512.
#pragma once

namespace pynar::PYNAR_ISA {

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
#if defined(__AVX512BF16__)
    // Subnormal numbers become zeros.
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 undefined = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, undefined, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#endif
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

#if defined(__AVX512BF16__)
// Products of bf16 as they are, two a lane. The instruction adds that of the upper halves first,
// then the other, each sum rounded (Intel's manual, VDPBF16PS; Zen 4 does the same), so that with
// the first of two terms in the upper half a sum has the value that it has in order, term by term,
// however terms are paired. Subnormal numbers count as zeros.
template <>
struct OperandType<BFloat16> {
  using type = BFloat16;
};

template <>
struct Factor<BFloat16> {
  static constexpr int kPer = 2;
  __m512i v;

  static Factor load(const BFloat16* p) { return {_mm512_loadu_si512(p)}; }
  static Factor broadcast(const BFloat16* p) {
    int pair;
    memcpy(&pair, p, sizeof(pair));
    return {_mm512_set1_epi32(pair)};
  }
  void store(BFloat16* p) const { _mm512_storeu_si512(p, v); }
  static Factor load_some(const BFloat16* p, bool first, bool second) {
    const __mmask32 wanted = (first ? 0xaaaaaaaau : 0u) | (second ? 0x55555555u : 0u);
    return {_mm512_maskz_loadu_epi16(wanted, p)};
  }
};

inline Simd<float> multiply_add(Factor<BFloat16> a, Factor<BFloat16> b, Simd<float> c) {
  return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}

// Reads 16 bytes of each of kLanes rows as one vector for each pair of neighbouring elements, as
// they lie.
inline void load_column_pairs(const BFloat16* const* rows, int64_t offset,
                              Factor<BFloat16> (&out)[4]) {
  __m512 units[4];
  load_units(reinterpret_cast<const void* const*>(rows), offset * 2, units);
  for (int u = 0; u < 4; ++u) out[u] = {_mm512_castps_si512(units[u])};
}

// The numbers of a vector, the first of each two above the second.
inline void store_factors(Simd<float> x, BFloat16* p) {
  const __m256i numbers = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_rol_epi32(numbers, 16));
}

inline __m512i interleave(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_slli_epi32(_mm512_cvtepu16_epi32(first), 16),
                         _mm512_cvtepu16_epi32(second));
}

// Lane by lane, a number of each of two vectors, the first above.
inline void store_pairs(Simd<float> first, Simd<float> second, BFloat16* p) {
  _mm512_storeu_si512(p, interleave(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(first.v)),
                                    reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(second.v))));
}
inline void store_pairs(const BFloat16* first, const BFloat16* second, BFloat16* p) {
  _mm512_storeu_si512(p, interleave(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)),
                                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second))));
}
#endif

}  // namespace pynar::PYNAR_ISA
