// The roof that the benchmarks hold the linear kernels against.
#pragma once

#include "linear/panel.h"

namespace pynar {

// Multiplies and adds in a weight's format, with operands in the innermost cache, on all threads;
// returns the number of operations, two for each product.
double multiply_in_cache(int64_t format, int64_t repeats);

// One thread's share: kBlockRows rows, half of a panel or all of it, kCachedSteps steps.
constexpr int64_t kCachedSteps = 64;

PYNAR_DECLARE_KERNEL(int64_t multiply_cached(WeightFormat format, const uint32_t* x,
                                             const uint32_t* words, int64_t repeats, uint32_t* out))

}  // namespace pynar
