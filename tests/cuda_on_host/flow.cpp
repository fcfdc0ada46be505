// Runs the kernels of the flow's operators on files: the arguments are the operator, dtype, a seed,
// a folder, and the operator's numbers in the order in which they are read below.
#include "cuda_on_host.h"

#include <string>
#include <vector>

#include "files.h"
#include "flow/affine_coupling.cuh"
#include "flow/batched_logdet.cuh"
#include "flow/flow_linear.cuh"

namespace {

using namespace pynar;

struct Arguments {
  std::string folder;
  uint32_t seed;
  std::vector<int64_t> numbers;

  template <typename T>
  std::unique_ptr<T[]> get(const char* name, int64_t count) const {
    return read<T>(folder + "/" + name, count);
  }
  template <typename T>
  void put(const char* name, const std::unique_ptr<T[]>& values, int64_t count) const {
    write(folder + "/" + name, values.get(), count);
  }
  template <typename Params>
  void launch(int64_t blocks, int threads, void (*kernel)(Params), const Params& p) const {
    if (blocks == 0) return;
    const auto block = static_cast<unsigned>(threads);
    cuda_on_host::launch({static_cast<unsigned>(blocks)}, {block}, 0, seed, kernel, p);
  }
};

template <typename T>
std::unique_ptr<T[]> poisoned(int64_t count) {
  std::unique_ptr<T[]> values(new T[count]);
  std::memset(static_cast<void*>(values.get()), 0xff, count * sizeof(T));
  return values;
}

template <typename T, typename U>
FlowRows<T> rows_of(const std::unique_ptr<U[]>& x, int64_t steps, int64_t channels,
                    int64_t pieces = 1) {
  return {x.get(),  nullptr, 1, channels, steps * channels,
          channels, 0,       0, pieces,   channels / pieces};
}

template <typename T>
void run_chain(const Arguments& a) {
  using A = accumulation_t<T>;
  FlowLinearParams<T> p{};
  p.batch = a.numbers[0];
  p.steps = a.numbers[1];
  p.channels = a.numbers[2];
  p.matrices = a.numbers[3];
  p.dim = a.numbers[4];
  p.layout = static_cast<FlowLayout>(a.numbers[5]);
  p.inverse = a.numbers[6];
  p.joined = a.numbers[8];
  const int64_t size = p.batch * p.steps * p.channels;
  const int64_t normed = a.numbers[7] * p.channels;
  const int64_t weights = p.matrices * p.dim * p.dim;
  const auto x = a.get<T>("x", size);
  const auto grad_y = a.get<T>("grad_y", size);
  const auto lengths = a.get<int64_t>("lengths", p.batch);
  const auto log_scale = a.get<A>("log_scale", normed);
  const auto bias = a.get<A>("bias", normed);
  const auto weight = a.get<A>("weight", weights);
  const auto y = poisoned<T>(size);
  const auto grad_x = poisoned<T>(size);
  const auto grad_log_scale = poisoned<A>(normed);
  const auto grad_bias = poisoned<A>(normed);
  const auto grad_weight = poisoned<A>(weights);
  // Numbers of either side lie the same way: of joined steps one after the other.
  const int64_t of_x = p.inverse ? 1 : p.joined;
  const int64_t of_y = p.inverse ? p.joined : 1;
  p.x = rows_of<const T>(x, p.steps, p.channels, of_x);
  p.y = rows_of<T>(y, p.steps, p.channels, of_y);
  p.lengths = lengths.get();
  p.lengths_stride = 1;
  p.log_scale = normed > 0 ? log_scale.get() : nullptr;
  p.bias = bias.get();
  p.weight = weight.get();
  const auto forward =
      p.matrices > 0 ? flow_linear_steps<T, kFlowThreads> : flow_copy<T, kFlowThreads>;
  a.launch(flow_linear_blocks(p), kFlowThreads, forward, p);

  const int64_t parts = flow_parts(p.batch * p.steps, p.channels, sizeof(A));
  const int64_t block_rows = flow_block_rows(p.channels, sizeof(A));
  const auto partials = poisoned<A>(parts * flow_sums(p.matrices, p.dim, p.channels));
  const auto states = poisoned<A>(parts * (p.matrices + 1) * block_rows * p.channels);
  FlowLinearBackwardParams<T> b{};
  b.forward = p;
  b.grad_y = rows_of<const T>(grad_y, p.steps, p.channels, of_y);
  b.grad_x = rows_of<T>(grad_x, p.steps, p.channels, of_x);
  b.grad_log_scale = grad_log_scale.get();
  b.grad_bias = grad_bias.get();
  b.grad_weight = grad_weight.get();
  b.partials = partials.get();
  b.states = states.get();
  a.launch(parts, kFlowThreads, flow_linear_gradient<T, kFlowThreads>, b);
  a.launch(flow_finish_blocks(p), kFlowThreads, flow_linear_finish<T, kFlowThreads>, b);
  a.put("y", y, size);
  a.put("grad_x", grad_x, size);
  a.put("grad_log_scale", grad_log_scale, normed);
  a.put("grad_bias", grad_bias, normed);
  a.put("grad_weight", grad_weight, weights);
}

// There and back.
template <typename T>
void run_squeeze(const Arguments& a) {
  FlowLinearParams<T> p{};
  p.batch = a.numbers[0];
  p.steps = a.numbers[1];
  p.channels = a.numbers[2];
  const int64_t factor = a.numbers[3];
  const int64_t kept = a.numbers[4];
  const int64_t left = p.channels - kept;
  const int64_t joined = (p.steps + factor - 1) / factor;
  const int64_t size = p.batch * p.steps * p.channels;
  const auto x = a.get<T>("x", size);
  const auto lengths = a.get<int64_t>("lengths", p.batch);
  const auto y = poisoned<T>(p.batch * joined * factor * kept);
  const auto dropped = poisoned<T>(p.batch * p.steps * left);
  const auto back = poisoned<T>(size);
  p.lengths = lengths.get();
  p.lengths_stride = 1;
  p.x = rows_of<const T>(x, p.steps, p.channels);
  p.y = {y.get(),       dropped.get(),  factor, kept, joined * factor * kept,
         factor * kept, p.steps * left, left};
  a.launch(flow_linear_blocks(p), kFlowThreads, flow_copy<T, kFlowThreads>, p);
  p.x = {y.get(),       dropped.get(),  factor, kept, joined * factor * kept,
         factor * kept, p.steps * left, left};
  p.y = rows_of<T>(back, p.steps, p.channels);
  a.launch(flow_linear_blocks(p), kFlowThreads, flow_copy<T, kFlowThreads>, p);
  a.put("y", y, p.batch * joined * factor * kept);
  a.put("dropped", dropped, p.batch * p.steps * left);
  a.put("back", back, size);
}

template <typename T>
void run_coupling(const Arguments& a) {
  using A = accumulation_t<T>;
  const int64_t batch = a.numbers[0];
  const int64_t steps = a.numbers[1];
  const int64_t channels = a.numbers[2];
  const int64_t inverse = a.numbers[3];
  const int64_t size = batch * steps * channels;
  const auto z = a.get<T>("z", size);
  const auto shift = a.get<T>("shift", size);
  const auto raw_scale = a.get<T>("raw_scale", size);
  const auto grad_y = a.get<T>("grad_y", size);
  const auto grad_logdet = a.get<A>("grad_logdet", batch);
  const auto lengths = a.get<int64_t>("lengths", batch);
  const auto y = poisoned<T>(size);
  const auto logdet = poisoned<A>(batch);
  const auto by_step = poisoned<A>(batch * steps);
  const auto grad_z = poisoned<T>(size);
  const auto grad_shift = poisoned<T>(size);
  const auto grad_raw_scale = poisoned<T>(size);
  const auto input = [&](const std::unique_ptr<T[]>& x) {
    return CouplingInput<T>{x.get(), steps * channels, channels};
  };
  const AffineCouplingParams<T> p{input(z),
                                  input(shift),
                                  input(raw_scale),
                                  lengths.get(),
                                  y.get(),
                                  logdet.get(),
                                  by_step.get(),
                                  batch,
                                  steps,
                                  channels,
                                  1,
                                  inverse};
  const int64_t rows = coupling_blocks(batch * steps);
  a.launch(rows, kCouplingThreads, affine_coupling_steps<T, kCouplingThreads>, p);
  a.launch(coupling_blocks(batch), kCouplingThreads, affine_coupling_sums<T, kCouplingThreads>, p);
  const AffineCouplingBackwardParams<T> b{input(grad_y),
                                          input(inverse ? y : z),
                                          input(raw_scale),
                                          grad_logdet.get(),
                                          lengths.get(),
                                          grad_z.get(),
                                          grad_shift.get(),
                                          grad_raw_scale.get(),
                                          batch,
                                          steps,
                                          channels,
                                          1,
                                          1,
                                          inverse};
  a.launch(rows, kCouplingThreads, affine_coupling_gradient<T, kCouplingThreads>, b);
  a.put("y", y, size);
  a.put("logdet", logdet, batch);
  a.put("grad_z", grad_z, size);
  a.put("grad_shift", grad_shift, size);
  a.put("grad_raw_scale", grad_raw_scale, size);
}

template <typename T>
void run_logdet(const Arguments& a) {
  const int64_t count = a.numbers[0];
  const int64_t dim = a.numbers[1];
  const auto weights = a.get<T>("weights", count * dim * dim);
  const auto logdet = poisoned<T>(count);
  const auto inverse = poisoned<T>(count * dim * dim);
  const BatchedLogdetParams<T> p{weights.get(), logdet.get(), inverse.get(), count, dim};
  a.launch(count, kLogdetThreads, batched_logdet_invert<T, kLogdetThreads>, p);
  a.put("logdet", logdet, count);
  a.put("inverse", inverse, count * dim * dim);
}

template <typename T>
void run(const std::string& name, const Arguments& a) {
  if (name == "chain") run_chain<T>(a);
  if (name == "squeeze") run_squeeze<T>(a);
  if (name == "coupling") run_coupling<T>(a);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) return 2;
  const std::string name = argv[1];
  const std::string dtype = argv[2];
  Arguments a{argv[4], static_cast<uint32_t>(std::stoul(argv[3])), {}};
  for (int i = 5; i < argc; ++i) a.numbers.push_back(std::stoll(argv[i]));
  if (name == "logdet") {
    dtype == "float64" ? run_logdet<double>(a) : run_logdet<float>(a);
    return 0;
  }
  if (dtype == "float32") run<float>(name, a);
  if (dtype == "float64") run<double>(name, a);
  if (dtype == "bfloat16") run<BFloat16>(name, a);
  if (dtype == "float16") run<Half>(name, a);
  return 0;
}
