// Runs the kernels of linear_argmax on files: the arguments are dtype, N, C, V, k, whether there is
// a bias, by how many elements the distance of rows exceeds C, an offset in elements at which x and
// the weight begin (both decide whether rows are aligned), a seed and a folder.
#include "cuda_on_host.h"

#include <string>

#include "files.h"
#include "linear/linear_argmax.cuh"

namespace {

template <typename T>
void run(const int64_t (&numbers)[8], const std::string& folder) {
  const auto [rows, depth, columns, k, has_bias, gap, offset, seed] = numbers;
  const int64_t stride = depth + gap;
  // The last row has no gap behind it.
  const auto x = read<T>(folder + "/x", offset + rows * stride - gap);
  const auto weight = read<T>(folder + "/weight", offset + columns * stride - gap);
  const auto bias = read<float>(folder + "/bias", has_bias ? columns : 0);
  const int64_t parts = pynar::linear_argmax_parts(columns);
  std::unique_ptr<pynar::ArgmaxSum[]> sums(new pynar::ArgmaxSum[rows * parts]);
  std::unique_ptr<pynar::ArgmaxCandidate[]> candidates(
      new pynar::ArgmaxCandidate[rows * parts * k]);
  std::memset(static_cast<void*>(sums.get()), 0xff, rows * parts * sizeof(pynar::ArgmaxSum));
  std::memset(static_cast<void*>(candidates.get()), 0xff,
              rows * parts * k * sizeof(pynar::ArgmaxCandidate));
  std::unique_ptr<int64_t[]> tokens(new int64_t[rows * k]);
  std::unique_ptr<float[]> log_probs(new float[rows * k]);
  std::unique_ptr<float[]> lse(new float[rows]);

  pynar::LinearArgmaxParams p{};
  p.x = x.get() + offset;
  p.weight = weight.get() + offset;
  p.bias = has_bias ? bias.get() : nullptr;
  p.sums = sums.get();
  p.candidates = candidates.get();
  p.tokens = tokens.get();
  p.log_probs = log_probs.get();
  p.lse = lse.get();
  p.rows = rows;
  p.depth = depth;
  p.columns = columns;
  p.k = k;
  p.segments = pynar::linear_argmax_segments(columns);
  p.x_stride = p.weight_stride = stride;
  p.aligned = offset * sizeof(T) % 16 == 0 && stride * sizeof(T) % 16 == 0;

  const auto kernel = k == 1 ? pynar::linear_argmax_partials<T, 1>
                             : pynar::linear_argmax_partials<T, pynar::kArgmaxMost>;
  const auto blocks = static_cast<unsigned>(pynar::linear_argmax_blocks(rows, columns));
  cuda_on_host::launch({blocks}, {pynar::kArgmaxThreads}, 0, seed, kernel, p);
  constexpr int kFinish = pynar::kArgmaxFinishThreads;
  const auto finish = static_cast<unsigned>(pynar::linear_argmax_finish_blocks(rows));
  cuda_on_host::launch({finish}, {kFinish}, 0, seed + 1, pynar::linear_argmax_finish<kFinish>, p);
  write(folder + "/tokens", tokens.get(), rows * k);
  write(folder + "/log_probs", log_probs.get(), rows * k);
  write(folder + "/lse", lse.get(), rows);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 11) return 2;
  const std::string dtype = argv[1];
  int64_t numbers[8];
  for (int i = 0; i < 8; ++i) numbers[i] = std::stoll(argv[i + 2]);
  if (dtype == "float32") run<float>(numbers, argv[10]);
  if (dtype == "bfloat16") run<pynar::BFloat16>(numbers, argv[10]);
  if (dtype == "float16") run<pynar::Half>(numbers, argv[10]);
  return 0;
}
