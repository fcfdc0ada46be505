// Host side of the operators of the flow: checks, and the choice of a kernel.
#pragma once

#include <type_traits>

#include "common/cpu.h"
#include "common/operators.h"

// The kernels of the flow have two levels, to keep the time of a build: avx2 serves for avx512 too.
// float64, which checks gradients, has the generic level alone.
#if defined(__x86_64__)
#define PYNAR_SELECT_FLOW_KERNEL(name)                                             \
  [] {                                                                             \
    if constexpr (std::is_same_v<accumulation_t<T>, double>)                       \
      return &generic::name;                                                       \
    else                                                                           \
      return ::pynar::isa() >= ::pynar::Isa::kAvx2 ? &avx2::name : &generic::name; \
  }()
#else
#define PYNAR_SELECT_FLOW_KERNEL(name) (&PYNAR_ONLY_ISA::name)
#endif

namespace pynar {

// Checks that the channels of [B, T, C] are neighbours.
void check_channels(const Check& check, const char* name, const Tensor& x);

// Checks one length a sentence of x, [B, T, C], on the CPU also that it is in [0, T * factor].
void check_flow_lengths(const Check& check, const Tensor& lengths, const char* name,
                        const Tensor& x, int64_t factor = 1);

// Checks steps [B, T, C] of a floating type on a device that has kernels, and their lengths.
void check_flow_steps(const Check& check, const char* name, const Tensor& x, const Tensor& lengths,
                      int64_t factor = 1);

}  // namespace pynar
