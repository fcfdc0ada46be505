// Matrices in shared memory, and the parts of them that the lanes of a warp hold for the products
// of common/mma.cuh. Two neighbouring products, rounded, are a left factor: see as_left().
#pragma once

#include "common/mma.cuh"

namespace pynar {

constexpr int kFragmentRows = 16;
constexpr int kFragmentColumns = 8;

template <typename T>
__device__ inline uint32_t pack_pair(T low, T high) {
  return static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
}

// A matrix in shared memory, each row kStride elements after the one before. With
// kStride = columns + 8 the words that a warp reads at once lie in different banks.
template <typename T, int kRows, int kStride>
struct alignas(16) SharedMatrix {
  T element[kRows * kStride];

  __device__ T* row(int r) { return element + r * kStride; }
  __device__ uint32_t pair(int r, int c) const {
    return *reinterpret_cast<const uint32_t*>(element + r * kStride + c);
  }

  // Rows r to r + 16, columns c to c + 16.
  __device__ void load_left(int r, int c, uint32_t (&a)[4]) const {
    const int g = threadIdx.x % kWarp / 4;
    const int t = threadIdx.x % 4;
    a[0] = pair(r + g, c + 2 * t);
    a[1] = pair(r + g + 8, c + 2 * t);
    a[2] = pair(r + g, c + 2 * t + 8);
    a[3] = pair(r + g + 8, c + 2 * t + 8);
  }
  // Of the transpose of rows r to r + 8, columns c to c + 16.
  __device__ void load_right_transposed(int r, int c, uint32_t (&b)[2]) const {
    const int g = threadIdx.x % kWarp / 4;
    const int t = threadIdx.x % 4;
    b[0] = pair(r + g, c + 2 * t);
    b[1] = pair(r + g, c + 2 * t + 8);
  }
  // Of rows r to r + 16, columns c to c + 8.
  __device__ void load_right(int r, int c, uint32_t (&b)[2]) const {
#if defined(__CUDA_ARCH__)
    const T* row = element + (r + threadIdx.x % 16) * kStride + c;
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(b[0]), "=r"(b[1])
                 : "r"(address)
                 : "memory");
#else
    const int g = threadIdx.x % kWarp / 4;
    const int t = threadIdx.x % 4;
    const T* column = element + (r + 2 * t) * kStride + c + g;
    b[0] = pack_pair(column[0], column[kStride]);
    b[1] = pack_pair(column[8 * kStride], column[9 * kStride]);
#endif
  }
};

// Two neighbouring products, columns 0 to 8 and 8 to 16, as the left factor of another.
template <typename T>
__device__ inline void as_left(const float (&low)[4], const float (&high)[4], uint32_t (&a)[4]) {
  a[0] = pack_pair(from_accumulation<T>(low[0]), from_accumulation<T>(low[1]));
  a[1] = pack_pair(from_accumulation<T>(low[2]), from_accumulation<T>(low[3]));
  a[2] = pack_pair(from_accumulation<T>(high[0]), from_accumulation<T>(high[1]));
  a[3] = pack_pair(from_accumulation<T>(high[2]), from_accumulation<T>(high[3]));
}

}  // namespace pynar
