// Runs the kernels of divergence_cross_entropy, forward and backward, on files: the arguments are
// dtype, C, N, V, the distance of rows, an offset in elements at which logits and gradients begin
// (both decide how they are aligned), a seed, a folder, the label smoothing, and the pairs.
#include "cuda_on_host.h"

#include <string>
#include <vector>

#include "files.h"
#include "losses/divergence_cross_entropy_backward.cuh"

namespace {

using namespace pynar;

struct Sizes {
  int64_t heads, rows, vocabulary, stride, offset;
};

template <typename T>
std::unique_ptr<T[]> poisoned(int64_t count) {
  std::unique_ptr<T[]> values(new T[count]);
  std::memset(static_cast<void*>(values.get()), 0xff, count * sizeof(T));
  return values;
}

template <typename Params>
void launch(int64_t blocks, uint32_t seed, void (*kernel)(Params), const Params& p) {
  if (blocks == 0) return;
  cuda_on_host::launch({static_cast<unsigned>(blocks)}, {kDivergenceThreads}, 0, seed, kernel, p);
}

template <typename T, int kHeads>
void launch_both(const DivergenceParams<T>& forward, const DivergenceBackwardParams<T>& backward,
                 uint32_t seed) {
  const int64_t blocks = forward.rows * (forward.heads / kHeads);
  launch(blocks, seed, divergence_cross_entropy_rows<T, kHeads>, forward);
  launch(blocks, seed + 1, divergence_cross_entropy_gradient<T, kHeads>, backward);
}

template <typename Params>
void set_sizes(Params& p, const Sizes& sizes, const std::vector<int64_t>& pairs, double smoothing) {
  p.rows = sizes.rows;
  p.vocabulary = sizes.vocabulary;
  p.heads = sizes.heads;
  p.pairs = static_cast<int64_t>(pairs.size() / 2);
  for (size_t i = 0; i < pairs.size(); ++i) p.pair[i / 2][i % 2] = pairs[i];
  p.targets_stride = 1;
  p.label_smoothing = smoothing;
  using T = std::remove_const_t<std::remove_pointer_t<std::remove_extent_t<decltype(p.logits)>>>;
  p.aligned = sizes.offset * sizeof(T) % 16 == 0 && sizes.stride * sizeof(T) % 16 == 0;
}

template <typename T>
void run(const Sizes& sizes, const std::vector<int64_t>& pairs, double smoothing, uint32_t seed,
         const std::string& folder) {
  using A = accumulation_t<T>;
  const auto num_pairs = static_cast<int64_t>(pairs.size() / 2);
  // To the last element of the last row, and no further.
  const int64_t count =
      sizes.offset + (sizes.heads * sizes.rows - 1) * sizes.stride + sizes.vocabulary;
  const auto logits = read<T>(folder + "/logits", count);
  const auto targets = read<int64_t>(folder + "/targets", sizes.rows);
  const auto grad_cross_entropy = read<A>(folder + "/grad_cross_entropy", sizes.heads * sizes.rows);
  const auto grad_divergence = read<A>(folder + "/grad_divergence", num_pairs * sizes.rows);
  const int64_t num_statistics = (2 * sizes.heads + 2 * num_pairs) * sizes.rows;
  const auto cross_entropy = poisoned<A>(sizes.heads * sizes.rows);
  const auto divergence = poisoned<A>(num_pairs * sizes.rows);
  const auto statistics = poisoned<A>(num_statistics);
  const auto grads = poisoned<T>(count);

  DivergenceParams<T> forward{};
  DivergenceBackwardParams<T> backward{};
  set_sizes(forward, sizes, pairs, smoothing);
  set_sizes(backward, sizes, pairs, smoothing);
  for (int64_t h = 0; h < sizes.heads; ++h) {
    const int64_t first = sizes.offset + h * sizes.rows * sizes.stride;
    forward.logits[h] = backward.logits[h] = logits.get() + first;
    backward.grads[h] = grads.get() + first;
    forward.logits_stride[h] = backward.logits_stride[h] = sizes.stride;
    backward.grads_stride[h] = sizes.stride;
  }
  forward.targets = backward.targets = targets.get();
  forward.cross_entropy = cross_entropy.get();
  forward.divergence = divergence.get();
  forward.statistics = statistics.get();
  backward.cross_entropy = grad_cross_entropy.get();
  backward.divergence = grad_divergence.get();
  backward.statistics = statistics.get();
  backward.cross_entropy_stride_h = backward.divergence_stride_p = sizes.rows;
  backward.cross_entropy_stride_n = backward.divergence_stride_n = 1;
  switch (divergence_group(sizes.heads, num_pairs)) {
    case 1:
      launch_both<T, 1>(forward, backward, seed);
      break;
    case 2:
      launch_both<T, 2>(forward, backward, seed);
      break;
    case 3:
      launch_both<T, 3>(forward, backward, seed);
      break;
    default:
      launch_both<T, 4>(forward, backward, seed);
  }
  write(folder + "/cross_entropy", cross_entropy.get(), sizes.heads * sizes.rows);
  write(folder + "/divergence", divergence.get(), num_pairs * sizes.rows);
  write(folder + "/grads", grads.get(), count);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 10) return 2;
  const std::string dtype = argv[1];
  const auto number = [&](int i) { return std::stoll(argv[i]); };
  const Sizes sizes{number(2), number(3), number(4), number(5), number(6)};
  const auto seed = static_cast<uint32_t>(number(7));
  const double smoothing = std::stod(argv[9]);
  std::vector<int64_t> pairs;
  for (int i = 10; i < argc; ++i) pairs.push_back(number(i));
  if (dtype == "float32") run<float>(sizes, pairs, smoothing, seed, argv[8]);
  if (dtype == "float64") run<double>(sizes, pairs, smoothing, seed, argv[8]);
  if (dtype == "bfloat16") run<BFloat16>(sizes, pairs, smoothing, seed, argv[8]);
  if (dtype == "float16") run<Half>(sizes, pairs, smoothing, seed, argv[8]);
  return 0;
}
