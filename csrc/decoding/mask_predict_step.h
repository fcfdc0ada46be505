// One step of mask-predict decoding. For each sentence b and slot t < lengths[b]:
//
//   tokens[b,t] == <mask>:  token = argmax_v logits[b,t,v]   (the lowest of equals)
//                           score = logits[b,t,token] - log sum_v exp(logits[b,t,v])
//   otherwise:              token = tokens[b,t], score = scores[b,t]
//
// with v over all symbols but <pad> and <mask>, which are never produced. A row without a
// distribution (a NaN or +inf among these logits, or all of them -inf) gives token <unk> and score
// NaN. Then, of the slots that did not come in as <pad>, <s> or </s>, the num_masked[b] with the
// lowest scores become <mask> and keep their scores; the lower t of equals, a NaN counts as -inf,
// and all of them if num_masked[b] is more than there are. Slots t >= lengths[b] get <pad> and 0.
//
// Rows of logits whose slot is not masked are not read.
#pragma once

#include "common/scalar.h"

namespace pynar {

template <typename T>
struct MaskPredictPartial {
  accumulation_t<T> max;
  accumulation_t<T> sum;  // of exp(logit - max)
  int64_t token;          // of the lowest symbol whose logit is max
};

// Argument of the kernels; every field is eight bytes wide.
template <typename T>
struct MaskPredictParams {
  const T* logits;                           // [B, T, V]
  const int64_t* tokens;                     // [B, T]
  const accumulation_t<T>* scores;           // [B, T]
  const int64_t* lengths;                    // [B]
  const int64_t* num_masked;                 // [B]
  int64_t* new_tokens;                       // [B, T]       written, contiguous
  accumulation_t<T>* new_scores;             // [B, T]       written, contiguous
  MaskPredictPartial<T>* partials;           // [B, T, segments] scratch
  int64_t steps;                             // T
  int64_t vocabulary;                        // V
  int64_t segments;                          // into which a row of logits is cut
  int64_t logits_stride_b, logits_stride_t;  // the vocabulary is contiguous
  int64_t tokens_stride_b, tokens_stride_t;
  int64_t scores_stride_b, scores_stride_t;
  int64_t lengths_stride;
  int64_t num_masked_stride;
  int64_t aligned;  // 1 if every row of logits begins at a multiple of 16 bytes
};

// A thread holds kMaskPredictPerThread logits in registers, so that the exponentials need not be
// redone when a greater logit turns up; a block of kThreads takes one segment of a row.
constexpr int kMaskPredictPerThread = 32;

// A small vocabulary would leave most of a large block without work. The choice depends on V
// alone: scores must not depend on the batch in the last bit.
PYNAR_HOST_DEVICE constexpr int mask_predict_threads(int64_t vocabulary) {
  return vocabulary > 4096 ? 256 : 64;
}

PYNAR_HOST_DEVICE constexpr int64_t mask_predict_segments(int64_t vocabulary) {
  const int64_t segment = mask_predict_threads(vocabulary) * kMaskPredictPerThread;
  return (vocabulary + segment - 1) / segment;
}

constexpr int kMaskPredictFinishThreads = 128;

#if !defined(__CUDACC_RTC__)
// Two launches on the current device: partials of the rows, then each sentence.
template <typename T>
void mask_predict_step_cuda(const MaskPredictParams<T>& params, int64_t batch, void* stream);
#endif

}  // namespace pynar
