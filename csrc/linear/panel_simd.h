// The inner loop of the linear kernels: a few rows of input times one panel of the weight. For the
// parts of a file that are compiled once for each instruction set; see common/simd.h.
#pragma once

#include "common/simd.h"
#include "linear/panel.h"

namespace pynar::PYNAR_ISA {

// A word at any address, which may hold a float or smaller numbers.
inline uint32_t word_at(const uint32_t* p) {
  uint32_t word;
  memcpy(&word, p, sizeof(word));
  return word;
}

// Dot<format>: a register of words of the weight, one of sums, and sums += input word * weights.
template <WeightFormat>
struct Dot;

#if defined(__AVX512F__)

inline __m512i load_words(const uint32_t* p) {
  return _mm512_loadu_si512(p);
}

template <>
struct Dot<WeightFormat::kFloat32> {
  static constexpr int kLanes = 16;
  using Sum = __m512;
  using Word = __m512;
  static Sum zero() { return _mm512_setzero_ps(); }
  static __m512 weights(const uint32_t* p) { return _mm512_castsi512_ps(load_words(p)); }
  static Word input(uint32_t word) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(word)));
  }
  static Sum add(Sum sum, Word x, __m512 w) { return _mm512_fmadd_ps(x, w, sum); }
  static void store(float* p, Sum sum) { _mm512_storeu_ps(p, sum); }
};

template <>
struct Dot<WeightFormat::kBFloat16> {
  static constexpr int kLanes = 16;
  using Sum = __m512;
  static Sum zero() { return _mm512_setzero_ps(); }
  static __m512i weights(const uint32_t* p) { return load_words(p); }
  static void store(float* p, Sum sum) { _mm512_storeu_ps(p, sum); }
#if defined(__AVX512BF16__)
  using Word = __m512bh;
  static Word input(uint32_t word) {
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(word)));
  }
  static Sum add(Sum sum, Word x, __m512i w) {
    return _mm512_dpbf16_ps(sum, x, reinterpret_cast<__m512bh>(w));
  }
#else
  struct Word {
    __m512 low, high;
  };
  static __m512 low(__m512i w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
  static __m512 high(__m512i w) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static Word input(uint32_t word) {
    const __m512i x = _mm512_set1_epi32(static_cast<int>(word));
    return {low(x), high(x)};
  }
  static Sum add(Sum sum, Word x, __m512i w) {
    return _mm512_fmadd_ps(x.high, high(w), _mm512_fmadd_ps(x.low, low(w), sum));
  }
#endif
};

template <>
struct Dot<WeightFormat::kInt8> {
  static constexpr int kLanes = 16;
  using Sum = __m512i;
  static Sum zero() { return _mm512_setzero_si512(); }
  static __m512i weights(const uint32_t* p) { return load_words(p); }
  static void store(int32_t* p, Sum sum) { _mm512_storeu_si512(p, sum); }
#if defined(__AVX512VNNI__)
  using Word = __m512i;
  static Word input(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }
  // The intrinsic makes GCC 12 copy every sum in every step, which halves the speed.
  static Sum add(Sum sum, Word x, __m512i w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    return sum;
  }
#else
  // Bytes 0 and 2 of a word, and 1 and 3, as 16-bit numbers: no sum of two products saturates.
  struct Word {
    __m512i even, odd;
  };
  static Word input(uint32_t word) {
    return {_mm512_set1_epi32(static_cast<int>(word & 0x00ff00ffu)),
            _mm512_set1_epi32(static_cast<int>(word >> 8 & 0x00ff00ffu))};
  }
  static Sum add(Sum sum, Word x, __m512i w) {
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8);
    const __m512i odd = _mm512_srai_epi16(w, 8);
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(x.even, even));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(x.odd, odd));
  }
#endif
};

#elif defined(__AVX2__)

inline __m256i load_words(const uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

template <>
struct Dot<WeightFormat::kFloat32> {
  static constexpr int kLanes = 8;
  using Sum = __m256;
  using Word = __m256;
  static Sum zero() { return _mm256_setzero_ps(); }
  static __m256 weights(const uint32_t* p) { return _mm256_castsi256_ps(load_words(p)); }
  static Word input(uint32_t word) {
    return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(word)));
  }
  static Sum add(Sum sum, Word x, __m256 w) { return _mm256_fmadd_ps(x, w, sum); }
  static void store(float* p, Sum sum) { _mm256_storeu_ps(p, sum); }
};

template <>
struct Dot<WeightFormat::kBFloat16> {
  static constexpr int kLanes = 8;
  using Sum = __m256;
  struct Word {
    __m256 low, high;
  };
  static Sum zero() { return _mm256_setzero_ps(); }
  static __m256i weights(const uint32_t* p) { return load_words(p); }
  static __m256 low(__m256i w) { return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)); }
  static __m256 high(__m256i w) {
    return _mm256_castsi256_ps(
        _mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static Word input(uint32_t word) {
    const __m256i x = _mm256_set1_epi32(static_cast<int>(word));
    return {low(x), high(x)};
  }
  static Sum add(Sum sum, Word x, __m256i w) {
    return _mm256_fmadd_ps(x.high, high(w), _mm256_fmadd_ps(x.low, low(w), sum));
  }
  static void store(float* p, Sum sum) { _mm256_storeu_ps(p, sum); }
};

template <>
struct Dot<WeightFormat::kInt8> {
  static constexpr int kLanes = 8;
  using Sum = __m256i;
  struct Word {
    __m256i even, odd;
  };
  static Sum zero() { return _mm256_setzero_si256(); }
  static __m256i weights(const uint32_t* p) { return load_words(p); }
  static Word input(uint32_t word) {
    return {_mm256_set1_epi32(static_cast<int>(word & 0x00ff00ffu)),
            _mm256_set1_epi32(static_cast<int>(word >> 8 & 0x00ff00ffu))};
  }
  static Sum add(Sum sum, Word x, __m256i w) {
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8);
    const __m256i odd = _mm256_srai_epi16(w, 8);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x.even, even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(x.odd, odd));
  }
  static void store(int32_t* p, Sum sum) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), sum);
  }
};

#else

template <WeightFormat kFormat>
struct Dot {
  static constexpr int kLanes = 8;
  static constexpr bool kInteger = kFormat == WeightFormat::kInt8;
  struct Words {
    uint32_t lane[kLanes];
  };
  template <bool, typename A, typename B>
  struct Choose {
    using type = A;
  };
  template <typename A, typename B>
  struct Choose<false, A, B> {
    using type = B;
  };
  using Number = typename Choose<kInteger, int32_t, float>::type;
  struct Sum {
    Number lane[kLanes];
  };
  using Word = uint32_t;

  static Sum zero() { return {}; }
  static Words weights(const uint32_t* p) {
    Words w;
    for (int i = 0; i < kLanes; ++i) w.lane[i] = word_at(p + i);
    return w;
  }
  static Word input(uint32_t word) { return word; }
  static Sum add(Sum sum, Word x, Words w) {
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t y = w.lane[i];
      if constexpr (kFormat == WeightFormat::kFloat32) {
        sum.lane[i] += float_from_bits(x) * float_from_bits(y);
      } else if constexpr (kFormat == WeightFormat::kBFloat16) {
        sum.lane[i] += float_from_bits(x << 16) * float_from_bits(y << 16);
        sum.lane[i] += float_from_bits(x & 0xffff0000u) * float_from_bits(y & 0xffff0000u);
      } else {
        for (int b = 0; b < 32; b += 8) {
          sum.lane[i] += static_cast<int32_t>(x >> b & 0xff) * static_cast<int8_t>(y >> b & 0xff);
        }
      }
    }
    return sum;
  }
  static void store(Number* p, Sum sum) {
    for (int i = 0; i < kLanes; ++i) p[i] = sum.lane[i];
  }
};

#endif

// The outputs of up to kBlockRows rows in one panel, before anything is done with them.
struct Block {
  float values[kBlockRows][kPanel];
};

// `panel` with a bias for all of its columns, of which there are `width`; in `whole` if need be.
inline Panel with_whole_bias(Panel panel, int64_t width, float (&whole)[kPanel]) {
  if (panel.bias != nullptr && width < kPanel) {
    for (int64_t i = 0; i < kPanel; ++i) whole[i] = i < width ? panel.bias[i] : 0.f;
    panel.bias = whole;
  }
  return panel;
}

template <WeightFormat kFormat, int kRows>
inline void multiply(const uint32_t* x, int64_t stride, const RowScale* x_scales,
                     const Panel& panel, Block& out) {
  using D = Dot<kFormat>;
  constexpr int kVectors = D::kLanes == 16 ? 4 : 2;
  constexpr int kWidth = kVectors * D::kLanes;
  for (int64_t first = 0; first < kPanel; first += kWidth) {
    typename D::Sum sum[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) sum[r][v] = D::zero();
    }
    const uint32_t* words = panel.words + first;
    const int64_t next = panel.steps * kPanel;
    for (int64_t step = 0; step < panel.steps; ++step, words += kPanel) {
      decltype(D::weights(words)) w[kVectors];
      for (int v = 0; v < kVectors; ++v) w[v] = D::weights(words + v * D::kLanes);
      // The next panel is on its way from memory while this one is at work.
      for (int c = 0; c < kWidth; c += 16) __builtin_prefetch(words + next + c, 0, 2);
      for (int r = 0; r < kRows; ++r) {
        const typename D::Word word = D::input(word_at(x + r * stride + step));
        for (int v = 0; v < kVectors; ++v) sum[r][v] = D::add(sum[r][v], word, w[v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      float* values = out.values[r] + first;
      if constexpr (kFormat == WeightFormat::kInt8) {
        int32_t sums[kWidth];
        for (int v = 0; v < kVectors; ++v) D::store(sums + v * D::kLanes, sum[r][v]);
        for (int i = 0; i < kWidth; ++i) {
          const int32_t exact = sums[i] - x_scales[r].zero * panel.column_sums[first + i];
          values[i] = static_cast<float>(exact) * (x_scales[r].scale * panel.scales[first + i]);
        }
      } else {
        for (int v = 0; v < kVectors; ++v) D::store(values + v * D::kLanes, sum[r][v]);
      }
      if (panel.bias != nullptr) {
        for (int i = 0; i < kWidth; ++i) values[i] += panel.bias[first + i];
      }
    }
  }
}

// Rows `first` to `first + rows` of the input, at most kBlockRows.
inline void multiply_block(WeightFormat format, const InputRows& input, int64_t first, int64_t rows,
                           const Panel& panel, Block& out) {
  const uint32_t* x = input.words + first * input.stride;
  const RowScale* scales = advance(input.scales, first);
  const auto with_format = [&]<WeightFormat kFormat>() {
    switch (rows) {
      case 1:
        return multiply<kFormat, 1>(x, input.stride, scales, panel, out);
      case 2:
        return multiply<kFormat, 2>(x, input.stride, scales, panel, out);
      case 3:
        return multiply<kFormat, 3>(x, input.stride, scales, panel, out);
      case 4:
        return multiply<kFormat, 4>(x, input.stride, scales, panel, out);
      case 5:
        return multiply<kFormat, 5>(x, input.stride, scales, panel, out);
      default:
        return multiply<kFormat, 6>(x, input.stride, scales, panel, out);
    }
  };
  if (format == WeightFormat::kFloat32)
    return with_format.template operator()<WeightFormat::kFloat32>();
  if (format == WeightFormat::kBFloat16)
    return with_format.template operator()<WeightFormat::kBFloat16>();
  return with_format.template operator()<WeightFormat::kInt8>();
}

}  // namespace pynar::PYNAR_ISA
