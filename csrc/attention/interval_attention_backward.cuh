#pragma once

#include "attention/interval_attention.cuh"
#include "attention/interval_attention_backward.h"

namespace pynar {

// One warp for each query of each head.
// grid: ceil(B * Tq * H / warps)
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    interval_attention_delta(IntervalAttentionBackwardParams<T> p) {
  using A = accumulation_t<T>;
  const AttentionSizes& sizes = p.sizes;
  const int lane = threadIdx.x % kWarp;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int64_t query = i / sizes.heads;
  if (query >= sizes.batch * sizes.queries) return;
  const int64_t b = query / sizes.queries;
  const int64_t t = query % sizes.queries;
  const int64_t h = i % sizes.heads;
  const T* grad_out = p.grad_out.at(b, h, t);
  const T* out = p.out.at(b, h, t);
  A sum = 0;
  for (int64_t c = lane; c < sizes.dim; c += kWarp) {
    sum += to_accumulation(grad_out[c]) * to_accumulation(out[c]);
  }
  sum = warp_sum(sum);
  if (lane == 0) p.delta[(b * sizes.heads + h) * sizes.queries + t] = sum;
}

// One thread for each chunk of queries.
// grid: ceil(B * chunks / threads)
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    interval_attention_hulls(IntervalAttentionBackwardParams<T> p) {
  const int64_t chunks = attention_chunks(p.sizes.queries);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.sizes.batch * chunks) return;
  int32_t lo = 0x7fffffff;
  int32_t hi = 0;
  for (int64_t q = 0; q < kAttentionChunk; ++q) {
    const int64_t t = i % chunks * kAttentionChunk + q;
    widen(load_spans(p.intervals, p.sizes, i / chunks, t), lo, hi);
  }
  p.hulls[2 * i] = lo;
  p.hulls[2 * i + 1] = hi;
}

// Whether the lane's chunk, `chunk`, of sentence b holds a query that may see a key in
// [first, last); the ballot of a warp tells of 32 chunks.
template <typename T>
__device__ inline unsigned chunks_with(const IntervalAttentionBackwardParams<T>& p, int64_t b,
                                       int64_t chunk, int64_t first, int64_t last) {
  const int64_t chunks = attention_chunks(p.sizes.queries);
  bool meets = false;
  if (chunk < chunks) {
    const int32_t* hull = p.hulls + (b * chunks + chunk) * 2;
    meets = hull[0] < last && first < hull[1];
  }
  return __ballot_sync(kAllLanes, meets);
}

template <typename T>
__device__ inline void load_vector(const T* x, int64_t dim, accumulation_t<T>* shared) {
  __syncwarp();
  for (int64_t c = threadIdx.x % kWarp; c < dim; c += kWarp) shared[c] = to_accumulation(x[c]);
  __syncwarp();
}

template <typename T>
__device__ inline void store_vector(const accumulation_t<T> (&sum)[kLaneChannels], int64_t dim,
                                    accumulation_t<T> factor, T* out) {
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    const int c = threadIdx.x % kWarp + i * kWarp;
    if (c < dim) out[c] = from_accumulation<T>(sum[i] * factor);
  }
}

// sum += weight of lane j times row j, for the lanes in `live`, in order. `row` gives its address.
template <typename A, typename Row>
__device__ inline void add_rows(A weight, unsigned live, int64_t dim, const Row& row,
                                A (&sum)[kLaneChannels]) {
  for (int j = 0; j < kWarp; ++j) {
    if ((live >> j & 1) == 0) continue;
    const A w = __shfl_sync(kAllLanes, weight, j);
    const auto* x = row(j);
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      const int c = threadIdx.x % kWarp + i * kWarp;
      if (c < dim) sum[i] += w * to_accumulation(x[c]);
    }
  }
}

// One warp for each query of each head, one lane for each key.
// grid: ceil(B * Tq * H / warps)
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    interval_attention_grad_q_rows(IntervalAttentionBackwardParams<T> p) {
  using A = accumulation_t<T>;
  constexpr int kWarps = kThreads / kWarp;
  __shared__ A queries[kWarps][kMaxHeadDim];
  __shared__ A gradients[kWarps][kMaxHeadDim];
  const AttentionSizes& sizes = p.sizes;
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  const int64_t query = index / sizes.heads;
  if (query >= sizes.batch * sizes.queries) return;
  const int64_t b = query / sizes.queries;
  const int64_t t = query % sizes.queries;
  const int64_t h = index % sizes.heads;
  load_vector(p.q.at(b, h, t), sizes.dim, queries[warp]);
  load_vector(p.grad_out.at(b, h, t), sizes.dim, gradients[warp]);
  const A lse = *p.lse.at(b, h, t);
  const A delta = p.delta[(b * sizes.heads + h) * sizes.queries + t];
  const KeySpans spans = load_spans(p.intervals, sizes, b, t);
  A sum[kLaneChannels] = {};
#pragma unroll
  for (int r = 0; r < kMaxIntervals; ++r) {
    for (int64_t first = spans.begin[r]; first < spans.end[r]; first += kWarp) {
      const int64_t key = first + lane;
      A grad_score = 0;
      if (key < spans.end[r]) {
        const A score = dot(queries[warp], p.k.at(b, h, key), sizes.dim, p.aligned != 0);
        const A product = dot(gradients[warp], p.v.at(b, h, key), sizes.dim, p.aligned != 0);
        grad_score = exponential(score * static_cast<A>(p.scale) - lse) * (product - delta);
      }
      add_rows(
          grad_score, __ballot_sync(kAllLanes, key < spans.end[r]), sizes.dim,
          [&](int j) { return p.k.at(b, h, first + j); }, sum);
    }
  }
  store_vector(sum, sizes.dim, static_cast<A>(p.scale), p.grad_q.at(b, h, t));
}

// One warp for each key of each head, one lane for each query, a chunk or two at a time.
// grid: ceil(B * Tk * H / warps)
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    interval_attention_grad_kv_rows(IntervalAttentionBackwardParams<T> p) {
  using A = accumulation_t<T>;
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarp % kAttentionChunk == 0);
  __shared__ A key_rows[kWarps][kMaxHeadDim];
  __shared__ A value_rows[kWarps][kMaxHeadDim];
  const AttentionSizes& sizes = p.sizes;
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  const int64_t row = index / sizes.heads;
  if (row >= sizes.batch * sizes.keys) return;
  const int64_t b = row / sizes.keys;
  const int64_t key = row % sizes.keys;
  const int64_t h = index % sizes.heads;
  load_vector(p.k.at(b, h, key), sizes.dim, key_rows[warp]);
  load_vector(p.v.at(b, h, key), sizes.dim, value_rows[warp]);
  A grad_k[kLaneChannels] = {};
  A grad_v[kLaneChannels] = {};
  const int64_t chunks = attention_chunks(sizes.queries);
  for (int64_t base = 0; base < chunks; base += kWarp) {
    const unsigned meets = chunks_with(p, b, base + lane, key, key + 1);
    constexpr int kTogether = kWarp / kAttentionChunk;
    for (int c = 0; c < kWarp; c += kTogether) {
      if ((meets >> c & ((1u << kTogether) - 1)) == 0) continue;
      const int64_t first = (base + c) * kAttentionChunk;
      const int64_t t = first + lane;
      const bool sees = load_spans(p.intervals, sizes, b, t).has(key);
      A weight = 0;
      A grad_score = 0;
      if (sees) {
        const A score = dot(key_rows[warp], p.q.at(b, h, t), sizes.dim, p.aligned != 0);
        const A product = dot(value_rows[warp], p.grad_out.at(b, h, t), sizes.dim, p.aligned != 0);
        weight = exponential(score * static_cast<A>(p.scale) - *p.lse.at(b, h, t));
        grad_score = weight * (product - p.delta[(b * sizes.heads + h) * sizes.queries + t]);
      }
      const unsigned live = __ballot_sync(kAllLanes, sees);
      add_rows(
          weight, live, sizes.dim, [&](int j) { return p.grad_out.at(b, h, first + j); }, grad_v);
      add_rows(grad_score, live, sizes.dim, [&](int j) { return p.q.at(b, h, first + j); }, grad_k);
    }
  }
  store_vector(grad_k, sizes.dim, static_cast<A>(p.scale), p.grad_k.at(b, h, key));
  store_vector(grad_v, sizes.dim, A(1), p.grad_v.at(b, h, key));
}

// Sets to zero what is not finite in a matrix, by a whole block: a key that no query sees may hold
// anything, and its weight of zero would not undo it. Where a query does see it, lse or delta carry
// the NaN on.
template <int kThreads, typename T, int kRows, int kStride>
__device__ inline void drop_undefined(SharedMatrix<T, kRows, kStride>& x) {
  for (int i = threadIdx.x; i < kRows * kStride; i += kThreads) {
    const float value = to_accumulation(x.element[i]);
    if (i % kStride < kStride - 8 && value - value != 0.f) x.element[i] = T{};
  }
}

// One block for kAttentionTileRows queries of a head, sixteen for each warp.
// grid: B * H * ceil(Tq / kAttentionTileRows)
template <typename T, int kDim>
__global__ void __launch_bounds__(kAttentionTileThreads)
    interval_attention_grad_q_tiles(IntervalAttentionBackwardParams<T> p) {
  constexpr int kThreads = kAttentionTileThreads;
  constexpr int kKeys = kAttentionBackwardKeys;
  constexpr int kKeyParts = kKeys / kFragmentColumns;
  constexpr int kParts = kDim / kFragmentColumns;
  __shared__ SharedMatrix<T, kKeys, kDim + 8> keys;
  __shared__ SharedMatrix<T, kKeys, kDim + 8> values;
  __shared__ int32_t hulls[2 * kThreads / kWarp];

  const AttentionSizes& sizes = p.sizes;
  const int64_t tiles = (sizes.queries + kAttentionTileRows - 1) / kAttentionTileRows;
  const int64_t b = blockIdx.x / tiles / sizes.heads;
  const int64_t h = blockIdx.x / tiles % sizes.heads;
  const int g = threadIdx.x % kWarp / 4;
  const int t = threadIdx.x % 4;
  const int64_t first =
      blockIdx.x % tiles * kAttentionTileRows + threadIdx.x / kWarp * kFragmentRows;

  uint32_t q[kDim / 16][4];
  uint32_t grad_out[kDim / 16][4];
  load_left_rows<kDim>(p.q, b, h, first, sizes.queries, sizes.dim, q);
  load_left_rows<kDim>(p.grad_out, b, h, first, sizes.queries, sizes.dim, grad_out);
  KeySpans spans[2];
  float lse[2] = {};
  float delta[2] = {};
  int32_t lo = 0x7fffffff;
  int32_t hi = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + g + 8 * half;
    spans[half] = load_spans(p.intervals, sizes, b, row);
    widen(spans[half], lo, hi);
    if (row < sizes.queries) {
      lse[half] = *p.lse.at(b, h, row);
      delta[half] = p.delta[(b * sizes.heads + h) * sizes.queries + row];
    }
  }
  block_hull<kThreads>(lo, hi, hulls);

  float grad_q[kParts][4] = {};
  for (int64_t key = lo / kKeys * kKeys; key < hi; key += kKeys) {
    const bool sees = spans[0].has_any(key, key + kKeys) || spans[1].has_any(key, key + kKeys);
    if (!__syncthreads_or(sees)) continue;
    load_matrix<kThreads>(p.k, b, h, key, lo, hi, sizes.dim, p.aligned != 0, keys);
    load_matrix<kThreads>(p.v, b, h, key, lo, hi, sizes.dim, p.aligned != 0, values);
    __syncthreads();
    drop_undefined<kThreads>(keys);
    drop_undefined<kThreads>(values);
    __syncthreads();
    if (!__any_sync(kAllLanes, sees)) continue;

    float scores[kKeyParts][4] = {};
    float products[kKeyParts][4] = {};
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int j = 0; j < kKeyParts; ++j) {
        uint32_t right[2];
        keys.load_right_transposed(j * kFragmentColumns, k * 16, right);
        multiply_accumulate<T>(scores[j], q[k], right);
        values.load_right_transposed(j * kFragmentColumns, k * 16, right);
        multiply_accumulate<T>(products[j], grad_out[k], right);
      }
    }
#pragma unroll
    for (int j = 0; j < kKeyParts; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2;
        const bool visible = spans[half].has(key + j * kFragmentColumns + 2 * t + i % 2);
        const float weight = exponential(scores[j][i] * static_cast<float>(p.scale) - lse[half]);
        scores[j][i] = visible ? weight * (products[j][i] - delta[half]) : 0.f;
      }
    }
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      uint32_t left[4];
      as_left<T>(scores[2 * k], scores[2 * k + 1], left);
#pragma unroll
      for (int n = 0; n < kParts; ++n) {
        uint32_t right[2];
        keys.load_right(k * 16, n * kFragmentColumns, right);
        multiply_accumulate<T>(grad_q[n], left, right);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kParts; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = first + g + 8 * (i / 2);
      const int c = n * kFragmentColumns + 2 * t + i % 2;
      if (row < sizes.queries && c < sizes.dim) {
        // A query without keys is zero whatever it holds.
        const float x = spans[i / 2].none() ? 0.f : grad_q[n][i];
        p.grad_q.at(b, h, row)[c] = from_accumulation<T>(x * static_cast<float>(p.scale));
      }
    }
  }
}

// One block for kAttentionTileRows keys of a head, sixteen for each warp: rows of scores are keys
// here, their columns queries.
// grid: B * H * ceil(Tk / kAttentionTileRows)
template <typename T, int kDim>
__global__ void __launch_bounds__(kAttentionTileThreads)
    interval_attention_grad_kv_tiles(IntervalAttentionBackwardParams<T> p) {
  constexpr int kThreads = kAttentionTileThreads;
  constexpr int kQueries = kAttentionChunk;
  constexpr int kQueryParts = kQueries / kFragmentColumns;
  constexpr int kParts = kDim / kFragmentColumns;
  __shared__ SharedMatrix<T, kAttentionTileRows, kDim + 8> keys;
  __shared__ SharedMatrix<T, kQueries, kDim + 8> queries;
  __shared__ SharedMatrix<T, kQueries, kDim + 8> gradients;
  __shared__ KeySpans spans[kQueries];
  __shared__ float lse[kQueries];
  __shared__ float delta[kQueries];

  const AttentionSizes& sizes = p.sizes;
  const int64_t tiles = (sizes.keys + kAttentionTileRows - 1) / kAttentionTileRows;
  const int64_t b = blockIdx.x / tiles / sizes.heads;
  const int64_t h = blockIdx.x / tiles % sizes.heads;
  const int64_t first = blockIdx.x % tiles * kAttentionTileRows;
  const int64_t last = first + kAttentionTileRows;
  const int warp = threadIdx.x / kWarp;
  const int g = threadIdx.x % kWarp / 4;
  const int t = threadIdx.x % 4;
  const int own = warp * kFragmentRows;  // where the warp's keys begin in the tile

  // Values stay in registers, keys in shared memory: both would be too many of either.
  load_matrix<kThreads>(p.v, b, h, first, 0, sizes.keys, sizes.dim, p.aligned != 0, keys);
  __syncthreads();
  drop_undefined<kThreads>(keys);
  __syncthreads();
  uint32_t value[kDim / 16][4];
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) keys.load_left(own, k * 16, value[k]);
  __syncthreads();
  load_matrix<kThreads>(p.k, b, h, first, 0, sizes.keys, sizes.dim, p.aligned != 0, keys);
  __syncthreads();
  drop_undefined<kThreads>(keys);

  float grad_k[kParts][4] = {};
  float grad_v[kParts][4] = {};
  const int64_t chunks = attention_chunks(sizes.queries);
  for (int64_t base = 0; base < chunks; base += kWarp) {
    // The same in every warp, so that all meet at the barriers.
    const unsigned meets = chunks_with(p, b, base + threadIdx.x % kWarp, first, last);
    for (int chunk = 0; chunk < kWarp; ++chunk) {
      if ((meets >> chunk & 1) == 0) continue;
      const int64_t query = (base + chunk) * kQueries;
      __syncthreads();
      if (threadIdx.x < kQueries) {
        const int64_t row = query + threadIdx.x;
        spans[threadIdx.x] = load_spans(p.intervals, sizes, b, row);
        const bool live = row < sizes.queries;
        lse[threadIdx.x] = live ? *p.lse.at(b, h, row) : 0.f;
        delta[threadIdx.x] = live ? p.delta[(b * sizes.heads + h) * sizes.queries + row] : 0.f;
      }
      load_matrix<kThreads>(p.q, b, h, query, 0, sizes.queries, sizes.dim, p.aligned != 0, queries);
      load_matrix<kThreads>(p.grad_out, b, h, query, 0, sizes.queries, sizes.dim, p.aligned != 0,
                            gradients);
      __syncthreads();
      // A query without keys may hold anything.
      for (int i = threadIdx.x; i < kQueries * kDim; i += kThreads) {
        if (spans[i / kDim].none()) {
          queries.row(i / kDim)[i % kDim] = T{};
          gradients.row(i / kDim)[i % kDim] = T{};
        }
      }
      __syncthreads();

      float scores[kQueryParts][4] = {};
      float products[kQueryParts][4] = {};
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        uint32_t left[4];
        keys.load_left(own, k * 16, left);
#pragma unroll
        for (int j = 0; j < kQueryParts; ++j) {
          uint32_t right[2];
          queries.load_right_transposed(j * kFragmentColumns, k * 16, right);
          multiply_accumulate<T>(scores[j], left, right);
          gradients.load_right_transposed(j * kFragmentColumns, k * 16, right);
          multiply_accumulate<T>(products[j], value[k], right);
        }
      }
#pragma unroll
      for (int j = 0; j < kQueryParts; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = j * kFragmentColumns + 2 * t + i % 2;
          const bool visible = spans[column].has(first + own + g + 8 * (i / 2));
          const float weight =
              exponential(scores[j][i] * static_cast<float>(p.scale) - lse[column]);
          scores[j][i] = visible ? weight : 0.f;
          products[j][i] = visible ? weight * (products[j][i] - delta[column]) : 0.f;
        }
      }
      uint32_t weights[4];
      uint32_t grad_scores[4];
      as_left<T>(scores[0], scores[1], weights);
      as_left<T>(products[0], products[1], grad_scores);
#pragma unroll
      for (int n = 0; n < kParts; ++n) {
        uint32_t right[2];
        gradients.load_right(0, n * kFragmentColumns, right);
        multiply_accumulate<T>(grad_v[n], weights, right);
        queries.load_right(0, n * kFragmentColumns, right);
        multiply_accumulate<T>(grad_k[n], grad_scores, right);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kParts; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t key = first + own + g + 8 * (i / 2);
      const int c = n * kFragmentColumns + 2 * t + i % 2;
      if (key < sizes.keys && c < sizes.dim) {
        p.grad_k.at(b, h, key)[c] =
            from_accumulation<T>(grad_k[n][i] * static_cast<float>(p.scale));
        p.grad_v.at(b, h, key)[c] = from_accumulation<T>(grad_v[n][i]);
      }
    }
  }
}

}  // namespace pynar
