#pragma once

#include "common/device.cuh"
#include "flow/flow_linear.h"

namespace pynar {

__device__ inline float natural_exponential(float x) {
  return expf(x);
}
__device__ inline double natural_exponential(double x) {
  return exp(x);
}

// What is done to a channel at a place, and what to subtract from a state for the gradient of the
// scale; see FlowLinearParams::normed.
template <typename A>
struct ChannelScale {
  A scale = 1;
  A shift = 0;
  A centre = 0;

  template <typename T>
  __device__ ChannelScale(const FlowLinearParams<T>& p, int64_t place, int64_t c) {
    const int64_t k = p.normed(place);
    if (k < 0) return;
    const A s = p.log_scale[k * p.channels + c];
    const A b = p.bias[k * p.channels + c];
    scale = natural_exponential(p.inverse ? -s : s);
    shift = p.inverse ? -b * scale : b;
    centre = p.inverse ? A(0) : b;
  }
};

// No matrices: a warp takes a step, so that its lanes read neighbouring channels. Steps go on to
// the end of the last one that is joined of several, where y is squeezed. grid: B * ceil(T /
// factor) * factor / (kThreads / 32)
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) flow_copy(FlowLinearParams<T> p) {
  using A = accumulation_t<T>;
  const int64_t steps = flow_joined_steps(p.steps, p.y.factor);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= p.batch * steps) return;
  const int64_t b = row / steps;
  const int64_t t = row % steps;
  const bool live = t < p.length(b);
  // Behind the last step there is nothing but a rest of the last row of `main`.
  const int64_t channels = t < p.steps ? p.channels : p.y.kept;
#pragma unroll 4
  for (int64_t c = threadIdx.x % kWarp; c < channels; c += kWarp) {
    T value{};
    if (live && p.holds(p.y, b, t, c)) {
      if (p.holds(p.x, b, t, c)) value = *p.x.at(b, t, c);
      if (p.log_scale != nullptr) {
        const ChannelScale<A> norm(p, 0, c);
        value = from_accumulation<T>(to_accumulation(value) * norm.scale + norm.shift);
      }
    }
    *p.y.at(b, t, c) = value;
  }
}

// The matrix of a block's current product, in shared memory if it fits there.
template <typename A>
struct SharedWeight {
  A element[kFlowWeightBytes / sizeof(A)];

  // Every thread of the block calls it; what was there is not read any more.
  __device__ const A* load(const A* weight, int64_t dim, int64_t* stride) {
    *stride = dim;
    if (dim * (dim + 1) * static_cast<int64_t>(sizeof(A)) > kFlowWeightBytes) return weight;
    // Rows one element apart from a multiple of 32 banks: lanes read a column.
    *stride = dim + 1;
    for (int64_t e = threadIdx.x; e < dim * dim; e += blockDim.x) {
      element[e / dim * (dim + 1) + e % dim] = weight[e];
    }
    __syncthreads();
    return element;
  }
};

// Each head of rows [rows, C], from `in` to `out`, by a matrix or its transpose, and then the scale
// of `place` unless that is -1. A thread takes a channel of all rows.
template <typename T>
__device__ inline void multiply_heads(const FlowLinearParams<T>& p, int64_t k, bool transposed,
                                      int64_t place, int64_t rows, const accumulation_t<T>* in,
                                      SharedWeight<accumulation_t<T>>& shared,
                                      accumulation_t<T>* out) {
  using A = accumulation_t<T>;
  int64_t stride;
  const A* weight = shared.load(p.weight + k * p.dim * p.dim, p.dim, &stride);
  const int64_t heads = p.channels / p.dim;
  const bool strided = p.strided(k);
  const int64_t apart = strided ? heads : 1;
  const int64_t by_output = transposed ? 1 : stride;
  const int64_t by_input = transposed ? stride : 1;
  for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
    const int64_t i = strided ? c / heads : c % p.dim;
    const int64_t first = strided ? c % heads : c - i;
    A sum[kFlowBlockRows];
#pragma unroll
    for (int r = 0; r < kFlowBlockRows; ++r) sum[r] = 0;
    for (int64_t j = 0; j < p.dim; ++j) {
      const A w = weight[i * by_output + j * by_input];
      const A* x = in + first + j * apart;
#pragma unroll
      for (int r = 0; r < kFlowBlockRows; ++r) {
        if (r < rows) sum[r] += w * x[r * p.channels];
      }
    }
    const ChannelScale<A> norm(p, place, c);
#pragma unroll
    for (int r = 0; r < kFlowBlockRows; ++r) {
      if (r < rows) out[r * p.channels + c] = sum[r] * norm.scale + norm.shift;
    }
  }
  __syncthreads();
}

// Rows of [B T, C], zero for the padding, with the scale of `place`.
template <typename T>
__device__ inline void load_steps(const FlowLinearParams<T>& p, const FlowRows<const T>& from,
                                  int64_t place, int64_t first, int64_t rows,
                                  accumulation_t<T>* to) {
  using A = accumulation_t<T>;
  for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
    const ChannelScale<A> norm(p, place, c);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = (first + r) / p.steps;
      const int64_t t = (first + r) % p.steps;
      const bool live = t < p.length(b);
      const A x = live && p.holds(from, b, t, c) ? to_accumulation(*from.at(b, t, c)) : A(0);
      to[r * p.channels + c] = live ? x * norm.scale + norm.shift : A(0);
    }
  }
  __syncthreads();
}

template <typename T>
__device__ inline void store_steps(const FlowLinearParams<T>& p, const accumulation_t<T>* from,
                                   int64_t first, int64_t rows, const FlowRows<T>& to) {
  for (int64_t e = threadIdx.x; e < rows * p.channels; e += blockDim.x) {
    const int64_t row = first + e / p.channels;
    const int64_t b = row / p.steps;
    const int64_t t = row % p.steps;
    const int64_t c = e % p.channels;
    const bool live = t < p.length(b) && p.holds(to, b, t, c);
    *to.at(b, t, c) = live ? from_accumulation<T>(from[e]) : T{};
  }
  __syncthreads();
}

// A block takes some steps through all matrices.
// grid: B * T / flow_block_rows(C)
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) flow_linear_steps(FlowLinearParams<T> p) {
  using A = accumulation_t<T>;
  __shared__ A states[kFlowStateBytes / sizeof(A)];
  __shared__ SharedWeight<A> weight;
  const int64_t most = flow_block_rows(p.channels, sizeof(A));
  const int64_t first = blockIdx.x * most;
  const int64_t rest = p.batch * p.steps - first;
  const int64_t rows = rest < most ? rest : most;
  A* in = states;
  A* out = states + rows * p.channels;
  load_steps(p, p.x, 0, first, rows, in);
  for (int64_t i = 0; i < p.matrices; ++i) {
    multiply_heads(p, p.applied(i), false, i + 1, rows, in, weight, out);
    A* const kept = in;
    in = out;
    out = kept;
  }
  store_steps(p, in, first, rows, p.y);
}

// A block takes a part of all steps, some at a time: forward again, which leaves what goes into
// each matrix in `states`, and back. grid: flow_parts(B T)
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    flow_linear_gradient(FlowLinearBackwardParams<T> params) {
  using A = accumulation_t<T>;
  const FlowLinearParams<T>& p = params.forward;
  __shared__ A gradients[kFlowStateBytes / sizeof(A)];
  __shared__ SharedWeight<A> weight;
  const int64_t most = flow_block_rows(p.channels, sizeof(A));
  const int64_t parts = flow_parts(p.batch * p.steps, p.channels, sizeof(A));
  const int64_t part = blockIdx.x;
  const int64_t weights = p.matrices * p.dim * p.dim;
  A* states = params.states + part * (p.matrices + 1) * most * p.channels;
  A* grad_weight = params.partials + part * flow_sums(p.matrices, p.dim, p.channels);
  A* sums = grad_weight + weights;
  A* moments = sums + (p.matrices + 1) * p.channels;
  for (int64_t e = threadIdx.x; e < flow_sums(p.matrices, p.dim, p.channels); e += kThreads) {
    grad_weight[e] = 0;
  }
  __syncthreads();

  const int64_t groups = (p.batch * p.steps + most - 1) / most;
  for (int64_t group = groups * part / parts; group < groups * (part + 1) / parts; ++group) {
    const int64_t first = group * most;
    const int64_t rest = p.batch * p.steps - first;
    const int64_t rows = rest < most ? rest : most;
    const int64_t size = rows * p.channels;
    load_steps(p, p.x, 0, first, rows, states);
    for (int64_t i = 0; i < p.matrices; ++i) {
      // What comes out of the last one matters only to a scale.
      if (i + 1 == p.matrices && p.normed(p.matrices) < 0) break;
      multiply_heads(p, p.applied(i), false, i + 1, rows, states + i * size, weight,
                     states + (i + 1) * size);
    }
    A* grad = gradients;
    A* other = gradients + size;
    load_steps(p, params.grad_y, -1, first, rows, grad);
    for (int64_t place = p.matrices; place >= 0; --place) {
      if (p.normed(place) >= 0) {
        for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) {
          const ChannelScale<A> norm(p, place, c);
          A sum = 0;
          A moment = 0;
          for (int64_t r = 0; r < rows; ++r) {
            const A g = grad[r * p.channels + c];
            sum += g;
            // The states of the padding are those of a zero, and its gradients zero.
            moment += g * (states[place * size + r * p.channels + c] - norm.centre);
            grad[r * p.channels + c] = g * norm.scale;
          }
          sums[place * p.channels + c] += sum;
          moments[place * p.channels + c] += moment;
        }
        __syncthreads();
      }
      if (place == 0) break;
      const int64_t k = p.applied(place - 1);
      const A* in = states + (place - 1) * size;
      const int64_t heads = p.channels / p.dim;
      const int64_t head_apart = p.strided(k) ? 1 : p.dim;
      const int64_t apart = p.strided(k) ? heads : 1;
      for (int64_t e = threadIdx.x; e < p.dim * p.dim; e += kThreads) {
        const A* g = grad + e / p.dim * apart;
        const A* x = in + e % p.dim * apart;
        A sum = 0;
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t h = 0; h < heads; ++h) {
            sum += g[r * p.channels + h * head_apart] * x[r * p.channels + h * head_apart];
          }
        }
        grad_weight[k * p.dim * p.dim + e] += sum;
      }
      multiply_heads(p, k, true, -1, rows, grad, weight, other);
      A* const kept = grad;
      grad = other;
      other = kept;
    }
    store_steps(p, grad, first, rows, params.grad_x);
  }
}

// Adds up the parts, one number a thread.
// grid: flow_sums(K, d, C) / kThreads
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) flow_linear_finish(FlowLinearBackwardParams<T> params) {
  using A = accumulation_t<T>;
  const FlowLinearParams<T>& p = params.forward;
  const int64_t parts = flow_parts(p.batch * p.steps, p.channels, sizeof(A));
  const int64_t size = flow_sums(p.matrices, p.dim, p.channels);
  const int64_t weights = p.matrices * p.dim * p.dim;
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= size) return;
  A total = 0;
  for (int64_t part = 0; part < parts; ++part) total += params.partials[part * size + e];
  if (e < weights) {
    params.grad_weight[e] = total;
    return;
  }
  const int64_t by_place = (p.matrices + 1) * p.channels;
  const bool is_moment = e - weights >= by_place;
  const int64_t at = is_moment ? e - weights - by_place : e - weights;
  const int64_t k = p.normed(at / p.channels);
  if (k < 0) return;
  const int64_t c = at % p.channels;
  const ChannelScale<A> norm(p, at / p.channels, c);
  if (is_moment) {
    params.grad_log_scale[k * p.channels + c] = p.inverse ? -total : total;
  } else {
    params.grad_bias[k * p.channels + c] = p.inverse ? -total * norm.scale : total;
  }
}

}  // namespace pynar
