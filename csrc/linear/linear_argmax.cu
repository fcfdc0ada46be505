#include "common/cuda_launch.h"
#include "linear/linear_argmax.cuh"

namespace pynar {

template <typename T>
void linear_argmax_cuda(const LinearArgmaxParams& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto blocks = static_cast<unsigned>(linear_argmax_blocks(params.rows, params.columns));
  if (params.k == 1) {
    linear_argmax_partials<T, 1><<<blocks, kArgmaxThreads, 0, cuda_stream>>>(params);
  } else {
    linear_argmax_partials<T, kArgmaxMost><<<blocks, kArgmaxThreads, 0, cuda_stream>>>(params);
  }
  PYNAR_CHECK_LAUNCH("linear_argmax_partials");
  linear_argmax_finish<kArgmaxFinishThreads>
      <<<static_cast<unsigned>(linear_argmax_finish_blocks(params.rows)), kArgmaxFinishThreads, 0,
         cuda_stream>>>(params);
  PYNAR_CHECK_LAUNCH("linear_argmax_finish");
}

template void linear_argmax_cuda<float>(const LinearArgmaxParams&, void*);
template void linear_argmax_cuda<BFloat16>(const LinearArgmaxParams&, void*);
template void linear_argmax_cuda<Half>(const LinearArgmaxParams&, void*);

}  // namespace pynar
