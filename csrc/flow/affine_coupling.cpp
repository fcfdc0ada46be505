#include "flow/affine_coupling.h"

#include "common/cpu.h"

namespace pynar {

PYNAR_DECLARE_KERNEL(template <typename T> accumulation_t<T> couple_row(
    const T* z, const T* shift, const T* raw_scale, int64_t count, bool inverse, T* y))
PYNAR_DECLARE_KERNEL(template <typename T> void couple_row_backward(
    const T* grad_y, const T* x, const T* raw_scale, accumulation_t<T> grad_logdet, int64_t count,
    bool inverse, T* grad_z, T* grad_shift, T* grad_raw_scale))

}  // namespace pynar

#ifdef PYNAR_ISA

#include "common/simd.h"

namespace pynar::PYNAR_ISA {
namespace {

// Channels are taken this many at a time, through arrays of the accumulation type: plain loops,
// which the compiler turns into vectors.
constexpr int kBlock = 64;

template <typename T>
inline void load_block(const T* x, int64_t count, accumulation_t<T>* out) {
  using Vector = Simd<accumulation_t<T>>;
  if (count == kBlock) {
    for (int i = 0; i < kBlock; i += Vector::kLanes) Vector::load(x + i).store(out + i);
  } else {
    for (int64_t i = 0; i < kBlock; ++i) {
      out[i] = i < count ? to_accumulation(x[i]) : accumulation_t<T>(0);
    }
  }
}

template <typename T>
inline void store_block(const accumulation_t<T>* x, int64_t count, T* out) {
  using Vector = Simd<accumulation_t<T>>;
  if (count == kBlock) {
    for (int i = 0; i < kBlock; i += Vector::kLanes) Vector::load(x + i).store(out + i);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = from_accumulation<T>(x[i]);
  }
}

// With v = raw_scale + 2 and t = exp(-|v|), the sigmoid of v is 1 / (1 + t) or t / (1 + t), and
// nothing overflows.
template <typename A>
struct Sigmoid {
  A v[kBlock];
  A t[kBlock];

  explicit Sigmoid(const A* raw_scale) {
    using Vector = Simd<A>;
    for (int i = 0; i < kBlock; ++i) v[i] = raw_scale[i] + A(2);
    for (int i = 0; i < kBlock; ++i) t[i] = (v[i] < 0 ? v[i] : -v[i]) * kLog2E<A>;
    for (int i = 0; i < kBlock; i += Vector::kLanes) {
      exp2<Precision::kFull>(Vector::load(t + i)).store(t + i);
    }
  }

  A value(int i) const { return (v[i] < 0 ? t[i] : A(1)) / (A(1) + t[i]); }
  A rest(int i) const { return (v[i] < 0 ? A(1) : t[i]) / (A(1) + t[i]); }
  A reciprocal(int i) const { return (A(1) + t[i]) / (v[i] < 0 ? t[i] : A(1)); }

  // The sum of the logarithms is that of min(v, 0) less the logarithm of one product, whose factors
  // lie between 1 and 2.
  A log_sum(int64_t count) const {
    constexpr int kLanes = 8;
    A product[kLanes];
    A sum[kLanes];
    for (int l = 0; l < kLanes; ++l) product[l] = 1;
    for (int l = 0; l < kLanes; ++l) sum[l] = 0;
    for (int i = 0; i < kBlock; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        product[l] *= i + l < count ? A(1) + t[i + l] : A(1);
        sum[l] += i + l < count && !(v[i + l] > 0) ? v[i + l] : A(0);
      }
    }
    double all = 1;
    A below = 0;
    for (int l = 0; l < kLanes; ++l) all *= static_cast<double>(product[l]);
    for (int l = 0; l < kLanes; ++l) below += sum[l];
    return below - static_cast<A>(__builtin_log(all));
  }
};

}  // namespace

template <typename T>
accumulation_t<T> couple_row(const T* z, const T* shift, const T* raw_scale, int64_t count,
                             bool inverse, T* y) {
  using A = accumulation_t<T>;
  A sum = 0;
  for (int64_t c = 0; c < count; c += kBlock) {
    const int64_t some = count - c < kBlock ? count - c : kBlock;
    A x[kBlock];
    A b[kBlock];
    A r[kBlock];
    load_block(z + c, some, x);
    load_block(shift + c, some, b);
    load_block(raw_scale + c, some, r);
    const Sigmoid<A> scale(r);
    if (inverse) {
      for (int i = 0; i < kBlock; ++i) x[i] = (x[i] - b[i]) * scale.reciprocal(i);
    } else {
      for (int i = 0; i < kBlock; ++i) x[i] = x[i] * scale.value(i) + b[i];
    }
    store_block(x, some, y + c);
    sum += scale.log_sum(some);
  }
  return inverse ? -sum : sum;
}

template <typename T>
void couple_row_backward(const T* grad_y, const T* x, const T* raw_scale,
                         accumulation_t<T> grad_logdet, int64_t count, bool inverse, T* grad_z,
                         T* grad_shift, T* grad_raw_scale) {
  using A = accumulation_t<T>;
  for (int64_t c = 0; c < count; c += kBlock) {
    const int64_t some = count - c < kBlock ? count - c : kBlock;
    A g[kBlock];
    A h[kBlock];
    A r[kBlock];
    load_block(grad_y + c, some, g);
    load_block(x + c, some, h);
    load_block(raw_scale + c, some, r);
    const Sigmoid<A> scale(r);
    if (inverse) {
      for (int i = 0; i < kBlock; ++i) r[i] = -(g[i] * h[i] + grad_logdet) * scale.rest(i);
      for (int i = 0; i < kBlock; ++i) h[i] = g[i] * scale.reciprocal(i);
      for (int i = 0; i < kBlock; ++i) g[i] = -h[i];
    } else {
      for (int i = 0; i < kBlock; ++i) {
        const A s = scale.value(i);
        r[i] = (g[i] * h[i] * s + grad_logdet) * scale.rest(i);
        h[i] = g[i] * s;
      }
    }
    store_block(h, some, grad_z + c);
    store_block(g, some, grad_shift + c);
    store_block(r, some, grad_raw_scale + c);
  }
}

#define PYNAR_COUPLE(T)                                                                       \
  template accumulation_t<T> couple_row(const T*, const T*, const T*, int64_t, bool, T*);     \
  template void couple_row_backward(const T*, const T*, const T*, accumulation_t<T>, int64_t, \
                                    bool, T*, T*, T*);

PYNAR_COUPLE(float)
PYNAR_COUPLE(BFloat16)
PYNAR_COUPLE(Half)
#if !defined(__AVX2__)
PYNAR_COUPLE(double)
#endif

}  // namespace pynar::PYNAR_ISA

#else

#include <algorithm>
#include <optional>

#include "common/operators.h"
#include "common/parallel.h"
#include "flow/flow_arguments.h"
#ifdef PYNAR_WITH_CUDA
#include "common/cuda_launch.h"
#endif

namespace pynar {
namespace {

// A step is some tens of nanoseconds for 64 channels.
int64_t coupling_grain(int64_t channels) {
  return 1 + (1 << 14) / channels;
}

template <typename T>
void affine_coupling_cpu(const AffineCouplingParams<T>& p) {
  const auto couple_row = PYNAR_SELECT_FLOW_KERNEL(couple_row<T>);
  parallel_for(p.batch * p.steps, coupling_grain(p.channels), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / p.steps;
      const int64_t t = i % p.steps;
      T* y = p.y + i * p.channels;
      if (t < p.lengths[b * p.lengths_stride]) {
        p.by_step[i] = couple_row(p.z.row(b, t), p.shift.row(b, t), p.raw_scale.row(b, t),
                                  p.channels, p.inverse != 0, y);
      } else {
        std::fill_n(y, p.channels, T{});
      }
    }
  });
  for (int64_t b = 0; b < p.batch; ++b) {
    accumulation_t<T> sum = 0;
    for (int64_t t = 0; t < p.lengths[b * p.lengths_stride]; ++t) sum += p.by_step[b * p.steps + t];
    p.logdet[b] = sum;
  }
}

template <typename T>
void affine_coupling_backward_cpu(const AffineCouplingBackwardParams<T>& p) {
  const auto couple_row_backward = PYNAR_SELECT_FLOW_KERNEL(couple_row_backward<T>);
  parallel_for(p.batch * p.steps, coupling_grain(p.channels), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / p.steps;
      const int64_t t = i % p.steps;
      const int64_t at = i * p.channels;
      if (t < p.lengths[b * p.lengths_stride]) {
        couple_row_backward(p.grad_y.row(b, t), p.x.row(b, t), p.raw_scale.row(b, t),
                            p.grad_logdet[b * p.grad_logdet_stride], p.channels, p.inverse != 0,
                            p.grad_z + at, p.grad_shift + at, p.grad_raw_scale + at);
      } else {
        for (T* grad : {p.grad_z, p.grad_shift, p.grad_raw_scale}) {
          std::fill_n(grad + at, p.channels, T{});
        }
      }
    }
  });
}

template <typename T>
CouplingInput<T> input(const Tensor& x) {
  return {x.data<T>(), x.stride(0), x.stride(1)};
}

void check_like(const Check& check, const char* name, const Tensor& x, const char* other_name,
                const Tensor& other) {
  check.shape(name, x, {other.size(0), other.size(1), other.size(2)},
              ("that of `" + std::string(other_name) + "`").c_str());
  check.dtype(name, x, {other.dtype()});
  check.device(name, x, other_name, other);
  check_channels(check, name, x);
}

}  // namespace

std::optional<LaunchPlan> affine_coupling(const Tensor& z, const Tensor& lengths,
                                          const Tensor& shift, const Tensor& raw_scale,
                                          bool inverse, const Tensor& y, const Tensor& logdet,
                                          const Tensor& workspace) {
  const Check check("affine_coupling");
  check_flow_steps(check, "z", z, lengths);
  check_like(check, "shift", shift, "z", z);
  check_like(check, "raw_scale", raw_scale, "z", z);
  check_like(check, "y", y, "z", z);
  check.contiguous("y", y);
  const DataType accumulation = z.dtype() == kFloat64 ? kFloat64 : kFloat32;
  check.shape("logdet", logdet, {z.size(0)}, "batch of `z`");
  check.shape("workspace", workspace, {z.size(0), z.size(1)}, "batch and steps of `z`");
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Tensor&>{"logdet", logdet}, {"workspace", workspace}}) {
    check.dtype(name, tensor, {accumulation});
    check.device(name, tensor, "z", z);
    check.contiguous(name, tensor);
  }
  if (z.size(0) == 0) return std::nullopt;
  return dispatch_floating(z.dtype(), [&]<typename T>() -> std::optional<LaunchPlan> {
    using A = accumulation_t<T>;
    const AffineCouplingParams<T> params{
        input<T>(z), input<T>(shift),  input<T>(raw_scale), lengths.data<int64_t>(),
        y.data<T>(), logdet.data<A>(), workspace.data<A>(), z.size(0),
        z.size(1),   z.size(2),        lengths.stride(0),   inverse};
    if (z.device().type == dlpack::kCpu) {
      affine_coupling_cpu(params);
      return std::nullopt;
    }
#ifdef PYNAR_WITH_CUDA
    if (!use_nvrtc()) {
      const DeviceGuard guard(z.device().index);
      affine_coupling_cuda(params, z.stream());
      return std::nullopt;
    }
#endif
    LaunchPlan plan("flow/affine_coupling.cuh", params, z);
    if (const int64_t rows = coupling_blocks(params.batch * params.steps); rows > 0) {
      plan.add<T>("affine_coupling_steps", kCouplingThreads, rows);
    }
    plan.add<T>("affine_coupling_sums", kCouplingThreads, coupling_blocks(params.batch));
    return plan;
  });
}

std::optional<LaunchPlan> affine_coupling_backward(const Tensor& grad_y, const Tensor& grad_logdet,
                                                   const Tensor& x, const Tensor& raw_scale,
                                                   const Tensor& lengths, bool inverse,
                                                   const Tensor& grad_z, const Tensor& grad_shift,
                                                   const Tensor& grad_raw_scale) {
  const Check check("affine_coupling_backward");
  check_flow_steps(check, "grad_y", grad_y, lengths);
  check_like(check, "x", x, "grad_y", grad_y);
  check_like(check, "raw_scale", raw_scale, "grad_y", grad_y);
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"grad_z", grad_z},
                                     {"grad_shift", grad_shift},
                                     {"grad_raw_scale", grad_raw_scale}}) {
    check_like(check, name, tensor, "grad_y", grad_y);
    check.contiguous(name, tensor);
  }
  check.shape("grad_logdet", grad_logdet, {x.size(0)}, "batch of `grad_y`");
  check.dtype("grad_logdet", grad_logdet, {x.dtype() == kFloat64 ? kFloat64 : kFloat32});
  check.device("grad_logdet", grad_logdet, "grad_y", grad_y);
  if (x.numel() == 0) return std::nullopt;
  return dispatch_floating(x.dtype(), [&]<typename T>() -> std::optional<LaunchPlan> {
    using A = accumulation_t<T>;
    const AffineCouplingBackwardParams<T> params{input<T>(grad_y),
                                                 input<T>(x),
                                                 input<T>(raw_scale),
                                                 grad_logdet.data<A>(),
                                                 lengths.data<int64_t>(),
                                                 grad_z.data<T>(),
                                                 grad_shift.data<T>(),
                                                 grad_raw_scale.data<T>(),
                                                 x.size(0),
                                                 x.size(1),
                                                 x.size(2),
                                                 grad_logdet.stride(0),
                                                 lengths.stride(0),
                                                 inverse};
    if (x.device().type == dlpack::kCpu) {
      affine_coupling_backward_cpu(params);
      return std::nullopt;
    }
#ifdef PYNAR_WITH_CUDA
    if (!use_nvrtc()) {
      const DeviceGuard guard(x.device().index);
      affine_coupling_backward_cuda(params, x.stream());
      return std::nullopt;
    }
#endif
    LaunchPlan plan("flow/affine_coupling.cuh", params, x);
    plan.add<T>("affine_coupling_gradient", kCouplingThreads,
                coupling_blocks(params.batch * params.steps));
    return plan;
  });
}

}  // namespace pynar

#endif
