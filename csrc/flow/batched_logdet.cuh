#pragma once

#include "common/device.cuh"
#include "flow/batched_logdet.h"

namespace pynar {

// A block for each matrix, which stays in shared memory while its inverse takes its place.
// grid: N
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) batched_logdet_invert(BatchedLogdetParams<T> p) {
  __shared__ T matrix[kLogdetMostBytes / sizeof(T)];
  __shared__ T factor[kLogdetMostRows];
  __shared__ int order[kLogdetMostRows];
  const int64_t dim = p.dim;
  const T* weight = p.weights + blockIdx.x * dim * dim;
  for (int64_t e = threadIdx.x; e < dim * dim; e += kThreads) matrix[e] = weight[e];
  __syncthreads();

  T logdet = 0;
  bool singular = false;
  for (int64_t k = 0; k < dim; ++k) {
    // The first of the greatest; a NaN counts as the greatest, so that it is found.
    if (threadIdx.x < kWarp) {
      T greatest = -1;
      int best = static_cast<int>(k);
      for (int64_t i = k + threadIdx.x; i < dim; i += kWarp) {
        const T element = matrix[i * dim + k];
        const T size = element < 0 ? -element : element;
        if (size > greatest || (size != size && greatest == greatest)) {
          greatest = size;
          best = static_cast<int>(i);
        }
      }
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const T other = __shfl_xor_sync(kAllLanes, greatest, offset);
        const int other_best = __shfl_xor_sync(kAllLanes, best, offset);
        const bool both = greatest != greatest && other != other;
        const bool greater = other > greatest || (other != other && greatest == greatest);
        if (greater || ((both || other == greatest) && other_best < best)) {
          greatest = other;
          best = other_best;
        }
      }
      if (threadIdx.x == 0) order[k] = best;
    }
    __syncthreads();
    const int64_t best = order[k];
    for (int64_t j = threadIdx.x; j < dim && best != k; j += kThreads) {
      const T kept = matrix[k * dim + j];
      matrix[k * dim + j] = matrix[best * dim + j];
      matrix[best * dim + j] = kept;
    }
    __syncthreads();
    const T pivot = matrix[k * dim + k];
    singular = singular || pivot == 0;
    logdet += logarithm(pivot < 0 ? -pivot : pivot);
    const T reciprocal = T(1) / pivot;
    for (int64_t i = threadIdx.x; i < dim; i += kThreads) factor[i] = matrix[i * dim + k];
    __syncthreads();
    for (int64_t j = threadIdx.x; j < dim; j += kThreads) {
      matrix[k * dim + j] = j == k ? reciprocal : matrix[k * dim + j] * reciprocal;
    }
    __syncthreads();
    for (int64_t e = threadIdx.x; e < dim * dim; e += kThreads) {
      const int64_t i = e / dim;
      const int64_t j = e % dim;
      if (i == k) continue;
      // In column k that of the inverse takes the place of zeros.
      matrix[e] = (j == k ? T(0) : matrix[e]) - factor[i] * matrix[k * dim + j];
    }
    __syncthreads();
  }

  // Rows were exchanged, so columns of the inverse are, from the last to the first; a row is the
  // work of one thread.
  for (int64_t i = threadIdx.x; i < dim; i += kThreads) {
    for (int64_t k = dim - 1; k >= 0; --k) {
      const T kept = matrix[i * dim + k];
      matrix[i * dim + k] = matrix[i * dim + order[k]];
      matrix[i * dim + order[k]] = kept;
    }
  }
  __syncthreads();
  const T lowest = negative_infinity<T>();
  T* inverse = p.inverse + blockIdx.x * dim * dim;
  for (int64_t e = threadIdx.x; e < dim * dim; e += kThreads) {
    inverse[e] = singular ? lowest - lowest : matrix[e];
  }
  if (threadIdx.x == 0) p.logdet[blockIdx.x] = singular ? lowest : logdet;
}

}  // namespace pynar
