// The harness itself: what it gives must behave as CUDA's does. `self_test good` exits with 0;
// `self_test divergent` and `self_test overrun` must not.
#include "cuda_on_host.h"

#include <numeric>

#include "common/device.cuh"

namespace {

void require(bool fact, const char* what) {
  if (fact) return;
  std::fprintf(stderr, "self_test: %s\n", what);
  std::exit(1);
}

// Reverses a block's numbers through dynamic shared memory, and sums them in four ways.
__global__ void good(const int* x, int* reversed, int* sums) {
  PYNAR_DYNAMIC_SHARED(int, shared);
  __shared__ int total;
  __shared__ float scratch[3];
  const unsigned i = threadIdx.x;
  const int value = x[blockIdx.x * blockDim.x + i];
  shared[i] = value;
  if (i == 0) total = 0;
  __syncthreads();
  reversed[blockIdx.x * blockDim.x + i] = shared[blockDim.x - 1 - i];
  atomicAdd(&total, value);
  const float block = pynar::block_sum<96>(static_cast<float>(value), scratch);
  int down = value;
  for (int offset = 16; offset > 0; offset /= 2)
    down += __shfl_down_sync(0xffffffffu, down, offset);
  const int warp = __shfl_sync(0xffffffffu, down, 0);
  const int odd = __syncthreads_count(value % 2);
  const unsigned ballot = __ballot_sync(0xffffffffu, value % 2);
  if (i == 0) {
    sums[blockIdx.x * 5 + 0] = total;
    sums[blockIdx.x * 5 + 1] = static_cast<int>(block);
    sums[blockIdx.x * 5 + 2] = warp;
    sums[blockIdx.x * 5 + 3] = odd;
    sums[blockIdx.x * 5 + 4] = __popc(ballot);
  }
}

__global__ void divergent(int* out) {
  if (threadIdx.x < 40) __syncthreads();
  if (threadIdx.x >= 40) out[0] = __shfl_sync(0xffffffffu, 1, 0);
}

__global__ void overrun(int* out) {
  out[threadIdx.x] = 1;
}

}  // namespace

int main(int, char** argv) {
  const std::string which = argv[1];
  constexpr int kBlocks = 2;
  constexpr int kThreads = 96;
  if (which == "good") {
    for (uint32_t seed = 1; seed <= 5; ++seed) {
      std::vector<int> x(kBlocks * kThreads);
      std::iota(x.begin(), x.end(), 3);
      std::vector<int> reversed(x.size());
      std::vector<int> sums(kBlocks * 5);
      cuda_on_host::launch({kBlocks}, {kThreads}, kThreads * sizeof(int), seed, good, x.data(),
                           reversed.data(), sums.data());
      for (int b = 0; b < kBlocks; ++b) {
        const auto first = x.begin() + b * kThreads;
        const int total = std::accumulate(first, first + kThreads, 0);
        for (int i = 0; i < kThreads; ++i) {
          require(reversed[b * kThreads + i] == first[kThreads - 1 - i], "shared memory");
        }
        require(sums[b * 5 + 0] == total, "atomicAdd");
        require(sums[b * 5 + 1] == total, "block_sum");
        require(sums[b * 5 + 2] == std::accumulate(first, first + 32, 0), "__shfl_down_sync");
        require(sums[b * 5 + 3] == kThreads / 2, "__syncthreads_count");
        require(sums[b * 5 + 4] == 16, "__ballot_sync");
      }
    }
    return 0;
  }
  std::vector<int> out(which == "overrun" ? 63 : 64);
  cuda_on_host::launch({1}, {64}, 0, 1, which == "overrun" ? overrun : divergent, out.data());
  return 0;
}
