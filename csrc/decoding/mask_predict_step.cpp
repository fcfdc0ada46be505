#include "decoding/mask_predict_step.h"

#include "common/cpu.h"
#include "common/symbols.h"

namespace pynar {

template <typename T>
struct BestSymbol {
  int64_t token;
  accumulation_t<T> score;
};

PYNAR_DECLARE_KERNEL(template <typename T> BestSymbol<T> best_symbol(const T* logits, int64_t size))

}  // namespace pynar

#ifdef PYNAR_ISA

#include "common/simd.h"

namespace pynar::PYNAR_ISA {
namespace {

template <typename T>
constexpr T kNegativeInfinity = -static_cast<T>(__builtin_huge_valf());
template <>
constexpr BFloat16 kNegativeInfinity<BFloat16>{0xff80};
template <>
constexpr Half kNegativeInfinity<Half>{0xfc00};

// Maximum and sum of exponentials of a row in one pass. The sum is relative to the greatest logit
// so far; that one changes about log(V) times in a row, so a block first asks whether it does.
template <typename T>
class Pass {
 public:
  using A = accumulation_t<T>;
  using Vector = Simd<A>;
  static constexpr int kVectors = 4;
  static constexpr int64_t kBlock = kVectors * Vector::kLanes;

  Pass() {
    for (int i = 0; i < kVectors; ++i) sum_[i] = Vector::broadcast(0);
  }

  void add_block(const T* block, int64_t first) {
    Vector x[kVectors];
    load_unordered(block, x);
    Vector greatest = x[0];
    for (int i = 1; i < kVectors; ++i) greatest = max(greatest, x[i]);
    if (any_greater(greatest, max_)) [[unlikely]]
      raise_max(reduce_max(greatest), first);
    const Vector log2e = Vector::broadcast(kLog2E<A>);
    if (near_) [[likely]] {
      for (int i = 0; i < kVectors; ++i) {
        sum_[i] = add(sum_[i], exp2<kPrecision>(multiply_add(x[i], log2e, offset_)));
      }
    } else if (first_of_max_ >= 0) {
      for (int i = 0; i < kVectors; ++i) {
        sum_[i] = add(sum_[i], exp2<kPrecision>(mul(sub(x[i], max_), log2e)));
      }
    } else {
      for (int64_t i = 0; i < kBlock; ++i) {
        const A value = to_accumulation(block[i]);
        undefined_ = undefined_ || value != value;
      }
    }
  }

  A greatest() const { return scalar_max_; }
  // Where the block begins that holds the first of the greatest logits; -1 if all are -inf or NaN.
  int64_t first_of_max() const { return first_of_max_; }
  // The logarithm of the sum of exp(logit - greatest()); NaN where the logits hold one.
  double log_sum() const {
    Vector total = sum_[0];
    for (int i = 1; i < kVectors; ++i) total = add(total, sum_[i]);
    return undefined_ ? __builtin_nan("") : __builtin_log(reduce_add(total)) - residual_;
  }

 private:
  static constexpr Precision kPrecision = sizeof(T) == 2 ? Precision::kShort : Precision::kFull;

  // A term is 2^(x log2e + exponent_). One multiply-add yields that power where exponent_ is a
  // float beside which log2e * max lies close enough; what the rounding of exponent_ adds to every
  // term alike is taken off in the end. For logits as great as a mask of 1e9, and in float64, the
  // maximum is subtracted first.
  void raise_max(A max, int64_t first) {
    const double scaled = static_cast<double>(max) * kLog2E<A>;
    near_ = sizeof(A) == 4 && max > A(-4096) && max < A(4096);
    const double exponent = near_ ? static_cast<double>(static_cast<A>(-scaled)) : -scaled;
    residual_ = near_ ? (scaled + exponent) * 0.6931471805599453 : 0.;
    const A factor =
        first_of_max_ < 0 ? A(0) : static_cast<A>(__builtin_exp2(exponent - exponent_));
    for (int i = 0; i < kVectors; ++i) sum_[i] = mul(sum_[i], Vector::broadcast(factor));
    exponent_ = exponent;
    offset_ = Vector::broadcast(static_cast<A>(exponent));
    scalar_max_ = max;
    max_ = Vector::broadcast(max);
    first_of_max_ = first;
  }

  A scalar_max_ = kNegativeInfinity<A>;
  Vector max_ = Vector::broadcast(kNegativeInfinity<A>);
  Vector offset_ = Vector::broadcast(0);
  double exponent_ = 0;
  double residual_ = 0;
  bool near_ = false;
  Vector sum_[kVectors];
  int64_t first_of_max_ = -1;
  bool undefined_ = false;
};

template <typename T>
void copy_block(const T* from, int64_t count, T* to, int64_t block) {
  for (int64_t i = 0; i < block; ++i) to[i] = i < count ? from[i] : kNegativeInfinity<T>;
}

}  // namespace

template <typename T>
BestSymbol<T> best_symbol(const T* logits, int64_t size) {
  using A = accumulation_t<T>;
  constexpr int64_t kBlock = Pass<T>::kBlock;
  Pass<T> pass;

  // The first block goes through a copy without the excluded symbols, the last one through a copy
  // filled up with -inf.
  T edge[kBlock];
  copy_block(logits, size, edge, kBlock);
  edge[kPad] = kNegativeInfinity<T>;
  edge[kMask] = kNegativeInfinity<T>;
  pass.add_block(edge, 0);
  int64_t v = kBlock;
  for (; v + kBlock <= size; v += kBlock) {
    // Where a vector of logits takes longer to compute than to read, the processor's own
    // prefetching leaves arithmetic waiting at the end of each page; where memory is the bound this
    // costs more than it gains.
    if constexpr (sizeof(T) * Simd<A>::kLanes <= 32) {
      constexpr int64_t kAhead = 2048 / sizeof(T);
      for (int64_t i = 0; i < kBlock; i += 64 / sizeof(T)) {
        __builtin_prefetch(logits + v + i + kAhead);
      }
    }
    pass.add_block(logits + v, v);
  }
  if (v < size) {
    copy_block(logits + v, size - v, edge, kBlock);
    pass.add_block(edge, v);
  }

  const A score = static_cast<A>(-pass.log_sum());
  if (pass.first_of_max() < 0 || score != score) {
    return {kUnk, static_cast<A>(__builtin_nanf(""))};
  }
  int64_t token = pass.first_of_max();
  while (token == kPad || token == kMask || to_accumulation(logits[token]) != pass.greatest())
    ++token;
  return {token, score};
}

template BestSymbol<float> best_symbol(const float*, int64_t);
template BestSymbol<BFloat16> best_symbol(const BFloat16*, int64_t);
template BestSymbol<Half> best_symbol(const Half*, int64_t);
#ifdef PYNAR_FLOAT64
template BestSymbol<double> best_symbol(const double*, int64_t);
#endif

}  // namespace pynar::PYNAR_ISA

#else

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "common/operators.h"
#include "common/parallel.h"
#ifdef PYNAR_WITH_CUDA
#include "common/cuda_launch.h"
#endif

namespace pynar {
namespace {

constexpr const char* kName = "mask_predict_step";

template <typename T>
void mask_predict_step_cpu(const MaskPredictParams<T>& p, int64_t batch) {
  using A = accumulation_t<T>;
  const Check check(kName);
  std::vector<std::pair<int64_t, int64_t> > masked;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = p.lengths[b * p.lengths_stride];
    if (length < 0 || length > p.steps) {
      check.fail("lengths", "have values in [0, " + std::to_string(p.steps) + "]",
                 std::to_string(length) + " (sentence " + std::to_string(b) + ")");
    }
    if (const int64_t n = p.num_masked[b * p.num_masked_stride]; n < 0) {
      check.fail("num_masked", "have values of at least 0",
                 std::to_string(n) + " (sentence " + std::to_string(b) + ")");
    }
    for (int64_t t = 0; t < p.steps; ++t) {
      const int64_t token =
          t < length ? p.tokens[b * p.tokens_stride_b + t * p.tokens_stride_t] : kPad;
      p.new_tokens[b * p.steps + t] = token;
      p.new_scores[b * p.steps + t] =
          t < length ? p.scores[b * p.scores_stride_b + t * p.scores_stride_t] : A(0);
      if (token == kMask) masked.emplace_back(b, t);
    }
  }

  // A row of a small vocabulary is too little for a thread of its own.
  const int64_t grain = 1 + (1 << 15) / p.vocabulary;
  const auto best_symbol = PYNAR_SELECT_KERNEL_OF(T, best_symbol<T>);
  parallel_for(static_cast<int64_t>(masked.size()), grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const auto [b, t] = masked[i];
      const BestSymbol<T> best =
          best_symbol(p.logits + b * p.logits_stride_b + t * p.logits_stride_t, p.vocabulary);
      p.new_tokens[b * p.steps + t] = best.token;
      p.new_scores[b * p.steps + t] = best.score;
    }
  });

  std::vector<std::pair<A, int64_t> > open;  // (score, t): the pair's order is the one wanted
  for (int64_t b = 0; b < batch; ++b) {
    open.clear();
    for (int64_t t = 0; t < p.lengths[b * p.lengths_stride]; ++t) {
      const int64_t token = p.tokens[b * p.tokens_stride_b + t * p.tokens_stride_t];
      if (token == kPad || token == kBos || token == kEos) continue;
      const A score = p.new_scores[b * p.steps + t];
      open.emplace_back(score == score ? score : -std::numeric_limits<A>::infinity(), t);
    }
    const int64_t count = std::min<int64_t>(p.num_masked[b * p.num_masked_stride], open.size());
    if (count < static_cast<int64_t>(open.size())) {
      std::nth_element(open.begin(), open.begin() + count, open.end());
    }
    for (int64_t i = 0; i < count; ++i) p.new_tokens[b * p.steps + open[i].second] = kMask;
  }
}

template <typename T>
MaskPredictParams<T> make_params(const Tensor& logits, const Tensor& tokens, const Tensor& scores,
                                 const Tensor& lengths, const Tensor& num_masked,
                                 const Tensor& new_tokens, const Tensor& new_scores,
                                 const std::optional<Tensor>& workspace) {
  using A = accumulation_t<T>;
  MaskPredictParams<T> p{};
  p.logits = logits.data<T>();
  p.tokens = tokens.data<int64_t>();
  p.scores = scores.data<A>();
  p.lengths = lengths.data<int64_t>();
  p.num_masked = num_masked.data<int64_t>();
  p.new_tokens = new_tokens.data<int64_t>();
  p.new_scores = new_scores.data<A>();
  p.partials = workspace ? workspace->data<MaskPredictPartial<T> >() : nullptr;
  p.steps = logits.size(1);
  p.vocabulary = logits.size(2);
  p.segments = mask_predict_segments(p.vocabulary);
  p.logits_stride_b = logits.stride(0);
  p.logits_stride_t = logits.stride(1);
  p.tokens_stride_b = tokens.stride(0);
  p.tokens_stride_t = tokens.stride(1);
  p.scores_stride_b = scores.stride(0);
  p.scores_stride_t = scores.stride(1);
  p.lengths_stride = lengths.stride(0);
  p.num_masked_stride = num_masked.stride(0);
  constexpr int64_t kPerChunk = 16 / sizeof(T);
  p.aligned = reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 &&
              p.logits_stride_b % kPerChunk == 0 && p.logits_stride_t % kPerChunk == 0;
  return p;
}

}  // namespace

int64_t mask_predict_step_workspace(int64_t batch, int64_t steps, int64_t vocabulary,
                                    int64_t element_size) {
  const size_t partial =
      element_size == 8 ? sizeof(MaskPredictPartial<double>) : sizeof(MaskPredictPartial<float>);
  return batch * steps * mask_predict_segments(vocabulary) * static_cast<int64_t>(partial);
}

std::optional<LaunchPlan> mask_predict_step(const Tensor& logits, const Tensor& tokens,
                                            const Tensor& scores, const Tensor& lengths,
                                            const Tensor& num_masked, const Tensor& new_tokens,
                                            const Tensor& new_scores,
                                            const std::optional<Tensor>& workspace) {
  const Check check(kName);
  check.dims("logits", logits, 3, "[B, T, V]");
  check.dtype("logits", logits, {kFloat32, kBFloat16, kFloat16, kFloat64});
  const int64_t batch = logits.size(0);
  const int64_t steps = logits.size(1);
  const int64_t vocabulary = logits.size(2);
  const DataType accumulation = logits.dtype() == kFloat64 ? kFloat64 : kFloat32;
  if (vocabulary < kNumSpecial) {
    check.fail("logits", "have at least 5 symbols (the special ones)", std::to_string(vocabulary));
  }
  const char* batch_and_steps = "batch and steps of `logits`";
  check.shape("tokens", tokens, {batch, steps}, batch_and_steps);
  check.dtype("tokens", tokens, {kInt64});
  check.shape("scores", scores, {batch, steps}, batch_and_steps);
  check.dtype("scores", scores, {accumulation});
  check.shape("lengths", lengths, {batch}, "batch of `logits`");
  check.dtype("lengths", lengths, {kInt64});
  check.shape("num_masked", num_masked, {batch}, "batch of `logits`");
  check.dtype("num_masked", num_masked, {kInt64});
  check.shape("new_tokens", new_tokens, {batch, steps}, batch_and_steps);
  check.dtype("new_tokens", new_tokens, {kInt64});
  check.contiguous("new_tokens", new_tokens);
  check.writable("new_tokens", new_tokens);
  check.shape("new_scores", new_scores, {batch, steps}, batch_and_steps);
  check.dtype("new_scores", new_scores, {accumulation});
  check.contiguous("new_scores", new_scores);
  check.writable("new_scores", new_scores);
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"tokens", tokens},
                                     {"scores", scores},
                                     {"lengths", lengths},
                                     {"num_masked", num_masked},
                                     {"new_tokens", new_tokens},
                                     {"new_scores", new_scores}}) {
    check.device(name, tensor, "logits", logits);
  }
  if (vocabulary > 1 && logits.stride(2) != 1) {
    check.fail("logits", "be contiguous over the vocabulary",
               "stride " + std::to_string(logits.stride(2)));
  }
  const bool on_cuda = logits.device().type == dlpack::kCuda;
  if (!on_cuda && logits.device().type != dlpack::kCpu) {
    check.fail("logits", "be on cpu or cuda", to_string(logits.device()));
  }
  if (on_cuda) {
    const int64_t bytes =
        mask_predict_step_workspace(batch, steps, vocabulary, logits.dtype().bits / 8);
    if (!workspace) check.fail("workspace", "be given on cuda", "None");
    check.shape("workspace", *workspace, {bytes}, "bytes");
    check.dtype("workspace", *workspace, {kUInt8});
    check.device("workspace", *workspace, "logits", logits);
  }
  if (batch == 0 || steps == 0) return std::nullopt;

  return dispatch_floating(logits.dtype(), [&]<typename T>() -> std::optional<LaunchPlan> {
    const MaskPredictParams<T> params = make_params<T>(logits, tokens, scores, lengths, num_masked,
                                                       new_tokens, new_scores, workspace);
    if (!on_cuda) {
      mask_predict_step_cpu(params, batch);
      return std::nullopt;
    }
#ifdef PYNAR_WITH_CUDA
    if (!use_nvrtc()) {
      const DeviceGuard guard(logits.device().index);
      mask_predict_step_cuda(params, batch, logits.stream());
      return std::nullopt;
    }
#endif
    const int threads = mask_predict_threads(vocabulary);
    LaunchPlan plan("decoding/mask_predict_step.cuh", params, logits);
    plan.add<T>("mask_predict_partials", threads, batch * steps * params.segments);
    plan.add<T>("mask_predict_finish", kMaskPredictFinishThreads, batch);
    return plan;
  });
}

}  // namespace pynar

#endif
