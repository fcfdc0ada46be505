#include "common/read_bandwidth.h"

#ifdef PYNAR_ISA

#include "common/simd.h"

namespace pynar::PYNAR_ISA {

float read_range(const float* x, int64_t n) {
  using Vector = Simd<float>;
  constexpr int kUnroll = 8;
  constexpr int64_t kStep = kUnroll * Vector::kLanes;
  Vector sum[kUnroll];
  for (int u = 0; u < kUnroll; ++u) sum[u] = Vector::broadcast(0.f);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int u = 0; u < kUnroll; ++u) {
      sum[u] = add(sum[u], Vector::load(x + i + u * Vector::kLanes));
    }
  }
  float total = 0.f;
  for (; i < n; ++i) total += x[i];
  for (int u = 0; u < kUnroll; ++u) total += reduce_add(sum[u]);
  return total;
}

}  // namespace pynar::PYNAR_ISA

#else

#include "common/parallel.h"
#include "common/tensor.h"

namespace pynar {

double read_all(const Tensor& x) {
  const Check check("read_all");
  check.dtype("x", x, {kFloat32});
  check.contiguous("x", x);
  const float* data = x.data<float>();
  const auto read = PYNAR_SELECT_KERNEL(read_range);
  double total = 0.;
  parallel_for(x.numel(), 1 << 20, [&](int64_t first, int64_t last) {
    const double part = read(data + first, last - first);
#pragma omp atomic
    total += part;
  });
  return total;
}

}  // namespace pynar

#endif
