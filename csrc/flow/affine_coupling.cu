#include "common/cuda_launch.h"
#include "flow/affine_coupling.cuh"

namespace pynar {

template <typename T>
void affine_coupling_cuda(const AffineCouplingParams<T>& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto rows = static_cast<unsigned>(coupling_blocks(params.batch * params.steps));
  if (rows > 0) {
    affine_coupling_steps<T, kCouplingThreads><<<rows, kCouplingThreads, 0, cuda_stream>>>(params);
    PYNAR_CHECK_LAUNCH("affine_coupling_steps");
  }
  const auto sentences = static_cast<unsigned>(coupling_blocks(params.batch));
  affine_coupling_sums<T, kCouplingThreads>
      <<<sentences, kCouplingThreads, 0, cuda_stream>>>(params);
  PYNAR_CHECK_LAUNCH("affine_coupling_sums");
}

template <typename T>
void affine_coupling_backward_cuda(const AffineCouplingBackwardParams<T>& params, void* stream) {
  const auto rows = static_cast<unsigned>(coupling_blocks(params.batch * params.steps));
  affine_coupling_gradient<T, kCouplingThreads>
      <<<rows, kCouplingThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  PYNAR_CHECK_LAUNCH("affine_coupling_gradient");
}

#define PYNAR_AFFINE_COUPLING(T)                                             \
  template void affine_coupling_cuda(const AffineCouplingParams<T>&, void*); \
  template void affine_coupling_backward_cuda(const AffineCouplingBackwardParams<T>&, void*);

PYNAR_AFFINE_COUPLING(float)
PYNAR_AFFINE_COUPLING(double)
PYNAR_AFFINE_COUPLING(BFloat16)
PYNAR_AFFINE_COUPLING(Half)

}  // namespace pynar
