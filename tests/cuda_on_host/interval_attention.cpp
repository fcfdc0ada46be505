// Runs the kernels of interval attention, forward and backward, on files: the arguments are dtype,
// B, H, Tq, Tk, D, R, an offset in elements at which keys and values begin (which decides how they
// are aligned), a seed and a folder. Tensors are [B, H, T, D] and contiguous.
#include "cuda_on_host.h"

#include <fstream>
#include <string>
#include <type_traits>

#include "attention/interval_attention_backward.cuh"

namespace {

using namespace pynar;

// Arrays of exactly the size needed, so that AddressSanitizer sees any access beside them.
template <typename T>
std::unique_ptr<T[]> read(const std::string& path, int64_t count) {
  std::unique_ptr<T[]> values(new T[count]);
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(values.get()), count * sizeof(T));
  if (file.gcount() != static_cast<std::streamsize>(count * sizeof(T))) {
    std::fprintf(stderr, "%s is too short\n", path.c_str());
    std::exit(2);
  }
  return values;
}

template <typename T>
std::unique_ptr<T[]> poisoned(int64_t count) {
  std::unique_ptr<T[]> values(new T[count]);
  std::memset(static_cast<void*>(values.get()), 0xff, count * sizeof(T));
  return values;
}

template <typename T>
void write(const std::string& path, const T* values, int64_t count) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(values), count * sizeof(T));
}

template <typename T>
HeadRows<T> rows(T* data, int64_t heads, int64_t steps, int64_t dim) {
  return {data, heads * steps * dim, steps * dim, dim};
}

template <typename Params>
void launch(int64_t blocks, int threads, uint32_t seed, void (*kernel)(Params), const Params& p) {
  if (blocks == 0) return;
  cuda_on_host::launch({static_cast<unsigned>(blocks)}, {static_cast<unsigned>(threads)}, 0, seed,
                       kernel, p);
}

template <typename T, int kDim>
void launch_tiles(const IntervalAttentionParams<T>& p, uint32_t seed) {
  launch(attention_blocks(p.sizes, sizeof(T)), kAttentionTileThreads, seed,
         interval_attention_tiles<T, kDim>, p);
}

template <typename T, int kDim>
void launch_tiles(const IntervalAttentionBackwardParams<T>& p, uint32_t seed) {
  const AttentionBackwardBlocks blocks = attention_backward_blocks(p.sizes, sizeof(T));
  launch(blocks.grad_q, kAttentionTileThreads, seed, interval_attention_grad_q_tiles<T, kDim>, p);
  launch(blocks.grad_kv, kAttentionTileThreads, seed, interval_attention_grad_kv_tiles<T, kDim>, p);
}

template <template <typename> typename Params, typename T>
void choose_tiles(const Params<T>& p, uint32_t seed) {
  // A kernel takes fewer channels too; one is enough where the type alone makes a difference.
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (p.sizes.dim <= 64) return launch_tiles<T, 64>(p, seed);
  }
  launch_tiles<T, 128>(p, seed);
}

template <typename T>
void forward(const IntervalAttentionParams<T>& p, uint32_t seed) {
  if constexpr (sizeof(T) == 2) {
    if (attention_takes_tiles(sizeof(T), p.sizes.queries, p.sizes.keys)) {
      return choose_tiles(p, seed);
    }
  }
  launch(attention_blocks(p.sizes, sizeof(T)), kAttentionRowThreads, seed,
         interval_attention_rows<T, kAttentionRowThreads>, p);
}

template <typename T>
void backward(const IntervalAttentionBackwardParams<T>& p, uint32_t seed) {
  const AttentionBackwardBlocks blocks = attention_backward_blocks(p.sizes, sizeof(T));
  constexpr int kThreads = kAttentionRowThreads;
  launch(blocks.delta, kThreads, seed, interval_attention_delta<T, kThreads>, p);
  launch(blocks.hulls, kThreads, seed, interval_attention_hulls<T, kThreads>, p);
  if constexpr (sizeof(T) == 2) {
    if (blocks.tiles) {
      return choose_tiles(p, seed);
    }
  }
  launch(blocks.grad_q, kThreads, seed, interval_attention_grad_q_rows<T, kThreads>, p);
  launch(blocks.grad_kv, kThreads, seed, interval_attention_grad_kv_rows<T, kThreads>, p);
}

template <typename T>
void run(const AttentionSizes& sizes, int64_t offset, uint32_t seed, const std::string& folder) {
  using A = accumulation_t<T>;
  const int64_t heads = sizes.heads;
  const int64_t q_count = sizes.batch * heads * sizes.queries * sizes.dim;
  const int64_t k_count = sizes.batch * heads * sizes.keys * sizes.dim;
  const int64_t lse_count = sizes.batch * heads * sizes.queries;
  const auto q = read<T>(folder + "/q", q_count);
  const auto k = read<T>(folder + "/k", offset + k_count);
  const auto v = read<T>(folder + "/v", offset + k_count);
  const auto grad_out = read<T>(folder + "/grad_out", q_count);
  const auto intervals =
      read<int32_t>(folder + "/intervals", sizes.batch * sizes.queries * sizes.num_intervals * 2);
  const auto out = poisoned<T>(q_count);
  const auto lse = poisoned<A>(lse_count);
  const auto grad_q = poisoned<T>(q_count);
  const auto grad_k = poisoned<T>(k_count);
  const auto grad_v = poisoned<T>(k_count);
  const auto delta = poisoned<A>(lse_count);
  const auto hulls = poisoned<int32_t>(sizes.batch * attention_chunks(sizes.queries) * 2);

  const auto queries = [&](auto* data) { return rows(data, heads, sizes.queries, sizes.dim); };
  const auto keys = [&](auto* data) { return rows(data, heads, sizes.keys, sizes.dim); };
  const T* k_data = k.get() + offset;
  const T* v_data = v.get() + offset;
  const IntervalRows interval_rows{intervals.get(), sizes.queries * sizes.num_intervals * 2,
                                   sizes.num_intervals * 2, 2};
  const double scale = 1 / std::sqrt(static_cast<double>(sizes.dim));
  const int64_t aligned = offset * sizeof(T) % 16 == 0 && sizes.dim * sizeof(T) % 16 == 0;
  const T* q_data = q.get();
  forward<T>({queries(q_data), keys(k_data), keys(v_data), interval_rows, queries(out.get()),
              rows(lse.get(), heads, sizes.queries, 1), sizes, scale, aligned},
             seed);
  const T* grad_out_data = grad_out.get();
  const T* out_data = out.get();
  const A* lse_data = lse.get();
  backward<T>(
      {queries(grad_out_data), queries(q_data), keys(k_data), keys(v_data), interval_rows,
       queries(out_data), rows(lse_data, heads, sizes.queries, 1), queries(grad_q.get()),
       keys(grad_k.get()), keys(grad_v.get()), delta.get(), hulls.get(), sizes, scale, aligned},
      seed + 1);
  write(folder + "/out", out.get(), q_count);
  write(folder + "/lse", lse.get(), lse_count);
  write(folder + "/grad_q", grad_q.get(), q_count);
  write(folder + "/grad_k", grad_k.get(), k_count);
  write(folder + "/grad_v", grad_v.get(), k_count);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 11) return 2;
  const std::string dtype = argv[1];
  const auto number = [&](int i) { return std::stoll(argv[i]); };
  const AttentionSizes sizes{number(2), number(3), number(4), number(5), number(6), number(7)};
  const auto seed = static_cast<uint32_t>(number(9));
  if (dtype == "float32") run<float>(sizes, number(8), seed, argv[10]);
  if (dtype == "float64") run<double>(sizes, number(8), seed, argv[10]);
  if (dtype == "bfloat16") run<BFloat16>(sizes, number(8), seed, argv[10]);
  if (dtype == "float16") run<Half>(sizes, number(8), seed, argv[10]);
  return 0;
}
