// The gradients of interval attention (interval_attention.h) by its inputs, for a gradient g of
// `out`. With p_ij = exp(s_ij - lse_i) where query i sees key j and 0 elsewhere:
//
//   dv_j  = sum_i p_ij g_i
//   ds_ij = p_ij (g_i . v_j - g_i . out_i)
//   dq_i  = scale * sum_j ds_ij k_j
//   dk_j  = scale * sum_i ds_ij q_i
//
// Queries without keys and keys that nobody sees get 0, whatever they hold.
#pragma once

#include "attention/interval_attention.h"

namespace pynar {

template <typename T>
struct IntervalAttentionBackwardParams {
  HeadRows<const T> grad_out;             // [B, H, Tq, D]
  HeadRows<const T> q;                    // [B, H, Tq, D]
  HeadRows<const T> k;                    // [B, H, Tk, D]
  HeadRows<const T> v;                    // [B, H, Tk, D]
  IntervalRows intervals;                 // [B, Tq, R, 2]
  HeadRows<const T> out;                  // [B, H, Tq, D]
  HeadRows<const accumulation_t<T>> lse;  // [B, H, Tq]
  HeadRows<T> grad_q;                     // [B, H, Tq, D]  written
  HeadRows<T> grad_k;                     // [B, H, Tk, D]  written
  HeadRows<T> grad_v;                     // [B, H, Tk, D]  written
  accumulation_t<T>* delta;               // [B, H, Tq]       scratch: g_i . out_i
  int32_t* hulls;                         // [B, chunks, 2]   scratch
  AttentionSizes sizes;
  double scale;
  int64_t aligned;  // 1 if every row of grad_out, q, k and v begins at a multiple of 16 bytes
};

// Queries whose keys are summed up in one hull, so that a key need not look at each query.
constexpr int kAttentionChunk = 16;

PYNAR_HOST_DEVICE constexpr int64_t attention_chunks(int64_t queries) {
  return (queries + kAttentionChunk - 1) / kAttentionChunk;
}

// Keys that the tensor-core kernel for grad_q takes at a time. That for grad_k and grad_v takes
// blocks of kAttentionTileRows keys, and a chunk of queries at a time.
constexpr int kAttentionBackwardKeys = 32;

struct AttentionBackwardBlocks {
  bool tiles;  // whether grad_q, grad_k and grad_v are left to the tensor cores
  int64_t delta, hulls, grad_q, grad_kv;
};

PYNAR_HOST_DEVICE constexpr AttentionBackwardBlocks attention_backward_blocks(
    const AttentionSizes& sizes, int64_t element_size) {
  const auto parts = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  constexpr int64_t kWarps = kAttentionRowThreads / 32;
  AttentionBackwardBlocks blocks{};
  blocks.tiles = sizes.keys > 0 && attention_takes_tiles(element_size, sizes.queries, sizes.keys);
  blocks.delta = parts(sizes.batch * sizes.queries * sizes.heads, kWarps);
  blocks.hulls = parts(sizes.batch * attention_chunks(sizes.queries), kAttentionRowThreads);
  blocks.grad_q = blocks.tiles
                      ? sizes.batch * sizes.heads * parts(sizes.queries, kAttentionTileRows)
                      : blocks.delta;
  blocks.grad_kv = blocks.tiles ? sizes.batch * sizes.heads * parts(sizes.keys, kAttentionTileRows)
                                : parts(sizes.batch * sizes.keys * sizes.heads, kWarps);
  return blocks;
}

#if !defined(__CUDACC_RTC__)
// Four launches on the current device: delta, hulls, grad_q, and grad_k with grad_v.
template <typename T>
void interval_attention_backward_cuda(const IntervalAttentionBackwardParams<T>& params,
                                      void* stream);
#endif

}  // namespace pynar
