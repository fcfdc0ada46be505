#include "linear/multiply_rate.h"

#ifdef PYNAR_ISA

#include "linear/panel_simd.h"

namespace pynar::PYNAR_ISA {
namespace {

template <WeightFormat kFormat>
int64_t multiply_cached(const uint32_t* x, const uint32_t* words, int64_t repeats, uint32_t* out) {
  using D = Dot<kFormat>;
  constexpr int kRows = kBlockRows;
  constexpr int kVectors = D::kLanes == 16 ? 4 : 2;
  typename D::Sum sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = D::zero();
  }
  for (int64_t i = 0; i < repeats; ++i) {
    for (int64_t step = 0; step < kCachedSteps; ++step) {
      for (int part = 0; part < D::kParts; ++part) {
        decltype(D::weights(words, part)) w[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          w[v] = D::weights(words + step * kStrip + v * D::kLanes, part);
        }
        for (int r = 0; r < kRows; ++r) {
          const typename D::Word word = D::input(word_at(x + r * kCachedSteps + step));
          for (int v = 0; v < kVectors; ++v) sum[r][v] = D::add(sum[r][v], word, w[v]);
        }
      }
    }
  }
  memcpy(out, sum, sizeof(sum));
  return 2 * depth_per_word(kFormat) * kRows * kVectors * D::kLanes * kCachedSteps * repeats;
}

}  // namespace

int64_t multiply_cached(WeightFormat format, const uint32_t* x, const uint32_t* words,
                        int64_t repeats, uint32_t* out) {
  if (format == WeightFormat::kFloat32) {
    return multiply_cached<WeightFormat::kFloat32>(x, words, repeats, out);
  }
  if (format == WeightFormat::kBFloat16) {
    return multiply_cached<WeightFormat::kBFloat16>(x, words, repeats, out);
  }
  return multiply_cached<WeightFormat::kInt8>(x, words, repeats, out);
}

}  // namespace pynar::PYNAR_ISA

#else

#include "common/parallel.h"
#include "common/tensor.h"

namespace pynar {

double multiply_in_cache(int64_t format, int64_t repeats) {
  if (format < 0 || format > static_cast<int64_t>(WeightFormat::kInt8)) {
    Check("multiply_in_cache").fail("format", "be in [0, 2]", std::to_string(format));
  }
  const auto multiply = PYNAR_SELECT_DOT_KERNEL(multiply_cached);
  // Zeros: neither overflow nor numbers too small for the format slow them down.
  alignas(64) const uint32_t x[kBlockRows * kCachedSteps] = {};
  alignas(64) const uint32_t words[kCachedSteps * kPanel] = {};
  double operations = 0;
  parallel_for(max_threads(), 1, [&](int64_t, int64_t) {
    alignas(64) uint32_t out[kBlockRows * kPanel];
    const double mine =
        static_cast<double>(multiply(static_cast<WeightFormat>(format), x, words, repeats, out));
#pragma omp atomic
    operations += mine;
  });
  return operations;
}

}  // namespace pynar

#endif
