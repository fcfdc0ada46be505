// The roof that the benchmarks hold memory-bound kernels against.
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace pynar {

class Tensor;

// Reads every byte of a contiguous float32 tensor once, on all threads, and returns the sum of
// its elements, in no particular order.
double read_all(const Tensor& x);

PYNAR_DECLARE_KERNEL(float read_range(const float* x, int64_t n))

}  // namespace pynar
