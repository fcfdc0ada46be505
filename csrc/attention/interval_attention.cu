#include "attention/interval_attention.cuh"
#include "common/cuda_launch.h"

namespace pynar {
namespace {

template <typename T, int kDim>
void launch_tiles(const IntervalAttentionParams<T>& params, unsigned blocks, cudaStream_t stream) {
  interval_attention_tiles<T, kDim><<<blocks, kAttentionTileThreads, 0, stream>>>(params);
  PYNAR_CHECK_LAUNCH("interval_attention_tiles");
}

}  // namespace

template <typename T>
void interval_attention_cuda(const IntervalAttentionParams<T>& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto blocks = static_cast<unsigned>(attention_blocks(params.sizes, sizeof(T)));
  if constexpr (sizeof(T) == 2) {
    if (attention_takes_tiles(sizeof(T), params.sizes.queries, params.sizes.keys)) {
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
  interval_attention_rows<T, kAttentionRowThreads>
      <<<blocks, kAttentionRowThreads, 0, cuda_stream>>>(params);
  PYNAR_CHECK_LAUNCH("interval_attention_rows");
}

template void interval_attention_cuda(const IntervalAttentionParams<float>&, void*);
template void interval_attention_cuda(const IntervalAttentionParams<double>&, void*);
template void interval_attention_cuda(const IntervalAttentionParams<BFloat16>&, void*);
template void interval_attention_cuda(const IntervalAttentionParams<Half>&, void*);

}  // namespace pynar
