#include "losses/divergence_cross_entropy.h"

#include "common/cpu.h"

namespace pynar {

// Results of one row, of as many heads from `first` on as are taken at a time.
PYNAR_DECLARE_KERNEL(template <typename T>
                     void divergence_row(const DivergenceParams<T>& p, int64_t first, int64_t row))

}  // namespace pynar

#ifdef PYNAR_ISA

#include "losses/row_blocks.h"

namespace pynar::PYNAR_ISA {
namespace {

// Blocks are summed up in the accumulation type, and put together in double.
struct Math {
  using Number = double;
  static double exp(double x) { return __builtin_exp(x); }
  static double log(double x) { return __builtin_log(x); }
};

template <typename A, Precision kPrecision, int kHeads>
class Row {
 public:
  using Vector = Simd<A>;

  Row(const RowReader<A>* heads, int64_t vocabulary) {
    A buffer[kHeads][kRowBlock];
    for (int64_t v = 0; v < vocabulary; v += kRowBlock) {
      const int64_t size = vocabulary - v < kRowBlock ? vocabulary - v : kRowBlock;
      const int64_t vectors = size / Vector::kLanes * Vector::kLanes;
      for (int h = 0; h < kHeads; ++h) {
        x_[h] = heads[h].read(heads[h].row, v, size, buffer[h]);
        raise_max(h, size, vectors);
      }
      add_vectors(vectors);
      add_symbols(vectors, size, true);
    }
  }

  void finish(const DivergenceResults<A>& p, int64_t first, int64_t row,
              const A (&target_logit)[kMaxHeads]) const {
    A logit[kHeads];
    for (int h = 0; h < kHeads; ++h) logit[h] = target_logit[h];
    sums_.finish(p, first, row, logit);
  }

 private:
  void raise_max(int h, int64_t size, int64_t vectors) {
    const A* x = x_[h];
    Vector greatest[4];
    for (int i = 0; i < 4; ++i) greatest[i] = Vector::broadcast(static_cast<A>(sums_.lowest()));
    int64_t v = 0;
    for (; v + 4 * Vector::kLanes <= vectors; v += 4 * Vector::kLanes) {
      for (int i = 0; i < 4; ++i) {
        greatest[i] = max(Vector::load(x + v + i * Vector::kLanes), greatest[i]);
      }
    }
    for (; v < vectors; v += Vector::kLanes) greatest[0] = max(Vector::load(x + v), greatest[0]);
    double to = reduce_max(max(max(greatest[0], greatest[1]), max(greatest[2], greatest[3])));
    for (; v < size; ++v) to = x[v] > to ? x[v] : to;
    if (to > sums_.max[h]) sums_.raise_max(h, to);
  }

  void add_vectors(int64_t size) {
    const Vector log2e = Vector::broadcast(kLog2E<A>);
    Vector shift[kHeads];
    Vector sum[kHeads];
    Vector total[kHeads];
    Vector moment[kHeads][kHeads];
    for (int h = 0; h < kHeads; ++h) {
      shift[h] = Vector::broadcast(static_cast<A>(sums_.shift(h)));
      sum[h] = total[h] = Vector::broadcast(0);
      for (int g = 0; g < kHeads; ++g) moment[h][g] = Vector::broadcast(0);
    }
    for (int64_t v = 0; v < size; v += Vector::kLanes) {
      Vector d[kHeads];
      Vector e[kHeads];
      for (int h = 0; h < kHeads; ++h) {
        const Vector x = Vector::load(x_[h] + v);
        total[h] = add(total[h], x);
        d[h] = sub(x, shift[h]);
        e[h] = exp2<kPrecision>(mul(d[h], log2e));
        sum[h] = add(sum[h], e[h]);
      }
      for (int p = 0; p < kHeads; ++p) {
        for (int q = p + 1; q < kHeads; ++q) {
          // The second one is what it is called but for its sign.
          const Vector difference = sub(d[p], d[q]);
          moment[p][q] = multiply_add(e[p], difference, moment[p][q]);
          moment[q][p] = multiply_add(e[q], difference, moment[q][p]);
        }
      }
    }
    bool finite = true;
    double block[kHeads][kHeads] = {};
    for (int h = 0; h < kHeads; ++h) {
      const double block_sum = reduce_add(sum[h]);
      // Of logits of -inf alone an exponential may come out as something above zero.
      if (sums_.max[h] > sums_.lowest() || block_sum != block_sum) sums_.sum[h] += block_sum;
      sums_.total[h] += reduce_add(total[h]);
      for (int g = 0; g < kHeads; ++g) {
        block[h][g] = h < g ? reduce_add(moment[h][g]) : -reduce_add(moment[h][g]);
        finite = finite && block[h][g] - block[h][g] == 0;
      }
    }
    if (!finite) [[unlikely]]
      return add_symbols(0, size, false);
    for (int p = 0; p < kHeads; ++p) {
      for (int q = 0; q < kHeads; ++q) sums_.moment[p][q] += block[p][q];
    }
  }

  // Symbols one by one: those beside whole vectors, and the moments of a block in which a logit is
  // not finite.
  void add_symbols(int64_t begin, int64_t end, bool all) {
    for (int64_t v = begin; v < end; ++v) {
      double x[kHeads];
      for (int h = 0; h < kHeads; ++h) x[h] = x_[h][v];
      if (all) {
        sums_.add(x);
      } else {
        double e[kHeads];
        for (int h = 0; h < kHeads; ++h) {
          x[h] -= sums_.shift(h);
          e[h] = Math::exp(x[h]);
        }
        sums_.add_moments(x, e);
      }
    }
  }

  const A* x_[kHeads];  // of a block
  DivergenceSums<Math, kHeads> sums_;
};

template <typename A, Precision kPrecision>
void sum_row(const DivergenceResults<A>& p, const RowReader<A>* heads,
             const A (&target_logit)[kMaxHeads], int64_t first, int64_t row) {
  const auto with_heads = [&](const auto& sums) { sums.finish(p, first, row, target_logit); };
  switch (divergence_group(p.heads, p.pairs)) {
    case 1:
      return with_heads(Row<A, kPrecision, 1>(heads, p.vocabulary));
    case 2:
      return with_heads(Row<A, kPrecision, 2>(heads, p.vocabulary));
    case 3:
      return with_heads(Row<A, kPrecision, 3>(heads, p.vocabulary));
    default:
      return with_heads(Row<A, kPrecision, 4>(heads, p.vocabulary));
  }
}

}  // namespace

template <typename T>
void divergence_row(const DivergenceParams<T>& p, int64_t first, int64_t row) {
  using A = accumulation_t<T>;
  constexpr Precision kPrecision = sizeof(T) == 2 ? Precision::kShort : Precision::kFull;
  RowReader<A> heads[kMaxHeads];
  A target_logit[kMaxHeads] = {};
  for (int64_t h = 0; h < divergence_group(p.heads, p.pairs); ++h) {
    heads[h] = row_reader(p.logits[first + h] + row * p.logits_stride[first + h]);
    target_logit[h] = p.target_logit(first + h, row);
  }
  sum_row<A, kPrecision>(p, heads, target_logit, first, row);
}

template void divergence_row(const DivergenceParams<float>&, int64_t, int64_t);
template void divergence_row(const DivergenceParams<BFloat16>&, int64_t, int64_t);
template void divergence_row(const DivergenceParams<Half>&, int64_t, int64_t);
#ifdef PYNAR_FLOAT64
template void divergence_row(const DivergenceParams<double>&, int64_t, int64_t);
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

constexpr const char* kName = "divergence_cross_entropy";

template <typename T>
void divergence_cross_entropy_cpu(const DivergenceParams<T>& p) {
  const auto divergence_row = PYNAR_SELECT_KERNEL_OF(T, divergence_row<T>);
  const int64_t group = divergence_group(p.heads, p.pairs);
  parallel_for(p.rows, divergence_grain(p.vocabulary, p.heads), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      for (int64_t h = 0; h < p.heads; h += group) divergence_row(p, h, row);
    }
  });
}

}  // namespace

std::optional<LaunchPlan> divergence_cross_entropy(
    const std::vector<Tensor>& logits, const Tensor& targets, const std::vector<int64_t>& pairs,
    double label_smoothing, const Tensor& cross_entropy, const Tensor& divergence,
    const Tensor& statistics) {
  const Check check(kName);
  check_divergence(check, logits, targets, pairs, label_smoothing);
  const auto heads = static_cast<int64_t>(logits.size());
  const auto count = static_cast<int64_t>(pairs.size() / 2);
  check_by_row(check, "cross_entropy", cross_entropy, heads, logits[0]);
  check_by_row(check, "divergence", divergence, count, logits[0]);
  check_by_row(check, "statistics", statistics, 2 * heads + 2 * count, logits[0]);
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Tensor&>{"cross_entropy", cross_entropy},
        {"divergence", divergence},
        {"statistics", statistics}}) {
    check.contiguous(name, tensor);
    check.writable(name, tensor);
  }
  if (logits[0].size(0) == 0) return std::nullopt;

  return dispatch_floating(logits[0].dtype(), [&]<typename T>() -> std::optional<LaunchPlan> {
    using A = accumulation_t<T>;
    DivergenceParams<T> params{};
    set_divergence(params, logits, targets, pairs, label_smoothing);
    params.cross_entropy = cross_entropy.data<A>();
    params.divergence = divergence.data<A>();
    params.statistics = statistics.data<A>();
    params.aligned = heads_aligned(logits);
    if (logits[0].device().type == dlpack::kCpu) {
      divergence_cross_entropy_cpu(params);
      return std::nullopt;
    }
#ifdef PYNAR_WITH_CUDA
    if (!use_nvrtc()) {
      const DeviceGuard guard(logits[0].device().index);
      divergence_cross_entropy_cuda(params, logits[0].stream());
      return std::nullopt;
    }
#endif
    const int64_t group = divergence_group(heads, count);
    LaunchPlan plan("losses/divergence_cross_entropy.cuh", params, logits[0]);
    plan.add<T>("divergence_cross_entropy_rows", group, kDivergenceThreads,
                params.rows * (heads / group));
    return plan;
  });
}

}  // namespace pynar

#endif
