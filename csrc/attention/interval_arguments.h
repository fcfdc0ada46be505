// The arguments that interval attention and its gradient have in common: checks, and views.
#pragma once

#include <initializer_list>

#include "attention/interval_attention.h"
#include "attention/interval_tiles.h"
#include "common/operators.h"

namespace pynar {

// Checks what the forward operator reads.
void check_attention(const Check& check, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Tensor& intervals);

// Checks a tensor of the shape, dtype and device of `like`, or of its leading dimensions for lse.
void check_like(const Check& check, const char* name, const Tensor& x, const char* like_name,
                const Tensor& like);
void check_lse(const Check& check, const Tensor& lse, const Tensor& q);
void check_inner_contiguous(const Check& check, const char* name, const Tensor& x);
void check_output(const Check& check, const char* name, const Tensor& x);

AttentionSizes attention_sizes(const Tensor& q, const Tensor& k, const Tensor& intervals);
IntervalRows interval_rows(const Tensor& intervals);

// Whether every row begins at a multiple of 16 bytes.
bool rows_aligned(std::initializer_list<const Tensor*> tensors);

// The packed form, [N, H, ...], is one sentence.
template <typename T>
HeadRows<T> head_rows(const Tensor& x, bool packed) {
  return {x.data<T>(), packed ? 0 : x.stride(0), x.stride(1), x.stride(packed ? 0 : 2)};
}

inline IntervalView interval_view(const IntervalRows& rows, const AttentionSizes& sizes) {
  return {rows.data,   rows.stride_b, rows.stride_t, rows.stride_r,
          sizes.batch, sizes.queries, sizes.keys,    sizes.num_intervals};
}

// A thread is worth starting for some ten microseconds of work, in pairs of a query and a key.
inline int64_t attention_grain(const AttentionSizes& sizes) {
  return (int64_t{1} << 18) / sizes.dim;
}

}  // namespace pynar
