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

// Sums over vectors of a block. Of the moments that of the greater head first lacks its sign.
template <typename A, int kHeads>
struct BlockSums {
  A sum[kHeads];
  A moment[kHeads][kHeads];
};

template <Precision kPrecision, int kHeads, typename T>
BlockSums<accumulation_t<T>, kHeads> sum_vectors(const T* const (&logits)[kHeads], int64_t size,
                                                 const accumulation_t<T> (&shifts)[kHeads]) {
  using A = accumulation_t<T>;
  using Vector = Simd<A>;
  const Vector log2e = Vector::broadcast(kLog2E<A>);
  Vector shift[kHeads];
  Vector sum[kHeads];
  Vector moment[kHeads][kHeads];
  for (int h = 0; h < kHeads; ++h) {
    shift[h] = Vector::broadcast(shifts[h]);
    sum[h] = Vector::broadcast(0);
    for (int g = 0; g < kHeads; ++g) moment[h][g] = Vector::broadcast(0);
  }
  for (int64_t v = 0; v < size; v += Vector::kLanes) {
    Vector d[kHeads];
    Vector e[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      const Vector x = Vector::load(logits[h] + v);
      d[h] = sub(x, shift[h]);
      e[h] = exp2<kPrecision>(mul(d[h], log2e));
      sum[h] = add(sum[h], e[h]);
    }
    for (int p = 0; p < kHeads; ++p) {
      for (int q = p + 1; q < kHeads; ++q) {
        const Vector difference = sub(d[p], d[q]);
        moment[p][q] = multiply_add(e[p], difference, moment[p][q]);
        moment[q][p] = multiply_add(e[q], difference, moment[q][p]);
      }
    }
  }
  BlockSums<A, kHeads> sums;
  for (int h = 0; h < kHeads; ++h) {
    sums.sum[h] = reduce_add(sum[h]);
    for (int g = 0; g < kHeads; ++g) sums.moment[h][g] = reduce_add(moment[h][g]);
  }
  return sums;
}

// The greatest of a block's logits, and the sum of those in whole vectors: here the registers are
// free for it.
template <typename A>
struct BlockScan {
  A greatest;
  A total;
};

template <typename T>
BlockScan<accumulation_t<T>> scan(const T* x, int64_t size) {
  using A = accumulation_t<T>;
  using Vector = Simd<A>;
  Vector greatest[4];
  Vector total[4];
  for (int i = 0; i < 4; ++i) {
    greatest[i] = Vector::broadcast(-static_cast<A>(__builtin_huge_val()));
    total[i] = Vector::broadcast(0);
  }
  int64_t v = 0;
  for (; v + 4 * Vector::kLanes <= size; v += 4 * Vector::kLanes) {
    for (int i = 0; i < 4; ++i) {
      const Vector some = Vector::load(x + v + i * Vector::kLanes);
      greatest[i] = max(some, greatest[i]);
      total[i] = add(total[i], some);
    }
  }
  for (; v + Vector::kLanes <= size; v += Vector::kLanes) {
    greatest[0] = max(Vector::load(x + v), greatest[0]);
    total[0] = add(total[0], Vector::load(x + v));
  }
  A to = reduce_max(max(max(greatest[0], greatest[1]), max(greatest[2], greatest[3])));
  for (; v < size; ++v) {
    const A value = to_accumulation(x[v]);
    to = value > to ? value : to;
  }
  return {to, reduce_add(add(add(total[0], total[1]), add(total[2], total[3])))};
}

// The sums of a row so far, the same for all element types.
template <typename A, int kHeads>
class RowSums {
 public:
  [[gnu::noinline]] void add(int h, const BlockScan<A>& block) {
    if (block.greatest > sums_.max[h]) sums_.raise_max(h, block.greatest);
    sums_.total[h] += block.total;
  }

  A shift(int h) const { return static_cast<A>(sums_.shift(h)); }

  // False if the moments are not finite, which are then left out.
  [[gnu::noinline]] bool add(const BlockSums<A, kHeads>& block) {
    bool finite = true;
    for (int h = 0; h < kHeads; ++h) {
      // Of logits of -inf alone an exponential may come out as something above zero.
      if (sums_.max[h] > sums_.lowest() || block.sum[h] != block.sum[h]) {
        sums_.sum[h] += block.sum[h];
      }
      for (int g = 0; g < kHeads; ++g) {
        finite = finite && block.moment[h][g] - block.moment[h][g] == 0;
      }
    }
    if (!finite) return false;
    for (int p = 0; p < kHeads; ++p) {
      for (int q = 0; q < kHeads; ++q) {
        sums_.moment[p][q] += p < q ? block.moment[p][q] : -block.moment[p][q];
      }
    }
    return true;
  }

  // Symbols one by one: the moments alone before `whole`, all sums from there on.
  [[gnu::noinline]] void add_symbols(const A (&logits)[kHeads][kRowBlock], int64_t begin,
                                     int64_t whole, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      double x[kHeads];
      for (int h = 0; h < kHeads; ++h) x[h] = logits[h][v];
      if (v >= whole) {
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

  [[gnu::noinline]] void finish(const DivergenceResults<A>& p, int64_t first, int64_t row,
                                const A (&target_logit)[kHeads]) const {
    sums_.finish(p, first, row, target_logit);
  }

 private:
  DivergenceSums<Math, kHeads> sums_;
};

template <int kHeads, typename T>
void sum_row(const DivergenceParams<T>& p, int64_t first, int64_t row) {
  using A = accumulation_t<T>;
  constexpr Precision kPrecision = sizeof(T) == 2 ? Precision::kShort : Precision::kFull;
  RowSums<A, kHeads> sums;
  A target_logit[kHeads];
  for (int h = 0; h < kHeads; ++h) target_logit[h] = p.target_logit(first + h, row);
  for (int64_t v = 0; v < p.vocabulary; v += kRowBlock) {
    const int64_t size = p.vocabulary - v < kRowBlock ? p.vocabulary - v : kRowBlock;
    const int64_t vectors = size / Simd<A>::kLanes * Simd<A>::kLanes;
    const T* logits[kHeads];
    A shift[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      logits[h] = p.logits[first + h] + row * p.logits_stride[first + h] + v;
      sums.add(h, scan(logits[h], size));
    }
    for (int h = 0; h < kHeads; ++h) shift[h] = sums.shift(h);
    const bool finite = sums.add(sum_vectors<kPrecision>(logits, vectors, shift));
    if (finite && vectors == size) [[likely]]
      continue;
    A symbols[kHeads][kRowBlock];
    const int64_t begin = finite ? vectors : 0;
    widen(logits, begin, size, symbols);
    sums.add_symbols(symbols, begin, vectors, size);
  }
  sums.finish(p, first, row, target_logit);
}

}  // namespace

template <typename T>
void divergence_row(const DivergenceParams<T>& p, int64_t first, int64_t row) {
  switch (divergence_group(p.heads, p.pairs)) {
    case 1:
      return sum_row<1>(p, first, row);
    case 2:
      return sum_row<2>(p, first, row);
    case 3:
      return sum_row<3>(p, first, row);
    default:
      return sum_row<4>(p, first, row);
  }
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
