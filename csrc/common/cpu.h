// Which instruction set the CPU kernels use, chosen at run time.
#pragma once

// The kernels need but their declarations.
#ifndef PYNAR_ISA

#include <string>
#include <type_traits>
#include <vector>

namespace pynar {

// kAvx512Vnni also has the dot products of bf16 pairs and of four bytes.
enum class Isa { kGeneric, kNeon, kAvx2, kAvx512, kAvx512Vnni };

// The widest one that was compiled and that this processor and its system support, unless
// set_isa() chose another.
Isa isa();

const char* isa_name(Isa isa);

// Those that can be chosen here, narrowest first.
std::vector<Isa> available_isas();

// Throws std::invalid_argument, listing the choices, for a name that is not among available_isas().
void set_isa(const std::string& name);

}  // namespace pynar

#endif

// Declares a kernel that each instruction set defines in its own namespace, see csrc/README.md.
// avx512_vnni is compiled for those alone that PYNAR_SELECT_DOT_KERNEL chooses: the ones that have
// use for dot products of bf16 or bytes.
#if defined(__x86_64__)
#define PYNAR_DECLARE_KERNEL(declaration) \
  namespace generic {                     \
  declaration;                            \
  }                                       \
  namespace avx2 {                        \
  declaration;                            \
  }                                       \
  namespace avx512 {                      \
  declaration;                            \
  }                                       \
  namespace avx512_vnni {                 \
  declaration;                            \
  }
#define PYNAR_SELECT_KERNEL(name)                         \
  (::pynar::isa() >= ::pynar::Isa::kAvx512 ? avx512::name \
   : ::pynar::isa() == ::pynar::Isa::kAvx2 ? avx2::name   \
                                           : generic::name)
#define PYNAR_SELECT_DOT_KERNEL(name) \
  (::pynar::isa() == ::pynar::Isa::kAvx512Vnni ? avx512_vnni::name : PYNAR_SELECT_KERNEL(name))
// For kernels of an element type: float64, which serves gradcheck, is compiled for generic alone.
#define PYNAR_SELECT_KERNEL_OF(T, name)        \
  [] {                                         \
    if constexpr (std::is_same_v<T, double>) { \
      return &generic::name;                   \
    } else {                                   \
      return PYNAR_SELECT_KERNEL(name);        \
    }                                          \
  }()
// The same, of which avx512_vnni is compiled for bf16 alone.
#define PYNAR_SELECT_DOT_KERNEL_OF(T, name)      \
  [] {                                           \
    if constexpr (std::is_same_v<T, BFloat16>) { \
      return PYNAR_SELECT_DOT_KERNEL(name);      \
    } else {                                     \
      return PYNAR_SELECT_KERNEL_OF(T, name);    \
    }                                            \
  }()
#else
// NEON is part of every 64-bit ARM processor, so there is nothing to choose.
#if defined(__aarch64__)
#define PYNAR_ONLY_ISA neon
#else
#define PYNAR_ONLY_ISA generic
#endif
#define PYNAR_DECLARE_KERNEL(declaration) \
  namespace PYNAR_ONLY_ISA {              \
  declaration;                            \
  }
#define PYNAR_SELECT_KERNEL(name) (PYNAR_ONLY_ISA::name)
#define PYNAR_SELECT_DOT_KERNEL(name) (PYNAR_ONLY_ISA::name)
#define PYNAR_SELECT_KERNEL_OF(T, name) (PYNAR_ONLY_ISA::name)
#define PYNAR_SELECT_DOT_KERNEL_OF(T, name) (PYNAR_ONLY_ISA::name)
#endif
