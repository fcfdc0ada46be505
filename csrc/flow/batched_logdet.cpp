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

// Subtracts multiples of kPivots rows, from `pivots` on, from kRows rows. In the columns of the
// pivots, of which the inverse takes the place, `pivots` hold it already. Those columns are written
// last: a vector that is loaded right after a part of it was stored has to wait for the store.
template <typename T, int kRows, int kPivots>
inline void eliminate(const T* pivots, int64_t k, int64_t stride, T* rows) {
  using Vector = Simd<T>;
  T factor[kRows][kPivots];
  Vector vector[kRows][kPivots];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kPivots; ++i) {
      factor[r][i] = -rows[r * stride + k + i];
      vector[r][i] = Vector::broadcast(factor[r][i]);
    }
  }
  for (int64_t j = 0; j < stride; j += Vector::kLanes) {
    Vector pivot[kPivots];
    for (int i = 0; i < kPivots; ++i) pivot[i] = Vector::load(pivots + i * stride + j);
    for (int r = 0; r < kRows; ++r) {
      T* row = rows + r * stride + j;
      Vector sum = Vector::load(row);
      for (int i = 0; i < kPivots; ++i) sum = multiply_add(vector[r][i], pivot[i], sum);
      sum.store(row);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kPivots; ++c) {
      T sum = 0;
      for (int i = 0; i < kPivots; ++i) sum += factor[r][i] * pivots[i * stride + k + c];
      rows[r * stride + k + c] = sum;
    }
  }
}

template <typename T, int kPivots>
inline void eliminate_all(T* matrix, int64_t k, int64_t dim, int64_t stride) {
  const T* pivots = matrix + k * stride;
  int64_t i = 0;
  while (i < dim) {
    if (i == k) {
      i += kPivots;
    } else if (i + kTogether <= (i < k ? k : dim)) {
      eliminate<T, kTogether, kPivots>(pivots, k, stride, matrix + i * stride);
      i += kTogether;
    } else {
      eliminate<T, 1, kPivots>(pivots, k, stride, matrix + i * stride);
      ++i;
    }
  }
}

template <typename T>
inline void exchange(T* a, T* b, int64_t count) {
  using Vector = Simd<T>;
  for (int64_t j = 0; j < count; j += Vector::kLanes) {
    const Vector kept = Vector::load(a + j);
    Vector::load(b + j).store(a + j);
    kept.store(b + j);
  }
}

// Which of the rows from k on has the greatest element, of which size() gives the size.
template <typename T, typename Size>
inline int64_t greatest_row(int64_t k, int64_t dim, const Size& size) {
  int64_t best = k;
  T greatest = size(k);
  for (int64_t i = k + 1; i < dim; ++i) {
    const T other = size(i);
    // A NaN counts as the greatest, so that it is found.
    if (other > greatest || other != other) {
      greatest = other;
      best = i;
    }
  }
  return best;
}

template <typename T>
inline T magnitude(T x) {
  return x < 0 ? -x : x;
}

}  // namespace

// The inverse grows in the columns that are eliminated; exchanged rows are exchanged columns of it.
// Two columns at a time, so that a row is loaded and stored once for two multiply-adds.
template <typename T>
T invert(const T* weight, int64_t dim, T* matrix, int64_t* order, T* inverse) {
  using Vector = Simd<T>;
  const int64_t stride = logdet_stride(dim);
  for (int64_t i = 0; i < dim; ++i) {
    for (int64_t j = 0; j < stride; ++j) matrix[i * stride + j] = j < dim ? weight[i * dim + j] : 0;
  }
  double logdet = 0;
  bool singular = false;
  for (int64_t k = 0; k < dim; k += 2) {
    T* first = matrix + k * stride;
    order[k] =
        greatest_row<T>(k, dim, [&](int64_t i) { return magnitude(matrix[i * stride + k]); });
    if (order[k] != k) exchange(first, matrix + order[k] * stride, stride);
    const T pivot = first[k];
    const T reciprocal = T(1) / pivot;
    singular = singular || pivot == 0;
    logdet += __builtin_log(static_cast<double>(magnitude(pivot)));
    if (k + 1 == dim) {
      const Vector factor = Vector::broadcast(reciprocal);
      for (int64_t j = 0; j < stride; j += Vector::kLanes) {
        mul(Vector::load(first + j), factor).store(first + j);
      }
      first[k] = reciprocal;
      eliminate_all<T, 1>(matrix, k, dim, stride);
      break;
    }

    // What the second column will be once the first is eliminated.
    const T slope = first[k + 1] * reciprocal;
    const auto second_column = [&](int64_t i) {
      const T* row = matrix + i * stride + k;
      return row[1] - row[0] * slope;
    };
    order[k + 1] =
        greatest_row<T>(k + 1, dim, [&](int64_t i) { return magnitude(second_column(i)); });
    T* second = first + stride;
    if (order[k + 1] != k + 1) exchange(second, matrix + order[k + 1] * stride, stride);
    const T second_pivot = second_column(k + 1);
    const T second_reciprocal = T(1) / second_pivot;
    singular = singular || second_pivot == 0;
    logdet += __builtin_log(static_cast<double>(magnitude(second_pivot)));

    // The second row less its multiple of the first, divided; the first likewise.
    const T below = second[k] * reciprocal;
    const Vector scale = Vector::broadcast(reciprocal);
    const Vector second_scale = Vector::broadcast(second_reciprocal);
    const Vector minus_below = Vector::broadcast(-second[k]);
    const Vector minus_slope = Vector::broadcast(-slope);
    for (int64_t j = 0; j < stride; j += Vector::kLanes) {
      const Vector scaled = mul(Vector::load(first + j), scale);
      const Vector rest =
          mul(multiply_add(minus_below, scaled, Vector::load(second + j)), second_scale);
      rest.store(second + j);
      multiply_add(minus_slope, rest, scaled).store(first + j);
    }
    second[k + 1] = second_reciprocal;
    second[k] = -below * second_reciprocal;
    first[k + 1] = -slope * second_reciprocal;
    first[k] = reciprocal + slope * below * second_reciprocal;
    eliminate_all<T, 2>(matrix, k, dim, stride);
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
