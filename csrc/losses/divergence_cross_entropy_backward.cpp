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

// The row of one head.
template <typename A>
struct HeadRow {
  RowReader<A> logits;
  RowWriter<A> grads;
};

// The gradients of kHeads of a row's heads.
template <typename A, Precision kPrecision, int kHeads>
class Row {
 public:
  using Vector = Simd<A>;

  Row(const HeadRow<A>* rows, const AllHeads<A>& all, const int* heads, int64_t vocabulary,
      int64_t target) {
    for (int h = 0; h < kHeads; ++h) {
      const int from = heads[h];
      row_.max[h] = all.max[from];
      row_.log_sum[h] = all.log_sum[from];
      row_.scale[h] = all.scale[from];
      row_.smooth[h] = all.smooth[from];
      row_.hit[h] = all.hit[from];
      row_.kind[h] = all.kind[from];
      for (int g = 0; g < kHeads; ++g) row_.weight[h][g] = all.weight[from][heads[g]];
    }
    A read[kHeads][kRowBlock];
    A written[kHeads][kRowBlock];
    for (int64_t v = 0; v < vocabulary; v += kRowBlock) {
      const int64_t size = vocabulary - v < kRowBlock ? vocabulary - v : kRowBlock;
      for (int h = 0; h < kHeads; ++h) {
        const HeadRow<A>& row = rows[heads[h]];
        x_[h] = row.logits.read(row.logits.row, v, size, read[h]);
        grads_[h] = row.grads.place(row.grads.row, v, written[h]);
      }
      const int64_t vectors = size / Vector::kLanes * Vector::kLanes;
      const bool defined = write_vectors(vectors);
      write_symbols(defined ? vectors : 0, size, target - v);
      if (target >= v && target < v + vectors)
        write_symbols(target - v, target - v + 1, target - v);
      for (int h = 0; h < kHeads; ++h) {
        const RowWriter<A>& grads = rows[heads[h]].grads;
        grads.write(grads.row, v, size, grads_[h]);
      }
    }
  }

 private:
  // As if no symbol were the target. False if a result is not finite: that of a symbol whose logits
  // are -inf has to be found otherwise.
  bool write_vectors(int64_t size) {
    const Vector log2e = Vector::broadcast(kLog2E<A>);
    Vector check[kHeads];
    for (int h = 0; h < kHeads; ++h) check[h] = Vector::broadcast(0);
    for (int64_t v = 0; v < size; v += Vector::kLanes) {
      Vector log_prob[kHeads];
      Vector prob[kHeads];
      Vector factor[kHeads];
      Vector rest[kHeads];
      for (int h = 0; h < kHeads; ++h) {
        const Vector x = Vector::load(x_[h] + v);
        log_prob[h] =
            sub(sub(x, Vector::broadcast(row_.max[h])), Vector::broadcast(row_.log_sum[h]));
        prob[h] = exp2<kPrecision>(mul(log_prob[h], log2e));
        factor[h] = Vector::broadcast(row_.scale[h]);
        rest[h] = Vector::broadcast(row_.smooth[h]);
      }
      for (int h = 0; h < kHeads; ++h) {
        for (int g = h + 1; g < kHeads; ++g) {
          const Vector w = Vector::broadcast(row_.weight[h][g]);
          const Vector minus_w = Vector::broadcast(-row_.weight[h][g]);
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
        grad.store(grads_[h] + v);
      }
    }
    bool finite = true;
    for (int h = 0; h < kHeads; ++h) {
      const A sum = reduce_add(check[h]);
      finite = finite && sum - sum == 0;
    }
    return finite;
  }

  void write_symbols(int64_t begin, int64_t end, int64_t target) {
    for (int64_t v = begin; v < end; ++v) {
      A x[kHeads];
      A grad[kHeads];
      for (int h = 0; h < kHeads; ++h) x[h] = x_[h][v];
      row_.at(x, v == target, grad);
      for (int h = 0; h < kHeads; ++h) grads_[h][v] = grad[h];
    }
  }

  const A* x_[kHeads];  // of a block
  A* grads_[kHeads];
  DivergenceGradient<Math<A>, kHeads> row_;
};

template <typename A, Precision kPrecision>
void write_row(const DivergenceFactors<A>& p, const HeadRow<A>* rows, int64_t target, int64_t row) {
  AllHeads<A> all;
  all.load(p, 0, row);
  // A head that is not regular itself is taken along where a pair needs it.
  int taken[kMaxHeads] = {};
  int count = 0;
  bool paired = false;
  for (int h = 0; h < p.heads; ++h) {
    bool needed = false;
    for (int g = 0; g < kMaxHeads; ++g) needed = needed || all.weight[h][g] != 0;
    paired = paired || needed;
    if (needed || all.kind[h] == GradientKind::kRegular) taken[count++] = h;
  }
  if (!paired) {
    for (int i = 0; i < count; ++i) {
      Row<A, kPrecision, 1>(rows, all, taken + i, p.vocabulary, target);
    }
  } else if (count == 2) {
    Row<A, kPrecision, 2>(rows, all, taken, p.vocabulary, target);
  } else if (count == 3) {
    Row<A, kPrecision, 3>(rows, all, taken, p.vocabulary, target);
  } else {
    Row<A, kPrecision, 4>(rows, all, taken, p.vocabulary, target);
  }
  for (int h = 0; h < p.heads; ++h) {
    if (all.kind[h] == GradientKind::kRegular) continue;
    const bool zero = all.kind[h] == GradientKind::kZero;
    const A value = zero ? A(0) : static_cast<A>(__builtin_nanf(""));
    const RowWriter<A>& grads = rows[h].grads;
    A buffer[kRowBlock];
    for (int64_t v = 0; v < p.vocabulary; v += kRowBlock) {
      const int64_t size = p.vocabulary - v < kRowBlock ? p.vocabulary - v : kRowBlock;
      A* place = grads.place(grads.row, v, buffer);
      for (int64_t i = 0; i < size; ++i) place[i] = value;
      grads.write(grads.row, v, size, place);
    }
  }
}

}  // namespace

template <typename T>
void gradient_row(const DivergenceBackwardParams<T>& p, int64_t row) {
  using A = accumulation_t<T>;
  constexpr Precision kPrecision = sizeof(T) == 2 ? Precision::kShort : Precision::kFull;
  HeadRow<A> rows[kMaxHeads] = {};
  for (int64_t h = 0; h < p.heads; ++h) {
    rows[h] = {row_reader(p.logits[h] + row * p.logits_stride[h]),
               row_writer(p.grads[h] + row * p.grads_stride[h])};
  }
  write_row<A, kPrecision>(p, rows, p.targets[row * p.targets_stride], row);
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
