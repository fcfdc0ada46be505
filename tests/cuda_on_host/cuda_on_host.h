// The CUDA built-ins on the CPU, so that device code (.cuh) runs, thread by thread, under a host
// compiler and its sanitizers. Included before the device code.
//
// The threads of a block are fibers of one OS thread. A fiber runs until it meets a barrier or a
// warp collective and goes on when all that must meet there have come; blocks run one after the
// other. The order in which fibers go on is shuffled by a seed, so that code which leans on one
// order has a chance to fail. A meeting that can never be complete, such as a barrier in a branch
// that some threads did not take, stops the program with a message. Static shared memory keeps what
// the block before left in it; dynamic shared memory is new for each block.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <ucontext.h>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define PYNAR_CUDA_ON_HOST
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kSlotBytes = 16;

enum class Waiting { kNothing, kBlock, kWarp };

struct Copy {
  void* to;
  const void* from;
  int bytes;
  int group;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;
  dim3 index;
  Waiting waiting = Waiting::kNothing;
  bool done = false;
  unsigned mask = 0;         // of the warp collective that it waits for
  const char* name = "";     // of what it waits for
  unsigned collectives = 0;  // how many warp collectives it has entered
  int predicate = 0;
  std::vector<Copy> copies;  // cp.async that were not waited for
  int groups = 0;            // of copies, committed
};

struct Warp {
  // Two sets of slots: a lane can be one collective ahead of a lane that has yet to read.
  alignas(16) char slot[2][kLanes][kSlotBytes];
};

struct State {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> shared;
  std::function<void()> body;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void* scheduler_fake_stack = nullptr;
  int current = 0;
  int predicate_count = 0;
  uint32_t random = 1;
};

inline State state;

inline uint32_t next_random() {
  state.random = state.random * 1664525u + 1013904223u;
  return state.random >> 8;
}

// Takes the calling fiber off the processor; `last` when it will not come back.
inline void to_scheduler(bool last = false) {
  Fiber& fiber = state.fibers[state.current];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, state.scheduler_stack,
                                 state.scheduler_stack_bytes);
#else
  (void)last;
#endif
  swapcontext(&fiber.context, &state.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

inline void to_fiber(int i) {
  Fiber& fiber = state.fibers[i];
  state.current = i;
  threadIdx = fiber.index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&state.scheduler_fake_stack, fiber.stack.get(), kStackBytes);
#endif
  swapcontext(&state.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(state.scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &state.scheduler_stack, &state.scheduler_stack_bytes);
#endif
  state.body();
  state.fibers[state.current].done = true;
  to_scheduler(true);
}

[[noreturn]] inline void stop(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s in block (%u, %u, %u)\n", what, blockIdx.x, blockIdx.y,
               blockIdx.z);
  for (size_t i = 0; i < state.fibers.size() && i < 64; ++i) {
    const Fiber& fiber = state.fibers[i];
    const char* at = fiber.waiting == Waiting::kNothing ? "running" : fiber.name;
    std::fprintf(stderr, "  thread %zu: %s\n", i, fiber.done ? "returned" : at);
  }
  std::exit(3);
}

// Lets those go on whose meeting is complete; returns whether there were any.
inline bool release() {
  bool any = false;
  bool block_complete = true;
  for (Fiber& fiber : state.fibers) {
    block_complete = block_complete && (fiber.done || fiber.waiting == Waiting::kBlock);
  }
  if (block_complete) {
    state.predicate_count = 0;
    for (Fiber& fiber : state.fibers) {
      if (fiber.done) continue;
      state.predicate_count += fiber.predicate != 0;
      fiber.waiting = Waiting::kNothing;
      any = true;
    }
  }
  for (size_t first = 0; first < state.fibers.size(); first += kLanes) {
    const size_t last = std::min(first + kLanes, state.fibers.size());
    for (size_t i = first; i < last; ++i) {
      if (state.fibers[i].waiting != Waiting::kWarp) continue;
      const unsigned mask = state.fibers[i].mask;
      bool complete = true;
      for (size_t j = first; j < last; ++j) {
        const Fiber& other = state.fibers[j];
        if ((mask >> (j - first) & 1) == 0 || other.done) continue;
        if (other.waiting != Waiting::kWarp) {
          complete = false;
        } else if (other.mask != mask || std::strcmp(other.name, state.fibers[i].name) != 0) {
          stop("lanes of a warp meet in different collectives");
        }
      }
      if (!complete) continue;
      for (size_t j = first; j < last; ++j) {
        if (mask >> (j - first) & 1) state.fibers[j].waiting = Waiting::kNothing;
      }
      any = true;
    }
  }
  return any;
}

inline void prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

inline void run_block(size_t threads) {
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = state.fibers[i];
    fiber.index = {unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y),
                   unsigned(i / blockDim.x / blockDim.y)};
    fiber.waiting = Waiting::kNothing;
    fiber.done = false;
    fiber.collectives = 0;
    fiber.copies.clear();
    fiber.groups = 0;
    prepare(fiber);
  }
  // Some warps are held back for a while, so that others run ahead of them as far as barriers let
  // them.
  uint32_t held = 0;
  for (;;) {
    size_t live = 0;
    bool waits = false;
    if (next_random() % 128 == 0) held = next_random();
    const size_t offset = next_random() % threads;
    const bool backwards = next_random() % 2;
    for (size_t n = 0; n < threads; ++n) {
      const size_t i = ((backwards ? threads - 1 - n : n) + offset) % threads;
      Fiber& fiber = state.fibers[i];
      if (!fiber.done && fiber.waiting == Waiting::kNothing) {
        if (held >> i / kLanes % 24 & 1) {
          waits = true;
        } else {
          to_fiber(int(i));
        }
      }
      live += !fiber.done;
    }
    if (live == 0) return;
    if (release()) continue;
    if (!waits) stop("threads wait for others that never come");
    held = 0;
  }
}

// kernel<<<grid, block, shared_bytes>>>(arguments...)
template <typename... Parameters, typename... Arguments>
void launch(dim3 grid, dim3 block, size_t shared_bytes, uint32_t seed,
            void (*kernel)(Parameters...), const Arguments&... arguments) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  state.random = seed;
  state.fibers = std::vector<Fiber>(threads);
  state.warps = std::vector<Warp>((threads + kLanes - 1) / kLanes);
  state.body = [&] { kernel(arguments...); };
  gridDim = grid;
  blockDim = block;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        state.shared.reset(new char[shared_bytes]);
        std::memset(state.shared.get(), 0xff, shared_bytes);
        run_block(threads);
      }
    }
  }
  state.shared.reset();
}

inline void* dynamic_shared() {
  return state.shared.get();
}

inline void meet_block(const char* name, int predicate = 0) {
  Fiber& fiber = state.fibers[state.current];
  fiber.waiting = Waiting::kBlock;
  fiber.name = name;
  fiber.predicate = predicate;
  to_scheduler();
}

// Leaves `value` in the calling lane's slot, waits for the other lanes of `mask`, and returns their
// slots.
template <typename T>
const char (*meet_warp(const char* name, unsigned mask, T value)) [kSlotBytes] {
  static_assert(sizeof(T) <= kSlotBytes);
  Fiber& fiber = state.fibers[state.current];
  const int lane = state.current % kLanes;
  if ((mask >> lane & 1) == 0) stop("a lane calls a collective whose mask leaves it out");
  auto* slots = state.warps[state.current / kLanes].slot[fiber.collectives++ % 2];
  std::memcpy(slots[lane], &value, sizeof(T));
  fiber.waiting = Waiting::kWarp;
  fiber.name = name;
  fiber.mask = mask;
  to_scheduler();
  return slots;
}

template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source, bool inside) {
  const auto* slots = meet_warp(name, mask, value);
  if (!inside) return value;
  if ((mask >> source & 1) == 0) stop("a shuffle reads a lane that its mask leaves out");
  T result;
  std::memcpy(&result, slots[source], sizeof(T));
  return result;
}

inline int lane() {
  return state.current % kLanes;
}

// The instructions that csrc/common/mma.cuh wraps. `number` turns 16 bits into a float.
template <typename Number>
void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         Number number) {
  struct A {
    uint32_t word[4];
  };
  struct B {
    uint32_t word[2];
  };
  const int g = lane() / 4;
  const int t = lane() % 4;
  float rows[2][16];
  const auto* slots = meet_warp("mma", ~0u, A{{a[0], a[1], a[2], a[3]}});
  for (int k = 0; k < 16; ++k) {
    A words;
    std::memcpy(&words, slots[4 * g + k % 8 / 2], sizeof(words));
    for (int r = 0; r < 2; ++r)
      rows[r][k] = number(words.word[k / 8 * 2 + r] >> k % 2 * 16 & 0xffff);
  }
  slots = meet_warp("mma", ~0u, B{{b[0], b[1]}});
  for (int c = 0; c < 2; ++c) {
    for (int k = 0; k < 16; ++k) {
      B words;
      std::memcpy(&words, slots[4 * (2 * t + c) + k % 8 / 2], sizeof(words));
      const float x = number(words.word[k / 8] >> k % 2 * 16 & 0xffff);
      for (int r = 0; r < 2; ++r) d[2 * r + c] += rows[r][k] * x;
    }
  }
}

inline void load_matrices(uint32_t (&words)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    stop("ldmatrix from an address that is no multiple of 16");
  const auto* slots = meet_warp("ldmatrix", ~0u, row);
  for (int i = 0; i < 4; ++i) {
    const char* from;
    std::memcpy(&from, slots[8 * i + lane() / 4], sizeof(from));
    std::memcpy(&words[i], from + lane() % 4 * 4, sizeof(words[i]));
  }
}

// What is copied is only there once it was waited for; until then there is 0xff.
inline void copy_async(void* to, const void* from, int bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) {
    stop("cp.async at an address that is no multiple of 16");
  }
  std::memset(to, 0xff, 16);
  Fiber& fiber = state.fibers[state.current];
  fiber.copies.push_back({to, from, bytes, fiber.groups});
}

inline void commit_copies() {
  ++state.fibers[state.current].groups;
}

inline void wait_copies(int left) {
  Fiber& fiber = state.fibers[state.current];
  std::erase_if(fiber.copies, [&](const Copy& copy) {
    if (copy.group >= fiber.groups - left) return false;
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, copy.bytes);
    return true;
  });
}

}  // namespace cuda_on_host

inline void __syncthreads() {
  cuda_on_host::meet_block("__syncthreads");
}

inline int __syncthreads_count(int predicate) {
  cuda_on_host::meet_block("__syncthreads_count", predicate);
  return cuda_on_host::state.predicate_count;
}

inline int __syncthreads_or(int predicate) {
  return __syncthreads_count(predicate) > 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_on_host::meet_warp("__syncwarp", mask, 0);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = cuda_on_host::lane() / width * width;
  return cuda_on_host::shuffle("__shfl_sync", mask, value, first + source % width, true);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = cuda_on_host::lane();
  const int source = lane ^ lane_mask;
  const bool inside = source < lane / width * width + width;
  return cuda_on_host::shuffle("__shfl_xor_sync", mask, value, source, inside);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cuda_on_host::lane();
  const bool inside = lane % width + int(delta) < width;
  return cuda_on_host::shuffle("__shfl_down_sync", mask, value, lane + int(delta), inside);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cuda_on_host::lane();
  const bool inside = lane % width - int(delta) >= 0;
  return cuda_on_host::shuffle("__shfl_up_sync", mask, value, lane - int(delta), inside);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto* slots = cuda_on_host::meet_warp("__ballot_sync", mask, int(predicate != 0));
  unsigned ballot = 0;
  for (int i = 0; i < cuda_on_host::kLanes; ++i) {
    int vote = 0;
    if (mask >> i & 1) std::memcpy(&vote, slots[i], sizeof(vote));
    ballot |= unsigned(vote) << i;
  }
  return ballot;
}

inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}

inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, !predicate) == 0;
}

// One fiber runs at a time and none is interrupted, so that a plain update is an atomic one.
template <typename T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}

template <typename T>
T atomicMin(T* p, T value) {
  const T old = *p;
  *p = value < old ? value : old;
  return old;
}

template <typename T>
T atomicMax(T* p, T value) {
  const T old = *p;
  *p = value > old ? value : old;
  return old;
}

template <typename T>
T atomicExch(T* p, T value) {
  const T old = *p;
  *p = value;
  return old;
}

template <typename T>
T atomicCAS(T* p, T expected, T value) {
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(unsigned(x));
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
