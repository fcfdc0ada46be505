#include "linear/packed_linear.h"

#ifdef PYNAR_ISA

#include "linear/panel_simd.h"

namespace pynar::PYNAR_ISA {
namespace {

struct Moments {
  float mean, rstd;
};

template <typename T>
float element(const T* x, int64_t i) {
  return to_accumulation(x[i]);
}

// Mean and reciprocal standard deviation, summed up in a fixed number of lanes.
template <typename T>
Moments moments(const T* x, int64_t size, float eps) {
  constexpr int kLanes = 32;
  float sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) sum[l] += element(x, i + l);
  }
  for (int l = 0; i + l < size; ++l) sum[l] += element(x, i + l);
  float total = 0;
  for (int l = 0; l < kLanes; ++l) total += sum[l];
  const float mean = total / static_cast<float>(size);
  float squares[kLanes] = {};
  for (i = 0; i + kLanes <= size; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float d = element(x, i + l) - mean;
      squares[l] += d * d;
    }
  }
  for (int l = 0; i + l < size; ++l) {
    const float d = element(x, i + l) - mean;
    squares[l] += d * d;
  }
  total = 0;
  for (int l = 0; l < kLanes; ++l) total += squares[l];
  return {mean, 1.f / __builtin_sqrtf(total / static_cast<float>(size) + eps)};
}

uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

uint32_t rounded_to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return nan ? (bits & 0xffff0000u) | 0x400000 : rounded;
}

// As two in a word, or each as an fp32 number where the kernel wants them so.
void to_bfloat16(const float* x, int64_t size, uint32_t* words) {
  if constexpr (Dot<WeightFormat::kBFloat16>::kParts == 2) {
    for (int64_t i = 0; i < size; ++i) words[i] = rounded_to_bfloat16(x[i]);
  } else {
    auto* out = reinterpret_cast<uint16_t*>(words);
    for (int64_t i = 0; i < size; ++i) {
      out[i] = static_cast<uint16_t>(rounded_to_bfloat16(x[i]) >> 16);
    }
  }
}

// Rounds to q in [0, 255] with x close to (q - zero) scale. A row with a NaN or an infinity gets a
// scale that makes NaN of all its outputs.
RowScale to_int8(const float* x, int64_t size, uint8_t* out) {
  using Vector = Simd<float>;
  const Vector zeros = Vector::broadcast(0);
  Vector highest_lanes = zeros;
  Vector minus_lowest_lanes = zeros;
  Vector finite_lanes = zeros;  // NaN where there was a NaN or an infinity
  int64_t i = 0;
  for (; i + Vector::kLanes <= size; i += Vector::kLanes) {
    const Vector v = Vector::load(x + i);
    highest_lanes = max(v, highest_lanes);
    minus_lowest_lanes = max(sub(zeros, v), minus_lowest_lanes);
    finite_lanes = add(finite_lanes, mul(v, zeros));
  }
  float highest = reduce_max(highest_lanes);
  float minus_lowest = reduce_max(minus_lowest_lanes);
  float finite = reduce_add(finite_lanes);
  for (; i < size; ++i) {
    highest = highest > x[i] ? highest : x[i];
    minus_lowest = minus_lowest > -x[i] ? minus_lowest : -x[i];
    finite += x[i] * 0.f;
  }
  if (finite != finite) {
    for (i = 0; i < size; ++i) out[i] = 0;
    return {__builtin_nanf(""), 0};
  }
  // Halves, since the range of a row of great numbers may be none itself.
  const float half = 0.5f * highest + 0.5f * minus_lowest;
  // So small a row would overflow its own reciprocal; it counts as zero.
  const float inverse = half > 1e-35f ? 127.5f / half : 0.f;
  // Adding 1.5 * 2^23 rounds to the nearest integer, which the low bits then hold.
  constexpr float kRound = 12582912.f;
  const float zero = (minus_lowest * inverse + kRound) - kRound;
  for (i = 0; i < size; ++i) {
    float q = x[i] * inverse + zero;
    q = q < 255.f ? q : 255.f;
    q = q > 0.f ? q : 0.f;
    out[i] = static_cast<uint8_t>(bits_of(q + kRound));
  }
  return {half / 127.5f, static_cast<int32_t>(zero)};
}

// z times the normal distribution's function, in absolute terms good to 3e-7 for |z| < 10 and to
// rounding beyond. With a = |z| that is max(z, 0) - a tail(a), where the logarithm of the tail is
// close to a polynomial: the coefficients are those of least error in a tail(a) on [0, 5.6], from
// where on that product is below 1e-7 and stays.
Simd<float> gelu(Simd<float> z) {
  using Vector = Simd<float>;
  constexpr float kLog2OfTail[] = {-0.999993086f,  -1.15120173f,    -0.458770961f,  -0.0534121022f,
                                   0.00808071531f, -0.00076921936f, 3.30927796e-05f};
  constexpr int kDegree = 6;
  const Vector zero = Vector::broadcast(0);
  const Vector positive = max(zero, z);
  const Vector minus_a =
      max(Vector::broadcast(-5.6f), sub(zero, add(positive, max(zero, sub(zero, z)))));
  const Vector a = sub(zero, minus_a);
  Vector log2_tail = Vector::broadcast(kLog2OfTail[kDegree]);
  for (int i = kDegree - 1; i >= 0; --i) {
    log2_tail = multiply_add(log2_tail, a, Vector::broadcast(kLog2OfTail[i]));
  }
  return multiply_add(minus_a, exp2<Precision::kFull>(log2_tail), positive);
}

// Outputs of the sums of rows [first, last) in the panel that begins at `column`.
void finish_panel(const PackedLinearParams& p, const RowScale* scales, const Panel& panel,
                  const Block& block, int64_t column, int64_t width, int64_t first, int64_t last) {
  using Vector = Simd<float>;
  const Vector zero = Vector::broadcast(0);
  float some[kPanel] = {};  // what a panel with fewer columns has to add, and its outputs
  for (int64_t row = first; row < last; ++row) {
    float* const out = p.y + row * p.columns + column;
    float* const y = width < kPanel ? some : out;
    const float* residual = advance(p.residual, row * p.residual_stride + column);
    if (residual != nullptr && width < kPanel) {
      for (int64_t i = 0; i < width; ++i) some[i] = residual[i];
      residual = some;
    }
    finish_row(p.format, block.values[row - first], advance(scales, row), panel,
               [&](int64_t i, Vector z) {
                 // max() gives the second where either is NaN.
                 if (p.activation == Activation::kRelu) z = max(zero, z);
                 if (p.activation == Activation::kGelu) z = gelu(z);
                 if (residual != nullptr) z = add(z, Vector::load(residual + i));
                 z.store(y + i);
               });
    for (int64_t i = 0; width < kPanel && i < width; ++i) out[i] = some[i];
  }
}

}  // namespace

template <typename T>
void convert_rows(WeightFormat format, const InputConversion& how, const T* x, int64_t x_stride,
                  int64_t rows, float* scratch, uint32_t* words, RowScale* scales) {
  const int64_t depth = how.depth;
  const bool is_float = format == WeightFormat::kFloat32;
  for (int64_t r = 0; r < rows; ++r, x += x_stride, words += how.stride) {
    const int64_t padded = how.steps * depth_per_word(format);
    float* row = is_float ? reinterpret_cast<float*>(words) : scratch;
    const float* h = row;
    if (how.eps >= 0) {
      const Moments m = moments(x, depth, how.eps);
      for (int64_t i = 0; i < depth; ++i) row[i] = (element(x, i) - m.mean) * m.rstd;
    } else if (sizeof(T) == sizeof(float) && !is_float && padded == depth) {
      h = reinterpret_cast<const float*>(x);
    } else {
      for (int64_t i = 0; i < depth; ++i) row[i] = element(x, i);
    }
    if (is_float) continue;
    for (int64_t i = depth; i < padded; ++i) row[i] = 0;
    if (format == WeightFormat::kBFloat16) {
      to_bfloat16(h, padded, words);
    } else {
      scales[r] = to_int8(h, padded, reinterpret_cast<uint8_t*>(words));
    }
  }
}

template void convert_rows(WeightFormat, const InputConversion&, const float*, int64_t, int64_t,
                           float*, uint32_t*, RowScale*);
template void convert_rows(WeightFormat, const InputConversion&, const BFloat16*, int64_t, int64_t,
                           float*, uint32_t*, RowScale*);
template void convert_rows(WeightFormat, const InputConversion&, const Half*, int64_t, int64_t,
                           float*, uint32_t*, RowScale*);

void packed_linear_panels(const PackedLinearParams& p, const InputRows& input, int64_t panel,
                          int64_t count, int64_t first, int64_t last) {
  const auto width = [&](int64_t column) {
    return p.columns - column < kPanel ? p.columns - column : kPanel;
  };
  float whole_bias[kPanel];  // only the last panel may be narrow
  Panel weights[kPanelGroup];
  Block blocks[kPanelGroup];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t column = (panel + i) * kPanel;
    weights[i] = with_whole_bias({p.words + column * p.steps, p.steps, advance(p.scales, column),
                                  advance(p.column_sums, column), advance(p.bias, column)},
                                 width(column), whole_bias);
  }
  multiply_chunk(p.format, input, first, last - first, weights, count, blocks);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t column = (panel + i) * kPanel;
    finish_panel(p, input.scales, weights[i], blocks[i], column, width(column), first, last);
  }
}

void normalise_rows(const OutputNorm& norm, float* y, int64_t columns, int64_t first,
                    int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    float* z = y + row * columns;
    const Moments m = moments(z, columns, norm.eps);
    for (int64_t i = 0; i < columns; ++i) {
      z[i] = (z[i] - m.mean) * m.rstd * norm.weight[i] + norm.bias[i];
    }
  }
}

}  // namespace pynar::PYNAR_ISA

#else

#include <algorithm>
#include <optional>

#include "common/operators.h"
#include "common/parallel.h"
#include "linear/host.h"

namespace pynar {
namespace {

constexpr const char* kName = "packed_linear";

}  // namespace

void packed_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scales,
                   const std::optional<Tensor>& column_sums, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual, const std::optional<Tensor>& norm_weight,
                   const std::optional<Tensor>& norm_bias, int64_t activation, double input_eps,
                   double output_eps, const Tensor& y) {
  const Check check(kName);
  check.dims("x", x, 2, "[N, K]");
  check.dtype("x", x, {kFloat32});
  check_cpu(check, "x", x);
  check_rows(check, "x", x);
  const int64_t rows = x.size(0);
  const int64_t depth = x.size(1);
  check.dims("y", y, 2, "[N, M]");
  check.dtype("y", y, {kFloat32});
  check_cpu(check, "y", y);
  check.contiguous("y", y);
  check.writable("y", y);
  const int64_t columns = y.size(1);
  const PackedView packed = view_packed(check, weight, scales, column_sums, depth, columns);
  check.shape("y", y, {rows, columns}, "rows of `x`, columns of `weight`");
  if (activation < 0 || activation > static_cast<int64_t>(Activation::kGelu)) {
    check.fail("activation", "be in [0, 2]", std::to_string(activation));
  }
  const auto optional_vector = [&](const char* name,
                                   const std::optional<Tensor>& tensor) -> const float* {
    if (!tensor) return nullptr;
    check.shape(name, *tensor, {columns}, "columns of `weight`");
    check.dtype(name, *tensor, {kFloat32});
    check_cpu(check, name, *tensor);
    check.contiguous(name, *tensor);
    return tensor->data<float>();
  };
  PackedLinearParams p{};
  p.words = packed.words;
  p.scales = packed.scales;
  p.column_sums = packed.column_sums;
  p.bias = optional_vector("bias", bias);
  p.y = y.data<float>();
  if (residual) {
    check.shape("residual", *residual, {rows, columns}, "rows of `x`, columns of `weight`");
    check.dtype("residual", *residual, {kFloat32});
    check_cpu(check, "residual", *residual);
    check_rows(check, "residual", *residual);
    p.residual = residual->data<float>();
    p.residual_stride = residual->stride(0);
  }
  OutputNorm norm{};
  norm.weight = optional_vector("norm_weight", norm_weight);
  norm.bias = optional_vector("norm_bias", norm_bias);
  norm.eps = static_cast<float>(output_eps);
  if (norm_weight.has_value() != norm_bias.has_value()) {
    check.fail("norm_bias", "be given with `norm_weight`, and only then",
               norm_bias ? "it alone" : "None");
  }
  p.rows = rows;
  p.columns = columns;
  p.steps = packed.steps;
  p.format = packed.format;
  p.activation = static_cast<Activation>(activation);
  if (rows == 0 || columns == 0) return;

  const auto convert = PYNAR_SELECT_DOT_KERNEL(convert_rows<float>);
  const auto multiply = PYNAR_SELECT_DOT_KERNEL(packed_linear_panels);
  const auto normalise = PYNAR_SELECT_DOT_KERNEL(normalise_rows);
  const float* data = x.data<float>();
  const bool as_it_is = p.format == WeightFormat::kFloat32 && input_eps < 0;
  const InputWords words(as_it_is ? 0 : rows, p.steps, p.format);
  const InputConversion how{depth, p.steps, words.stride(), static_cast<float>(input_eps)};
  const InputRows input =
      as_it_is ? InputRows{reinterpret_cast<const uint32_t*>(data), nullptr, x.stride(0)}
               : words.rows();
  const int64_t chunks = div_up(rows, kChunkRows);
  // Every thread gets some groups, or single panels where there are too few.
  const bool grouped =
      strip_columns() < kPanel && packed.steps > 2 * kStripSteps && rows > kChunkRows / 2 &&
      (free_threads() == 1 || packed.panels * chunks >= 4 * kPanelGroup * free_threads());
  const int64_t groups = grouped ? div_up(packed.panels, kPanelGroup) : packed.panels;
  const int64_t tasks = groups * chunks;
  // Below some twenty microseconds a second thread comes too late.
  const int64_t work = rows * packed.panels * p.steps;
  parallel_phases(
      work < (1 << 12) ? 1 : tasks,
      [&](const Part& part) {
        if (!as_it_is) {
          const auto [first, last] = part.of(rows);
          convert(p.format, how, data + first * x.stride(0), x.stride(0), last - first,
                  words.scratch(part.index), words.words(first), words.scales(first));
        }
      },
      [&](const Part& part) {
        // A thread keeps to a group of panels while it goes through the chunks of rows.
        const auto [first, last] = part.of(tasks);
        for (int64_t task = first; task < last; ++task) {
          const int64_t begin = task % chunks * kChunkRows;
          const int64_t group = task / chunks;
          const int64_t panel = packed.panels * group / groups;
          multiply(p, input, panel, packed.panels * (group + 1) / groups - panel, begin,
                   std::min(rows, begin + kChunkRows));
        }
      },
      [&](const Part& part) {
        if (norm.weight != nullptr) {
          const auto [first, last] = part.of(rows);
          normalise(norm, p.y, columns, first, last);
        }
      });
}

}  // namespace pynar

#endif
