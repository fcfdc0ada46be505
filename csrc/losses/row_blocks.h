// Rows of logits are taken in blocks that stay in the innermost cache. For files that are compiled
// once per instruction set.
//
// What is done to a symbol at a time, beside whole vectors and where a logit is not finite, is
// compiled once for all element types, and gets its part of a block in the accumulation type.
#pragma once

#include "common/simd.h"

namespace pynar::PYNAR_ISA {

constexpr int64_t kRowBlock = 512;

// Elements [begin, end) of a block of each of kHeads rows, in place.
template <typename T, int kHeads>
void widen(const T* const (&rows)[kHeads], int64_t begin, int64_t end,
           accumulation_t<T> (&out)[kHeads][kRowBlock]) {
  for (int h = 0; h < kHeads; ++h) {
    for (int64_t i = begin; i < end; ++i) out[h][i] = to_accumulation(rows[h][i]);
  }
}

}  // namespace pynar::PYNAR_ISA
