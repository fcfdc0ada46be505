#include "common/cuda_launch.h"
#include "flow/flow_linear.cuh"

namespace pynar {

template <typename T>
void flow_linear_cuda(const FlowLinearParams<T>& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto blocks = static_cast<unsigned>(flow_linear_blocks(params));
  if (params.matrices == 0) {
    flow_copy<T, kFlowThreads><<<blocks, kFlowThreads, 0, cuda_stream>>>(params);
    PYNAR_CHECK_LAUNCH("flow_copy");
    return;
  }
  flow_linear_steps<T, kFlowThreads><<<blocks, kFlowThreads, 0, cuda_stream>>>(params);
  PYNAR_CHECK_LAUNCH("flow_linear_steps");
}

template <typename T>
void flow_linear_backward_cuda(const FlowLinearBackwardParams<T>& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const FlowLinearParams<T>& p = params.forward;
  const int64_t parts = flow_parts(p.batch * p.steps, p.channels, sizeof(accumulation_t<T>));
  if (parts > 0) {
    flow_linear_gradient<T, kFlowThreads>
        <<<static_cast<unsigned>(parts), kFlowThreads, 0, cuda_stream>>>(params);
    PYNAR_CHECK_LAUNCH("flow_linear_gradient");
  }
  const auto blocks = static_cast<unsigned>(flow_finish_blocks(p));
  flow_linear_finish<T, kFlowThreads><<<blocks, kFlowThreads, 0, cuda_stream>>>(params);
  PYNAR_CHECK_LAUNCH("flow_linear_finish");
}

#define PYNAR_FLOW_LINEAR(T)                                         \
  template void flow_linear_cuda(const FlowLinearParams<T>&, void*); \
  template void flow_linear_backward_cuda(const FlowLinearBackwardParams<T>&, void*);

PYNAR_FLOW_LINEAR(float)
PYNAR_FLOW_LINEAR(double)
PYNAR_FLOW_LINEAR(BFloat16)
PYNAR_FLOW_LINEAR(Half)

}  // namespace pynar
