// The inner loops of chains of per-step maps, [C, kFlowRows] states at a time. For the parts of a
// file that are compiled once for each instruction set; see common/simd.h.
#pragma once

#include "common/simd.h"
#include "flow/flow_step.h"

namespace pynar::PYNAR_ISA {
namespace {

// As many sums at a time as hide the latency of a multiply-add.
constexpr int kOutputs = 6;
constexpr int kVectors = 2;

// Where a channel of a head lies: first + i * apart.
struct Head {
  int64_t first, apart;
};

template <typename A>
inline Head head_of(const FlowStep<A>& step, int64_t h) {
  return step.strided ? Head{h, step.heads} : Head{h * step.dim, 1};
}

template <typename A, int kCount>
inline void multiply_some(const A* in, const FlowStep<A>& step, Head head, int64_t first, A* out) {
  using Vector = Simd<A>;
  const A* weight = step.weight + first * step.row_stride;
  Vector sum[kCount][kVectors];
  for (int i = 0; i < kCount; ++i) {
    for (int v = 0; v < kVectors; ++v) sum[i][v] = Vector::broadcast(0);
  }
  for (int64_t j = 0; j < step.dim; ++j) {
    const A* x = in + (head.first + j * head.apart) * kFlowRows;
    Vector channel[kVectors];
    for (int v = 0; v < kVectors; ++v) channel[v] = Vector::load(x + v * Vector::kLanes);
    for (int i = 0; i < kCount; ++i) {
      const Vector w = Vector::broadcast(weight[i * step.row_stride + j * step.column_stride]);
      for (int v = 0; v < kVectors; ++v) sum[i][v] = multiply_add(w, channel[v], sum[i][v]);
    }
  }
  for (int i = 0; i < kCount; ++i) {
    const int64_t c = head.first + (first + i) * head.apart;
    const Vector scale = Vector::broadcast(step.scale[c]);
    const Vector shift = Vector::broadcast(step.shift[c]);
    for (int v = 0; v < kVectors; ++v) {
      multiply_add(sum[i][v], scale, shift).store(out + c * kFlowRows + v * Vector::kLanes);
    }
  }
}

// Elements (i, j) to (i, j + kCount - 1) of the gradient of a matrix, for heads that vectors do not
// divide.
template <typename A, int kCount>
inline void add_elements(const A* grad, const A* in, const FlowStep<A>& step, int64_t i, int64_t j,
                         A* grad_weight) {
  using Vector = Simd<A>;
  Vector sum[kCount];
  for (int e = 0; e < kCount; ++e) sum[e] = Vector::broadcast(0);
  for (int64_t h = 0; h < step.heads; ++h) {
    const Head head = head_of(step, h);
    const A* g = grad + (head.first + i * head.apart) * kFlowRows;
    const A* x = in + (head.first + j * head.apart) * kFlowRows;
    for (int v = 0; v < kFlowRows; v += Vector::kLanes) {
      const Vector gradient = Vector::load(g + v);
      for (int e = 0; e < kCount; ++e) {
        sum[e] = multiply_add(gradient, Vector::load(x + e * head.apart * kFlowRows + v), sum[e]);
      }
    }
  }
  for (int e = 0; e < kCount; ++e) grad_weight[i * step.dim + j + e] += reduce_add(sum[e]);
}

// Some vectors of a head's channels, from `first` on, as rows [kFlowRows, kCount vectors].
template <typename A, int kCount>
inline void rows_of_head(const A* in, Head head, int64_t first, A* out) {
  using Vector = Simd<A>;
  using Transposed = Columns<A, A>;
  constexpr int kWidth = kCount * Vector::kLanes;
  const A* channels[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    channels[i] = in + (head.first + (first + i) * head.apart) * kFlowRows;
  }
  for (int r = 0; r < kFlowRows; r += Transposed::kCount) {
    for (int v = 0; v < kCount; ++v) {
      Vector row[Transposed::kCount];
      Transposed::load(channels + v * Vector::kLanes, r, row);
      for (int i = 0; i < Transposed::kCount; ++i) {
        row[i].store(out + (r + i) * kWidth + v * Vector::kLanes);
      }
    }
  }
}

// Adds the products of kRows channels of `grad`, `apart` from each other, and of `rows`.
template <typename A, int kRows, int kCount>
inline void add_products_of_rows(const A* grad, int64_t apart, const A* rows, int64_t stride,
                                 A* grad_weight) {
  using Vector = Simd<A>;
  Vector sum[kRows][kCount];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kCount; ++v) sum[r][v] = Vector::broadcast(0);
  }
  for (int t = 0; t < kFlowRows; ++t, rows += kCount * Vector::kLanes) {
    Vector x[kCount];
    for (int v = 0; v < kCount; ++v) x[v] = Vector::load(rows + v * Vector::kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vector g = Vector::broadcast(grad[r * apart + t]);
      for (int v = 0; v < kCount; ++v) sum[r][v] = multiply_add(g, x[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kCount; ++v) {
      A* place = grad_weight + r * stride + v * Vector::kLanes;
      add(Vector::load(place), sum[r][v]).store(place);
    }
  }
}

// The gradient of a matrix by some vectors of its columns. Their channels become rows first: then
// sums lie in lanes, and none ends across a vector.
template <typename A, int kCount>
inline void add_columns(const A* grad, const A* in, const FlowStep<A>& step, int64_t first,
                        A* grad_weight) {
  static_assert(Simd<A>::kLanes % 2 == 0 && kFlowRows % Columns<A, A>::kCount == 0);
  alignas(64) A rows[kFlowRows * kCount * Simd<A>::kLanes];
  for (int64_t h = 0; h < step.heads; ++h) {
    const Head head = head_of(step, h);
    rows_of_head<A, kCount>(in, head, first, rows);
    const int64_t apart = head.apart * kFlowRows;
    const A* g = grad + head.first * kFlowRows;
    A* out = grad_weight + first;
    int64_t i = 0;
    for (; i + kOutputs <= step.dim; i += kOutputs) {
      add_products_of_rows<A, kOutputs, kCount>(g + i * apart, apart, rows, step.dim,
                                                out + i * step.dim);
    }
    for (; i + 2 <= step.dim; i += 2) {
      add_products_of_rows<A, 2, kCount>(g + i * apart, apart, rows, step.dim, out + i * step.dim);
    }
  }
}

}  // namespace

template <typename T>
void scale_row(const T* x, const accumulation_t<T>* scale, const accumulation_t<T>* shift, T* y,
               int64_t count) {
  using Vector = Simd<accumulation_t<T>>;
  int64_t c = 0;
  for (; c + Vector::kLanes <= count; c += Vector::kLanes) {
    multiply_add(Vector::load(x + c), Vector::load(scale + c), Vector::load(shift + c))
        .store(y + c);
  }
  for (; c < count; ++c) {
    y[c] = from_accumulation<T>(to_accumulation(x[c]) * scale[c] + shift[c]);
  }
}

template <typename T>
void scale_row_backward(const T* grad_y, const T* x, const accumulation_t<T>* scale,
                        const accumulation_t<T>* centre, T* grad_x, accumulation_t<T>* sum,
                        accumulation_t<T>* moment, int64_t count) {
  using A = accumulation_t<T>;
  using Vector = Simd<A>;
  int64_t c = 0;
  for (; c + Vector::kLanes <= count; c += Vector::kLanes) {
    const Vector g = Vector::load(grad_y + c);
    const Vector deviation = sub(Vector::load(x + c), Vector::load(centre + c));
    add(Vector::load(sum + c), g).store(sum + c);
    multiply_add(g, deviation, Vector::load(moment + c)).store(moment + c);
    mul(g, Vector::load(scale + c)).store(grad_x + c);
  }
  for (; c < count; ++c) {
    const A g = to_accumulation(grad_y[c]);
    sum[c] += g;
    moment[c] += g * (to_accumulation(x[c]) - centre[c]);
    grad_x[c] = from_accumulation<T>(g * scale[c]);
  }
}

template <typename T>
void load_steps(const T* const* rows, int64_t count, const accumulation_t<T>* scale,
                const accumulation_t<T>* shift, accumulation_t<T>* state) {
  using A = accumulation_t<T>;
  using Vector = Simd<A>;
  using Transposed = Columns<A, T>;
  for (int first = 0; first < kFlowRows; first += Vector::kLanes) {
    int64_t c = 0;
    for (; c + Transposed::kCount <= count; c += Transposed::kCount) {
      Vector column[Transposed::kCount];
      Transposed::load(rows + first, c, column);
      for (int i = 0; i < Transposed::kCount; ++i) {
        const Vector scaled = multiply_add(column[i], Vector::broadcast(scale[c + i]),
                                           Vector::broadcast(shift[c + i]));
        scaled.store(state + (c + i) * kFlowRows + first);
      }
    }
    for (; c < count; ++c) {
      A lane[Vector::kLanes];
      for (int i = 0; i < Vector::kLanes; ++i) lane[i] = to_accumulation(rows[first + i][c]);
      // The same multiply-add as above: a channel must not tell how many there are.
      const Vector scaled = multiply_add(Vector::load(lane), Vector::broadcast(scale[c]),
                                         Vector::broadcast(shift[c]));
      scaled.store(state + c * kFlowRows + first);
    }
  }
}

template <typename T>
void store_steps(const accumulation_t<T>* state, int64_t count, int64_t num_rows, T* const* rows) {
  using A = accumulation_t<T>;
  using Vector = Simd<A>;
  using Transposed = Columns<A, A>;
  int64_t c = 0;
  for (; c + Vector::kLanes <= count; c += Vector::kLanes) {
    const A* channels[Vector::kLanes];
    for (int i = 0; i < Vector::kLanes; ++i) channels[i] = state + (c + i) * kFlowRows;
    for (int r = 0; r < num_rows; r += Transposed::kCount) {
      Vector row[Transposed::kCount];
      Transposed::load(channels, r, row);
      for (int i = 0; i < Transposed::kCount; ++i) {
        if (r + i < num_rows) row[i].store(rows[r + i] + c);
      }
    }
  }
  for (; c < count; ++c) {
    for (int r = 0; r < num_rows; ++r) {
      rows[r][c] = from_accumulation<T>(state[c * kFlowRows + r]);
    }
  }
}

template <typename A>
void multiply_heads(const A* in, const FlowStep<A>& step, A* out) {
  constexpr int kRows = kVectors * Simd<A>::kLanes;
  for (int64_t h = 0; h < step.heads; ++h) {
    const Head head = head_of(step, h);
    int64_t i = 0;
    for (; i + kOutputs <= step.dim; i += kOutputs) {
      for (int r = 0; r < kFlowRows; r += kRows) {
        multiply_some<A, kOutputs>(in + r, step, head, i, out + r);
      }
    }
    for (; i + 2 <= step.dim; i += 2) {
      for (int r = 0; r < kFlowRows; r += kRows) {
        multiply_some<A, 2>(in + r, step, head, i, out + r);
      }
    }
    for (; i < step.dim; ++i) {
      for (int r = 0; r < kFlowRows; r += kRows) {
        multiply_some<A, 1>(in + r, step, head, i, out + r);
      }
    }
  }
}

template <typename A>
void add_outer_products(const A* grad, const A* in, const FlowStep<A>& step, A* grad_weight) {
  constexpr int64_t kLanes = Simd<A>::kLanes;
  if (step.dim % kLanes == 0) {
    int64_t j = 0;
    for (; j + 2 * kLanes <= step.dim; j += 2 * kLanes) {
      add_columns<A, 2>(grad, in, step, j, grad_weight);
    }
    if (j < step.dim) add_columns<A, 1>(grad, in, step, j, grad_weight);
    return;
  }
  for (int64_t i = 0; i < step.dim; ++i) {
    int64_t j = 0;
    for (; j + 4 <= step.dim; j += 4) add_elements<A, 4>(grad, in, step, i, j, grad_weight);
    for (; j < step.dim; ++j) add_elements<A, 1>(grad, in, step, i, j, grad_weight);
  }
}

template <typename A>
void scale_gradient(const A* state, const A* scale, const A* centre, A* grad, int64_t channels,
                    A* sum, A* moment) {
  using Vector = Simd<A>;
  for (int64_t c = 0; c < channels; ++c) {
    const Vector middle = Vector::broadcast(centre[c]);
    const Vector factor = Vector::broadcast(scale[c]);
    Vector channel_sum = Vector::broadcast(0);
    Vector channel_moment = channel_sum;
    for (int v = 0; v < kFlowRows; v += Vector::kLanes) {
      const Vector g = Vector::load(grad + c * kFlowRows + v);
      const Vector deviation = sub(Vector::load(state + c * kFlowRows + v), middle);
      channel_sum = add(channel_sum, g);
      channel_moment = multiply_add(g, deviation, channel_moment);
      mul(g, factor).store(grad + c * kFlowRows + v);
    }
    sum[c] += reduce_add(channel_sum);
    moment[c] += reduce_add(channel_moment);
  }
}

}  // namespace pynar::PYNAR_ISA
