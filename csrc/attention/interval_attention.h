// Softmax attention of queries over the keys of a few intervals each. For sentence b, head h, query
// i, with J = the keys j that lie in [begin, end) of any of the query's R intervals:
//
//   s_j = scale * q[b,h,i] . k[b,h,j]
//   lse[b,h,i] = log sum_{j in J} exp(s_j)
//   out[b,h,i] = sum_{j in J} exp(s_j - lse[b,h,i]) v[b,h,j]
//
// An interval with begin >= end is empty. A key in several intervals counts once. A query without
// keys gets out = 0 and lse = -inf. Keys that a query does not see have no influence on it,
// whatever they hold.
//
// The packed form, with the sentences of a batch one after the other, is B = 1 to this file.
#pragma once

#include "common/scalar.h"

namespace pynar {

constexpr int kMaxIntervals = 4;
constexpr int kMaxHeadDim = 128;

// A tensor [B, H, T, D] with contiguous channels, or [B, H, T].
template <typename T>
struct HeadRows {
  T* data;
  int64_t stride_b, stride_h, stride_t;

  PYNAR_HOST_DEVICE T* at(int64_t b, int64_t h, int64_t t) const {
    return data + b * stride_b + h * stride_h + t * stride_t;
  }
};

// [B, Tq, R, 2]
struct IntervalRows {
  const int32_t* data;
  int64_t stride_b, stride_t, stride_r;
};

struct AttentionSizes {
  int64_t batch, heads, queries, keys, dim, num_intervals;
};

template <typename T>
struct IntervalAttentionParams {
  HeadRows<const T> q;              // [B, H, Tq, D]
  HeadRows<const T> k;              // [B, H, Tk, D]
  HeadRows<const T> v;              // [B, H, Tk, D]
  IntervalRows intervals;           // [B, Tq, R, 2]
  HeadRows<T> out;                  // [B, H, Tq, D]  written
  HeadRows<accumulation_t<T>> lse;  // [B, H, Tq]     written
  AttentionSizes sizes;
  double scale;
  int64_t aligned;  // 1 if every row of q, k and v begins at a multiple of 16 bytes
};

// One warp takes a query of a head, and each lane a key at a time.
constexpr int kAttentionRowThreads = 128;
// A block of the tensor-core kernel takes this many queries of a head.
constexpr int kAttentionTileThreads = 128;
constexpr int kAttentionTileRows = 64;
constexpr int kAttentionTileKeys = 64;

// Where there are many more keys than queries, as with a cache in decoding, queries have few keys
// in common, and a tile would multiply each with the keys of all others.
PYNAR_HOST_DEVICE constexpr bool attention_takes_tiles(int64_t element_size, int64_t queries,
                                                       int64_t keys) {
  return element_size == 2 && queries > 1 && keys < 16 * queries;
}

// The channels for which a tile kernel is compiled.
PYNAR_HOST_DEVICE constexpr int attention_tile_dim(int64_t dim) {
  return static_cast<int>((dim + 31) / 32 * 32);
}

// The grid of the kernel that is taken.
PYNAR_HOST_DEVICE constexpr int64_t attention_blocks(const AttentionSizes& sizes,
                                                     int64_t element_size) {
  if (attention_takes_tiles(element_size, sizes.queries, sizes.keys)) {
    return sizes.batch * sizes.heads *
           ((sizes.queries + kAttentionTileRows - 1) / kAttentionTileRows);
  }
  constexpr int kWarps = kAttentionRowThreads / 32;
  return (sizes.batch * sizes.queries * sizes.heads + kWarps - 1) / kWarps;
}

#if !defined(__CUDACC_RTC__)
// One launch on the current device.
template <typename T>
void interval_attention_cuda(const IntervalAttentionParams<T>& params, void* stream);
#endif

}  // namespace pynar
