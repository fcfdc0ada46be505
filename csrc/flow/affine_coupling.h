// An affine coupling whose scale is below one. For t < lengths[b], with s = sigmoid(raw_scale + 2):
//
//   forward:  y = s z + shift           logdet[b] =  sum_{t,c} log s
//   inverse:  y = (z - shift) / s       logdet[b] = -sum_{t,c} log s
//
// and for gradients g of y and a of logdet, with x the z of the forward direction, the y of the
// inverse one:
//
//   forward:  grad_z = g s    grad_shift =  g      grad_raw_scale =  (g x s + a) (1 - s)
//   inverse:  grad_z = g / s  grad_shift = -g / s  grad_raw_scale = -(g x   + a) (1 - s)
//
// Steps t >= lengths[b] are zero in all results and not read.
#pragma once

#include "common/scalar.h"

namespace pynar {

template <typename T>
struct CouplingInput {
  const T* data;  // [B, T, C], the channels are neighbours
  int64_t stride_b, stride_t;

  PYNAR_HOST_DEVICE const T* row(int64_t b, int64_t t) const {
    return data + b * stride_b + t * stride_t;
  }
};

template <typename T>
struct AffineCouplingParams {
  CouplingInput<T> z, shift, raw_scale;
  const int64_t* lengths;      // [B]
  T* y;                        // [B, T, C]  written, contiguous
  accumulation_t<T>* logdet;   // [B]        written, contiguous
  accumulation_t<T>* by_step;  // [B, T]     scratch: the sums of each step
  int64_t batch, steps, channels;
  int64_t lengths_stride;
  int64_t inverse;
};

template <typename T>
struct AffineCouplingBackwardParams {
  CouplingInput<T> grad_y, x, raw_scale;
  const accumulation_t<T>* grad_logdet;  // [B]
  const int64_t* lengths;                // [B]
  T* grad_z;                             // [B, T, C]  written, contiguous
  T* grad_shift;                         // [B, T, C]  written, contiguous
  T* grad_raw_scale;                     // [B, T, C]  written, contiguous
  int64_t batch, steps, channels;
  int64_t grad_logdet_stride, lengths_stride;
  int64_t inverse;
};

constexpr int kCouplingThreads = 128;

// A warp takes a row.
PYNAR_HOST_DEVICE constexpr int64_t coupling_blocks(int64_t rows) {
  return (rows + kCouplingThreads / 32 - 1) / (kCouplingThreads / 32);
}

#if !defined(__CUDACC_RTC__)
template <typename T>
void affine_coupling_cuda(const AffineCouplingParams<T>& params, void* stream);
template <typename T>
void affine_coupling_backward_cuda(const AffineCouplingBackwardParams<T>& params, void* stream);
#endif

}  // namespace pynar
