#include "flow/batched_logdet.h"

#include "common/cpu.h"

namespace pynar {

// `matrix` is scratch of dim rows at distances of logdet_stride(dim), `order` one of dim numbers.
PYNAR_DECLARE_KERNEL(template <typename T>
                     T invert(const T* weight, int64_t dim, T* matrix, int64_t* order, T* inverse))

// Rows are filled up to whole vectors of every instruction set.
constexpr int64_t logdet_stride(int64_t dim) {
  return (dim + 15) / 16 * 16;
}

}  // namespace pynar

#ifdef PYNAR_ISA

#include "common/simd.h"

namespace pynar::PYNAR_ISA {
namespace {

constexpr int kTogether = 4;

// Takes column k out of kRows rows. In its place comes the column of the inverse; it is written
// last, as a vector that is loaded right after a part of it was stored has to wait for the store.
template <typename T, int kRows>
inline void eliminate(const T* pivot_row, int64_t k, int64_t stride, T* rows) {
  using Vector = Simd<T>;
  T factor[kRows];
  Vector vector[kRows];
  for (int r = 0; r < kRows; ++r) {
    factor[r] = -rows[r * stride + k];
    vector[r] = Vector::broadcast(factor[r]);
  }
  for (int64_t j = 0; j < stride; j += Vector::kLanes) {
    const Vector pivot = Vector::load(pivot_row + j);
    for (int r = 0; r < kRows; ++r) {
      T* row = rows + r * stride + j;
      multiply_add(vector[r], pivot, Vector::load(row)).store(row);
    }
  }
  for (int r = 0; r < kRows; ++r) rows[r * stride + k] = factor[r] * pivot_row[k];
}

}  // namespace

// The inverse grows in the columns that are eliminated; exchanged rows are exchanged columns of it.
template <typename T>
T invert(const T* weight, int64_t dim, T* matrix, int64_t* order, T* inverse) {
  using Vector = Simd<T>;
  const int64_t stride = logdet_stride(dim);
  for (int64_t i = 0; i < dim; ++i) {
    for (int64_t j = 0; j < stride; ++j) matrix[i * stride + j] = j < dim ? weight[i * dim + j] : 0;
  }
  double logdet = 0;
  bool singular = false;
  for (int64_t k = 0; k < dim; ++k) {
    // A NaN counts as the greatest, so that it is found.
    int64_t best = k;
    T greatest = __builtin_fabs(matrix[k * stride + k]);
    for (int64_t i = k + 1; i < dim; ++i) {
      const T size = __builtin_fabs(matrix[i * stride + k]);
      if (size > greatest || size != size) {
        greatest = size;
        best = i;
      }
    }
    order[k] = best;
    T* pivot_row = matrix + k * stride;
    T* best_row = matrix + best * stride;
    if (best != k) {
      for (int64_t j = 0; j < stride; ++j) {
        const T kept = pivot_row[j];
        pivot_row[j] = best_row[j];
        best_row[j] = kept;
      }
    }
    const T pivot = pivot_row[k];
    singular = singular || pivot == 0;
    logdet += __builtin_log(static_cast<double>(greatest));
    const T reciprocal = T(1) / pivot;
    const Vector factor = Vector::broadcast(reciprocal);
    for (int64_t j = 0; j < stride; j += Vector::kLanes) {
      mul(Vector::load(pivot_row + j), factor).store(pivot_row + j);
    }
    pivot_row[k] = reciprocal;
    int64_t i = 0;
    for (; i + kTogether <= dim; i += kTogether) {
      if (k < i || k >= i + kTogether) {
        eliminate<T, kTogether>(pivot_row, k, stride, matrix + i * stride);
      } else {
        for (int64_t r = i; r < i + kTogether; ++r) {
          if (r != k) eliminate<T, 1>(pivot_row, k, stride, matrix + r * stride);
        }
      }
    }
    for (; i < dim; ++i) {
      if (i != k) eliminate<T, 1>(pivot_row, k, stride, matrix + i * stride);
    }
  }
  for (int64_t k = dim - 1; k >= 0; --k) {
    if (order[k] == k) continue;
    for (int64_t i = 0; i < dim; ++i) {
      const T kept = matrix[i * stride + k];
      matrix[i * stride + k] = matrix[i * stride + order[k]];
      matrix[i * stride + order[k]] = kept;
    }
  }
  const T undefined = static_cast<T>(__builtin_nanf(""));
  for (int64_t i = 0; i < dim; ++i) {
    for (int64_t j = 0; j < dim; ++j) {
      inverse[i * dim + j] = singular ? undefined : matrix[i * stride + j];
    }
  }
  return static_cast<T>(singular ? -__builtin_huge_val() : logdet);
}

template float invert(const float*, int64_t, float*, int64_t*, float*);
#if !defined(__AVX2__)
template double invert(const double*, int64_t, double*, int64_t*, double*);
#endif

}  // namespace pynar::PYNAR_ISA

#else

#include <optional>

#include "common/parallel.h"
#include "flow/flow_arguments.h"
#ifdef PYNAR_WITH_CUDA
#include "common/cuda_launch.h"
#endif

namespace pynar {
namespace {

template <typename T>
void batched_logdet_cpu(const BatchedLogdetParams<T>& p) {
  const auto invert = PYNAR_SELECT_FLOW_KERNEL(invert<T>);
  const int64_t grain = 1 + (1 << 16) / (1 + p.dim * p.dim * p.dim);
  parallel_for(p.count, grain, [&](int64_t first, int64_t last) {
    thread_local Scratch scratch;
    thread_local Scratch order;
    T* matrix = scratch.get<T>(p.dim * logdet_stride(p.dim));
    for (int64_t n = first; n < last; ++n) {
      const int64_t at = n * p.dim * p.dim;
      p.logdet[n] =
          invert(p.weights + at, p.dim, matrix, order.get<int64_t>(p.dim), p.inverse + at);
    }
  });
}

}  // namespace

int64_t batched_logdet_most_bytes() {
  return kLogdetMostBytes;
}

std::optional<LaunchPlan> batched_logdet(const Tensor& weights, const Tensor& logdet,
                                         const Tensor& inverse) {
  const Check check("batched_logdet");
  check.dims("weights", weights, 3, "[N, d, d]");
  check.dtype("weights", weights, {kFloat32, kFloat64});
  const int64_t count = weights.size(0);
  const int64_t dim = weights.size(1);
  check.shape("weights", weights, {count, dim, dim}, "square matrices");
  check.contiguous("weights", weights);
  check.shape("logdet", logdet, {count}, "number of `weights`");
  check.shape("inverse", inverse, {count, dim, dim}, "that of `weights`");
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Tensor&>{"logdet", logdet}, {"inverse", inverse}}) {
    check.dtype(name, tensor, {weights.dtype()});
    check.device(name, tensor, "weights", weights);
    check.contiguous(name, tensor);
  }
  if (count == 0) return std::nullopt;
  const auto run = [&]<typename T>() -> std::optional<LaunchPlan> {
    const BatchedLogdetParams<T> params{weights.data<T>(), logdet.data<T>(), inverse.data<T>(),
                                        count, dim};
    if (weights.device().type == dlpack::kCpu) {
      batched_logdet_cpu(params);
      return std::nullopt;
    }
    if (dim * dim * static_cast<int64_t>(sizeof(T)) > kLogdetMostBytes) {
      check.fail("weights", "fit into shared memory on cuda", std::to_string(dim));
    }
#ifdef PYNAR_WITH_CUDA
    if (!use_nvrtc()) {
      const DeviceGuard guard(weights.device().index);
      batched_logdet_cuda(params, weights.stream());
      return std::nullopt;
    }
#endif
    LaunchPlan plan("flow/batched_logdet.cuh", params, weights);
    plan.add<T>("batched_logdet_invert", kLogdetThreads, count);
    return plan;
  };
  if (weights.dtype() == kFloat64) return run.template operator()<double>();
  return run.template operator()<float>();
}

}  // namespace pynar

#endif
