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

// Dot<format>: a register of words of the weight, one of sums, and sums += input word * weights. A
// step takes kParts words of the input, each with its part of the weight's word.
template <WeightFormat>
struct Dot;

#if defined(__AVX512F__)

inline __m512i load_words(const uint32_t* p) {
  return _mm512_loadu_si512(p);
}

template <>
struct Dot<WeightFormat::kFloat32> {
  static constexpr int kLanes = 16;
  static constexpr int kParts = 1;
  using Sum = __m512;
  using Word = __m512;
  static Sum zero() { return _mm512_setzero_ps(); }
  static __m512 weights(const uint32_t* p, int) { return _mm512_castsi512_ps(load_words(p)); }
  static Word input(uint32_t word) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(word)));
  }
  static Sum add(Sum sum, Word x, __m512 w) { return _mm512_fmadd_ps(x, w, sum); }
  static Sum load(const void* p) { return _mm512_loadu_ps(p); }
  static void store(void* p, Sum sum) { _mm512_storeu_ps(p, sum); }
};

template <>
struct Dot<WeightFormat::kBFloat16> {
  static constexpr int kLanes = 16;
  static constexpr int kParts = 1;
  using Sum = __m512;
  static Sum zero() { return _mm512_setzero_ps(); }
  static __m512i weights(const uint32_t* p, int) { return load_words(p); }
  static Sum load(const void* p) { return _mm512_loadu_ps(p); }
  static void store(void* p, Sum sum) { _mm512_storeu_ps(p, sum); }
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
  static constexpr int kParts = 1;
  using Sum = __m512i;
  static Sum zero() { return _mm512_setzero_si512(); }
  static __m512i weights(const uint32_t* p, int) { return load_words(p); }
  static Sum load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, Sum sum) { _mm512_storeu_si512(p, sum); }
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
  static constexpr int kParts = 1;
  using Sum = __m256;
  using Word = __m256;
  static Sum zero() { return _mm256_setzero_ps(); }
  static __m256 weights(const uint32_t* p, int) { return _mm256_castsi256_ps(load_words(p)); }
  static Word input(uint32_t word) {
    return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(word)));
  }
  static Sum add(Sum sum, Word x, __m256 w) { return _mm256_fmadd_ps(x, w, sum); }
  static Sum load(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
  static void store(void* p, Sum sum) { _mm256_storeu_ps(static_cast<float*>(p), sum); }
};

// The input comes as fp32 numbers, rounded, so that only the weight is taken apart.
template <>
struct Dot<WeightFormat::kBFloat16> {
  static constexpr int kLanes = 8;
  static constexpr int kParts = 2;
  using Sum = __m256;
  using Word = __m256;
  static Sum zero() { return _mm256_setzero_ps(); }
  static __m256 weights(const uint32_t* p, int part) {
    const __m256i w = load_words(p);
    return _mm256_castsi256_ps(
        part == 0 ? _mm256_slli_epi32(w, 16)
                  : _mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static Word input(uint32_t word) {
    return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(word)));
  }
  static Sum add(Sum sum, Word x, __m256 w) { return _mm256_fmadd_ps(x, w, sum); }
  static Sum load(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
  static void store(void* p, Sum sum) { _mm256_storeu_ps(static_cast<float*>(p), sum); }
};

template <>
struct Dot<WeightFormat::kInt8> {
  static constexpr int kLanes = 8;
  static constexpr int kParts = 1;
  using Sum = __m256i;
  using Word = __m256i;
  static Sum zero() { return _mm256_setzero_si256(); }
  static __m256i weights(const uint32_t* p, int) { return load_words(p); }
  static Word input(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }
  // Two products are added in 16 bits, where they would saturate: a weight's pairs are bounded, see
  // panel.h. With intrinsics GCC 12 begins all products of a step before it ends the first, and
  // keeps most of the sums in memory.
  static Sum add(Sum sum, Word x, __m256i w) {
    __m256i pairs;
    asm("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
        : "+x"(sum), "=&x"(pairs)
        : "x"(x), "x"(w), "xm"(_mm256_set1_epi16(1)));
    return sum;
  }
  static Sum load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, Sum sum) { _mm256_storeu_si256(static_cast<__m256i*>(p), sum); }
};

#else

template <WeightFormat kFormat>
struct Dot {
  static constexpr int kLanes = 8;
  static constexpr int kParts = 1;
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
  static Words weights(const uint32_t* p, int) {
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
  static Sum load(const void* p) {
    Sum sum;
    memcpy(&sum, p, sizeof(sum));
    return sum;
  }
  static void store(void* p, Sum sum) { memcpy(p, &sum, sizeof(sum)); }
};

#if defined(__aarch64__)

template <>
struct Dot<WeightFormat::kFloat32> {
  static constexpr int kLanes = 8;
  static constexpr int kParts = 1;
  struct Sum {
    float32x4_t low, high;
  };
  using Word = float;
  static Sum zero() { return {vdupq_n_f32(0), vdupq_n_f32(0)}; }
  static Sum weights(const uint32_t* p, int) { return load(p); }
  static Word input(uint32_t word) { return float_from_bits(word); }
  static Sum add(Sum sum, Word x, Sum w) {
    return {vfmaq_n_f32(sum.low, w.low, x), vfmaq_n_f32(sum.high, w.high, x)};
  }
  static Sum load(const void* p) {
    const auto* from = static_cast<const float*>(p);
    return {vld1q_f32(from), vld1q_f32(from + 4)};
  }
  static void store(void* p, Sum sum) {
    auto* to = static_cast<float*>(p);
    vst1q_f32(to, sum.low);
    vst1q_f32(to + 4, sum.high);
  }
};

// As with AVX2 the input comes as fp32 numbers.
template <>
struct Dot<WeightFormat::kBFloat16> : Dot<WeightFormat::kFloat32> {
  static constexpr int kParts = 2;
  static Sum weights(const uint32_t* p, int part) {
    const uint32x4_t low = vld1q_u32(p);
    const uint32x4_t high = vld1q_u32(p + 4);
    if (part == 0) return {first_of_pair(low), first_of_pair(high)};
    return {second_of_pair(low), second_of_pair(high)};
  }
};

#endif

#endif

// Columns of a panel whose words follow each other: see panel.h.
constexpr int64_t kStrip = Dot<WeightFormat::kFloat32>::kLanes == 16 ? kPanel : kNarrowStrip;

// The sums of up to kChunkRows rows in one panel.
struct Block {
  float values[kChunkRows][kPanel];
};

// `panel` with a bias for all of its columns, of which there are `width`; in `whole` if need be.
inline Panel with_whole_bias(Panel panel, int64_t width, float (&whole)[kPanel]) {
  if (panel.bias != nullptr && width < kPanel) {
    for (int64_t i = 0; i < kPanel; ++i) whole[i] = i < width ? panel.bias[i] : 0.f;
    panel.bias = whole;
  }
  return panel;
}

// Some steps of a panel and of rows of input, whose sums are rows of kPanel words.
struct Steps {
  const uint32_t* x;
  int64_t stride;
  const uint32_t* words;
  int64_t to_strip;  // from a strip to the next one
  int64_t count;
  int64_t ahead;     // so far behind `words` lies what is fetched from memory meanwhile
  const char* next;  // or the next panel, so many bytes a step, where strips go by many times
  int64_t rate;
  bool from_zero;
  uint32_t* sums;
};

// Adds the products of kRows rows and kVectors registers of columns.
template <WeightFormat kFormat, int kRows, int kVectors>
inline void accumulate(const Steps& steps) {
  using D = Dot<kFormat>;
  typename D::Sum sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t* p = steps.sums + r * kPanel + v * D::kLanes;
      sum[r][v] = steps.from_zero ? D::zero() : D::load(p);
    }
  }
  const uint32_t* words = steps.words;
  const uint32_t* x = steps.x;
  const auto place = [&](int column) { return column / kStrip * steps.to_strip + column % kStrip; };
  for (int64_t step = 0; step < steps.count; ++step, words += kStrip, x += D::kParts) {
    if constexpr (kVectors * D::kLanes == 16) {
      __builtin_prefetch(steps.next + step * steps.rate, 0, 2);
    } else {
      for (int c = 0; c < kVectors * D::kLanes; c += 16) {
        __builtin_prefetch(words + steps.ahead + place(c), 0, 2);
      }
    }
    for (int part = 0; part < D::kParts; ++part) {
      decltype(D::weights(words, part)) w[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) w[v] = D::weights(words + place(v * D::kLanes), part);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const typename D::Word word = D::input(word_at(x + r * steps.stride + part));
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] = D::add(sum[r][v], word, w[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) D::store(steps.sums + r * kPanel + v * D::kLanes, sum[r][v]);
  }
}

// How many registers of columns so many rows take, of the sixteen or 32 that there are.
constexpr int vectors_for(int64_t rows, int lanes) {
  return lanes == 16 ? 4 : rows == 1 ? 8 : rows == 2 ? 4 : 2;
}

// As above for up to kBlockRows rows.
template <WeightFormat kFormat>
inline void accumulate_rows(int64_t rows, const Steps& steps) {
  const auto with_rows = [&]<int kRows>() {
    accumulate<kFormat, kRows, vectors_for(kRows, Dot<kFormat>::kLanes)>(steps);
  };
  switch (rows) {
    case 1:
      return with_rows.template operator()<1>();
    case 2:
      return with_rows.template operator()<2>();
    case 3:
      return with_rows.template operator()<3>();
    case 4:
      return with_rows.template operator()<4>();
    case 5:
      return with_rows.template operator()<5>();
    default:
      return with_rows.template operator()<6>();
  }
}

// The numbers that a vector of int8 sums stands for, of columns `first` and following ones.
inline Simd<float> from_int8(const void* sums, RowScale scale, const Panel& panel, int64_t first) {
  const int32_t* column_sums = panel.column_sums + first;
  using Vector = Simd<float>;
#if defined(__AVX512F__)
  const __m512i zeros =
      _mm512_mullo_epi32(_mm512_set1_epi32(scale.zero), _mm512_loadu_si512(column_sums));
  const Vector exact{_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sums), zeros))};
#elif defined(__AVX2__)
  const auto load = [](const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  };
  const __m256i zeros = _mm256_mullo_epi32(_mm256_set1_epi32(scale.zero), load(column_sums));
  const Vector exact{_mm256_cvtepi32_ps(_mm256_sub_epi32(load(sums), zeros))};
#else
  int32_t lanes[Vector::kLanes];
  float numbers[Vector::kLanes];
  memcpy(lanes, sums, sizeof(lanes));
  for (int i = 0; i < Vector::kLanes; ++i) {
    numbers[i] = static_cast<float>(lanes[i] - scale.zero * column_sums[i]);
  }
  const Vector exact = Vector::load(numbers);
#endif
  return mul(exact, mul(Vector::broadcast(scale.scale), Vector::load(panel.scales + first)));
}

// Calls then(first, values) for each vector of outputs of a row: its sums as numbers, with bias.
template <WeightFormat kFormat, typename Then>
inline void finish_row(const float* sums, const RowScale* scale, const Panel& panel,
                       const Then& then) {
  using Vector = Simd<float>;
  for (int64_t i = 0; i < kPanel; i += Vector::kLanes) {
    Vector values;
    if constexpr (kFormat == WeightFormat::kInt8) {
      values = from_int8(sums + i, *scale, panel, i);
    } else {
      values = Vector::load(sums + i);
    }
    if (panel.bias != nullptr) values = add(values, Vector::load(panel.bias + i));
    then(i, values);
  }
}

// As above, for whatever format.
template <typename Then>
inline void finish_row(WeightFormat format, const float* sums, const RowScale* scale,
                       const Panel& panel, const Then& then) {
  if (format == WeightFormat::kInt8) {
    return finish_row<WeightFormat::kInt8>(sums, scale, panel, then);
  }
  finish_row<WeightFormat::kFloat32>(sums, scale, panel, then);
}

// Not inlined, since its loops need all registers that there are.
template <WeightFormat kFormat>
[[gnu::noinline]] void multiply(const InputRows& input, int64_t first, int64_t rows,
                                const Panel* panels, int64_t count, Block* out) {
  using D = Dot<kFormat>;
  // Where a panel is several strips, one stays in the innermost cache while rows go by, and so many
  // steps of the rows in the next one while panels go by.
  constexpr bool kStrips = kStrip < kPanel;
  const int64_t width = vectors_for(rows, D::kLanes) * D::kLanes;
  const int64_t all = panels->steps;
  const int64_t depth = kStrips ? kStripSteps : all;
  // A weight that is taken apart leaves registers for a row less. Blocks are of nearly equal size:
  // so one has less than three rows only where there are no more.
  const int64_t blocks = div_up(rows, kBlockRows - (D::kParts - 1));
  Steps steps{};
  steps.stride = input.stride;
  steps.to_strip = all * kStrip;
  steps.ahead = (kStrips ? 16 : all) * kStrip;
  // A step of a panel takes 256 bytes, and comes by once for each strip and block.
  steps.rate = div_up(4 * width, blocks);
  for (int64_t begin = 0; begin < all; begin += depth) {
    steps.count = all - begin < depth ? all - begin : depth;
    steps.from_zero = begin == 0;
    for (int64_t i = 0; i < count; ++i) {
      // What comes after this panel: these steps of the next one, or of the first one the next.
      const bool last = i + 1 == count;
      const uint32_t* after = last && begin + depth < all
                                  ? panels->words + (begin + depth) * kStrip
                                  : panels[i].words + all * kPanel + (last ? 0 : begin * kStrip);
      for (int64_t column = 0; column < kPanel; column += width) {
        const int64_t strip = column / kStrip * steps.to_strip;
        steps.words = panels[i].words + strip + begin * kStrip;
        steps.next = reinterpret_cast<const char*>(after + strip);
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t row = rows * block / blocks;
          steps.x = input.words + (first + row) * input.stride + begin * D::kParts;
          steps.sums = reinterpret_cast<uint32_t*>(out[i].values[row]) + column;
          accumulate_rows<kFormat>(rows * (block + 1) / blocks - row, steps);
          steps.next += steps.count * steps.rate;
        }
      }
    }
  }
}

// The sums of rows `first` to `first + rows` of the input, at most kChunkRows, in `count` panels
// that follow each other; finish_row() makes outputs of them.
inline void multiply_chunk(WeightFormat format, const InputRows& input, int64_t first, int64_t rows,
                           const Panel* panels, int64_t count, Block* out) {
  if (format == WeightFormat::kFloat32) {
    return multiply<WeightFormat::kFloat32>(input, first, rows, panels, count, out);
  }
  if (format == WeightFormat::kBFloat16) {
    return multiply<WeightFormat::kBFloat16>(input, first, rows, panels, count, out);
  }
  return multiply<WeightFormat::kInt8>(input, first, rows, panels, count, out);
}

}  // namespace pynar::PYNAR_ISA
