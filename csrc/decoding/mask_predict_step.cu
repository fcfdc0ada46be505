#include "common/cuda_launch.h"
#include "decoding/mask_predict_step.cuh"

namespace pynar {
namespace {

template <typename T, int kThreads>
void launch(const MaskPredictParams<T>& params, int64_t batch, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(batch * params.steps * params.segments);
  mask_predict_partials<T, kThreads><<<blocks, kThreads, 0, stream>>>(params);
  PYNAR_CHECK_LAUNCH("mask_predict_partials");
  mask_predict_finish<T, kMaskPredictFinishThreads>
      <<<static_cast<unsigned>(batch), kMaskPredictFinishThreads, 0, stream>>>(params);
  PYNAR_CHECK_LAUNCH("mask_predict_finish");
}

}  // namespace

template <typename T>
void mask_predict_step_cuda(const MaskPredictParams<T>& params, int64_t batch, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (mask_predict_threads(params.vocabulary) == 256) {
    launch<T, 256>(params, batch, cuda_stream);
  } else {
    launch<T, 64>(params, batch, cuda_stream);
  }
}

template void mask_predict_step_cuda(const MaskPredictParams<float>&, int64_t, void*);
template void mask_predict_step_cuda(const MaskPredictParams<double>&, int64_t, void*);
template void mask_predict_step_cuda(const MaskPredictParams<BFloat16>&, int64_t, void*);
template void mask_predict_step_cuda(const MaskPredictParams<Half>&, int64_t, void*);

}  // namespace pynar
