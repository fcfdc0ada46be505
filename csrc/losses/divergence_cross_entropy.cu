#include "common/cuda_launch.h"
#include "losses/divergence_cross_entropy.cuh"

namespace pynar {
namespace {

template <typename T, int kHeads>
void launch(const DivergenceParams<T>& params, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(params.rows * (params.heads / kHeads));
  divergence_cross_entropy_rows<T, kHeads><<<blocks, kDivergenceThreads, 0, stream>>>(params);
  PYNAR_CHECK_LAUNCH("divergence_cross_entropy_rows");
}

}  // namespace

template <typename T>
void divergence_cross_entropy_cuda(const DivergenceParams<T>& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (divergence_group(params.heads, params.pairs)) {
    case 1:
      return launch<T, 1>(params, cuda_stream);
    case 2:
      return launch<T, 2>(params, cuda_stream);
    case 3:
      return launch<T, 3>(params, cuda_stream);
    default:
      return launch<T, 4>(params, cuda_stream);
  }
}

template void divergence_cross_entropy_cuda(const DivergenceParams<float>&, void*);
template void divergence_cross_entropy_cuda(const DivergenceParams<double>&, void*);
template void divergence_cross_entropy_cuda(const DivergenceParams<BFloat16>&, void*);
template void divergence_cross_entropy_cuda(const DivergenceParams<Half>&, void*);

}  // namespace pynar
