#include "losses/divergence_cross_entropy_backward.h"

#include "common/cpu.h"

namespace pynar {

PYNAR_DECLARE_KERNEL(template <typename T>
                     void gradient_row(const DivergenceBackwardParams<T>& p, int64_t row))

}  // namespace pynar

#ifdef PYNAR_ISA

#include "losses/row_blocks.h"

namespace pynar::PYNAR_ISA {
namespace {

template <typename A>
struct Math {
  using Number = A;
  static A exp(A x) { return static_cast<A>(__builtin_exp(x)); }
};

template <typename A>
using AllHeads = DivergenceGradient<Math<A>, kMaxHeads>;

template <typename A, int kHeads>
using Gradient = DivergenceGradient<Math<A>, kHeads>;

// The gradients of a block, as if no symbol were the target. False if a result is not finite: that
// of a symbol whose logits are -inf has to be found otherwise.
template <Precision kPrecision, int kHeads, typename T>
bool write_vectors(const Gradient<accumulation_t<T>, kHeads>& row, const T* const (&logits)[kHeads],
                   int64_t size, T* const (&grads)[kHeads]) {
  using A = accumulation_t<T>;
  using Vector = Simd<A>;
  const Vector log2e = Vector::broadcast(kLog2E<A>);
  Vector check[kHeads];
  for (int h = 0; h < kHeads; ++h) check[h] = Vector::broadcast(0);
  for (int64_t v = 0; v < size; v += Vector::kLanes) {
    Vector log_prob[kHeads];
    Vector prob[kHeads];
    Vector factor[kHeads];
    Vector rest[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      const Vector x = Vector::load(logits[h] + v);
      log_prob[h] = sub(sub(x, Vector::broadcast(row.max[h])), Vector::broadcast(row.log_sum[h]));
      prob[h] = exp2<kPrecision>(mul(log_prob[h], log2e));
      factor[h] = Vector::broadcast(row.scale[h]);
      rest[h] = Vector::broadcast(row.smooth[h]);
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int g = h + 1; g < kHeads; ++g) {
        const Vector w = Vector::broadcast(row.weight[h][g]);
        const Vector minus_w = Vector::broadcast(-row.weight[h][g]);
        const Vector difference = sub(log_prob[h], log_prob[g]);
        factor[h] = multiply_add(w, difference, factor[h]);
        factor[g] = multiply_add(minus_w, difference, factor[g]);
        rest[h] = multiply_add(w, prob[g], rest[h]);
        rest[g] = multiply_add(w, prob[h], rest[g]);
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      const Vector grad = sub(mul(prob[h], factor[h]), rest[h]);
      check[h] = add(check[h], grad);
      grad.store(grads[h] + v);
    }
  }
  bool finite = true;
  for (int h = 0; h < kHeads; ++h) {
    const A sum = reduce_add(check[h]);
    finite = finite && sum - sum == 0;
  }
  return finite;
}

// The same for all element types: symbols one by one.
template <typename A, int kHeads>
[[gnu::noinline]] void gradients_of_symbols(const Gradient<A, kHeads>& row, int64_t begin,
                                            int64_t end, int64_t target,
                                            A (&logits_to_grads)[kHeads][kRowBlock]) {
  for (int64_t v = begin; v < end; ++v) {
    A x[kHeads];
    A grad[kHeads];
    for (int h = 0; h < kHeads; ++h) x[h] = logits_to_grads[h][v];
    row.at(x, v == target, grad);
    for (int h = 0; h < kHeads; ++h) logits_to_grads[h][v] = grad[h];
  }
}

template <int kHeads, typename T>
[[gnu::noinline]] void write_symbols(const Gradient<accumulation_t<T>, kHeads>& row,
                                     const T* const (&logits)[kHeads], int64_t begin, int64_t end,
                                     int64_t target, T* const (&grads)[kHeads]) {
  accumulation_t<T> symbols[kHeads][kRowBlock];
  widen(logits, begin, end, symbols);
  gradients_of_symbols<accumulation_t<T>, kHeads>(row, begin, end, target, symbols);
  for (int h = 0; h < kHeads; ++h) {
    for (int64_t v = begin; v < end; ++v) grads[h][v] = from_accumulation<T>(symbols[h][v]);
  }
}

// What a row's gradients need, the same for all element types.
template <typename A>
struct RowPlan {
  AllHeads<A> all;
  // A head that is not regular itself is taken along where a pair needs it.
  int taken[kMaxHeads] = {};
  int count = 0;
  bool paired = false;

  [[gnu::noinline]] RowPlan(const DivergenceFactors<A>& p, int64_t row) {
    all.load(p, 0, row);
    for (int h = 0; h < p.heads; ++h) {
      bool needed = false;
      for (int g = 0; g < kMaxHeads; ++g) needed = needed || all.weight[h][g] != 0;
      paired = paired || needed;
      if (needed || all.kind[h] == GradientKind::kRegular) taken[count++] = h;
    }
  }

  template <int kHeads>
  [[gnu::noinline]] Gradient<A, kHeads> gradient(const int* heads) const {
    Gradient<A, kHeads> some;
    for (int h = 0; h < kHeads; ++h) {
      const int from = heads[h];
      some.max[h] = all.max[from];
      some.log_sum[h] = all.log_sum[from];
      some.scale[h] = all.scale[from];
      some.smooth[h] = all.smooth[from];
      some.hit[h] = all.hit[from];
      some.kind[h] = all.kind[from];
      for (int g = 0; g < kHeads; ++g) some.weight[h][g] = all.weight[from][heads[g]];
    }
    return some;
  }
};

// The gradients of kHeads of a row's heads.
template <int kHeads, typename T>
void write_row(const DivergenceBackwardParams<T>& p, const RowPlan<accumulation_t<T>>& plan,
               const int* heads, int64_t row) {
  using A = accumulation_t<T>;
  constexpr Precision kPrecision = sizeof(T) == 2 ? Precision::kShort : Precision::kFull;
  const Gradient<A, kHeads> gradient = plan.template gradient<kHeads>(heads);
  const int64_t target = p.targets[row * p.targets_stride];
  for (int64_t v = 0; v < p.vocabulary; v += kRowBlock) {
    const int64_t size = p.vocabulary - v < kRowBlock ? p.vocabulary - v : kRowBlock;
    const int64_t vectors = size / Simd<A>::kLanes * Simd<A>::kLanes;
    const T* logits[kHeads];
    T* grads[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      logits[h] = p.logits[heads[h]] + row * p.logits_stride[heads[h]] + v;
      grads[h] = p.grads[heads[h]] + row * p.grads_stride[heads[h]] + v;
    }
    const bool finite = write_vectors<kPrecision, kHeads>(gradient, logits, vectors, grads);
    if (!finite || vectors < size) [[unlikely]]
      write_symbols<kHeads>(gradient, logits, finite ? vectors : 0, size, target - v, grads);
    if (target >= v && target < v + vectors) {
      write_symbols<kHeads>(gradient, logits, target - v, target - v + 1, target - v, grads);
    }
  }
}

}  // namespace

template <typename T>
void gradient_row(const DivergenceBackwardParams<T>& p, int64_t row) {
  using A = accumulation_t<T>;
  const RowPlan<A> plan(p, row);
  if (!plan.paired) {
    for (int i = 0; i < plan.count; ++i) write_row<1>(p, plan, plan.taken + i, row);
  } else if (plan.count == 2) {
    write_row<2>(p, plan, plan.taken, row);
  } else if (plan.count == 3) {
    write_row<3>(p, plan, plan.taken, row);
  } else {
    write_row<4>(p, plan, plan.taken, row);
  }
  for (int h = 0; h < p.heads; ++h) {
    if (plan.all.kind[h] == GradientKind::kRegular) continue;
    const bool zero = plan.all.kind[h] == GradientKind::kZero;
    const T value = from_accumulation<T>(zero ? A(0) : static_cast<A>(__builtin_nanf("")));
    T* grad = p.grads[h] + row * p.grads_stride[h];
    for (int64_t v = 0; v < p.vocabulary; ++v) grad[v] = value;
  }
}

template void gradient_row(const DivergenceBackwardParams<float>&, int64_t);
template void gradient_row(const DivergenceBackwardParams<BFloat16>&, int64_t);
template void gradient_row(const DivergenceBackwardParams<Half>&, int64_t);
#ifdef PYNAR_FLOAT64
template void gradient_row(const DivergenceBackwardParams<double>&, int64_t);
#endif

}  // namespace pynar::PYNAR_ISA

#else

#include <optional>
#include <vector>

#include "common/parallel.h"
#include "losses/divergence_arguments.h"
#ifdef PYNAR_WITH_CUDA
#include "common/cuda_launch.h"
#endif

namespace pynar {
namespace {

constexpr const char* kName = "divergence_cross_entropy_backward";

template <typename T>
void divergence_cross_entropy_backward_cpu(const DivergenceBackwardParams<T>& p) {
  const auto gradient_row = PYNAR_SELECT_KERNEL_OF(T, gradient_row<T>);
  parallel_for(p.rows, divergence_grain(p.vocabulary, p.heads), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) gradient_row(p, row);
  });
}

void check_grads(const Check& check, const std::vector<Tensor>& grads,
                 const std::vector<Tensor>& logits) {
  if (grads.size() != logits.size()) {
    check.fail("grads", "have " + std::to_string(logits.size()) + " heads",
               std::to_string(grads.size()));
  }
  for (const Tensor& grad : grads) {
    check.shape("grads", grad, {logits[0].size(0), logits[0].size(1)}, "that of `logits[0]`");
    check.dtype("grads", grad, {logits[0].dtype()});
    check.device("grads", grad, "logits[0]", logits[0]);
    check.contiguous("grads", grad);
    check.writable("grads", grad);
  }
}

}  // namespace

std::optional<LaunchPlan> divergence_cross_entropy_backward(
    const Tensor& grad_cross_entropy, const Tensor& grad_divergence,
    const std::vector<Tensor>& logits, const Tensor& targets, const Tensor& statistics,
    const std::vector<int64_t>& pairs, double label_smoothing, const std::vector<Tensor>& grads) {
  const Check check(kName);
  check_divergence(check, logits, targets, pairs, label_smoothing);
  const auto heads = static_cast<int64_t>(logits.size());
  const auto count = static_cast<int64_t>(pairs.size() / 2);
  check_by_row(check, "grad_cross_entropy", grad_cross_entropy, heads, logits[0]);
  check_by_row(check, "grad_divergence", grad_divergence, count, logits[0]);
  check_by_row(check, "statistics", statistics, 2 * heads + 2 * count, logits[0]);
  check.contiguous("statistics", statistics);
  check_grads(check, grads, logits);
  if (logits[0].size(0) == 0) return std::nullopt;

  return dispatch_floating(logits[0].dtype(), [&]<typename T>() -> std::optional<LaunchPlan> {
    using A = accumulation_t<T>;
    DivergenceBackwardParams<T> params{};
    set_divergence(params, logits, targets, pairs, label_smoothing);
    for (size_t h = 0; h < grads.size(); ++h) {
      params.grads[h] = grads[h].data<T>();
      params.grads_stride[h] = grads[h].stride(0);
    }
    params.cross_entropy = grad_cross_entropy.data<A>();
    params.cross_entropy_stride_h = grad_cross_entropy.stride(0);
    params.cross_entropy_stride_n = grad_cross_entropy.stride(1);
    params.divergence = grad_divergence.data<A>();
    params.divergence_stride_p = grad_divergence.stride(0);
    params.divergence_stride_n = grad_divergence.stride(1);
    params.statistics = statistics.data<A>();
    params.aligned = heads_aligned(logits) && heads_aligned(grads);
    if (logits[0].device().type == dlpack::kCpu) {
      divergence_cross_entropy_backward_cpu(params);
      return std::nullopt;
    }
#ifdef PYNAR_WITH_CUDA
    if (!use_nvrtc()) {
      const DeviceGuard guard(logits[0].device().index);
      divergence_cross_entropy_backward_cuda(params, logits[0].stream());
      return std::nullopt;
    }
#endif
    const int64_t group = divergence_group(heads, count);
    LaunchPlan plan("losses/divergence_cross_entropy_backward.cuh", params, logits[0]);
    plan.add<T>("divergence_cross_entropy_gradient", group, kDivergenceThreads,
                params.rows * (heads / group));
    return plan;
  });
}

}  // namespace pynar

#endif
