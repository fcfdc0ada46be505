#include "common/cuda_launch.h"
#include "losses/divergence_cross_entropy_backward.cuh"

namespace pynar {
namespace {

template <typename T, int kHeads>
void launch(const DivergenceBackwardParams<T>& params, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(params.rows * (params.heads / kHeads));
  divergence_cross_entropy_gradient<T, kHeads><<<blocks, kDivergenceThreads, 0, stream>>>(params);
  PYNAR_CHECK_LAUNCH("divergence_cross_entropy_gradient");
}

}  // namespace

template <typename T>
void divergence_cross_entropy_backward_cuda(const DivergenceBackwardParams<T>& params,
                                            void* stream) {
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

template void divergence_cross_entropy_backward_cuda(const DivergenceBackwardParams<float>&, void*);
template void divergence_cross_entropy_backward_cuda(const DivergenceBackwardParams<double>&,
                                                     void*);
template void divergence_cross_entropy_backward_cuda(const DivergenceBackwardParams<BFloat16>&,
                                                     void*);
template void divergence_cross_entropy_backward_cuda(const DivergenceBackwardParams<Half>&, void*);

}  // namespace pynar
