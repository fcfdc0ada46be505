// The operators that are chains of actnorm and head-wise products, or none of them: checks, and the
// choice of an implementation.
#include <optional>

#include "common/operators.h"
#include "flow/flow_arguments.h"
#include "flow/flow_linear.h"
#ifdef PYNAR_WITH_CUDA
#include "common/cuda_launch.h"
#endif

namespace pynar {
namespace {

constexpr const char* kChannels = "channels of `x`";

void check_result(const Check& check, const char* name, const Tensor& y, const Tensor& x,
                  std::initializer_list<int64_t> shape) {
  check.shape(name, y, shape, "that of `x`");
  check.dtype(name, y, {x.dtype()});
  check.device(name, y, "x", x);
  check_channels(check, name, y);
}

void check_parameter(const Check& check, const char* name, const Tensor& parameter,
                     std::initializer_list<int64_t> shape, const char* meaning, const Tensor& x) {
  check.shape(name, parameter, shape, meaning);
  check.dtype(name, parameter, {x.dtype() == kFloat64 ? kFloat64 : kFloat32});
  check.device(name, parameter, "x", x);
  check.contiguous(name, parameter);
}

template <typename T>
FlowRows<T> plain_rows(const Tensor& x) {
  return {x.data<T>(), nullptr, 1, x.size(2), x.stride(0), x.stride(1), 0, 0};
}

// The sizes of a map that acts on `squeeze` steps at a time, which lie apart in x, or in y in the
// inverse direction.
struct MapSizes {
  int64_t batch, steps, channels, squeeze;
  bool inverse;

  MapSizes(const Check& check, const Tensor& x, const Tensor& lengths, int64_t squeeze,
           bool inverse)
      : squeeze(squeeze), inverse(inverse) {
    if (squeeze < 1) check.fail("squeeze", "be at least 1", std::to_string(squeeze));
    check_flow_steps(check, "x", x, lengths, inverse ? squeeze : 1);
    batch = x.size(0);
    steps = inverse ? x.size(1) : x.size(1) / squeeze;
    channels = inverse ? x.size(2) : x.size(2) * squeeze;
    const int64_t divided = inverse ? x.size(2) : x.size(1);
    if (divided % squeeze != 0) {
      check.fail("x",
                 "have a multiple of " + std::to_string(squeeze) +
                     (inverse ? " channels" : " steps") + " (`squeeze`)",
                 std::to_string(divided));
    }
  }

  // Of x, or the gradient by it.
  void check_input(const Check& check, const char* name, const Tensor& tensor,
                   const Tensor& x) const {
    check_side(check, name, tensor, x, !inverse);
  }
  // Of y, or the gradient by it.
  void check_output(const Check& check, const char* name, const Tensor& tensor,
                    const Tensor& x) const {
    check_side(check, name, tensor, x, inverse);
  }
  template <typename T>
  FlowRows<T> input(const Tensor& x) const {
    return rows<T>(x, inverse ? 1 : squeeze);
  }
  template <typename T>
  FlowRows<T> output(const Tensor& y) const {
    return rows<T>(y, inverse ? squeeze : 1);
  }
  template <typename T>
  FlowLinearParams<T> params(const Tensor& lengths) const {
    FlowLinearParams<T> p{};
    p.lengths = lengths.data<int64_t>();
    p.lengths_stride = lengths.stride(0);
    p.batch = batch;
    p.steps = steps;
    p.channels = channels;
    p.inverse = inverse;
    p.joined = squeeze;
    return p;
  }

 private:
  void check_side(const Check& check, const char* name, const Tensor& tensor, const Tensor& x,
                  bool in_pieces) const {
    const int64_t pieces = in_pieces ? squeeze : 1;
    check_result(check, name, tensor, x, {batch, steps * pieces, channels / pieces});
  }
  template <typename T>
  static FlowRows<T> rows(const Tensor& x, int64_t pieces) {
    return {x.data<T>(), nullptr, 1,      x.size(2) * pieces, x.stride(0), x.stride(1) * pieces,
            0,           0,       pieces, x.stride(1)};
  }
};

template <typename T>
FlowRows<T> squeezed_rows(const Tensor& main, const Tensor& dropped, int64_t factor) {
  return {main.data<T>(),        dropped.data<T>(), factor,
          main.size(2) / factor, main.stride(0),    main.stride(1),
          dropped.stride(0),     dropped.stride(1)};
}

template <typename T>
FlowLinearParams<T> sized_params(const Tensor& x, const Tensor& lengths) {
  FlowLinearParams<T> p{};
  p.lengths = lengths.data<int64_t>();
  p.lengths_stride = lengths.stride(0);
  p.batch = x.size(0);
  p.steps = x.size(1);
  p.channels = x.size(2);
  return p;
}

// A GPU holds two states of a step in shared memory.
template <typename T>
void check_fits(const Check& check, const FlowLinearParams<T>& p) {
  const int64_t most = kFlowStateBytes / static_cast<int64_t>(2 * sizeof(accumulation_t<T>));
  if (p.channels > most) {
    check.fail("x", "have at most " + std::to_string(most) + " channels on cuda",
               std::to_string(p.channels));
  }
}

template <typename T>
std::optional<LaunchPlan> run_forward(const Check& check, const FlowLinearParams<T>& params,
                                      const Tensor& x) {
  if (x.device().type == dlpack::kCpu) {
    flow_linear_cpu(params);
    return std::nullopt;
  }
  if (params.matrices > 0) check_fits(check, params);
#ifdef PYNAR_WITH_CUDA
  if (!use_nvrtc()) {
    const DeviceGuard guard(x.device().index);
    flow_linear_cuda(params, x.stream());
    return std::nullopt;
  }
#endif
  LaunchPlan plan("flow/flow_linear.cuh", params, x);
  plan.add<T>(params.matrices > 0 ? "flow_linear_steps" : "flow_copy", kFlowThreads,
              flow_linear_blocks(params));
  return plan;
}

template <typename T>
std::optional<LaunchPlan> run_backward(const Check& check, FlowLinearBackwardParams<T>& params,
                                       const Tensor& x, const std::optional<Tensor>& workspace) {
  using A = accumulation_t<T>;
  const FlowLinearParams<T>& p = params.forward;
  if (x.device().type == dlpack::kCpu) {
    flow_linear_backward_cpu(params);
    return std::nullopt;
  }
  check_fits(check, p);
  if (!workspace) check.fail("workspace", "be given on cuda", "None");
  const int64_t size =
      flow_linear_backward_workspace(p.batch, p.steps, p.channels, p.matrices, p.dim, sizeof(A));
  check_parameter(check, "workspace", *workspace, {size}, "numbers", x);
  const int64_t parts = flow_parts(p.batch * p.steps, p.channels, sizeof(A));
  params.partials = workspace->data<A>();
  params.states = params.partials + parts * flow_sums(p.matrices, p.dim, p.channels);
#ifdef PYNAR_WITH_CUDA
  if (!use_nvrtc()) {
    const DeviceGuard guard(x.device().index);
    flow_linear_backward_cuda(params, x.stream());
    return std::nullopt;
  }
#endif
  LaunchPlan plan("flow/flow_linear.cuh", params, x);
  if (parts > 0) plan.add<T>("flow_linear_gradient", kFlowThreads, parts);
  plan.add<T>("flow_linear_finish", kFlowThreads, flow_finish_blocks(p));
  return plan;
}

}  // namespace

void check_channels(const Check& check, const char* name, const Tensor& x) {
  if (x.numel() > 0 && x.size(2) > 1 && x.stride(2) != 1) {
    check.fail(name, "have neighbouring channels", "stride " + std::to_string(x.stride(2)));
  }
}

void check_flow_lengths(const Check& check, const Tensor& lengths, const char* name,
                        const Tensor& x, int64_t factor) {
  if (x.device().type != dlpack::kCpu && x.device().type != dlpack::kCuda) {
    check.fail(name, "be on cpu or cuda", to_string(x.device()));
  }
  check.shape("lengths", lengths, {x.size(0)}, ("batch of `" + std::string(name) + "`").c_str());
  check.dtype("lengths", lengths, {kInt64});
  check.device("lengths", lengths, name, x);
  if (x.device().type != dlpack::kCpu) return;
  for (int64_t b = 0; b < x.size(0); ++b) {
    const int64_t length = lengths.data<int64_t>()[b * lengths.stride(0)];
    if (length >= 0 && length <= x.size(1) * factor) continue;
    check.fail("lengths", "have values in [0, " + std::to_string(x.size(1) * factor) + "]",
               std::to_string(length) + " (sentence " + std::to_string(b) + ")");
  }
}

void check_flow_steps(const Check& check, const char* name, const Tensor& x, const Tensor& lengths,
                      int64_t factor) {
  check.dims(name, x, 3, "[B, T, C]");
  check.dtype(name, x, {kFloat32, kBFloat16, kFloat16, kFloat64});
  if (x.size(2) == 0) check.fail(name, "have at least one channel", "0");
  check_channels(check, name, x);
  check_flow_lengths(check, lengths, name, x, factor);
}

int64_t flow_linear_backward_workspace(int64_t batch, int64_t steps, int64_t channels,
                                       int64_t matrices, int64_t dim, int64_t element_size) {
  // Too many channels are an error, which is raised later.
  const int64_t rows = channels > 0 ? flow_block_rows(channels, element_size) : 0;
  if (rows == 0) return 0;
  const int64_t parts = flow_parts(batch * steps, channels, element_size);
  return parts * (flow_sums(matrices, dim, channels) + (matrices + 1) * rows * channels);
}

std::optional<LaunchPlan> actnorm(const Tensor& x, const Tensor& lengths, const Tensor& log_scale,
                                  const Tensor& bias, bool inverse, int64_t squeeze,
                                  const Tensor& y) {
  const Check check("actnorm");
  const MapSizes sizes(check, x, lengths, squeeze, inverse);
  check_parameter(check, "log_scale", log_scale, {sizes.channels}, kChannels, x);
  check_parameter(check, "bias", bias, {sizes.channels}, kChannels, x);
  sizes.check_output(check, "y", y, x);
  if (x.numel() == 0) return std::nullopt;
  return dispatch_floating(x.dtype(), [&]<typename T>() -> std::optional<LaunchPlan> {
    using A = accumulation_t<T>;
    FlowLinearParams<T> params = sizes.params<T>(lengths);
    params.x = sizes.input<const T>(x);
    params.y = sizes.output<T>(y);
    params.log_scale = log_scale.data<A>();
    params.bias = bias.data<A>();
    return run_forward(check, params, x);
  });
}

std::optional<LaunchPlan> actnorm_backward(const Tensor& grad_y, const Tensor& x,
                                           const Tensor& lengths, const Tensor& log_scale,
                                           const Tensor& bias, bool inverse, int64_t squeeze,
                                           const Tensor& grad_x, const Tensor& grad_log_scale,
                                           const Tensor& grad_bias,
                                           const std::optional<Tensor>& workspace) {
  const Check check("actnorm_backward");
  const MapSizes sizes(check, x, lengths, squeeze, inverse);
  sizes.check_output(check, "grad_y", grad_y, x);
  sizes.check_input(check, "grad_x", grad_x, x);
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"log_scale", log_scale},
                                     {"bias", bias},
                                     {"grad_log_scale", grad_log_scale},
                                     {"grad_bias", grad_bias}}) {
    check_parameter(check, name, tensor, {sizes.channels}, kChannels, x);
  }
  return dispatch_floating(x.dtype(), [&]<typename T>() -> std::optional<LaunchPlan> {
    using A = accumulation_t<T>;
    FlowLinearBackwardParams<T> params{};
    params.forward = sizes.params<T>(lengths);
    params.forward.x = sizes.input<const T>(x);
    params.forward.log_scale = log_scale.data<A>();
    params.forward.bias = bias.data<A>();
    params.grad_y = sizes.output<const T>(grad_y);
    params.grad_x = sizes.input<T>(grad_x);
    params.grad_log_scale = grad_log_scale.data<A>();
    params.grad_bias = grad_bias.data<A>();
    return run_backward(check, params, x, workspace);
  });
}

std::optional<LaunchPlan> squeeze(const Tensor& x, const Tensor& lengths, int64_t factor,
                                  const Tensor& y, const Tensor& dropped) {
  const Check check("squeeze");
  check_flow_steps(check, "x", x, lengths);
  if (factor < 1) check.fail("factor", "be at least 1", std::to_string(factor));
  check.dims("y", y, 3, "[B, T, f C]");
  const int64_t kept = y.size(2) / factor;
  check.shape("y", y, {x.size(0), (x.size(1) + factor - 1) / factor, factor * kept},
              "steps of `x`, joined");
  check.shape("dropped", dropped, {x.size(0), x.size(1), x.size(2) - kept}, "what is not kept");
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Tensor&>{"y", y}, {"dropped", dropped}}) {
    check.dtype(name, tensor, {x.dtype()});
    check.device(name, tensor, "x", x);
    check.contiguous(name, tensor);
  }
  if (x.numel() == 0) return std::nullopt;
  return dispatch_floating(x.dtype(), [&]<typename T>() -> std::optional<LaunchPlan> {
    FlowLinearParams<T> params = sized_params<T>(x, lengths);
    params.x = plain_rows<const T>(x);
    params.y = squeezed_rows<T>(y, dropped, factor);
    return run_forward(check, params, x);
  });
}

std::optional<LaunchPlan> unsqueeze(const std::string& name, const Tensor& y, const Tensor& dropped,
                                    const Tensor& lengths, int64_t factor, const Tensor& x) {
  const Check check(name.c_str());
  check.dims("y", y, 3, "[B, T, f C]");
  check.dtype("y", y, {kFloat32, kBFloat16, kFloat16, kFloat64});
  if (factor < 1) check.fail("factor", "be at least 1", std::to_string(factor));
  if (y.size(2) == 0 || y.size(2) % factor != 0) {
    check.fail("y", "have a multiple of " + std::to_string(factor) + " channels (`factor`)",
               std::to_string(y.size(2)));
  }
  check.dims("dropped", dropped, 3, "[B, T, D]");
  const int64_t batch = dropped.size(0);
  const int64_t steps = dropped.size(1);
  const int64_t kept = y.size(2) / factor;
  check.shape("y", y, {batch, (steps + factor - 1) / factor, factor * kept},
              "batch and steps of `dropped`, joined");
  check.dtype("dropped", dropped, {y.dtype()});
  check.device("dropped", dropped, "y", y);
  check_channels(check, "y", y);
  check_channels(check, "dropped", dropped);
  check.shape("x", x, {batch, steps, kept + dropped.size(2)}, "steps taken apart");
  check.dtype("x", x, {y.dtype()});
  check_channels(check, "x", x);
  check.device("x", x, "y", y);
  check_flow_lengths(check, lengths, "y", x);
  if (x.numel() == 0) return std::nullopt;
  return dispatch_floating(x.dtype(), [&]<typename T>() -> std::optional<LaunchPlan> {
    FlowLinearParams<T> params = sized_params<T>(x, lengths);
    params.x = squeezed_rows<const T>(y, dropped, factor);
    params.y = plain_rows<T>(x);
    return run_forward(check, params, x);
  });
}

namespace {

// The operator's arguments, but for where results go.
template <typename T>
FlowLinearParams<T> chain_params(const MapSizes& sizes, const Tensor& x, const Tensor& lengths,
                                 const std::optional<Tensor>& log_scale,
                                 const std::optional<Tensor>& bias, const Tensor& weight,
                                 int64_t layout) {
  using A = accumulation_t<T>;
  FlowLinearParams<T> params = sizes.params<T>(lengths);
  params.x = sizes.input<const T>(x);
  params.log_scale = log_scale ? log_scale->data<A>() : nullptr;
  params.bias = bias ? bias->data<A>() : nullptr;
  params.weight = weight.data<A>();
  params.matrices = weight.size(0);
  params.dim = weight.size(1);
  params.layout = static_cast<FlowLayout>(layout);
  // No step is no map, not actnorm.
  if (params.matrices == 0) params.log_scale = nullptr;
  return params;
}

MapSizes check_chain(const Check& check, const Tensor& x, const Tensor& lengths,
                     const std::optional<Tensor>& log_scale, const std::optional<Tensor>& bias,
                     const Tensor& weight, int64_t layout, bool inverse, int64_t squeeze) {
  const MapSizes sizes(check, x, lengths, squeeze, inverse);
  check.dims("weight", weight, 3, "[K, d, d]");
  const int64_t matrices = weight.size(0);
  const int64_t dim = weight.size(1);
  check_parameter(check, "weight", weight, {matrices, dim, dim}, "a square matrix a step", x);
  if (dim == 0 || sizes.channels % dim != 0) {
    check.fail(
        "weight",
        "be of a size that divides the " + std::to_string(sizes.channels) + " channels of `x`",
        std::to_string(dim));
  }
  const char* meaning = "steps of `weight`, channels of `x`";
  if (log_scale.has_value() != bias.has_value()) check.fail("bias", "come with `log_scale`", "one");
  if (log_scale) {
    check_parameter(check, "log_scale", *log_scale, {matrices, sizes.channels}, meaning, x);
    check_parameter(check, "bias", *bias, {matrices, sizes.channels}, meaning, x);
  }
  if (layout < 0 || layout > 2) check.fail("layout", "be in [0, 2]", std::to_string(layout));
  return sizes;
}

}  // namespace

std::optional<LaunchPlan> flow_linear(const std::string& name, const Tensor& x,
                                      const Tensor& lengths, const std::optional<Tensor>& log_scale,
                                      const std::optional<Tensor>& bias, const Tensor& weight,
                                      int64_t layout, bool inverse, int64_t squeeze,
                                      const Tensor& y) {
  const Check check(name.c_str());
  const MapSizes sizes =
      check_chain(check, x, lengths, log_scale, bias, weight, layout, inverse, squeeze);
  sizes.check_output(check, "y", y, x);
  if (x.numel() == 0) return std::nullopt;
  return dispatch_floating(x.dtype(), [&]<typename T>() -> std::optional<LaunchPlan> {
    FlowLinearParams<T> params =
        chain_params<T>(sizes, x, lengths, log_scale, bias, weight, layout);
    params.y = sizes.output<T>(y);
    return run_forward(check, params, x);
  });
}

std::optional<LaunchPlan> flow_linear_backward(
    const std::string& name, const Tensor& grad_y, const Tensor& x, const Tensor& lengths,
    const std::optional<Tensor>& log_scale, const std::optional<Tensor>& bias, const Tensor& weight,
    int64_t layout, bool inverse, int64_t squeeze, const Tensor& grad_x,
    const Tensor& grad_log_scale, const Tensor& grad_bias, const Tensor& grad_weight,
    const std::optional<Tensor>& workspace) {
  const std::string full_name = name + "_backward";
  const Check check(full_name.c_str());
  const MapSizes sizes =
      check_chain(check, x, lengths, log_scale, bias, weight, layout, inverse, squeeze);
  sizes.check_output(check, "grad_y", grad_y, x);
  sizes.check_input(check, "grad_x", grad_x, x);
  const int64_t matrices = weight.size(0);
  const int64_t dim = weight.size(1);
  const int64_t normed = log_scale ? matrices : 0;
  check_parameter(check, "grad_log_scale", grad_log_scale, {normed, sizes.channels}, "by step", x);
  check_parameter(check, "grad_bias", grad_bias, {normed, sizes.channels}, "by step", x);
  check_parameter(check, "grad_weight", grad_weight, {matrices, dim, dim}, "that of `weight`", x);
  return dispatch_floating(x.dtype(), [&]<typename T>() -> std::optional<LaunchPlan> {
    using A = accumulation_t<T>;
    FlowLinearBackwardParams<T> params{};
    params.forward = chain_params<T>(sizes, x, lengths, log_scale, bias, weight, layout);
    params.grad_y = sizes.output<const T>(grad_y);
    params.grad_x = sizes.input<T>(grad_x);
    params.grad_log_scale = grad_log_scale.data<A>();
    params.grad_bias = grad_bias.data<A>();
    params.grad_weight = grad_weight.data<A>();
    return run_backward(check, params, x, workspace);
  });
}

}  // namespace pynar
