#pragma once

#include "attention/interval_attention.h"
#include "common/matrix.cuh"

namespace pynar {

// The intervals of a query in order and without overlap; those that are left over are empty.
struct KeySpans {
  int32_t begin[kMaxIntervals];
  int32_t end[kMaxIntervals];

  __device__ bool has(int64_t key) const {
    bool any = false;
#pragma unroll
    for (int r = 0; r < kMaxIntervals; ++r) any = any || (begin[r] <= key && key < end[r]);
    return any;
  }
  __device__ bool has_any(int64_t first, int64_t last) const {
    bool any = false;
#pragma unroll
    for (int r = 0; r < kMaxIntervals; ++r) {
      any = any || (begin[r] < end[r] && begin[r] < last && first < end[r]);
    }
    return any;
  }
  __device__ bool has_all(int64_t first, int64_t last) const {
    bool any = false;
#pragma unroll
    for (int r = 0; r < kMaxIntervals; ++r) any = any || (begin[r] <= first && last <= end[r]);
    return any;
  }
  __device__ bool none() const { return !has_any(0, 0x7fffffff); }
};

__device__ inline KeySpans load_spans(const IntervalRows& rows, const AttentionSizes& sizes,
                                      int64_t b, int64_t t) {
  KeySpans spans;
  const int32_t* p = rows.data + b * rows.stride_b + t * rows.stride_t;
#pragma unroll
  for (int r = 0; r < kMaxIntervals; ++r) {
    spans.begin[r] = spans.end[r] = 0;
    if (r < sizes.num_intervals && t < sizes.queries) {
      // Nothing is read beside the keys, whatever the intervals say.
      const int32_t begin = p[r * rows.stride_r] < 0 ? 0 : p[r * rows.stride_r];
      const int32_t end = p[r * rows.stride_r + 1] < sizes.keys ? p[r * rows.stride_r + 1]
                                                                : static_cast<int32_t>(sizes.keys);
      if (begin < end) {
        spans.begin[r] = begin;
        spans.end[r] = end;
      }
    }
  }
  const auto order = [&](int i, int j) {
    if (spans.begin[j] < spans.begin[i]) {
      const int32_t begin = spans.begin[i];
      const int32_t end = spans.end[i];
      spans.begin[i] = spans.begin[j];
      spans.end[i] = spans.end[j];
      spans.begin[j] = begin;
      spans.end[j] = end;
    }
  };
  order(0, 1);
  order(2, 3);
  order(0, 2);
  order(1, 3);
  order(1, 2);
  int32_t last = 0;
#pragma unroll
  for (int r = 0; r < kMaxIntervals; ++r) {
    if (spans.begin[r] < last) spans.begin[r] = last;
    if (spans.end[r] > last) last = spans.end[r];
    if (spans.end[r] < spans.begin[r]) spans.end[r] = spans.begin[r];
  }
  return spans;
}

template <typename A, typename T>
__device__ inline A dot(const A* x, const T* y, int64_t dim, bool aligned) {
  constexpr int kCount = Chunk<T>::kCount;
  A sum = 0;
  int64_t c = 0;
  for (; c + kCount <= dim; c += kCount) {
    const Chunk<T> chunk = load_chunk(y + c, aligned);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += x[c + i] * to_accumulation(chunk.element[i]);
  }
  for (; c < dim; ++c) sum += x[c] * to_accumulation(y[c]);
  return sum;
}

// A vector of a head, lane by lane: channel lane + 32 * i.
constexpr int kLaneChannels = kMaxHeadDim / kWarp;

// One query by one warp. `scaled` is the warp's own, kMaxHeadDim elements.
template <typename T>
__device__ inline void attend_row(const IntervalAttentionParams<T>& p, int64_t b, int64_t h,
                                  int64_t t, accumulation_t<T>* scaled) {
  using A = accumulation_t<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t dim = p.sizes.dim;
  const A lowest = negative_infinity<A>();
  const KeySpans spans = load_spans(p.intervals, p.sizes, b, t);
  const T* q = p.q.at(b, h, t);
  __syncwarp();
  for (int64_t c = lane; c < dim; c += kWarp) {
    scaled[c] = to_accumulation(q[c]) * static_cast<A>(p.scale);
  }
  __syncwarp();

  A max = lowest;
  A total = 0;
  A sum[kLaneChannels] = {};
#pragma unroll
  for (int r = 0; r < kMaxIntervals; ++r) {
    for (int64_t first = spans.begin[r]; first < spans.end[r]; first += kWarp) {
      const int64_t left = spans.end[r] - first;
      const int count = left < kWarp ? static_cast<int>(left) : kWarp;
      A score = lowest;
      if (lane < count) score = dot(scaled, p.k.at(b, h, first + lane), dim, p.aligned != 0);
      const A greatest = maximum(max, warp_max(score));
      const A shift = greatest == lowest ? A(0) : greatest;
      const A factor = exponential(max - shift);
      const A weight = lane < count ? exponential(score - shift) : A(0);
      max = greatest;
      total = total * factor + warp_sum(weight);
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) sum[i] *= factor;
      const T* v = p.v.at(b, h, first);
      for (int j = 0; j < count; ++j, v += p.v.stride_t) {
        const A w = __shfl_sync(kAllLanes, weight, j);
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) {
          const int c = lane + i * kWarp;
          if (c < dim) sum[i] += w * to_accumulation(v[c]);
        }
      }
    }
  }
  const bool sees = !spans.none();
  T* out = p.out.at(b, h, t);
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    const int c = lane + i * kWarp;
    if (c < dim) out[c] = from_accumulation<T>(sees ? sum[i] / total : A(0));
  }
  if (lane == 0) *p.lse.at(b, h, t) = sees ? max + logarithm(total) : lowest;
}

// One warp for each query of each head; the heads of a query, whose keys lie side by side, are
// neighbours.
// grid: ceil(B * Tq * H / warps)
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) interval_attention_rows(IntervalAttentionParams<T> p) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ accumulation_t<T> scaled[kWarps][kMaxHeadDim];
  const int warp = threadIdx.x / kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  const int64_t query = i / p.sizes.heads;
  if (query >= p.sizes.batch * p.sizes.queries) return;
  attend_row(p, query / p.sizes.queries, i % p.sizes.heads, query % p.sizes.queries, scaled[warp]);
}

// Rows `first` to `first` + kRows of a head into shared memory by a whole block; zero where the
// row is not in [begin, end) and past the last channel.
template <int kThreads, typename T, int kRows, int kStride>
__device__ inline void load_matrix(const HeadRows<const T>& x, int64_t b, int64_t h, int64_t first,
                                   int64_t begin, int64_t end, int64_t dim, bool aligned,
                                   SharedMatrix<T, kRows, kStride>& to) {
  constexpr int kCount = Chunk<T>::kCount;
  constexpr int kChunks = kStride / kCount - 1;
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int64_t row = first + i / kChunks;
    const int c = i % kChunks * kCount;
    Chunk<T> chunk = {};
    if (row >= begin && row < end) {
      const T* from = x.at(b, h, row) + c;
      if (c + kCount <= dim) {
        chunk = load_chunk(from, aligned);
      } else {
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          if (c + e < dim) chunk.element[e] = from[e];
        }
      }
    }
    *reinterpret_cast<Chunk<T>*>(to.row(i / kChunks) + c) = chunk;
  }
}

// The hull [lo, hi) of what the block's queries see; lo >= hi if that is nothing. `scratch` is
// shared, two elements a warp.
template <int kThreads>
__device__ inline void block_hull(int32_t& lo, int32_t& hi, int32_t* scratch) {
  constexpr int kWarps = kThreads / kWarp;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const int32_t other_lo = __shfl_xor_sync(kAllLanes, lo, offset);
    const int32_t other_hi = __shfl_xor_sync(kAllLanes, hi, offset);
    lo = other_lo < lo ? other_lo : lo;
    hi = other_hi > hi ? other_hi : hi;
  }
  if (threadIdx.x % kWarp == 0) {
    scratch[threadIdx.x / kWarp * 2] = lo;
    scratch[threadIdx.x / kWarp * 2 + 1] = hi;
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    lo = scratch[2 * w] < lo ? scratch[2 * w] : lo;
    hi = scratch[2 * w + 1] > hi ? scratch[2 * w + 1] : hi;
  }
}

__device__ inline void widen(const KeySpans& spans, int32_t& lo, int32_t& hi) {
#pragma unroll
  for (int r = 0; r < kMaxIntervals; ++r) {
    if (spans.begin[r] < spans.end[r]) {
      lo = spans.begin[r] < lo ? spans.begin[r] : lo;
      hi = spans.end[r] > hi ? spans.end[r] : hi;
    }
  }
}

// Sixteen rows of a head, from `first` on, as left factors straight from global memory.
template <int kDim, typename T>
__device__ inline void load_left_rows(const HeadRows<const T>& x, int64_t b, int64_t h,
                                      int64_t first, int64_t end, int64_t dim,
                                      uint32_t (&a)[kDim / 16][4]) {
  const int g = threadIdx.x % kWarp / 4;
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = first + g + i % 2 * 8;
      const int c = k * 16 + 2 * t + i / 2 * 8;
      T pair[2] = {};
      if (row < end && c < dim) pair[0] = x.at(b, h, row)[c];
      if (row < end && c + 1 < dim) pair[1] = x.at(b, h, row)[c + 1];
      a[k][i] = pack_pair(pair[0], pair[1]);
    }
  }
}

// One block for kAttentionTileRows queries of a head, sixteen for each warp. Key tiles begin at
// multiples of their size whatever the queries see, and a tile that a query sees nothing of leaves
// its sums as they are, so that a result does not depend on the queries beside it.
// grid: B * H * ceil(Tq / kAttentionTileRows)
template <typename T, int kDim>
__global__ void __launch_bounds__(kAttentionTileThreads)
    interval_attention_tiles(IntervalAttentionParams<T> p) {
  constexpr int kThreads = kAttentionTileThreads;
  constexpr int kWarps = kThreads / kWarp;
  constexpr int kKeys = kAttentionTileKeys;
  constexpr int kKeyParts = kKeys / kFragmentColumns;
  constexpr int kParts = kDim / kFragmentColumns;
  static_assert(kWarps * kFragmentRows == kAttentionTileRows);
  __shared__ SharedMatrix<T, kKeys, kDim + 8> keys;
  __shared__ SharedMatrix<T, kKeys, kDim + 8> values;
  __shared__ float scaled[kWarps][kMaxHeadDim];
  __shared__ int32_t hulls[2 * kWarps];

  const AttentionSizes& sizes = p.sizes;
  const int64_t tiles = (sizes.queries + kAttentionTileRows - 1) / kAttentionTileRows;
  const int64_t b = blockIdx.x / tiles / sizes.heads;
  const int64_t h = blockIdx.x / tiles % sizes.heads;
  const int warp = threadIdx.x / kWarp;
  const int g = threadIdx.x % kWarp / 4;
  const int t = threadIdx.x % 4;
  const int64_t first = blockIdx.x % tiles * kAttentionTileRows + warp * kFragmentRows;
  const float lowest = negative_infinity<float>();

  uint32_t q[kDim / 16][4];
  load_left_rows<kDim>(p.q, b, h, first, sizes.queries, sizes.dim, q);
  KeySpans spans[2];
  int32_t lo = 0x7fffffff;
  int32_t hi = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    spans[half] = load_spans(p.intervals, sizes, b, first + g + 8 * half);
    widen(spans[half], lo, hi);
  }
  block_hull<kThreads>(lo, hi, hulls);

  float out[kParts][4] = {};
  float max[2] = {lowest, lowest};
  float total[2] = {};  // of the lane's own columns
  for (int64_t key = lo / kKeys * kKeys; key < hi; key += kKeys) {
    const bool sees = spans[0].has_any(key, key + kKeys) || spans[1].has_any(key, key + kKeys);
    // The barrier also keeps the tile before until all have read it.
    if (!__syncthreads_or(sees)) continue;
    load_matrix<kThreads>(p.k, b, h, key, lo, hi, sizes.dim, p.aligned != 0, keys);
    load_matrix<kThreads>(p.v, b, h, key, lo, hi, sizes.dim, p.aligned != 0, values);
    __syncthreads();
    if (!__any_sync(kAllLanes, sees)) continue;

    float scores[kKeyParts][4] = {};
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int j = 0; j < kKeyParts; ++j) {
        uint32_t right[2];
        keys.load_right_transposed(j * kFragmentColumns, k * 16, right);
        multiply_accumulate<T>(scores[j], q[k], right);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool all = spans[half].has_all(key, key + kKeys);
      float greatest = max[half];
#pragma unroll
      for (int j = 0; j < kKeyParts; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[j][2 * half + i];
          const bool visible = all || spans[half].has(key + j * kFragmentColumns + 2 * t + i);
          score = visible ? score * static_cast<float>(p.scale) : lowest;
          greatest = maximum(greatest, score);
        }
      }
      // The four lanes that share a row.
      greatest = maximum(greatest, __shfl_xor_sync(kAllLanes, greatest, 1));
      greatest = maximum(greatest, __shfl_xor_sync(kAllLanes, greatest, 2));
      const float shift = greatest == lowest ? 0.f : greatest;
      const float factor = exponential(max[half] - shift);
      max[half] = greatest;
      total[half] *= factor;
#pragma unroll
      for (int j = 0; j < kKeyParts; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[j][2 * half + i];
          score = exponential(score - shift);
          total[half] += score;
        }
      }
#pragma unroll
      for (int n = 0; n < kParts; ++n) {
        out[n][2 * half] *= factor;
        out[n][2 * half + 1] *= factor;
      }
    }
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      uint32_t left[4];
      as_left<T>(scores[2 * k], scores[2 * k + 1], left);
#pragma unroll
      for (int n = 0; n < kParts; ++n) {
        uint32_t right[2];
        values.load_right(k * 16, n * kFragmentColumns, right);
        multiply_accumulate<T>(out[n], left, right);
      }
    }
  }

  unsigned undefined[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] += __shfl_xor_sync(kAllLanes, total[half], 1);
    total[half] += __shfl_xor_sync(kAllLanes, total[half], 2);
    const int64_t row = first + g + 8 * half;
    const bool sees = !spans[half].none();
    const float factor = sees ? 1.f / total[half] : 0.f;
    bool finite = true;
#pragma unroll
    for (int n = 0; n < kParts; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float x = out[n][2 * half + i];
        finite = finite && x - x == 0.f;
        const int c = n * kFragmentColumns + 2 * t + i;
        if (row < sizes.queries && c < sizes.dim) {
          p.out.at(b, h, row)[c] = from_accumulation<T>(sees ? x * factor : 0.f);
        }
      }
    }
    if (t == 0 && row < sizes.queries) {
      *p.lse.at(b, h, row) = sees ? max[half] + logarithm(total[half]) : lowest;
    }
    undefined[half] = __ballot_sync(kAllLanes, !finite && row < sizes.queries);
  }
  // The product of a weight of zero and a NaN, of a key that the query does not see, is NaN.
  for (int r = 0; r < kFragmentRows; ++r) {
    if (undefined[r / 8] >> (r % 8 * 4) & 0xf) attend_row(p, b, h, first + r, scaled[warp]);
  }
}

}  // namespace pynar
