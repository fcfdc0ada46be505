// What the host functions of the linear operators share: tensors in memory of their own, views of
// packed weights, scratch for converted input.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <optional>

#include "common/parallel.h"
#include "common/tensor.h"
#include "linear/panel.h"

namespace pynar {

inline void check_cpu(const Check& check, const char* name, const Tensor& tensor) {
  if (tensor.device().type != dlpack::kCpu) {
    check.fail(name, "be on cpu, where packed weights are used", to_string(tensor.device()));
  }
}

// Rows may lie apart; the elements of one may not.
inline void check_rows(const Check& check, const char* name, const Tensor& tensor) {
  if (tensor.size(1) > 1 && tensor.stride(1) != 1) {
    check.fail(name, "have contiguous rows", "stride " + std::to_string(tensor.stride(1)));
  }
}

// A tensor in memory of our own. It stays where it is, since the tensor points into it.
class View {
 public:
  View(void* data, DataType dtype, std::initializer_list<int64_t> shape,
       std::initializer_list<int64_t> strides) {
    std::copy(shape.begin(), shape.end(), shape_);
    std::copy(strides.begin(), strides.end(), strides_);
    const auto dims = static_cast<int32_t>(shape.size());
    tensor_ = {{data, {dlpack::kCpu, 0}, dims, dtype, shape_, strides_, 0}, nullptr, false};
  }
  View(float* data, int64_t rows, int64_t columns)
      : View(data, kFloat32, {rows, columns}, {columns, 1}) {}
  View(const View&) = delete;
  View& operator=(const View&) = delete;

  operator const Tensor&() const { return tensor_; }

 private:
  static constexpr int kMaxDims = 4;
  int64_t shape_[kMaxDims];
  int64_t strides_[kMaxDims];
  Tensor tensor_;
};

inline WeightFormat format_of(DataType dtype) {
  return dtype == kFloat32    ? WeightFormat::kFloat32
         : dtype == kBFloat16 ? WeightFormat::kBFloat16
                              : WeightFormat::kInt8;
}

// Of a packed weight's strips, for the instruction set in use.
inline int64_t strip_columns() {
  return isa() >= Isa::kAvx512 ? kPanel : kNarrowStrip;
}

struct PackedView {
  const uint32_t* words;
  const float* scales;
  const int32_t* column_sums;
  WeightFormat format;
  int64_t panels;
  int64_t steps;
};

// `weight` [strips, steps, columns of a strip, depth per word] in fp32, bf16 or int8, of so many
// columns.
inline PackedView view_packed(const Check& check, const Tensor& weight,
                              const std::optional<Tensor>& scales,
                              const std::optional<Tensor>& column_sums, int64_t depth,
                              int64_t columns) {
  check.dims("weight", weight, 4, "[strips, steps, columns of a strip, depth per word]");
  check.dtype("weight", weight, {kFloat32, kBFloat16, kInt8});
  check_cpu(check, "weight", weight);
  check.contiguous("weight", weight);
  const WeightFormat format = format_of(weight.dtype());
  const int64_t per_word = depth_per_word(format);
  const int64_t panels = div_up(columns, kPanel);
  const int64_t strip = strip_columns();
  if (weight.size(2) != strip) {
    check.fail("weight",
               "be packed for " + std::string(isa_name(isa())) + ", in strips of " +
                   std::to_string(strip) + " columns",
               std::to_string(weight.size(2)));
  }
  check.shape("weight", weight, {panels * kPanel / strip, div_up(depth, per_word), strip, per_word},
              "strips for all columns, steps for the depth of `x`");
  PackedView view{weight.data<uint32_t>(), nullptr, nullptr, format, panels, weight.size(1)};
  if (format == WeightFormat::kInt8) {
    if (depth > kInt8Depth) {
      check.fail("x", "have at most " + std::to_string(kInt8Depth) + " columns with an int8 weight",
                 std::to_string(depth));
    }
    if (!scales || !column_sums) check.fail("scales", "be given for an int8 weight", "None");
    check.shape("scales", *scales, {panels * kPanel}, "columns, padded to panels");
    check.dtype("scales", *scales, {kFloat32});
    check_cpu(check, "scales", *scales);
    check.contiguous("scales", *scales);
    check.shape("column_sums", *column_sums, {panels * kPanel}, "columns, padded to panels");
    check.dtype("column_sums", *column_sums, {kInt32});
    check_cpu(check, "column_sums", *column_sums);
    check.contiguous("column_sums", *column_sums);
    view.scales = scales->data<float>();
    view.column_sums = column_sums->data<int32_t>();
  }
  return view;
}

// Rows of input as words, and a row of scratch for each thread.
class InputWords {
 public:
  InputWords(int64_t rows, int64_t steps, WeightFormat format)
      : stride_(words_per_step(format) * steps),
        row_(steps * depth_per_word(format)),
        words_(std::make_unique_for_overwrite<uint32_t[]>(rows * stride_)),
        scratch_(std::make_unique_for_overwrite<float[]>(max_threads() * row_)),
        scales_(std::make_unique_for_overwrite<RowScale[]>(rows)) {}

  float* scratch(int64_t thread) const { return scratch_.get() + thread * row_; }
  uint32_t* words(int64_t row) const { return words_.get() + row * stride_; }
  int64_t stride() const { return stride_; }
  RowScale* scales(int64_t row) const { return scales_.get() + row; }
  InputRows rows() const { return {words_.get(), scales_.get(), stride_}; }

 private:
  int64_t stride_;
  int64_t row_;
  std::unique_ptr<uint32_t[]> words_;
  std::unique_ptr<float[]> scratch_;
  std::unique_ptr<RowScale[]> scales_;
};

}  // namespace pynar
