// Matrix instructions of a warp and copies that do not pass through registers, for compute
// capability 8.0 and later. The host harness emulates them all.
#pragma once

#include "common/device.cuh"

namespace pynar {

// D += A B with A [16, 16], B [16, 8] in T (BFloat16 or Half) and D [16, 8] in fp32. Lane 4 g + t
// holds, two neighbouring elements a word,
//   a[0], a[1]: rows g and g + 8 of A in columns 2 t and 2 t + 1; a[2], a[3]: 8 columns further on
//   b[0], b[1]: column g of B in rows 2 t and 2 t + 1, and 8 rows further on
//   d[0..3]:    row g, then row g + 8 of D in columns 2 t and 2 t + 1
template <typename T>
__device__ inline void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4],
                                           const uint32_t (&b)[2]);

// Four matrices of 8 rows of 16 bytes. Lane i gives the address of row i % 8 of matrix i / 8; lane
// 4 g + t gets word t of row g of every matrix. Addresses are shared memory, multiples of 16.
__device__ inline void load_matrices(uint32_t (&words)[4], const void* row);

// Copies `bytes` of at most 16, and zeros for the rest, to shared memory. Both addresses are
// multiples of 16; with 0 bytes nothing is read. Copies since the last commit_copies() are a group.
__device__ inline void copy_async(void* shared, const void* global, int bytes);
__device__ inline void commit_copies();

// Waits until of this thread's groups only the kLeft last ones may be unfinished. What other
// threads copied is there after the barrier behind it.
template <int kLeft>
__device__ inline void wait_copies();

#if defined(PYNAR_CUDA_ON_HOST)

template <typename T>
inline void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  cuda_on_host::multiply_accumulate(
      d, a, b, [](uint32_t bits) { return to_accumulation(T{static_cast<uint16_t>(bits)}); });
}

inline void load_matrices(uint32_t (&words)[4], const void* row) {
  cuda_on_host::load_matrices(words, row);
}

inline void copy_async(void* shared, const void* global, int bytes) {
  cuda_on_host::copy_async(shared, global, bytes);
}

inline void commit_copies() {
  cuda_on_host::commit_copies();
}

template <int kLeft>
inline void wait_copies() {
  cuda_on_host::wait_copies(kLeft);
}

#else

#define PYNAR_MMA(type)                                                               \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <>
__device__ inline void multiply_accumulate<BFloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  PYNAR_MMA("bf16");
}
template <>
__device__ inline void multiply_accumulate<Half>(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  PYNAR_MMA("f16");
}

#undef PYNAR_MMA

__device__ inline void load_matrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

__device__ inline void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global),
                 "r"(bytes)
               : "memory");
}

__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kLeft>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

#endif

}  // namespace pynar
