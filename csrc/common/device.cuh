// Device-side helpers. Taken by nvcc, by NVRTC and, with the built-ins of
// tests/cuda_on_host/cuda_on_host.h, by a host compiler.
#pragma once

#include "common/scalar.h"

namespace pynar {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504f;

// Shared memory whose size the launch gives, as an array of T.
#if defined(PYNAR_CUDA_ON_HOST)
#define PYNAR_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(cuda_on_host::dynamic_shared())
#else
#define PYNAR_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char pynar_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(pynar_dynamic_shared)
#endif

template <typename A>
__device__ inline A negative_infinity() {
  return static_cast<A>(float_from_bits(0xff800000));
}

__device__ inline float exponential(float x) {
#if defined(__CUDA_ARCH__)
  // One instruction of two ulp; exp2f() would spend three more on results below 2^-126.
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * kLog2E));
  return y;
#else
  return exp2f(x * kLog2E);
#endif
}
__device__ inline double exponential(double x) {
  return exp(x);
}

__device__ inline float logarithm(float x) {
  return logf(x);
}
__device__ inline double logarithm(double x) {
  return log(x);
}

// The greater one; NaN loses against a number.
__device__ inline float maximum(float a, float b) {
  return fmaxf(a, b);
}
__device__ inline double maximum(double a, double b) {
  return fmax(a, b);
}

template <typename A>
__device__ inline A warp_max(A x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = maximum(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}

template <typename A>
__device__ inline A warp_sum(A x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}

// Over all kThreads threads of a one-dimensional block, in an order that only kThreads decides;
// every thread gets the result. `scratch` is shared, one element a warp, and free again after the
// block's next barrier.
template <int kThreads, typename A>
__device__ inline A block_max(A x, A* scratch) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kThreads % kWarp == 0 && kWarps <= kWarp);
  x = warp_max(x);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = scratch[0];
  for (int w = 1; w < kWarps; ++w) x = maximum(x, scratch[w]);
  return x;
}

template <int kThreads, typename A>
__device__ inline A block_sum(A x, A* scratch) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kThreads % kWarp == 0 && kWarps <= kWarp);
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = scratch[0];
  for (int w = 1; w < kWarps; ++w) x += scratch[w];
  return x;
}

// kCount neighbouring elements. `aligned`: p is a multiple of their size in bytes, so that one
// instruction of 16 bytes takes them; otherwise they come one by one, into the same places.
template <typename T>
struct alignas(16) Chunk {
  static constexpr int kCount = 16 / sizeof(T);
  T element[kCount];
};

template <typename T>
__device__ inline Chunk<T> load_chunk(const T* p, bool aligned) {
  Chunk<T> chunk;
  if (aligned) {
    chunk = *reinterpret_cast<const Chunk<T>*>(p);
  } else {
#pragma unroll
    for (int i = 0; i < Chunk<T>::kCount; ++i) chunk.element[i] = p[i];
  }
  return chunk;
}

}  // namespace pynar
