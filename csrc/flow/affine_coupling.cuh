#pragma once

#include "common/device.cuh"
#include "flow/affine_coupling.h"

namespace pynar {

__device__ inline float coupling_exponential(float x) {
  return expf(x);
}
__device__ inline double coupling_exponential(double x) {
  return exp(x);
}
__device__ inline float coupling_log1p(float x) {
  return log1pf(x);
}
__device__ inline double coupling_log1p(double x) {
  return log1p(x);
}

// With v = raw_scale + 2 and t = exp(-|v|), nothing overflows.
template <typename A>
struct DeviceSigmoid {
  A v, t;

  __device__ explicit DeviceSigmoid(A raw_scale)
      : v(raw_scale + A(2)), t(coupling_exponential(v < 0 ? v : -v)) {}
  __device__ A value() const { return (v < 0 ? t : A(1)) / (A(1) + t); }
  __device__ A rest() const { return (v < 0 ? A(1) : t) / (A(1) + t); }
  __device__ A reciprocal() const { return (A(1) + t) / (v < 0 ? t : A(1)); }
  __device__ A log() const { return (v > 0 ? A(0) : v) - coupling_log1p(t); }
};

// A warp takes a step, its lanes neighbouring channels.
// grid: B * T / (kThreads / 32)
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) affine_coupling_steps(AffineCouplingParams<T> p) {
  using A = accumulation_t<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= p.batch * p.steps) return;
  const int64_t b = row / p.steps;
  const int64_t t = row % p.steps;
  const bool live = t < p.lengths[b * p.lengths_stride];
  const T* z = p.z.row(b, t);
  const T* shift = p.shift.row(b, t);
  const T* raw_scale = p.raw_scale.row(b, t);
  T* y = p.y + row * p.channels;
  A sum = 0;
#pragma unroll 4
  for (int64_t c = threadIdx.x % kWarp; c < p.channels; c += kWarp) {
    T value{};
    if (live) {
      const DeviceSigmoid<A> scale(to_accumulation(raw_scale[c]));
      const A x = to_accumulation(z[c]);
      const A m = to_accumulation(shift[c]);
      value =
          from_accumulation<T>(p.inverse ? (x - m) * scale.reciprocal() : x * scale.value() + m);
      sum += scale.log();
    }
    y[c] = value;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) p.by_step[row] = p.inverse ? -sum : sum;
}

// A warp adds up the steps of a sentence.
// grid: B / (kThreads / 32)
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) affine_coupling_sums(AffineCouplingParams<T> p) {
  using A = accumulation_t<T>;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (b >= p.batch) return;
  const int64_t length = p.lengths[b * p.lengths_stride];
  A sum = 0;
  for (int64_t t = threadIdx.x % kWarp; t < length; t += kWarp) sum += p.by_step[b * p.steps + t];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) p.logdet[b] = sum;
}

// grid: B * T / (kThreads / 32)
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    affine_coupling_gradient(AffineCouplingBackwardParams<T> p) {
  using A = accumulation_t<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= p.batch * p.steps) return;
  const int64_t b = row / p.steps;
  const int64_t t = row % p.steps;
  const bool live = t < p.lengths[b * p.lengths_stride];
  const T* grad_y = p.grad_y.row(b, t);
  const T* x = p.x.row(b, t);
  const T* raw_scale = p.raw_scale.row(b, t);
  const A grad_logdet = p.grad_logdet[b * p.grad_logdet_stride];
#pragma unroll 4
  for (int64_t c = threadIdx.x % kWarp; c < p.channels; c += kWarp) {
    A by_z = 0;
    A by_shift = 0;
    A by_raw_scale = 0;
    if (live) {
      const DeviceSigmoid<A> scale(to_accumulation(raw_scale[c]));
      const A g = to_accumulation(grad_y[c]);
      const A h = to_accumulation(x[c]);
      if (p.inverse) {
        by_z = g * scale.reciprocal();
        by_shift = -by_z;
        by_raw_scale = -(g * h + grad_logdet) * scale.rest();
      } else {
        by_z = g * scale.value();
        by_shift = g;
        by_raw_scale = (g * h * scale.value() + grad_logdet) * scale.rest();
      }
    }
    const int64_t at = row * p.channels + c;
    p.grad_z[at] = from_accumulation<T>(by_z);
    p.grad_shift[at] = from_accumulation<T>(by_shift);
    p.grad_raw_scale[at] = from_accumulation<T>(by_raw_scale);
  }
}

}  // namespace pynar
