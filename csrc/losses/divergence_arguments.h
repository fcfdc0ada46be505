// The arguments that divergence_cross_entropy and its gradient have in common.
#pragma once

#include <vector>

#include "common/operators.h"
#include "losses/divergence_cross_entropy.h"

namespace pynar {

// Checks what the forward operator reads; targets in the vocabulary on the CPU alone.
void check_divergence(const Check& check, const std::vector<Tensor>& logits, const Tensor& targets,
                      const std::vector<int64_t>& pairs, double label_smoothing);

// Checks a tensor [count, N] in the accumulation type of the logits.
void check_by_row(const Check& check, const char* name, const Tensor& x, int64_t count,
                  const Tensor& logits);

// Whether every row begins at a multiple of 16 bytes.
bool heads_aligned(const std::vector<Tensor>& heads);

// A thread is worth starting for some ten microseconds of work.
inline int64_t divergence_grain(int64_t vocabulary, int64_t heads) {
  return 1 + (int64_t{1} << 14) / (vocabulary * heads);
}

// The fields that the parameters of both operators begin with.
template <typename Params>
void set_divergence(Params& p, const std::vector<Tensor>& logits, const Tensor& targets,
                    const std::vector<int64_t>& pairs, double label_smoothing) {
  using T = std::remove_const_t<std::remove_pointer_t<std::remove_extent_t<decltype(p.logits)>>>;
  p.heads = static_cast<int64_t>(logits.size());
  for (int64_t h = 0; h < p.heads; ++h) {
    p.logits[h] = logits[h].data<const T>();
    p.logits_stride[h] = logits[h].stride(0);
  }
  p.rows = logits[0].size(0);
  p.vocabulary = logits[0].size(1);
  p.targets = targets.data<int64_t>();
  p.targets_stride = targets.stride(0);
  p.pairs = static_cast<int64_t>(pairs.size() / 2);
  for (size_t i = 0; i < pairs.size(); ++i) p.pair[i / 2][i % 2] = pairs[i];
  p.label_smoothing = label_smoothing;
}

}  // namespace pynar
