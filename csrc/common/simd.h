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

// A factor of a product: a number for each lane, or kPer of them, whose products are added one
// after the other.
template <typename T>
struct Factor {
  static constexpr int kPer = 1;
  Simd<T> v;

  static Factor load(const T* p) { return {Simd<T>::load(p)}; }
  // For all lanes.
  static Factor broadcast(const T* p) { return {Simd<T>::broadcast(*p)}; }
  // Of each lane's numbers those that are asked for, and zeros.
  static Factor load_some(const T* p, bool, bool) { return load(p); }
};

template <typename T>
inline Simd<T> multiply_add(Factor<T> a, Factor<T> b, Simd<T> c) {
  return multiply_add(a.v, b.v, c);
}

// What numbers of a storage type are multiplied as.
template <typename T>
struct OperandType {
  using type = accumulation_t<T>;
};
template <typename T>
using operand_t = typename OperandType<T>::type;

}  // namespace pynar::PYNAR_ISA

// float has vectors of its own where the instruction set is known.
#if defined(__AVX512F__)
#include "common/simd_avx512.h"
#elif defined(__AVX2__)
#include "common/simd_avx2.h"
#elif defined(__aarch64__)
#include "common/simd_neon.h"
#else

namespace pynar::PYNAR_ISA {

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

}  // namespace pynar::PYNAR_ISA

#endif
