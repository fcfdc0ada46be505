// One matrix for rows as they lie, channels next to each other, which saves taking them apart and
// putting them together again. For the parts of a file that are compiled once for each instruction
// set; see common/simd.h.
#pragma once

#include "common/simd.h"
#include "flow/flow_step.h"

namespace pynar::PYNAR_ISA {
namespace {

// kRows rows times kVectors vectors of outputs of a contiguous head, from `first` on. Weights of
// neighbouring outputs lie next to each other.
template <typename T, int kRows, int kVectors>
inline void contiguous_outputs(const accumulation_t<T>* const* in,
                               const FlowStep<accumulation_t<T>>& step, int64_t head, int64_t first,
                               T* const* out) {
  using Vector = Simd<accumulation_t<T>>;
  Vector sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector::broadcast(0);
  }
  for (int64_t j = 0; j < step.dim; ++j) {
    Vector weight[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      weight[v] = Vector::load(step.weight + j * step.column_stride + first + v * Vector::kLanes);
    }
    for (int r = 0; r < kRows; ++r) {
      const Vector x = Vector::broadcast(in[r][head * step.dim + j]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(weight[v], x, sum[r][v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = head * step.dim + first + v * Vector::kLanes;
    const Vector scale = Vector::load(step.scale + c);
    const Vector shift = Vector::load(step.shift + c);
    for (int r = 0; r < kRows; ++r) multiply_add(sum[r][v], scale, shift).store(out[r] + c);
  }
}

// kRows rows times kOutputs outputs of as many strided heads as a vector has lanes.
template <typename T, int kRows, int kOutputs>
inline void strided_outputs(const accumulation_t<T>* const* in,
                            const FlowStep<accumulation_t<T>>& step, int64_t head, int64_t first,
                            T* const* out) {
  using Vector = Simd<accumulation_t<T>>;
  Vector sum[kRows][kOutputs];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kOutputs; ++i) sum[r][i] = Vector::broadcast(0);
  }
  for (int64_t j = 0; j < step.dim; ++j) {
    Vector weight[kOutputs];
    for (int i = 0; i < kOutputs; ++i) {
      const int64_t at = (first + i) * step.row_stride + j * step.column_stride;
      weight[i] = Vector::broadcast(step.weight[at]);
    }
    for (int r = 0; r < kRows; ++r) {
      const Vector x = Vector::load(in[r] + j * step.heads + head);
      for (int i = 0; i < kOutputs; ++i) sum[r][i] = multiply_add(weight[i], x, sum[r][i]);
    }
  }
  for (int i = 0; i < kOutputs; ++i) {
    const int64_t c = (first + i) * step.heads + head;
    const Vector scale = Vector::load(step.scale + c);
    const Vector shift = Vector::load(step.shift + c);
    for (int r = 0; r < kRows; ++r) multiply_add(sum[r][i], scale, shift).store(out[r] + c);
  }
}

template <typename T, int kRows>
inline void multiply_some_rows(const accumulation_t<T>* const* in,
                               const FlowStep<accumulation_t<T>>& step, T* const* out) {
  constexpr int64_t kLanes = Simd<accumulation_t<T>>::kLanes;
  if (step.strided) {
    for (int64_t head = 0; head < step.heads; head += kLanes) {
      int64_t i = 0;
      for (; i + 2 <= step.dim; i += 2) strided_outputs<T, kRows, 2>(in, step, head, i, out);
      if (i < step.dim) strided_outputs<T, kRows, 1>(in, step, head, i, out);
    }
    return;
  }
  for (int64_t head = 0; head < step.heads; ++head) {
    int64_t i = 0;
    for (; i + 2 * kLanes <= step.dim; i += 2 * kLanes) {
      contiguous_outputs<T, kRows, 2>(in, step, head, i, out);
    }
    if (i < step.dim) contiguous_outputs<T, kRows, 1>(in, step, head, i, out);
  }
}

// Adds the products of kRows channels of `grad` and kVectors vectors of channels of `in`, of all
// rows and heads. Those of `in` are contiguous.
template <typename A, int kRows, int kVectors>
inline void add_products(const A* const* grad, const A* const* in, int64_t count,
                         const FlowStep<A>& step, int64_t i, int64_t j, A* grad_weight) {
  using Vector = Simd<A>;
  const int64_t apart = step.strided ? step.heads : 1;
  const int64_t next_head = step.strided ? 1 : step.dim;
  const auto place = [&](int r, int v) {
    return grad_weight + (i + r) * step.dim + j + v * Vector::kLanes;
  };
  Vector sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector::load(place(r, v));
  }
  for (int64_t row = 0; row < count; ++row) {
    const A* g = grad[row] + i * apart;
    const A* x = in[row] + j;
    for (int64_t head = 0; head < step.heads; ++head, g += next_head, x += step.dim) {
      Vector channel[kVectors];
      for (int v = 0; v < kVectors; ++v) channel[v] = Vector::load(x + v * Vector::kLanes);
      for (int r = 0; r < kRows; ++r) {
        const Vector gradient = Vector::broadcast(g[r * apart]);
        for (int v = 0; v < kVectors; ++v) {
          sum[r][v] = multiply_add(gradient, channel[v], sum[r][v]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v].store(place(r, v));
  }
}

template <typename A, int kRows>
inline void add_products_of(const A* const* grad, const A* const* in, int64_t count,
                            const FlowStep<A>& step, int64_t i, A* grad_weight) {
  constexpr int64_t kLanes = Simd<A>::kLanes;
  int64_t j = 0;
  for (; j + 2 * kLanes <= step.dim; j += 2 * kLanes) {
    add_products<A, kRows, 2>(grad, in, count, step, i, j, grad_weight);
  }
  if (j < step.dim) add_products<A, kRows, 1>(grad, in, count, step, i, j, grad_weight);
}

// The channels of strided heads as those of contiguous ones.
template <typename A>
inline void gather_heads(const A* x, const FlowStep<A>& step, A* out) {
  using Vector = Simd<A>;
  using Transposed = Columns<A, A>;
  for (int64_t j = 0; j < step.dim; j += Vector::kLanes) {
    const A* channels[Vector::kLanes];
    for (int i = 0; i < Vector::kLanes; ++i) channels[i] = x + (j + i) * step.heads;
    for (int64_t head = 0; head < step.heads; head += Transposed::kCount) {
      Vector column[Transposed::kCount];
      Transposed::load(channels, head, column);
      for (int k = 0; k < Transposed::kCount; ++k) {
        column[k].store(out + (head + k) * step.dim + j);
      }
    }
  }
}

}  // namespace

// Whether vectors divide a head's channels and, where these lie apart, the heads.
template <typename A>
bool takes_rows(const FlowStep<A>& step) {
  constexpr int64_t kLanes = Simd<A>::kLanes;
  return step.dim % kLanes == 0 && (!step.strided || step.heads % kLanes == 0);
}

// At most kRowsTogether rows x, scaled and shifted first unless `scale` is null, through one
// matrix. `scratch` is for as many rows; where heads are contiguous the weight's row_stride is 1. A
// row may be written over itself.
template <typename T>
void multiply_rows(const T* const* x, int64_t count, const accumulation_t<T>* scale,
                   const accumulation_t<T>* shift, const FlowStep<accumulation_t<T>>& step,
                   accumulation_t<T>* scratch, T* const* y) {
  using A = accumulation_t<T>;
  using Vector = Simd<A>;
  const int64_t channels = step.heads * step.dim;
  const A* in[kRowsTogether];
  for (int64_t r = 0; r < count; ++r) {
    if constexpr (sizeof(T) == sizeof(A)) {
      in[r] = x[r];
      if (scale == nullptr && x[r] != y[r]) continue;
    }
    A* row = scratch + r * channels;
    for (int64_t c = 0; c < channels; c += Vector::kLanes) {
      Vector states = Vector::load(x[r] + c);
      if (scale != nullptr) {
        states = multiply_add(states, Vector::load(scale + c), Vector::load(shift + c));
      }
      states.store(row + c);
    }
    in[r] = row;
  }
  int64_t r = 0;
  for (; r + 6 <= count; r += 6) multiply_some_rows<T, 6>(in + r, step, y + r);
  for (; r + 3 <= count; r += 3) multiply_some_rows<T, 3>(in + r, step, y + r);
  for (; r < count; ++r) multiply_some_rows<T, 1>(in + r, step, y + r);
}

// Adds the gradient of a matrix by at most kRowsTogether rows. `scratch` is for as many.
template <typename A>
void add_row_products(const A* const* grad, const A* const* in, int64_t count,
                      const FlowStep<A>& step, A* scratch, A* grad_weight) {
  const A* rows[kRowsTogether];
  for (int64_t r = 0; r < count; ++r) {
    rows[r] = in[r];
    if (!step.strided) continue;
    A* row = scratch + r * step.heads * step.dim;
    gather_heads(in[r], step, row);
    rows[r] = row;
  }
  int64_t i = 0;
  for (; i + 6 <= step.dim; i += 6) add_products_of<A, 6>(grad, rows, count, step, i, grad_weight);
  for (; i < step.dim; i += 2) add_products_of<A, 2>(grad, rows, count, step, i, grad_weight);
}

}  // namespace pynar::PYNAR_ISA
