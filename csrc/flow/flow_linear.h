// The maps of a flow that act on one step at a time: actnorm, head_linear, chains of both, and the
// squeeze between levels. For each sentence b and step t < lengths[b], with K matrices of size d on
// H = C / d heads:
//
//   h = x[b,t]
//   forward, k = 0 .. K-1:   h = h * exp(log_scale[k]) + bias[k];   h = weight[k] h
//   inverse, k = K-1 .. 0:   h = weight[k] h;   h = (h - bias[k]) * exp(-log_scale[k])
//   y[b,t] = h
//
// where `weight h` multiplies each head. For the inverse direction `weight` holds the inverses.
// Channel i of head h is h d + i where heads are contiguous, i H + h where they are strided.
// Without matrices there may be one log_scale and bias (actnorm), or none (squeeze); with them, one
// for each or none. Steps t >= lengths[b] of y are zero, those of x are not read.
//
// Or the maps act on `joined` neighbouring steps side by side: x, or y in the inverse direction, is
// [B, T joined, C / joined], and so are the lengths. Of the last step that is joined the parts
// beyond them count as zero, and are zero in y.
//
// Gradients keep x alone: what goes into each matrix is computed again.
#pragma once

#include "common/scalar.h"

namespace pynar {

// The steps of a batch, [B, T, C]; or squeezed: the first `kept` channels of `factor` neighbouring
// steps are one row of `main`, and the others lie apart. Or in pieces: a step is `pieces`
// neighbouring rows of `main`.
template <typename T>
struct FlowRows {
  T* main;     // [B, ceil(T / factor), factor * kept], or [B, T * pieces, C / pieces]
  T* dropped;  // [B, T, C - kept]
  int64_t factor, kept;
  int64_t main_stride_b, main_stride_t;  // of a step, or of a joined one
  int64_t dropped_stride_b, dropped_stride_t;
  int64_t pieces = 1;
  int64_t piece_stride = 0;

  PYNAR_HOST_DEVICE T* kept_of(int64_t b, int64_t t) const {
    return main + b * main_stride_b + t / factor * main_stride_t + t % factor * kept;
  }
  PYNAR_HOST_DEVICE T* dropped_of(int64_t b, int64_t t) const {
    return dropped + b * dropped_stride_b + t * dropped_stride_t;
  }
  PYNAR_HOST_DEVICE T* at(int64_t b, int64_t t, int64_t c) const {
    if (pieces > 1) {
      const int64_t width = kept / pieces;
      return kept_of(b, t) + c / width * piece_stride + c % width;
    }
    return c < kept ? kept_of(b, t) + c : dropped_of(b, t) + (c - kept);
  }
};

// Heads of the K matrices, as LAYOUTS of pynar/ops/flow_linear.py numbers them.
enum class FlowLayout : int64_t { kContiguous, kStrided, kAlternating };

template <typename T>
struct FlowLinearParams {
  FlowRows<const T> x;
  FlowRows<T> y;                       //                written
  const int64_t* lengths;              // [B]
  const accumulation_t<T>* log_scale;  // [L, C], L = K, or 1 with K = 0; or null
  const accumulation_t<T>* bias;       // [L, C], or null
  const accumulation_t<T>* weight;     // [K, d, d]
  int64_t batch, steps, channels;      // B, T, C
  int64_t matrices, dim;               // K, d
  int64_t lengths_stride;
  FlowLayout layout;
  int64_t inverse;
  int64_t joined = 1;

  PYNAR_HOST_DEVICE int64_t length(int64_t b) const {
    return (lengths[b * lengths_stride] + joined - 1) / joined;
  }
  // Whether a channel of a live step is no padding.
  template <typename U>
  PYNAR_HOST_DEVICE bool holds(const FlowRows<U>& rows, int64_t b, int64_t t, int64_t c) const {
    return rows.pieces == 1 ||
           t * rows.pieces + c / (rows.kept / rows.pieces) < lengths[b * lengths_stride];
  }
  PYNAR_HOST_DEVICE bool strided(int64_t k) const {
    return layout == FlowLayout::kStrided || (layout == FlowLayout::kAlternating && k % 2 == 1);
  }
  // The matrix that is applied as number i.
  PYNAR_HOST_DEVICE int64_t applied(int64_t i) const { return inverse ? matrices - 1 - i : i; }
  // The channels are scaled and shifted before each matrix and after the last one: at places 0 to
  // K, in the order in which they are applied. Which log_scale and bias act at a place; -1 for
  // none.
  PYNAR_HOST_DEVICE int64_t normed(int64_t place) const {
    if (log_scale == nullptr || place < 0) return -1;
    if (matrices == 0) return 0;
    if (inverse) return place > 0 ? matrices - place : -1;
    return place < matrices ? place : -1;
  }
};

template <typename T>
struct FlowLinearBackwardParams {
  FlowLinearParams<T> forward;  // y is not used
  FlowRows<const T> grad_y;
  FlowRows<T> grad_x;                 //            written
  accumulation_t<T>* grad_log_scale;  // [L, C]     written, contiguous
  accumulation_t<T>* grad_bias;       // [L, C]     written, contiguous
  accumulation_t<T>* grad_weight;     // [K, d, d]  written, contiguous
  accumulation_t<T>* partials;        // [parts, flow_sums(K, d, C)]  scratch on a GPU
  accumulation_t<T>* states;          // [parts, K + 1, block rows, C]  scratch on a GPU
};

// The gradients of parameters are sums over steps. On the CPU each of at most kFlowChunks equal
// parts of them is summed up in order, then the parts, so that threads do not show in the result.
constexpr int64_t kFlowChunks = 16;

// A block of this many steps goes through all maps together on the CPU.
constexpr int kFlowRows = 32;

// How many numbers the gradients of parameters come from: those of the matrices, and two sums for
// each channel and place.
PYNAR_HOST_DEVICE constexpr int64_t flow_sums(int64_t matrices, int64_t dim, int64_t channels) {
  return matrices * dim * dim + 2 * (matrices + 1) * channels;
}

// Steps up to the end of the last row of `main`.
PYNAR_HOST_DEVICE constexpr int64_t flow_joined_steps(int64_t steps, int64_t factor) {
  return (steps + factor - 1) / factor * factor;
}

// On a GPU. A block holds two states of its steps in shared memory, and a matrix if it is no wider
// than 65 (46 in float64). Steps do not depend on each other, so their number in a block shows in
// no result.
constexpr int kFlowThreads = 128;
constexpr int kFlowBlockRows = 8;
constexpr int64_t kFlowStateBytes = 30 << 10;
constexpr int64_t kFlowWeightBytes = 65 * 66 * 4;
constexpr int64_t kFlowMostParts = 128;

PYNAR_HOST_DEVICE constexpr int64_t flow_block_rows(int64_t channels, int64_t element_size) {
  const int64_t rows = kFlowStateBytes / (2 * channels * element_size);
  return rows < kFlowBlockRows ? rows : kFlowBlockRows;
}

// The parts of all steps whose gradients of parameters are added up one after another.
PYNAR_HOST_DEVICE constexpr int64_t flow_parts(int64_t rows, int64_t channels,
                                               int64_t element_size) {
  const int64_t most = flow_block_rows(channels, element_size);
  const int64_t groups = (rows + most - 1) / most;
  return groups < kFlowMostParts ? groups : kFlowMostParts;
}

template <typename T>
PYNAR_HOST_DEVICE constexpr int64_t flow_linear_blocks(const FlowLinearParams<T>& p) {
  const bool chain = p.matrices > 0;
  const int64_t rows = p.batch * (chain ? p.steps : flow_joined_steps(p.steps, p.y.factor));
  const int64_t each =
      chain ? flow_block_rows(p.channels, sizeof(accumulation_t<T>)) : kFlowThreads / 32;
  return (rows + each - 1) / each;
}

template <typename T>
PYNAR_HOST_DEVICE constexpr int64_t flow_finish_blocks(const FlowLinearParams<T>& p) {
  return (flow_sums(p.matrices, p.dim, p.channels) + kFlowThreads - 1) / kFlowThreads;
}

#if !defined(__CUDACC_RTC__)
template <typename T>
void flow_linear_cpu(const FlowLinearParams<T>& params);
template <typename T>
void flow_linear_backward_cpu(const FlowLinearBackwardParams<T>& params);
template <typename T>
void flow_linear_cuda(const FlowLinearParams<T>& params, void* stream);
template <typename T>
void flow_linear_backward_cuda(const FlowLinearBackwardParams<T>& params, void* stream);
#endif

}  // namespace pynar
