#pragma once

#include "common/device.cuh"
#include "common/mma.cuh"
#include "common/symbols.h"
#include "linear/linear_argmax.h"

namespace pynar {

// A stage of the pipeline holds 64 bytes of depth of every row of x and of every column of the
// weight in a tile, in units of 16 bytes. The units of a row are permuted so that neither 8 rows at
// the same depth nor 8 units that are written together lie in the same banks.
struct alignas(16) ArgmaxUnit {
  unsigned char byte[16];
};

constexpr int kArgmaxUnits = 4;
constexpr int kArgmaxStages = 3;
constexpr int kArgmaxStageUnits = (kArgmaxRows + kArgmaxColumns) * kArgmaxUnits;

// After the depth, the stages' memory holds the tile of outputs. The distance of rows puts the four
// rows that a quarter of a warp reads into different banks.
constexpr int kArgmaxDistance = kArgmaxColumns + 8;
static_assert(kArgmaxRows * kArgmaxDistance * 4 <= kArgmaxStages * kArgmaxStageUnits * 16);

__device__ inline int argmax_unit(int row, int unit) {
  return row * kArgmaxUnits + (unit ^ (row / 2 % kArgmaxUnits));
}

// Brings one unit of a row, from element `first` on; zeros where there is no such row or element.
template <typename T>
__device__ inline void argmax_load(ArgmaxUnit* to, const T* matrix, int64_t stride, int64_t row,
                                   int64_t rows, int64_t first, int64_t depth, bool aligned) {
  constexpr int kPerUnit = 16 / sizeof(T);
  const int64_t left = row < rows ? depth - first : 0;
  const int count = left <= 0 ? 0 : left < kPerUnit ? static_cast<int>(left) : kPerUnit;
  const T* from = count > 0 ? matrix + row * stride + first : matrix;
  if (aligned) {
    copy_async(to, from, count * static_cast<int>(sizeof(T)));
  } else {
    T* element = reinterpret_cast<T*>(to);
#pragma unroll
    for (int i = 0; i < kPerUnit; ++i) element[i] = i < count ? from[i] : T{};
  }
}

// What a thread sums up of a tile: 16-bit types on tensor cores, a warp for 32 rows and 64 columns.
template <typename T>
struct ArgmaxTile {
  static constexpr int kRowTiles = 2;
  static constexpr int kColumnTiles = 8;
  float sum[kRowTiles][kColumnTiles][4] = {};

  __device__ void add(const ArgmaxUnit* x, const ArgmaxUnit* weight) {
    const int lane = threadIdx.x % kWarp;
    const int row = threadIdx.x / kWarp % 2 * 32;
    const int column = threadIdx.x / kWarp / 2 * 64;
#pragma unroll
    for (int unit = 0; unit < kArgmaxUnits; unit += 2) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        load_matrices(a[r], x + argmax_unit(row + r * 16 + lane % 16, unit + lane / 16));
      }
#pragma unroll
      for (int c = 0; c < kColumnTiles; c += 2) {
        uint32_t b[4];
        const int from = column + c * 8 + lane / 16 * 8 + lane % 8;
        load_matrices(b, weight + argmax_unit(from, unit + lane / 8 % 2));
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiply_accumulate<T>(sum[r][c], a[r], {b[0], b[1]});
          multiply_accumulate<T>(sum[r][c + 1], a[r], {b[2], b[3]});
        }
      }
    }
  }

  __device__ void store(float* z) const {
    const int lane = threadIdx.x % kWarp;
    const int row = threadIdx.x / kWarp % 2 * 32 + lane / 4;
    const int column = threadIdx.x / kWarp / 2 * 64 + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          z[(row + r * 16 + i / 2 * 8) * kArgmaxDistance + column + c * 8 + i % 2] = sum[r][c][i];
        }
      }
    }
  }
};

// fp32: every thread has 8 rows and 8 columns, 8 and 16 apart.
template <>
struct ArgmaxTile<float> {
  static constexpr int kEach = 8;
  static constexpr int kRowStep = kArgmaxRows / kEach;
  static constexpr int kColumnStep = kArgmaxColumns / kEach;
  float sum[kEach][kEach] = {};

  __device__ void add(const ArgmaxUnit* x, const ArgmaxUnit* weight) {
    const int row = threadIdx.x / kColumnStep;
    const int column = threadIdx.x % kColumnStep;
    using Four = Chunk<float>;
#pragma unroll
    for (int unit = 0; unit < kArgmaxUnits; ++unit) {
      Four a[kEach];
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
        a[r] = reinterpret_cast<const Four&>(x[argmax_unit(row + r * kRowStep, unit)]);
      }
#pragma unroll
      for (int c = 0; c < kEach; ++c) {
        const Four b =
            reinterpret_cast<const Four&>(weight[argmax_unit(column + c * kColumnStep, unit)]);
#pragma unroll
        for (int r = 0; r < kEach; ++r) {
#pragma unroll
          for (int i = 0; i < Four::kCount; ++i) sum[r][c] += a[r].element[i] * b.element[i];
        }
      }
    }
  }

  __device__ void store(float* z) const {
    const int row = threadIdx.x / kColumnStep;
    const int column = threadIdx.x % kColumnStep;
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
#pragma unroll
      for (int c = 0; c < kEach; ++c) {
        z[(row + r * kRowStep) * kArgmaxDistance + column + c * kColumnStep] = sum[r][c];
      }
    }
  }
};

// Of one row and part, as its outputs come in ascending order of symbols.
template <int kMost>
struct ArgmaxPart {
  ArgmaxSum total{negative_infinity<float>(), 0.f};
  ArgmaxCandidate best[kMost];

  __device__ ArgmaxPart() {
#pragma unroll
    for (int i = 0; i < kMost; ++i) best[i] = {negative_infinity<float>(), 0};
  }

  // Four neighbouring symbols.
  __device__ void add(const float (&z)[4], int64_t symbol) {
    const float four = maximum(maximum(z[0], z[1]), maximum(z[2], z[3]));
    if (four > total.max) {
      // What was summed up before the first finite output is 0 or NaN.
      total.sum *= exponential(total.max - four);
      total.max = four;
    }
    const float shift = total.max == negative_infinity<float>() ? 0.f : total.max;
#pragma unroll
    for (int i = 0; i < 4; ++i) total.sum += exponential(z[i] - shift);
    if (four > best[kMost - 1].value) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (z[i] > best[kMost - 1].value) insert({z[i], static_cast<int32_t>(symbol + i)});
      }
    }
  }

  // Equals stay behind those that came before.
  __device__ void insert(ArgmaxCandidate candidate) {
    best[kMost - 1] = candidate;
#pragma unroll
    for (int i = kMost - 1; i > 0; --i) {
      if (best[i].value > best[i - 1].value) {
        const ArgmaxCandidate other = best[i - 1];
        best[i - 1] = best[i];
        best[i] = other;
      }
    }
  }
};

// The partial results of kArgmaxRows rows in one segment, with the k <= kMost best of each.
// Neighbouring blocks take the same segment, so that the weight comes from memory once.
// grid: linear_argmax_blocks(N, V)
template <typename T, int kMost>
__global__ void __launch_bounds__(kArgmaxThreads) linear_argmax_partials(LinearArgmaxParams p) {
  constexpr int kPerStage = kArgmaxUnits * 16 / sizeof(T);
  constexpr int kPerUnit = 16 / sizeof(T);
  __shared__ ArgmaxUnit stages[kArgmaxStages * kArgmaxStageUnits];
  __shared__ float bias[kArgmaxColumns];

  const int64_t row_tiles = (p.rows + kArgmaxRows - 1) / kArgmaxRows;
  const int64_t segment = blockIdx.x / row_tiles;
  const int64_t first_row = blockIdx.x % row_tiles * kArgmaxRows;
  const int64_t segment_columns = linear_argmax_segment_tiles(p.columns) * kArgmaxColumns;
  const int64_t begin = segment * segment_columns;
  const int64_t end = begin + segment_columns < p.columns ? begin + segment_columns : p.columns;
  const int64_t steps = (p.depth + kPerStage - 1) / kPerStage;
  const T* x = static_cast<const T*>(p.x);
  const T* weight = static_cast<const T*>(p.weight);

  ArgmaxPart<kMost> part;
  for (int64_t first_column = begin; first_column < end; first_column += kArgmaxColumns) {
    const auto load = [&](int64_t step) {
      ArgmaxUnit* stage = stages + step % kArgmaxStages * kArgmaxStageUnits;
#pragma unroll
      for (int i = threadIdx.x; i < kArgmaxStageUnits; i += kArgmaxThreads) {
        const int row = i / kArgmaxUnits;
        const int unit = i % kArgmaxUnits;
        const int64_t depth = step * kPerStage + unit * kPerUnit;
        if (row < kArgmaxRows) {
          argmax_load(stage + argmax_unit(row, unit), x, p.x_stride, first_row + row, p.rows, depth,
                      p.depth, p.aligned != 0);
        } else {
          argmax_load(stage + argmax_unit(row, unit), weight, p.weight_stride,
                      first_column + row - kArgmaxRows, end, depth, p.depth, p.aligned != 0);
        }
      }
    };

    for (int c = threadIdx.x; c < kArgmaxColumns; c += kArgmaxThreads) {
      const int64_t v = first_column + c;
      bias[c] = v >= end ? negative_infinity<float>() : p.bias == nullptr ? 0.f : p.bias[v];
    }
    ArgmaxTile<T> tile;
    for (int step = 0; step < kArgmaxStages - 1; ++step) {
      if (step < steps) load(step);
      commit_copies();
    }
    for (int64_t step = 0; step < steps; ++step) {
      wait_copies<kArgmaxStages - 2>();
      // Also: all are done with the stage before this one, which is the next to be filled.
      __syncthreads();
      if (step + kArgmaxStages - 1 < steps) load(step + kArgmaxStages - 1);
      commit_copies();
      const ArgmaxUnit* stage = stages + step % kArgmaxStages * kArgmaxStageUnits;
      tile.add(stage, stage + kArgmaxRows * kArgmaxUnits);
    }
    wait_copies<0>();
    __syncthreads();
    float* z = reinterpret_cast<float*>(stages);
    tile.store(z);
    __syncthreads();

    // Two threads for each row take turns at four columns.
    const float* row = z + threadIdx.x / 2 * kArgmaxDistance;
#pragma unroll 4
    for (int c = threadIdx.x % 2 * 4; c < kArgmaxColumns; c += 8) {
      const Chunk<float> four = load_chunk(row + c, true);
      const float shifted[4] = {four.element[0] + bias[c], four.element[1] + bias[c + 1],
                                four.element[2] + bias[c + 2], four.element[3] + bias[c + 3]};
      part.add(shifted, first_column + c);
    }
    __syncthreads();
  }

  const int64_t row = first_row + threadIdx.x / 2;
  if (row >= p.rows) return;
  const int64_t place = row * 2 * p.segments + 2 * segment + threadIdx.x % 2;
  p.sums[place] = part.total;
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    if (i < p.k) p.candidates[place * p.k + i] = part.best[i];
  }
}

// One warp for each row: puts its parts together.
// grid: linear_argmax_finish_blocks(N)
template <int kThreads>
__global__ void __launch_bounds__(kThreads) linear_argmax_finish(LinearArgmaxParams p) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (row >= p.rows) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t parts = 2 * p.segments;
  const ArgmaxSum* sums = p.sums + row * parts;
  const ArgmaxCandidate* candidates = p.candidates + row * parts * p.k;
  const float lowest = negative_infinity<float>();

  float max = lowest;
  for (int64_t i = lane; i < parts; i += kWarp) max = maximum(max, sums[i].max);
  max = warp_max(max);
  float sum = 0;
  for (int64_t i = lane; i < parts; i += kWarp) {
    // A part without a maximum saw -inf alone and has the sum 0, or a NaN, which must not vanish.
    sum += sums[i].sum * (sums[i].max > lowest ? exponential(sums[i].max - max) : 1.f);
  }
  const float log_sum = logarithm(warp_sum(sum));
  const float lse = max + log_sum;
  // Infinities and NaN have no difference with themselves.
  const bool defined = lse - lse == 0.f;
  const float undefined = lowest - lowest;
  if (lane == 0) p.lse[row] = defined ? lse : undefined;

  // Candidates are ordered by descending value, then by ascending symbol. Each turn finds the first
  // one behind the one found before.
  ArgmaxCandidate last{-lowest, -1};
  for (int64_t i = 0; i < p.k; ++i) {
    ArgmaxCandidate next{lowest, 0};
    for (int64_t part = lane; part < parts; part += kWarp) {
      for (int64_t c = 0; c < p.k; ++c) {
        const ArgmaxCandidate candidate = candidates[part * p.k + c];
        if (candidate.value > last.value ||
            (candidate.value == last.value && candidate.token <= last.token)) {
          continue;
        }
        if (candidate.value > next.value ||
            (candidate.value == next.value && candidate.token < next.token)) {
          next = candidate;
        }
        break;
      }
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const float value = __shfl_xor_sync(kAllLanes, next.value, offset);
      const int32_t token = __shfl_xor_sync(kAllLanes, next.token, offset);
      if (value > next.value || (value == next.value && token < next.token)) next = {value, token};
    }
    if (lane == 0) {
      const bool found = defined && next.value > lowest;
      p.tokens[row * p.k + i] = found ? next.token : kUnk;
      p.log_probs[row * p.k + i] = found     ? next.value - max - log_sum
                                   : defined ? lowest
                                             : undefined;
    }
    last = next;
  }
}

}  // namespace pynar
