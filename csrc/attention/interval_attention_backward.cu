#include "attention/interval_attention_backward.cuh"
#include "common/cuda_launch.h"

namespace pynar {
namespace {

template <typename T, int kDim>
void launch_tiles(const IntervalAttentionBackwardParams<T>& params,
                  const AttentionBackwardBlocks& blocks, cudaStream_t stream) {
  interval_attention_grad_q_tiles<T, kDim>
      <<<static_cast<unsigned>(blocks.grad_q), kAttentionTileThreads, 0, stream>>>(params);
  PYNAR_CHECK_LAUNCH("interval_attention_grad_q_tiles");
  interval_attention_grad_kv_tiles<T, kDim>
      <<<static_cast<unsigned>(blocks.grad_kv), kAttentionTileThreads, 0, stream>>>(params);
  PYNAR_CHECK_LAUNCH("interval_attention_grad_kv_tiles");
}

template <typename T>
void launch_rows(const IntervalAttentionBackwardParams<T>& params,
                 const AttentionBackwardBlocks& blocks, cudaStream_t stream) {
  constexpr int kThreads = kAttentionRowThreads;
  if (blocks.grad_q > 0) {
    interval_attention_grad_q_rows<T, kThreads>
        <<<static_cast<unsigned>(blocks.grad_q), kThreads, 0, stream>>>(params);
    PYNAR_CHECK_LAUNCH("interval_attention_grad_q_rows");
  }
  if (blocks.grad_kv > 0) {
    interval_attention_grad_kv_rows<T, kThreads>
        <<<static_cast<unsigned>(blocks.grad_kv), kThreads, 0, stream>>>(params);
    PYNAR_CHECK_LAUNCH("interval_attention_grad_kv_rows");
  }
}

}  // namespace

template <typename T>
void interval_attention_backward_cuda(const IntervalAttentionBackwardParams<T>& params,
                                      void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const AttentionBackwardBlocks blocks = attention_backward_blocks(params.sizes, sizeof(T));
  constexpr int kThreads = kAttentionRowThreads;
  if (blocks.delta > 0) {
    interval_attention_delta<T, kThreads>
        <<<static_cast<unsigned>(blocks.delta), kThreads, 0, cuda_stream>>>(params);
    PYNAR_CHECK_LAUNCH("interval_attention_delta");
    interval_attention_hulls<T, kThreads>
        <<<static_cast<unsigned>(blocks.hulls), kThreads, 0, cuda_stream>>>(params);
    PYNAR_CHECK_LAUNCH("interval_attention_hulls");
  }
  if constexpr (sizeof(T) == 2) {
    if (blocks.tiles) {
      switch (attention_tile_dim(params.sizes.dim)) {
        case 32:
          return launch_tiles<T, 32>(params, blocks, cuda_stream);
        case 64:
          return launch_tiles<T, 64>(params, blocks, cuda_stream);
        case 96:
          return launch_tiles<T, 96>(params, blocks, cuda_stream);
        default:
          return launch_tiles<T, 128>(params, blocks, cuda_stream);
      }
    }
  }
  launch_rows(params, blocks, cuda_stream);
}

template void interval_attention_backward_cuda(const IntervalAttentionBackwardParams<float>&,
                                               void*);
template void interval_attention_backward_cuda(const IntervalAttentionBackwardParams<double>&,
                                               void*);
template void interval_attention_backward_cuda(const IntervalAttentionBackwardParams<BFloat16>&,
                                               void*);
template void interval_attention_backward_cuda(const IntervalAttentionBackwardParams<Half>&, void*);

}  // namespace pynar
