// For each of N matrices of size d: logdet[n] = log |det weights[n]| and inverse[n], by
// Gauss-Jordan elimination with the greatest pivot of each column. A singular matrix has
// log-determinant -inf and an inverse of NaN.
#pragma once

#include "common/scalar.h"

namespace pynar {

template <typename T>
struct BatchedLogdetParams {
  const T* weights;  // [N, d, d]  contiguous
  T* logdet;         // [N]        written, contiguous
  T* inverse;        // [N, d, d]  written, contiguous
  int64_t count;     // N
  int64_t dim;       // d
};

// A block of the GPU keeps its matrix in shared memory.
constexpr int64_t kLogdetMostBytes = 40 << 10;
constexpr int kLogdetThreads = 256;
// The greatest dim of that size, of float32.
constexpr int kLogdetMostRows = 101;

#if !defined(__CUDACC_RTC__)
template <typename T>
void batched_logdet_cuda(const BatchedLogdetParams<T>& params, void* stream);
#endif

}  // namespace pynar
