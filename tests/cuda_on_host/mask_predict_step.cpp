// Runs the kernels of mask_predict_step on files: the arguments are dtype, B, T, V, an offset in
// elements at which the logits begin (which decides how they are aligned), a seed and a folder.
#include "cuda_on_host.h"

#include <string>

#include "decoding/mask_predict_step.cuh"
#include "files.h"

namespace {

template <typename T, int kThreads>
void launch(const pynar::MaskPredictParams<T>& p, unsigned batch, uint32_t seed) {
  const unsigned blocks = batch * static_cast<unsigned>(p.steps * p.segments);
  cuda_on_host::launch({blocks}, {kThreads}, 0, seed, pynar::mask_predict_partials<T, kThreads>, p);
  constexpr int kFinish = pynar::kMaskPredictFinishThreads;
  cuda_on_host::launch({batch}, {kFinish}, 0, seed + 1, pynar::mask_predict_finish<T, kFinish>, p);
}

template <typename T>
void run(int64_t batch, int64_t steps, int64_t vocabulary, int64_t offset, uint32_t seed,
         const std::string& folder) {
  using A = pynar::accumulation_t<T>;
  const int64_t slots = batch * steps;
  const auto logits = read<T>(folder + "/logits", offset + slots * vocabulary);
  const auto tokens = read<int64_t>(folder + "/tokens", slots);
  const auto scores = read<A>(folder + "/scores", slots);
  const auto lengths = read<int64_t>(folder + "/lengths", batch);
  const auto num_masked = read<int64_t>(folder + "/num_masked", batch);
  std::unique_ptr<int64_t[]> new_tokens(new int64_t[slots]);
  std::unique_ptr<A[]> new_scores(new A[slots]);
  const int64_t segments = pynar::mask_predict_segments(vocabulary);
  std::unique_ptr<pynar::MaskPredictPartial<T>[]> partials(
      new pynar::MaskPredictPartial<T>[slots * segments]);
  std::memset(static_cast<void*>(partials.get()), 0xff,
              slots * segments * sizeof(pynar::MaskPredictPartial<T>));

  pynar::MaskPredictParams<T> p{};
  p.logits = logits.get() + offset;
  p.tokens = tokens.get();
  p.scores = scores.get();
  p.lengths = lengths.get();
  p.num_masked = num_masked.get();
  p.new_tokens = new_tokens.get();
  p.new_scores = new_scores.get();
  p.partials = partials.get();
  p.steps = steps;
  p.vocabulary = vocabulary;
  p.segments = segments;
  p.logits_stride_b = steps * vocabulary;
  p.logits_stride_t = vocabulary;
  p.tokens_stride_b = p.scores_stride_b = steps;
  p.tokens_stride_t = p.scores_stride_t = 1;
  p.lengths_stride = p.num_masked_stride = 1;
  p.aligned = reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 && vocabulary * sizeof(T) % 16 == 0;
  if (pynar::mask_predict_threads(vocabulary) == 256) {
    launch<T, 256>(p, static_cast<unsigned>(batch), seed);
  } else {
    launch<T, 64>(p, static_cast<unsigned>(batch), seed);
  }
  write(folder + "/new_tokens", new_tokens.get(), slots);
  write(folder + "/new_scores", new_scores.get(), slots);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8) return 2;
  const std::string dtype = argv[1];
  const auto number = [&](int i) { return std::stoll(argv[i]); };
  const auto seed = static_cast<uint32_t>(number(6));
  if (dtype == "float32") run<float>(number(2), number(3), number(4), number(5), seed, argv[7]);
  if (dtype == "float64") run<double>(number(2), number(3), number(4), number(5), seed, argv[7]);
  if (dtype == "bfloat16") {
    run<pynar::BFloat16>(number(2), number(3), number(4), number(5), seed, argv[7]);
  }
  if (dtype == "float16")
    run<pynar::Half>(number(2), number(3), number(4), number(5), seed, argv[7]);
  return 0;
}
