// The special symbols; pynar/symbols.py says the same to Python.
#pragma once

#include "common/scalar.h"

namespace pynar {

constexpr int64_t kPad = 0;
constexpr int64_t kBos = 1;
constexpr int64_t kEos = 2;
constexpr int64_t kUnk = 3;
constexpr int64_t kMask = 4;
constexpr int64_t kNumSpecial = 5;

}  // namespace pynar
