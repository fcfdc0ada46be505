// How the weight of a linear map is stored for CPU kernels, and the piece of work they share.
//
// A weight [columns, depth] is cut into panels of kPanel columns, and a panel into strips: of
// kNarrowStrip columns, or with AVX-512 the whole panel is one. A step of a strip holds one 32-bit
// word for each of its columns: one fp32 value, two bf16 or four int8 values that follow each other
// in depth. So a vector register takes the same step of neighbouring columns, and one multiply-add
// with a broadcast word of the input serves them all:
//
//   words[panel][strip][step][column in strip],   missing columns and missing depth are zero.
//
// A strip goes by many rows of input from the innermost cache, so it has to lie together: of lines
// at equal distances that cache holds few.
//
// int8 weights have a scale for each column. Inputs are rounded to 256 steps over the range of
// their row, and 0, since the processor multiplies unsigned by signed bytes; what the row's zero
// adds to a column is that many times the sum of its weights. With AVX2 two products are added in
// 16 bits, for which the sum of two weights at an even depth and the next one must lie in [-128,
// 128].
//
// Every output is summed up over depth in one order, whatever the number of rows and threads.
#pragma once

#include "common/cpu.h"
#include "common/scalar.h"

namespace pynar {

enum class WeightFormat : int64_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

constexpr int64_t kPanel = 64;
constexpr int64_t kNarrowStrip = 16;
// Rows that share a pass over a panel: as many as the registers of AVX-512 hold sums for.
constexpr int64_t kBlockRows = 6;
// Rows that go past a panel one after another.
constexpr int64_t kChunkRows = 16 * kBlockRows;
// So many steps of a narrow strip stay in the innermost cache while a chunk of rows goes by.
constexpr int64_t kStripSteps = 256;
// Panels that a chunk of rows goes past together where the rows have more steps than the next cache
// holds, which would else come from the outer caches for each panel.
constexpr int64_t kPanelGroup = 4;

constexpr int64_t depth_per_word(WeightFormat format) {
  return format == WeightFormat::kFloat32 ? 1 : format == WeightFormat::kBFloat16 ? 2 : 4;
}

// Words of the input that a step may take: some processors want bf16 numbers as fp32.
constexpr int64_t words_per_step(WeightFormat format) {
  return format == WeightFormat::kBFloat16 ? 2 : 1;
}

// The sums of an int8 weight stay within 32 bits: 255 * 127 * kInt8Depth < 2^31.
constexpr int64_t kInt8Depth = 1 << 16;

constexpr int64_t div_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// p + i of an array that may be missing.
template <typename T>
constexpr const T* advance(const T* p, int64_t i) {
  return p == nullptr ? nullptr : p + i;
}

// An input x of int8 is (q - zero) scale, with q in [0, 255].
struct RowScale {
  float scale;
  int32_t zero;
};

// Rows of input as words for each step of a panel.
struct InputRows {
  const uint32_t* words;   // [rows, stride]
  const RowScale* scales;  // [rows], of int8
  int64_t stride;
};

// One panel and what turns its sums into outputs.
struct Panel {
  const uint32_t* words;
  int64_t steps;
  const float* scales;         // [kPanel], of int8
  const int32_t* column_sums;  // [kPanel], of int8
  const float* bias;           // of those columns that there are, or null
};

// How rows of input become words: normalised first (layer normalisation without its affine part,
// which belongs into the weight) where eps >= 0. `scratch` holds a row in fp32.
struct InputConversion {
  int64_t depth;
  int64_t steps;
  int64_t stride;  // from one row of words to the next
  float eps;
};

PYNAR_DECLARE_KERNEL(template <typename T>
                     void convert_rows(WeightFormat format, const InputConversion& how, const T* x,
                                       int64_t x_stride, int64_t rows, float* scratch,
                                       uint32_t* words, RowScale* scales))

}  // namespace pynar
