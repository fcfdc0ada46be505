#pragma once

#include "common/device.cuh"
#include "common/symbols.h"
#include "decoding/mask_predict_step.h"

namespace pynar {

// One block for each segment of each row; blocks of rows that are not masked leave at once.
// grid: B * T * segments
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) mask_predict_partials(MaskPredictParams<T> p) {
  using A = accumulation_t<T>;
  constexpr int kPerChunk = Chunk<T>::kCount;
  constexpr int kChunks = kMaskPredictPerThread / kPerChunk;
  constexpr int64_t kSegment = static_cast<int64_t>(kThreads) * kMaskPredictPerThread;

  const int64_t row = blockIdx.x / p.segments;
  const int64_t segment = blockIdx.x % p.segments;
  const int64_t b = row / p.steps;
  const int64_t t = row % p.steps;
  if (t >= p.lengths[b * p.lengths_stride]) return;
  if (p.tokens[b * p.tokens_stride_b + t * p.tokens_stride_t] != kMask) return;

  const T* logits = p.logits + b * p.logits_stride_b + t * p.logits_stride_t;
  const int64_t first = segment * kSegment;
  const A lowest = negative_infinity<A>();

  // Neighbouring threads take neighbouring chunks of 16 bytes. A thread's loads do not wait for
  // each other: 64 to 128 bytes a thread are on their way at once.
  A x[kChunks][kPerChunk];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int64_t v = first + (static_cast<int64_t>(c) * kThreads + threadIdx.x) * kPerChunk;
    if (v + kPerChunk <= p.vocabulary) {
      const Chunk<T> chunk = load_chunk(logits + v, p.aligned != 0);
#pragma unroll
      for (int i = 0; i < kPerChunk; ++i) x[c][i] = to_accumulation(chunk.element[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kPerChunk; ++i) {
        x[c][i] = v + i < p.vocabulary ? to_accumulation(logits[v + i]) : lowest;
      }
    }
  }
  // The excluded symbols lie in the first chunks of the row.
  if (first == 0 && threadIdx.x * kPerChunk < kNumSpecial) {
#pragma unroll
    for (int i = 0; i < kPerChunk; ++i) {
      const int64_t v = threadIdx.x * kPerChunk + i;
      if (v == kPad || v == kMask) x[0][i] = lowest;
    }
  }

  A thread_max = lowest;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kPerChunk; ++i) thread_max = maximum(thread_max, x[c][i]);
  }
  __shared__ A max_scratch[kThreads / kWarp];
  __shared__ A sum_scratch[kThreads / kWarp];
  __shared__ unsigned token_offset;
  if (threadIdx.x == 0) token_offset = kSegment;
  const A max = block_max<kThreads>(thread_max, max_scratch);

  // Few threads hold the maximum, so that the search for its place costs next to nothing. The
  // minimum does not depend on the order of the atomics.
  if (thread_max == max) {
    unsigned offset = kSegment;
#pragma unroll
    for (int c = kChunks - 1; c >= 0; --c) {
#pragma unroll
      for (int i = kPerChunk - 1; i >= 0; --i) {
        if (x[c][i] == max) offset = (c * kThreads + threadIdx.x) * kPerChunk + i;
      }
    }
    atomicMin(&token_offset, offset);
  }

  const A shift = max == lowest ? A(0) : max;
  A sum = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kPerChunk; ++i) sum += exponential(x[c][i] - shift);
  }
  sum = block_sum<kThreads>(sum, sum_scratch);
  if (threadIdx.x == 0) p.partials[blockIdx.x] = {max, sum, first + token_offset};
}

// One block for each sentence: joins the partials, keeps what was there, masks the worst again.
// grid: B
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) mask_predict_finish(MaskPredictParams<T> p) {
  using A = accumulation_t<T>;
  const int64_t b = blockIdx.x;
  const int64_t length = p.lengths[b * p.lengths_stride];
  const int64_t* tokens = p.tokens + b * p.tokens_stride_b;
  const A* scores = p.scores + b * p.scores_stride_b;
  int64_t* new_tokens = p.new_tokens + b * p.steps;
  A* new_scores = p.new_scores + b * p.steps;
  const A lowest = negative_infinity<A>();

  for (int64_t t = threadIdx.x; t < p.steps; t += kThreads) {
    int64_t token = kPad;
    A score = 0;
    if (t < length) {
      token = tokens[t * p.tokens_stride_t];
      if (token == kMask) {
        const MaskPredictPartial<T>* partials = p.partials + (b * p.steps + t) * p.segments;
        A max = lowest;
        for (int64_t s = 0; s < p.segments; ++s) {
          if (partials[s].max > max) {
            max = partials[s].max;
            token = partials[s].token;
          }
        }
        A sum = 0;
        for (int64_t s = 0; s < p.segments; ++s) {
          const A m = partials[s].max;
          sum += partials[s].sum * (m == max ? A(1) : exponential(m - max));
        }
        score = max > lowest ? -logarithm(sum) : lowest - lowest;
        if (score != score) token = kUnk;
      } else {
        score = scores[t * p.scores_stride_t];
      }
    }
    new_tokens[t] = token;
    new_scores[t] = score;
  }
  __syncthreads();

  const int64_t num_masked = p.num_masked[b * p.num_masked_stride];
  if (num_masked <= 0) return;

  // A slot is masked again if fewer than num_masked come before it in order of (score, t).
  // Sentences are short, so that counting beats sorting. Slots that cannot be masked sort behind
  // all others.
  __shared__ A tile[kThreads];
  __shared__ bool tile_open[kThreads];
  for (int64_t base = 0; base < length; base += kThreads) {
    const int64_t t = base + threadIdx.x;
    A score = 0;
    bool open = false;
    if (t < length) {
      const int64_t token = tokens[t * p.tokens_stride_t];
      open = token != kPad && token != kBos && token != kEos;
      score = new_scores[t];
      if (score != score) score = lowest;
    }
    int64_t before = 0;
    for (int64_t u_base = 0; u_base < length; u_base += kThreads) {
      __syncthreads();
      const int64_t u = u_base + threadIdx.x;
      bool u_open = false;
      A u_score = 0;
      if (u < length) {
        const int64_t token = tokens[u * p.tokens_stride_t];
        u_open = token != kPad && token != kBos && token != kEos;
        u_score = new_scores[u];
        if (u_score != u_score) u_score = lowest;
      }
      tile[threadIdx.x] = u_score;
      tile_open[threadIdx.x] = u_open;
      __syncthreads();
      const int64_t count = length - u_base < kThreads ? length - u_base : kThreads;
      for (int64_t i = 0; i < count; ++i) {
        const bool first = tile[i] < score || (tile[i] == score && u_base + i < t);
        before += tile_open[i] && first;
      }
    }
    if (open && before < num_masked) new_tokens[t] = kMask;
  }
}

}  // namespace pynar
