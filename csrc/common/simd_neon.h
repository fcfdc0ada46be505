// What common/simd.h has for NEON.
#pragma once

namespace pynar::PYNAR_ISA {

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

}  // namespace pynar::PYNAR_ISA
