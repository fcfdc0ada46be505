// The k greatest outputs of a linear map, and their log-probabilities, without the outputs:
//
//   z[n,v] = sum_c x[n,c] W[v,c] + bias[v]
//   lse[n] = log sum_v exp(z[n,v])
//   tokens[n,0..k) = those v with the greatest z[n,v], in descending order, the lowest v of equals
//   log_probs[n,i] = z[n, tokens[n,i]] - lse[n]
//
// A symbol with bias -inf is never chosen; where fewer than k are left, the rest is <unk> with
// log-probability -inf. A row without a distribution (a NaN or +inf among z, or all of them -inf)
// gives <unk> and NaN everywhere.
//
// The vocabulary is cut into parts; each row and part has a partial result, and partial results are
// put together in the order of the parts.
#pragma once

#include "common/scalar.h"

namespace pynar {

// Of one row and part: k candidates in descending order, filled up with -inf,
struct ArgmaxCandidate {
  float value;
  int32_t token;
};

// and beside them the maximum and the sum of exp(z - maximum).
struct ArgmaxSum {
  float max;
  float sum;
};

// Argument of the GPU's kernels; every field is eight bytes wide.
struct LinearArgmaxParams {
  const void* x;                // [N, C]
  const void* weight;           // [V, C]
  const float* bias;            // [V] or null
  ArgmaxSum* sums;              // [N, parts]     scratch
  ArgmaxCandidate* candidates;  // [N, parts, k]  scratch
  int64_t* tokens;              // [N, k]  written
  float* log_probs;             // [N, k]  written
  float* lse;                   // [N]     written
  int64_t rows;                 // N
  int64_t depth;                // C
  int64_t columns;              // V
  int64_t k;
  int64_t segments;                 // into which the vocabulary is cut
  int64_t x_stride, weight_stride;  // elements of a row are neighbours
  int64_t aligned;  // 1 if every row of x and of the weight begins at a multiple of 16 bytes
};

// A block takes kArgmaxRows rows and a segment of so many tiles of kArgmaxColumns columns that
// there are at most kArgmaxSegments segments: a single row still occupies the whole GPU.
constexpr int kArgmaxThreads = 128;
constexpr int kArgmaxRows = 64;
constexpr int kArgmaxColumns = 128;
constexpr int64_t kArgmaxSegments = 256;

// Candidates are kept in registers. With more than that the GPU has no kernel.
constexpr int kArgmaxMost = 16;

PYNAR_HOST_DEVICE constexpr int64_t linear_argmax_segment_tiles(int64_t columns) {
  const int64_t tiles = (columns + kArgmaxColumns - 1) / kArgmaxColumns;
  return (tiles + kArgmaxSegments - 1) / kArgmaxSegments;
}

PYNAR_HOST_DEVICE constexpr int64_t linear_argmax_segments(int64_t columns) {
  const int64_t segment = linear_argmax_segment_tiles(columns) * kArgmaxColumns;
  return (columns + segment - 1) / segment;
}

// Two threads share a row, so that a segment has two parts.
PYNAR_HOST_DEVICE constexpr int64_t linear_argmax_parts(int64_t columns) {
  return 2 * linear_argmax_segments(columns);
}

PYNAR_HOST_DEVICE constexpr int64_t linear_argmax_blocks(int64_t rows, int64_t columns) {
  return (rows + kArgmaxRows - 1) / kArgmaxRows * linear_argmax_segments(columns);
}

constexpr int kArgmaxFinishThreads = 128;  // a warp for each row

PYNAR_HOST_DEVICE constexpr int64_t linear_argmax_finish_blocks(int64_t rows) {
  constexpr int64_t kRows = kArgmaxFinishThreads / 32;
  return (rows + kRows - 1) / kRows;
}

#if !defined(__CUDACC_RTC__)
// Two launches on the current device: parts of the rows, then each row.
template <typename T>
void linear_argmax_cuda(const LinearArgmaxParams& params, void* stream);
#endif

}  // namespace pynar
