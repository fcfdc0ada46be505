#include "common/cuda_launch.h"
#include "flow/batched_logdet.cuh"

namespace pynar {

template <typename T>
void batched_logdet_cuda(const BatchedLogdetParams<T>& params, void* stream) {
  const auto blocks = static_cast<unsigned>(params.count);
  batched_logdet_invert<T, kLogdetThreads>
      <<<blocks, kLogdetThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  PYNAR_CHECK_LAUNCH("batched_logdet_invert");
}

template void batched_logdet_cuda(const BatchedLogdetParams<float>&, void*);
template void batched_logdet_cuda(const BatchedLogdetParams<double>&, void*);

}  // namespace pynar
