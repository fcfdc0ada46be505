#include "flow/flow_linear.h"

#include "common/cpu.h"
#include "flow/flow_step.h"

namespace pynar {

PYNAR_DECLARE_KERNEL(template <typename T>
                     void scale_row(const T* x, const accumulation_t<T>* scale,
                                    const accumulation_t<T>* shift, T* y, int64_t count))
PYNAR_DECLARE_KERNEL(template <typename T> void scale_row_backward(
    const T* grad_y, const T* x, const accumulation_t<T>* scale, const accumulation_t<T>* centre,
    T* grad_x, accumulation_t<T>* sum, accumulation_t<T>* moment, int64_t count))
PYNAR_DECLARE_KERNEL(template <typename T> void load_steps(const T* const* rows, int64_t count,
                                                           const accumulation_t<T>* scale,
                                                           const accumulation_t<T>* shift,
                                                           accumulation_t<T>* state))
PYNAR_DECLARE_KERNEL(template <typename T> void store_steps(const accumulation_t<T>* state,
                                                            int64_t count, int64_t num_rows,
                                                            T* const* rows))
PYNAR_DECLARE_KERNEL(template <typename A>
                     void multiply_heads(const A* in, const FlowStep<A>& step, A* out))
PYNAR_DECLARE_KERNEL(template <typename A> bool takes_rows(const FlowStep<A>& step))
PYNAR_DECLARE_KERNEL(template <typename T> void multiply_rows(
    const T* const* x, int64_t count, const accumulation_t<T>* scale,
    const accumulation_t<T>* shift, const FlowStep<accumulation_t<T>>& step,
    accumulation_t<T>* scratch, T* const* y))
PYNAR_DECLARE_KERNEL(template <typename A> void add_outer_products(const A* grad, const A* in,
                                                                   const FlowStep<A>& step,
                                                                   A* grad_weight))
PYNAR_DECLARE_KERNEL(template <typename A>
                     void add_row_products(const A* const* grad, const A* const* in, int64_t count,
                                           const FlowStep<A>& step, A* scratch, A* grad_weight))
PYNAR_DECLARE_KERNEL(template <typename A> void scale_gradient(const A* state, const A* scale,
                                                               const A* centre, A* grad,
                                                               int64_t channels, A* sum, A* moment))

}  // namespace pynar

#ifdef PYNAR_ISA

#include "flow/flow_linear_simd.h"
#include "flow/head_rows.h"

namespace pynar::PYNAR_ISA {

#define PYNAR_FLOW_BY_STORAGE(T, A)                                                              \
  template void scale_row(const T*, const A*, const A*, T*, int64_t);                            \
  template void scale_row_backward(const T*, const T*, const A*, const A*, T*, A*, A*, int64_t); \
  template void load_steps(const T* const*, int64_t, const A*, const A*, A*);                    \
  template void store_steps(const A*, int64_t, int64_t, T* const*);                              \
  template void multiply_rows(const T* const*, int64_t, const A*, const A*, const FlowStep<A>&,  \
                              A*, T* const*);
#define PYNAR_FLOW_BY_ACCUMULATION(A)                                                           \
  template void multiply_heads(const A*, const FlowStep<A>&, A*);                               \
  template bool takes_rows(const FlowStep<A>&);                                                 \
  template void add_row_products(const A* const*, const A* const*, int64_t, const FlowStep<A>&, \
                                 A*, A*);                                                       \
  template void add_outer_products(const A*, const A*, const FlowStep<A>&, A*);                 \
  template void scale_gradient(const A*, const A*, const A*, A*, int64_t, A*, A*);

PYNAR_FLOW_BY_STORAGE(float, float)
PYNAR_FLOW_BY_STORAGE(BFloat16, float)
PYNAR_FLOW_BY_STORAGE(Half, float)
PYNAR_FLOW_BY_ACCUMULATION(float)
#if !defined(__AVX2__)
// float64 checks gradients; nobody waits for it.
PYNAR_FLOW_BY_STORAGE(double, double)
PYNAR_FLOW_BY_ACCUMULATION(double)
#endif

}  // namespace pynar::PYNAR_ISA

#else

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "flow/flow_arguments.h"

namespace pynar {
namespace {

struct Place {
  int64_t b, t;
};

// The steps that are no padding.
template <typename T>
std::vector<Place> live_steps(const FlowLinearParams<T>& p) {
  int64_t total = 0;
  for (int64_t b = 0; b < p.batch; ++b) total += p.length(b);
  std::vector<Place> places(total);
  Place* place = places.data();
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = p.length(b);
    for (int64_t t = 0; t < length; ++t) *place++ = {b, t};
  }
  return places;
}

// After the other steps: what is beyond the end of a joined one may have been written with it.
template <typename T, typename U>
void zero_padding(const FlowLinearParams<T>& p, const FlowRows<U>& rows) {
  const int64_t squeezed = flow_joined_steps(p.steps, rows.factor);
  for (int64_t b = 0; b < p.batch; ++b) {
    if (rows.pieces > 1) {
      const int64_t width = rows.kept / rows.pieces;
      for (int64_t i = p.lengths[b * p.lengths_stride]; i < p.steps * rows.pieces; ++i) {
        std::fill_n(rows.at(b, i / rows.pieces, i % rows.pieces * width), width, U{});
      }
      continue;
    }
    const int64_t length = p.length(b);
    for (int64_t t = length; t < squeezed; ++t) std::fill_n(rows.kept_of(b, t), rows.kept, U{});
    for (int64_t t = length; t < p.steps; ++t) {
      std::fill_n(rows.dropped_of(b, t), p.channels - rows.kept, U{});
    }
  }
}

// Channels of a step that lie next to each other.
struct Channels {
  int64_t first, count;
};

template <typename U>
std::vector<Channels> parts_of(const FlowRows<U>& rows, int64_t channels) {
  std::vector<Channels> parts;
  const int64_t width = rows.kept / rows.pieces;
  for (int64_t first = 0; first < rows.kept; first += width) parts.push_back({first, width});
  if (rows.kept < channels) parts.push_back({rows.kept, channels - rows.kept});
  return parts;
}

// The scale and shift of every place, [K + 2, C] each; the last row scales by one and shifts by
// nothing. The centre is what to subtract from a state for the gradient of the scale.
template <typename T>
struct Coefficients {
  using A = accumulation_t<T>;
  std::vector<A> scale, shift, centre;
  int64_t channels;
  int64_t identity;

  explicit Coefficients(const FlowLinearParams<T>& p)
      : scale((p.matrices + 2) * p.channels, A(1)),
        shift((p.matrices + 2) * p.channels, A(0)),
        centre((p.matrices + 2) * p.channels, A(0)),
        channels(p.channels),
        identity((p.matrices + 1) * p.channels) {
    for (int64_t place = 0; place <= p.matrices; ++place) {
      const int64_t k = p.normed(place);
      if (k < 0) continue;
      for (int64_t c = 0; c < channels; ++c) {
        const A s = p.log_scale[k * channels + c];
        const A b = p.bias[k * channels + c];
        const A factor = std::exp(p.inverse ? -s : s);
        scale[place * channels + c] = factor;
        shift[place * channels + c] = p.inverse ? -b * factor : b;
        // Forward, what comes out is a state: x e^s = y - b. Backward it is -(x - b) e^-s itself.
        centre[place * channels + c] = p.inverse ? A(0) : b;
      }
    }
  }
};

// Everything about a block of steps, and where it is.
template <typename T>
class Block {
 public:
  using A = accumulation_t<T>;

  explicit Block(const FlowLinearParams<T>& p) : p_(p), zeros_(p.channels, T{}) {}

  void load(const FlowRows<const T>& from, const Place* places, int64_t count, const A* scale,
            const A* shift, A* state) const {
    const auto load_steps = PYNAR_SELECT_FLOW_KERNEL(load_steps<T>);
    for (const auto [first, width] : parts_of(from, p_.channels)) {
      const T* rows[kFlowRows];
      for (int64_t r = 0; r < kFlowRows; ++r) {
        const bool holds = r < count && p_.holds(from, places[r].b, places[r].t, first);
        rows[r] = holds ? from.at(places[r].b, places[r].t, first) : zeros_.data();
      }
      load_steps(rows, width, scale + first, shift + first, state + first * kFlowRows);
    }
  }

  void store(const A* state, const Place* places, int64_t count, const FlowRows<T>& to) const {
    const auto store_steps = PYNAR_SELECT_FLOW_KERNEL(store_steps<T>);
    for (const auto [first, width] : parts_of(to, p_.channels)) {
      T* rows[kFlowRows];
      for (int64_t r = 0; r < count; ++r) rows[r] = to.at(places[r].b, places[r].t, first);
      store_steps(state + first * kFlowRows, width, count, rows);
    }
  }

  // Matrix number i in order of application, with what follows it.
  FlowStep<A> step(int64_t i, const Coefficients<T>& c) const {
    const int64_t k = p_.applied(i);
    return {p_.weight + k * p_.dim * p_.dim,
            p_.dim,
            1,
            p_.dim,
            p_.channels / p_.dim,
            p_.strided(k),
            &c.scale[(i + 1) * p_.channels],
            &c.shift[(i + 1) * p_.channels]};
  }

  // The same matrix transposed, with nothing after it.
  FlowStep<A> transposed(int64_t i, const Coefficients<T>& c) const {
    FlowStep<A> step = this->step(i, c);
    std::swap(step.row_stride, step.column_stride);
    step.scale = &c.scale[c.identity];
    step.shift = &c.shift[c.identity];
    return step;
  }

 private:
  const FlowLinearParams<T>& p_;
  std::vector<T> zeros_;
};

// For a piece of some ten microseconds.
template <typename T>
int64_t flow_grain(const FlowLinearParams<T>& p, int64_t rows) {
  const int64_t work = rows * p.channels * (4 + p.matrices * p.dim / 8);
  return 1 + (int64_t{1} << 15) / work;
}

template <typename T>
void copy_steps(const FlowLinearParams<T>& p, const std::vector<Place>& places) {
  using A = accumulation_t<T>;
  const auto scale_row = PYNAR_SELECT_FLOW_KERNEL(scale_row<T>);
  const Coefficients<T> coefficients(p);
  const A* scale = coefficients.scale.data();
  const A* shift = coefficients.shift.data();
  const std::vector<T> zeros(p.channels, T{});
  const auto one = [&](const T* x, int64_t first, int64_t count, T* y) {
    if (p.log_scale == nullptr) {
      std::copy_n(x, count, y);
    } else {
      scale_row(x, scale + first, shift + first, y, count);
    }
  };
  // One side may be squeezed, or in pieces; the other one has it all together.
  const bool by_x = p.x.pieces > 1 || p.x.kept < p.channels;
  const std::vector<Channels> parts = by_x ? parts_of(p.x, p.channels) : parts_of(p.y, p.channels);
  const int64_t n = static_cast<int64_t>(places.size());
  parallel_for(n, flow_grain(p, 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [b, t] = places[i];
      for (const auto [c, count] : parts) {
        const T* x = p.holds(p.x, b, t, c) ? p.x.at(b, t, c) : zeros.data();
        one(x, c, count, p.y.at(b, t, c));
      }
    }
  });
}

// One matrix, unless vectors do not fit its heads.
template <typename T>
bool multiply_steps(const FlowLinearParams<T>& p, const std::vector<Place>& places,
                    const Coefficients<T>& coefficients, const Block<T>& block) {
  using A = accumulation_t<T>;
  if (p.joined > 1) return false;
  FlowStep<A> step = block.step(0, coefficients);
  const auto takes_rows = PYNAR_SELECT_FLOW_KERNEL(takes_rows<A>);
  if (!takes_rows(step)) return false;
  const auto multiply_rows = PYNAR_SELECT_FLOW_KERNEL(multiply_rows<T>);
  std::vector<A> transposed;
  if (!step.strided) {
    transposed.resize(p.dim * p.dim);
    for (int64_t i = 0; i < p.dim; ++i) {
      for (int64_t j = 0; j < p.dim; ++j) transposed[j * p.dim + i] = step.weight[i * p.dim + j];
    }
    step.weight = transposed.data();
    std::swap(step.row_stride, step.column_stride);
  }
  const A* scale = p.normed(0) >= 0 ? coefficients.scale.data() : nullptr;
  const int64_t n = static_cast<int64_t>(places.size());
  const int64_t groups = (n + kRowsTogether - 1) / kRowsTogether;
  parallel_for(groups, flow_grain(p, kRowsTogether), [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    A* rows = scratch.get<A>(kRowsTogether * p.channels);
    for (int64_t i = begin * kRowsTogether; i < std::min(n, end * kRowsTogether);
         i += kRowsTogether) {
      const int64_t count = std::min(kRowsTogether, n - i);
      const T* x[kRowsTogether];
      T* y[kRowsTogether];
      for (int64_t r = 0; r < count; ++r) {
        const auto [b, t] = places[i + r];
        x[r] = p.x.kept_of(b, t);
        y[r] = p.y.kept_of(b, t);
      }
      multiply_rows(x, count, scale, coefficients.shift.data(), step, rows, y);
    }
  });
  return true;
}

// The sums that the gradients of parameters are made of.
template <typename A>
struct FlowSums {
  A* weight;  // [K, d, d]
  A* sum;     // [K + 1, C], by place: of the gradients of what comes out there
  A* moment;  // [K + 1, C], by place: of these times the state less the centre

  FlowSums(A* memory, int64_t matrices, int64_t dim, int64_t channels)
      : weight(memory),
        sum(weight + matrices * dim * dim),
        moment(sum + (matrices + 1) * channels) {}
};

template <typename T>
void scale_steps_backward(const FlowLinearBackwardParams<T>& params, const Place* places,
                          int64_t count, const Coefficients<T>& coefficients,
                          const FlowSums<accumulation_t<T>>& sums) {
  const FlowLinearParams<T>& p = params.forward;
  const auto scale_row_backward = PYNAR_SELECT_FLOW_KERNEL(scale_row_backward<T>);
  // Here the states are those that go in.
  std::vector<accumulation_t<T>> centre(p.channels, 0);
  if (p.inverse && p.log_scale != nullptr) std::copy_n(p.bias, p.channels, centre.begin());
  const std::vector<T> zeros(p.channels, T{});
  const std::vector<Channels> parts = parts_of(p.inverse ? params.grad_y : p.x, p.channels);
  for (int64_t i = 0; i < count; ++i) {
    const auto [b, t] = places[i];
    for (const auto [first, width] : parts) {
      const auto read = [&, b = b, t = t, first = first](const FlowRows<const T>& rows) {
        return p.holds(rows, b, t, first) ? rows.at(b, t, first) : zeros.data();
      };
      scale_row_backward(read(params.grad_y), read(p.x), &coefficients.scale[first], &centre[first],
                         params.grad_x.at(b, t, first), sums.sum + first, sums.moment + first,
                         width);
    }
  }
}

template <typename T>
void chain_backward(const FlowLinearBackwardParams<T>& params, const Place* places, int64_t count,
                    const Coefficients<T>& coefficients, const Block<T>& block,
                    const FlowSums<accumulation_t<T>>& sums) {
  using A = accumulation_t<T>;
  const FlowLinearParams<T>& p = params.forward;
  const auto multiply_heads = PYNAR_SELECT_FLOW_KERNEL(multiply_heads<A>);
  const auto add_outer_products = PYNAR_SELECT_FLOW_KERNEL(add_outer_products<A>);
  const auto scale_gradient = PYNAR_SELECT_FLOW_KERNEL(scale_gradient<A>);
  thread_local Scratch scratch;
  const int64_t size = p.channels * kFlowRows;
  A* states = scratch.get<A>((p.matrices + 3) * size);
  A* grad = states + (p.matrices + 1) * size;
  A* other = grad + size;
  const A* ones = &coefficients.scale[coefficients.identity];
  const A* zeros = &coefficients.shift[coefficients.identity];
  // What comes out of the last matrix is needed where it is scaled afterwards.
  const int64_t products = p.normed(p.matrices) >= 0 ? p.matrices : p.matrices - 1;

  for (int64_t i = 0; i < count; i += kFlowRows) {
    const int64_t rows = std::min<int64_t>(kFlowRows, count - i);
    block.load(p.x, places + i, rows, coefficients.scale.data(), coefficients.shift.data(), states);
    for (int64_t k = 0; k < products; ++k) {
      multiply_heads(states + k * size, block.step(k, coefficients), states + (k + 1) * size);
    }
    block.load(params.grad_y, places + i, rows, ones, zeros, grad);
    for (int64_t place = p.matrices; place >= 0; --place) {
      if (p.normed(place) >= 0) {
        scale_gradient(states + place * size, &coefficients.scale[place * p.channels],
                       &coefficients.centre[place * p.channels], grad, p.channels,
                       sums.sum + place * p.channels, sums.moment + place * p.channels);
      }
      if (place == 0) break;
      const int64_t k = place - 1;
      const FlowStep<A> step = block.transposed(k, coefficients);
      add_outer_products(grad, states + k * size, step, sums.weight + p.applied(k) * p.dim * p.dim);
      multiply_heads(grad, step, other);
      std::swap(grad, other);
    }
    block.store(grad, places + i, rows, params.grad_x);
  }
}

// One matrix that takes rows, and nothing after it.
template <typename A>
void rows_backward(const FlowLinearBackwardParams<A>& params, const Place* places, int64_t count,
                   const Coefficients<A>& coefficients, const FlowStep<A>& step,
                   const FlowSums<A>& sums) {
  using T = A;
  const FlowLinearParams<A>& p = params.forward;
  const auto scale_row = PYNAR_SELECT_FLOW_KERNEL(scale_row<T>);
  const auto scale_row_backward = PYNAR_SELECT_FLOW_KERNEL(scale_row_backward<T>);
  const auto multiply_rows = PYNAR_SELECT_FLOW_KERNEL(multiply_rows<T>);
  const auto add_row_products = PYNAR_SELECT_FLOW_KERNEL(add_row_products<A>);
  thread_local Scratch scratch;
  A* states = scratch.get<A>(2 * kRowsTogether * p.channels);
  A* gathered = states + kRowsTogether * p.channels;
  const A* scale = coefficients.scale.data();
  const A* centre = coefficients.centre.data();
  const bool normed = p.normed(0) >= 0;
  for (int64_t i = 0; i < count; i += kRowsTogether) {
    const int64_t rows = std::min(kRowsTogether, count - i);
    const A* x[kRowsTogether];
    const A* grad_y[kRowsTogether];
    A* grad_x[kRowsTogether];
    for (int64_t r = 0; r < rows; ++r) {
      const auto [b, t] = places[i + r];
      x[r] = p.x.kept_of(b, t);
      grad_y[r] = params.grad_y.kept_of(b, t);
      grad_x[r] = params.grad_x.kept_of(b, t);
      if (!normed) continue;
      A* state = states + r * p.channels;
      scale_row(x[r], scale, coefficients.shift.data(), state, p.channels);
      x[r] = state;
    }
    add_row_products(grad_y, x, rows, step, gathered, sums.weight);
    multiply_rows(grad_y, rows, nullptr, nullptr, step, nullptr, grad_x);
    for (int64_t r = 0; normed && r < rows; ++r) {
      scale_row_backward(grad_x[r], x[r], scale, centre, grad_x[r], sums.sum, sums.moment,
                         p.channels);
    }
  }
}

// From the sums of all parts, in order.
template <typename T>
void finish_gradients(const FlowLinearBackwardParams<T>& params,
                      const Coefficients<T>& coefficients,
                      const FlowSums<accumulation_t<T>>& sums) {
  using A = accumulation_t<T>;
  const FlowLinearParams<T>& p = params.forward;
  std::copy_n(sums.weight, p.matrices * p.dim * p.dim, params.grad_weight);
  for (int64_t place = 0; place <= p.matrices; ++place) {
    const int64_t k = p.normed(place);
    if (k < 0) continue;
    for (int64_t c = 0; c < p.channels; ++c) {
      const A scale = coefficients.scale[place * p.channels + c];
      const A sum = sums.sum[place * p.channels + c];
      A moment = sums.moment[place * p.channels + c];
      if (p.matrices == 0) moment *= scale;
      params.grad_bias[k * p.channels + c] = p.inverse ? -sum * scale : sum;
      params.grad_log_scale[k * p.channels + c] = p.inverse ? -moment : moment;
    }
  }
}

template <typename T>
void run_steps(const FlowLinearParams<T>& p, const std::vector<Place>& places) {
  using A = accumulation_t<T>;
  if (p.matrices == 0) return copy_steps(p, places);

  const auto multiply_heads = PYNAR_SELECT_FLOW_KERNEL(multiply_heads<A>);
  const Coefficients<T> coefficients(p);
  const Block<T> block(p);
  if (p.matrices == 1 && multiply_steps(p, places, coefficients, block)) return;
  const int64_t n = static_cast<int64_t>(places.size());
  const int64_t blocks = (n + kFlowRows - 1) / kFlowRows;
  parallel_for(blocks, flow_grain(p, kFlowRows), [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    const int64_t size = p.channels * kFlowRows;
    A* in = scratch.get<A>(2 * size);
    A* out = in + size;
    for (int64_t i = begin * kFlowRows; i < std::min(n, end * kFlowRows); i += kFlowRows) {
      const int64_t count = std::min<int64_t>(kFlowRows, n - i);
      block.load(p.x, &places[i], count, coefficients.scale.data(), coefficients.shift.data(), in);
      for (int64_t k = 0; k < p.matrices; ++k) {
        multiply_heads(in, block.step(k, coefficients), out);
        std::swap(in, out);
      }
      block.store(in, &places[i], count, p.y);
    }
  });
}

}  // namespace

template <typename T>
void flow_linear_cpu(const FlowLinearParams<T>& p) {
  run_steps(p, live_steps(p));
  zero_padding(p, p.y);
}

template <typename T>
void flow_linear_backward_cpu(const FlowLinearBackwardParams<T>& params) {
  using A = accumulation_t<T>;
  const FlowLinearParams<T>& p = params.forward;
  const std::vector<Place> places = live_steps(p);
  const Coefficients<T> coefficients(p);
  const Block<T> block(p);
  const int64_t n = static_cast<int64_t>(places.size());
  const int64_t blocks = (n + kFlowRows - 1) / kFlowRows;
  const int64_t chunks = std::clamp<int64_t>(blocks, 1, kFlowChunks);
  const int64_t size = flow_sums(p.matrices, p.dim, p.channels);
  std::vector<A> memory(chunks * size, A(0));
  const bool by_rows = p.matrices == 1 && p.normed(1) < 0 && p.joined == 1 &&
                       PYNAR_SELECT_FLOW_KERNEL(takes_rows<A>)(block.step(0, coefficients));
  const int64_t grain = 1 + flow_grain(p, kFlowRows) * chunks / (blocks + 1);
  parallel_for(chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = blocks * chunk / chunks * kFlowRows;
      const int64_t count = std::min(n, blocks * (chunk + 1) / chunks * kFlowRows) - first;
      const FlowSums<A> sums(&memory[chunk * size], p.matrices, p.dim, p.channels);
      if (p.matrices == 0) {
        scale_steps_backward(params, places.data() + first, count, coefficients, sums);
        continue;
      }
      if constexpr (std::is_same_v<T, A>) {
        if (by_rows) {
          const FlowStep<A> step = block.transposed(0, coefficients);
          rows_backward(params, places.data() + first, count, coefficients, step, sums);
          continue;
        }
      }
      chain_backward(params, places.data() + first, count, coefficients, block, sums);
    }
  });
  parallel_for(size, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      for (int64_t i = begin; i < end; ++i) memory[i] += memory[chunk * size + i];
    }
  });
  finish_gradients(params, coefficients, FlowSums<A>(memory.data(), p.matrices, p.dim, p.channels));
  zero_padding(p, params.grad_x);
}

#define PYNAR_FLOW_LINEAR(T)                                 \
  template void flow_linear_cpu(const FlowLinearParams<T>&); \
  template void flow_linear_backward_cpu(const FlowLinearBackwardParams<T>&);

PYNAR_FLOW_LINEAR(float)
PYNAR_FLOW_LINEAR(double)
PYNAR_FLOW_LINEAR(BFloat16)
PYNAR_FLOW_LINEAR(Half)

}  // namespace pynar

#endif
