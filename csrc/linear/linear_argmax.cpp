#include "linear/linear_argmax.h"

#include "linear/panel.h"

namespace pynar {

// The rows [first, last) of an input, at most kChunkRows, times the panel that begins at `column`:
// `width` of its columns count. Updates sums [last - first] and candidates [last - first, k] of the
// rows, whose distance is `stride` sums or lists of candidates.
struct ArgmaxTask {
  int64_t first, last;
  int64_t column, width;
  int64_t stride;
  int64_t k;
  ArgmaxSum* sums;
  ArgmaxCandidate* candidates;
};

PYNAR_DECLARE_KERNEL(void argmax_panel(WeightFormat format, const InputRows& input,
                                       const Panel& panel, const ArgmaxTask& task))

// The same with the rows of a weight [columns, depth] as they are; `x` [rows, depth] in fp32.
PYNAR_DECLARE_KERNEL(template <typename T> void argmax_rows(const float* x, int64_t depth,
                                                            const T* weight, int64_t weight_stride,
                                                            const float* bias,
                                                            const ArgmaxTask& task))

}  // namespace pynar

#ifdef PYNAR_ISA

#include "linear/panel_simd.h"

namespace pynar::PYNAR_ISA {
namespace {

constexpr float kInfinity = __builtin_huge_valf();

// Puts a value into a list in descending order. Equals stay behind those that came before.
void insert(ArgmaxCandidate* list, int64_t k, float value, int64_t token) {
  int64_t i = k - 1;
  for (; i > 0 && list[i - 1].value < value; --i) list[i] = list[i - 1];
  list[i] = {value, static_cast<int32_t>(token)};
}

void update(const float* values, const ArgmaxTask& task, ArgmaxSum& total,
            ArgmaxCandidate* candidates) {
  using Vector = Simd<float>;
  constexpr int kVectors = kPanel / Vector::kLanes;
  Vector z[kVectors];
  for (int v = 0; v < kVectors; ++v) z[v] = Vector::load(values + v * Vector::kLanes);
  Vector greatest = z[0];
  for (int v = 1; v < kVectors; ++v) greatest = max(greatest, z[v]);
  const float panel_max = reduce_max(greatest);
  if (task.k == 1 && panel_max > candidates->value) {
    int64_t i = 0;
    while (values[i] != panel_max) ++i;
    *candidates = {panel_max, static_cast<int32_t>(task.column + i)};
  } else if (panel_max > candidates[task.k - 1].value) {
    for (int64_t i = 0; i < task.width; ++i) {
      if (values[i] > candidates[task.k - 1].value) {
        insert(candidates, task.k, values[i], task.column + i);
      }
    }
  }
  if (panel_max > total.max) {
    total.sum *= total.max == -kInfinity ? 0.f : __builtin_expf(total.max - panel_max);
    total.max = panel_max;
  }
  if (total.max == -kInfinity) {
    // Only a NaN tells this row from one that has no symbols so far.
    for (int64_t i = 0; i < task.width; ++i) {
      if (values[i] != values[i]) total.sum = __builtin_nanf("");
    }
    return;
  }
  const Vector max_vector = Vector::broadcast(total.max);
  const Vector log2e = Vector::broadcast(kLog2E<float>);
  Vector sum = Vector::broadcast(0);
  for (int v = 0; v < kVectors; ++v) {
    sum = add(sum, exp2<Precision::kFull>(mul(sub(z[v], max_vector), log2e)));
  }
  total.sum += reduce_add(sum);
}

// Products of kRows rows of x with kColumns rows of the weight, each summed up in its own lanes.
template <int kRows, int kColumns, typename T>
void dot_products(const float* x, int64_t depth, const T* weight, int64_t stride, float* out) {
  using Vector = Simd<float>;
  Vector sum[kRows][kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) sum[r][c] = Vector::broadcast(0);
  }
  int64_t i = 0;
  for (; i + Vector::kLanes <= depth; i += Vector::kLanes) {
    Vector w[kColumns];
    for (int c = 0; c < kColumns; ++c) w[c] = Vector::load(weight + c * stride + i);
    for (int r = 0; r < kRows; ++r) {
      const Vector h = Vector::load(x + r * depth + i);
      for (int c = 0; c < kColumns; ++c) sum[r][c] = multiply_add(h, w[c], sum[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      float total = reduce_add(sum[r][c]);
      for (int64_t j = i; j < depth; ++j) {
        total += x[r * depth + j] * to_accumulation(weight[c * stride + j]);
      }
      out[r * kPanel + c] = total;
    }
  }
}

template <int kRows, typename T>
void multiply_rows(const float* x, int64_t depth, const T* weight, int64_t stride, int64_t width,
                   Block& out) {
  int64_t c = 0;
  for (; c + 4 <= width; c += 4) {
    dot_products<kRows, 4>(x, depth, weight + c * stride, stride, out.values[0] + c);
  }
  for (; c < width; ++c) {
    dot_products<kRows, 1>(x, depth, weight + c * stride, stride, out.values[0] + c);
  }
}

void finish_block(Block& block, int64_t row, int64_t rows, const ArgmaxTask& task) {
  for (int64_t r = 0; r < rows; ++r) {
    float* values = block.values[r];
    for (int64_t i = task.width; i < kPanel; ++i) values[i] = -kInfinity;
    const int64_t place = (row - task.first + r) * task.stride;
    update(values, task, task.sums[place], task.candidates + place * task.k);
  }
}

}  // namespace

void argmax_panel(WeightFormat format, const InputRows& input, const Panel& panel,
                  const ArgmaxTask& task) {
  float whole_bias[kPanel];
  const Panel whole = with_whole_bias(panel, task.width, whole_bias);
  Block block;
  multiply_chunk(format, input, task.first, task.last - task.first, &whole, 1, &block);
  for (int64_t row = task.first; row < task.last; ++row) {
    float* values = block.values[row - task.first];
    finish_row(format, values, advance(input.scales, row), whole,
               [&](int64_t i, Simd<float> logits) { logits.store(values + i); });
  }
  finish_block(block, task.first, task.last - task.first, task);
}

template <typename T>
void argmax_rows(const float* x, int64_t depth, const T* weight, int64_t weight_stride,
                 const float* bias, const ArgmaxTask& task) {
  constexpr int kRows = 4;
  Block block;
  for (int64_t row = task.first; row < task.last;) {
    const float* h = x + row * depth;
    const int64_t rows = task.last - row < kRows ? 1 : kRows;
    if (rows == kRows) {
      multiply_rows<kRows>(h, depth, weight, weight_stride, task.width, block);
    } else {
      multiply_rows<1>(h, depth, weight, weight_stride, task.width, block);
    }
    if (bias != nullptr) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < task.width; ++i) block.values[r][i] += bias[i];
      }
    }
    finish_block(block, row, rows, task);
    row += rows;
  }
}

template void argmax_rows(const float*, int64_t, const float*, int64_t, const float*,
                          const ArgmaxTask&);
template void argmax_rows(const float*, int64_t, const BFloat16*, int64_t, const float*,
                          const ArgmaxTask&);
template void argmax_rows(const float*, int64_t, const Half*, int64_t, const float*,
                          const ArgmaxTask&);

}  // namespace pynar::PYNAR_ISA

#else

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>

#include "common/operators.h"
#include "common/symbols.h"
#include "linear/host.h"
#ifdef PYNAR_WITH_CUDA
#include "common/cuda_launch.h"
#endif

namespace pynar {
namespace {

constexpr const char* kName = "linear_argmax";
constexpr int64_t kSegmentPanels = 8;
constexpr int64_t kSegment = kSegmentPanels * kPanel;

struct Output {
  int64_t* tokens;   // [rows, k]
  float* log_probs;  // [rows, k]
  float* lse;        // [rows]
};

// Puts the partial results of one row together: `size` candidates of each segment.
void finish(const ArgmaxSum* sums, const ArgmaxCandidate* candidates, int64_t segments,
            int64_t size, int64_t k, int64_t row, const Output& out) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  float max = -kInfinity;
  for (int64_t s = 0; s < segments; ++s) max = std::max(max, sums[s].max);
  double sum = 0;
  for (int64_t s = 0; s < segments; ++s) {
    // One without a maximum saw -inf alone and has the sum 0, or a NaN, which must not vanish.
    const double shift = sums[s].max > -kInfinity ? static_cast<double>(sums[s].max) - max : 0.;
    sum += sums[s].sum * std::exp(shift);
  }
  const double lse = max + std::log(sum);
  const bool defined = std::isfinite(lse);
  out.lse[row] = defined ? static_cast<float>(lse) : kNaN;

  // The segments come in the order of their symbols, so that equals stay in it.
  int64_t* tokens = out.tokens + row * k;
  float* values = out.log_probs + row * k;
  std::fill_n(tokens, k, kUnk);
  std::fill_n(values, k, defined ? -kInfinity : kNaN);
  if (!defined) return;
  for (int64_t s = 0; s < segments; ++s) {
    for (int64_t c = 0; c < size; ++c) {
      const auto& [value, token] = candidates[s * size + c];
      if (!(value > values[k - 1])) break;
      int64_t i = k - 1;
      for (; i > 0 && values[i - 1] < value; --i) {
        values[i] = values[i - 1];
        tokens[i] = tokens[i - 1];
      }
      values[i] = value;
      tokens[i] = token;
    }
  }
  for (int64_t i = 0; i < k; ++i) values[i] = static_cast<float>(values[i] - lse);
}

struct Weight {
  WeightFormat format;  // of the words that rows of x become; fp32 if the weight is not packed
  int64_t steps;
  int64_t columns;
  int64_t depth;
  const PackedView* packed;  // null if the weight is not packed
  const Tensor* rows;
};

template <typename T>
void linear_argmax_cpu(const Tensor& x, const Weight& weight, const float* bias, int64_t k,
                       const Output& out) {
  const int64_t rows = x.size(0);
  const int64_t panels = div_up(weight.columns, kPanel);
  const int64_t segments = div_up(panels, kSegmentPanels);
  const int64_t chunks = div_up(rows, kChunkRows);
  const int64_t tasks = segments * chunks;
  const InputWords words(rows, weight.steps, weight.format);
  const InputConversion how{weight.depth, weight.steps, words.stride(), -1.f};
  const InputRows input = words.rows();
  // A segment has no more candidates than symbols.
  const int64_t size = std::min(k, kSegment);
  const auto sums = std::make_unique_for_overwrite<ArgmaxSum[]>(rows * segments);
  const auto candidates = std::make_unique_for_overwrite<ArgmaxCandidate[]>(rows * segments * size);
  const auto convert = PYNAR_SELECT_DOT_KERNEL(convert_rows<T>);
  const auto packed_kernel = PYNAR_SELECT_DOT_KERNEL(argmax_panel);
  const auto rows_kernel = PYNAR_SELECT_DOT_KERNEL(argmax_rows<T>);
  const int64_t work = rows * panels * weight.steps;

  parallel_phases(
      work < (1 << 14) ? 1 : std::max(tasks, rows),
      [&](const Part& part) {
        const auto [first, last] = part.of(rows);
        convert(weight.format, how, x.data<T>() + first * x.stride(0), x.stride(0), last - first,
                words.scratch(part.index), words.words(first), words.scales(first));
      },
      [&](const Part& part) {
        const auto [first, last] = part.of(tasks);
        for (int64_t t = first; t < last; ++t) {
          const int64_t segment = t / chunks;
          const int64_t begin = t % chunks * kChunkRows;
          ArgmaxTask task{};
          task.first = begin;
          task.last = std::min(rows, begin + kChunkRows);
          task.stride = segments;
          task.k = size;
          task.sums = sums.get() + begin * segments + segment;
          task.candidates = candidates.get() + (begin * segments + segment) * size;
          constexpr float kLowest = -std::numeric_limits<float>::infinity();
          for (int64_t place = 0; place < (task.last - begin) * segments; place += segments) {
            task.sums[place] = {kLowest, 0.f};
            std::fill_n(task.candidates + place * size, size, ArgmaxCandidate{kLowest, 0});
          }
          const int64_t end = panels * (segment + 1) / segments;
          for (int64_t p = panels * segment / segments; p < end; ++p) {
            task.column = p * kPanel;
            task.width = std::min(kPanel, weight.columns - task.column);
            const float* panel_bias = advance(bias, task.column);
            if (weight.packed == nullptr) {
              const int64_t stride = weight.rows->stride(0);
              rows_kernel(reinterpret_cast<const float*>(input.words), weight.depth,
                          weight.rows->data<T>() + task.column * stride, stride, panel_bias, task);
              continue;
            }
            const PackedView& packed = *weight.packed;
            const Panel panel{packed.words + task.column * weight.steps, weight.steps,
                              advance(packed.scales, task.column),
                              advance(packed.column_sums, task.column), panel_bias};
            packed_kernel(weight.format, input, panel, task);
          }
        }
      },
      [&](const Part& part) {
        const auto [first, last] = part.of(rows);
        for (int64_t row = first; row < last; ++row) {
          finish(sums.get() + row * segments, candidates.get() + row * segments * size, segments,
                 size, k, row, out);
        }
      });
}

template <typename T>
std::optional<LaunchPlan> linear_argmax_on_gpu(const LinearArgmaxParams& params, const Tensor& x) {
#ifdef PYNAR_WITH_CUDA
  if (!use_nvrtc()) {
    const DeviceGuard guard(x.device().index);
    linear_argmax_cuda<T>(params, x.stream());
    return std::nullopt;
  }
#endif
  LaunchPlan plan("linear/linear_argmax.cuh", params, x);
  plan.add<T>("linear_argmax_partials", params.k == 1 ? 1 : kArgmaxMost, kArgmaxThreads,
              linear_argmax_blocks(params.rows, params.columns));
  plan.add("linear_argmax_finish", kArgmaxFinishThreads, linear_argmax_finish_blocks(params.rows));
  return plan;
}

}  // namespace

int64_t linear_argmax_workspace(int64_t rows, int64_t columns, int64_t k) {
  const int64_t part = sizeof(ArgmaxSum) + k * sizeof(ArgmaxCandidate);
  return rows * linear_argmax_parts(columns) * part;
}

std::optional<LaunchPlan> linear_argmax(const Tensor& x, const Tensor& weight,
                                        const std::optional<Tensor>& scales,
                                        const std::optional<Tensor>& column_sums,
                                        const std::optional<Tensor>& bias, int64_t columns,
                                        int64_t k, const Tensor& tokens, const Tensor& log_probs,
                                        const Tensor& lse, const std::optional<Tensor>& workspace) {
  const Check check(kName);
  check.dims("x", x, 2, "[N, C]");
  // float64 is the reference's: pynar/ops/linear_argmax.py sends it there.
  check.dtype("x", x, {kFloat32, kBFloat16, kFloat16, kFloat64});
  if (x.dtype() == kFloat64) check.fail("x", "have another dtype here", "float64");
  const bool on_cuda = x.device().type == dlpack::kCuda;
  if (!on_cuda && x.device().type != dlpack::kCpu) {
    check.fail("x", "be on cpu or cuda", to_string(x.device()));
  }
  check_rows(check, "x", x);
  const int64_t rows = x.size(0);
  const int64_t depth = x.size(1);
  Weight w{WeightFormat::kFloat32, depth, columns, depth, nullptr, &weight};
  PackedView packed{};
  if (weight.dim() == 4) {
    check.dtype("x", x, {kFloat32});
    check_cpu(check, "x", x);
    packed = view_packed(check, weight, scales, column_sums, depth, columns);
    w.format = packed.format;
    w.steps = packed.steps;
    w.packed = &packed;
  } else {
    check.dims("weight", weight, 2, "[V, C]");
    check.shape("weight", weight, {columns, depth}, "symbols, channels of `x`");
    check.dtype("weight", weight, {x.dtype()});
    check.device("weight", weight, "x", x);
    check_rows(check, "weight", weight);
  }
  if (columns > std::numeric_limits<int32_t>::max()) {
    check.fail("weight", "have fewer than 2^31 symbols", std::to_string(columns));
  }
  if (k < 1 || k > columns) {
    check.fail("k", "be in [1, " + std::to_string(columns) + "]", std::to_string(k));
  }
  if (bias) {
    check.shape("bias", *bias, {columns}, "symbols of `weight`");
    check.dtype("bias", *bias, {kFloat32});
    check.device("bias", *bias, "x", x);
    check.contiguous("bias", *bias);
  }
  const auto check_output = [&](const char* name, const Tensor& tensor, DataType dtype) {
    check.dtype(name, tensor, {dtype});
    check.device(name, tensor, "x", x);
    check.contiguous(name, tensor);
    check.writable(name, tensor);
  };
  check.shape("tokens", tokens, {rows, k}, "rows of `x`, k");
  check_output("tokens", tokens, kInt64);
  check.shape("log_probs", log_probs, {rows, k}, "rows of `x`, k");
  check_output("log_probs", log_probs, kFloat32);
  check.shape("lse", lse, {rows}, "rows of `x`");
  check_output("lse", lse, kFloat32);
  if (on_cuda) {
    // More is the reference's, too.
    if (k > kArgmaxMost) {
      check.fail("k", "be at most " + std::to_string(kArgmaxMost) + " here", std::to_string(k));
    }
    if (!workspace) check.fail("workspace", "be given on cuda", "None");
    check.shape("workspace", *workspace, {linear_argmax_workspace(rows, columns, k)}, "bytes");
    check.dtype("workspace", *workspace, {kUInt8});
    check.device("workspace", *workspace, "x", x);
  }
  if (rows == 0) return std::nullopt;

  const float* bias_data = bias ? bias->data<float>() : nullptr;
  const auto with_type = [&]<typename T>() -> std::optional<LaunchPlan> {
    if (!on_cuda) {
      const Output out{tokens.data<int64_t>(), log_probs.data<float>(), lse.data<float>()};
      linear_argmax_cpu<T>(x, w, bias_data, k, out);
      return std::nullopt;
    }
    LinearArgmaxParams p{};
    p.x = x.data<T>();
    p.weight = weight.data<T>();
    p.bias = bias_data;
    p.sums = workspace->data<ArgmaxSum>();
    p.candidates = reinterpret_cast<ArgmaxCandidate*>(p.sums + rows * linear_argmax_parts(columns));
    p.tokens = tokens.data<int64_t>();
    p.log_probs = log_probs.data<float>();
    p.lse = lse.data<float>();
    p.rows = rows;
    p.depth = depth;
    p.columns = columns;
    p.k = k;
    p.segments = linear_argmax_segments(columns);
    p.x_stride = x.stride(0);
    p.weight_stride = weight.stride(0);
    const auto begins_at_units = [](const Tensor& tensor) {
      return reinterpret_cast<uintptr_t>(tensor.data<T>()) % 16 == 0 &&
             (tensor.size(0) == 1 || tensor.stride(0) * sizeof(T) % 16 == 0);
    };
    p.aligned = begins_at_units(x) && begins_at_units(weight);
    return linear_argmax_on_gpu<T>(p, x);
  };
  if (x.dtype() == kBFloat16) return with_type.template operator()<BFloat16>();
  if (x.dtype() == kFloat16) return with_type.template operator()<Half>();
  return with_type.template operator()<float>();
}

}  // namespace pynar

#endif
