#pragma once

#include "losses/divergence_cross_entropy.cuh"
#include "losses/divergence_cross_entropy_backward.h"

namespace pynar {

// grid: N for each group of kHeads heads
template <typename T, int kHeads>
__global__ void __launch_bounds__(kDivergenceThreads)
    divergence_cross_entropy_gradient(DivergenceBackwardParams<T> p) {
  using A = accumulation_t<T>;
  constexpr int kPerChunk = Chunk<T>::kCount;
  const int64_t row = blockIdx.x % p.rows;
  const int64_t first = blockIdx.x / p.rows * kHeads;
  const int64_t target = p.targets[row * p.targets_stride];
  const T* logits[kHeads];
  T* grads[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    logits[h] = p.logits[first + h] + row * p.logits_stride[first + h];
    grads[h] = p.grads[first + h] + row * p.grads_stride[first + h];
  }

  // Made once, in memory because pairs are indices there; then everyone's, in registers.
  __shared__ DivergenceGradient<DeviceMath<A>, kHeads> shared;
  if (threadIdx.x == 0) shared.load(p, first, row);
  __syncthreads();
  const DivergenceGradient<DeviceMath<A>, kHeads> gradient = shared;

  constexpr int64_t kStep = static_cast<int64_t>(kDivergenceThreads) * kPerChunk;
  for (int64_t v = threadIdx.x * kPerChunk; v < p.vocabulary; v += kStep) {
    A x[kHeads][kPerChunk];
    load_symbols(logits, v, p.vocabulary, p.aligned != 0, x);
    Chunk<T> out[kHeads];
#pragma unroll
    for (int i = 0; i < kPerChunk; ++i) {
      A symbol[kHeads];
      A grad[kHeads];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) symbol[h] = x[h][i];
      gradient.at(symbol, v + i == target, grad);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) out[h].element[i] = from_accumulation<T>(grad[h]);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (p.aligned != 0 && v + kPerChunk <= p.vocabulary) {
        *reinterpret_cast<Chunk<T>*>(grads[h] + v) = out[h];
      } else {
#pragma unroll
        for (int i = 0; i < kPerChunk; ++i) {
          if (v + i < p.vocabulary) grads[h][v + i] = out[h].element[i];
        }
      }
    }
  }
}

}  // namespace pynar
