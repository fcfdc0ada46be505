#pragma once

#include "common/device.cuh"
#include "losses/divergence_cross_entropy.h"

namespace pynar {

template <typename A>
struct DeviceMath {
  using Number = A;
  __device__ static A exp(A x) { return exponential(x); }
  __device__ static A log(A x) { return logarithm(x); }
};

// The elements of kHeads rows of logits from v on, -inf beside a row.
template <typename T, int kHeads>
__device__ inline void load_symbols(const T* const (&logits)[kHeads], int64_t v, int64_t vocabulary,
                                    bool aligned,
                                    accumulation_t<T> (&x)[kHeads][Chunk<T>::kCount]) {
  constexpr int kPerChunk = Chunk<T>::kCount;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (v + kPerChunk <= vocabulary) {
      const Chunk<T> chunk = load_chunk(logits[h] + v, aligned);
#pragma unroll
      for (int i = 0; i < kPerChunk; ++i) x[h][i] = to_accumulation(chunk.element[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kPerChunk; ++i) {
        x[h][i] = v + i < vocabulary ? to_accumulation(logits[h][v + i])
                                     : negative_infinity<accumulation_t<T>>();
      }
    }
  }
}

// Each thread sums up its own symbols against its own maxima; in the end all change to the block's.
// grid: N for each group of kHeads heads
template <typename T, int kHeads>
__global__ void __launch_bounds__(kDivergenceThreads)
    divergence_cross_entropy_rows(DivergenceParams<T> p) {
  using A = accumulation_t<T>;
  constexpr int kPerChunk = Chunk<T>::kCount;
  constexpr int kWarps = kDivergenceThreads / kWarp;
  const int64_t row = blockIdx.x % p.rows;
  const int64_t first = blockIdx.x / p.rows * kHeads;
  const T* logits[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    logits[h] = p.logits[first + h] + row * p.logits_stride[first + h];
  }

  DivergenceSums<DeviceMath<A>, kHeads> sums;
  constexpr int64_t kStep = static_cast<int64_t>(kDivergenceThreads) * kPerChunk;
  for (int64_t v = threadIdx.x * kPerChunk; v < p.vocabulary; v += kStep) {
    A x[kHeads][kPerChunk];
    load_symbols(logits, v, p.vocabulary, p.aligned != 0, x);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      A greatest = x[h][0];
#pragma unroll
      for (int i = 1; i < kPerChunk; ++i) greatest = maximum(greatest, x[h][i]);
      if (greatest > sums.max[h]) sums.raise_max(h, greatest);
    }
#pragma unroll
    for (int i = 0; i < kPerChunk; ++i) {
      // Beside the row there is nothing to add, not even -inf.
      if (v + i >= p.vocabulary) break;
      A symbol[kHeads];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) symbol[h] = x[h][i];
      sums.add(symbol);
    }
  }

  __shared__ A max_scratch[kHeads][kWarps];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const A max = block_max<kDivergenceThreads>(sums.max[h], max_scratch[h]);
    if (max > sums.max[h]) sums.raise_max(h, max);
  }

  // Sum, total and moments of each head, and a word that says which divergences are infinite.
  constexpr int kValues = kHeads * (kHeads + 1);
  __shared__ A scratch[kValues][kWarps];
  __shared__ uint32_t infinite[kWarps];
  const int warp = threadIdx.x / kWarp;
  const bool writes = threadIdx.x % kWarp == 0;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      // The moment of a head with itself is zero, and its place the sum's.
      const A value = warp_sum(g == h ? sums.sum[h] : sums.moment[h][g]);
      if (writes) scratch[h * kHeads + g][warp] = value;
    }
    const A total = warp_sum(sums.total[h]);
    if (writes) scratch[kHeads * kHeads + h][warp] = total;
  }
  uint32_t bits = sums.infinite;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    bits |= __shfl_xor_sync(kAllLanes, bits, offset);
  }
  if (writes) infinite[warp] = bits;
  __syncthreads();
  if (threadIdx.x != 0) return;

  const auto gather = [&](int i) {
    A value = scratch[i][0];
    for (int w = 1; w < kWarps; ++w) value += scratch[i][w];
    return value;
  };
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      const A value = gather(h * kHeads + g);
      if (g == h) {
        sums.sum[h] = value;
      } else {
        sums.moment[h][g] = value;
      }
    }
    sums.total[h] = gather(kHeads * kHeads + h);
  }
  for (int w = 0; w < kWarps; ++w) sums.infinite |= infinite[w];
  A target_logit[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) target_logit[h] = p.target_logit(first + h, row);
  sums.finish(p, first, row, target_logit);
}

}  // namespace pynar
