// A linear map with a packed weight, and what surrounds it in a Transformer:
//
//   h = x                          or (x - mean(x)) / sqrt(var(x) + eps), with input_eps >= 0
//   z = f(h W^T + bias) + residual
//   y = z                          or layer normalisation of z with weight, bias and output_eps
//
// f is the identity, relu or (exact) gelu. Everything outside the products is computed in fp32.
#pragma once

#include "linear/panel.h"

namespace pynar {

enum class Activation : int64_t { kNone = 0, kRelu = 1, kGelu = 2 };

struct PackedLinearParams {
  const uint32_t* words;       // see panel.h
  const float* scales;         // [panels * kPanel], of int8
  const int32_t* column_sums;  // [panels * kPanel], of int8
  const float* bias;           // [columns] or null
  const float* residual;       // [rows, columns] or null
  float* y;                    // [rows, columns], contiguous
  int64_t residual_stride;
  int64_t rows;
  int64_t columns;
  int64_t steps;
  WeightFormat format;
  Activation activation;
};

struct OutputNorm {
  const float* weight;  // [columns]
  const float* bias;    // [columns]
  float eps;
};

// Fills y for rows [first, last), at most kChunkRows, in `count` panels, at most kPanelGroup.
PYNAR_DECLARE_KERNEL(void packed_linear_panels(const PackedLinearParams& p, const InputRows& input,
                                               int64_t panel, int64_t count, int64_t first,
                                               int64_t last))

// Normalises rows [first, last) of y in place.
PYNAR_DECLARE_KERNEL(void normalise_rows(const OutputNorm& norm, float* y, int64_t columns,
                                         int64_t first, int64_t last))

}  // namespace pynar
