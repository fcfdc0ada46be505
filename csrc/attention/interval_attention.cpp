#include "attention/interval_attention.h"

#include "attention/interval_tiles.h"
#include "common/cpu.h"

namespace pynar {

// One head of one tile.
template <typename T>
struct AttentionTile {
  using A = accumulation_t<T>;
  const T* q;  // of the tile's first query
  const T* k;  // of the sentence
  const T* v;
  const T* next_k;  // of the next head; `k` for the last one
  T* out;
  A* lse;
  int64_t q_stride, k_stride, v_stride, out_stride, lse_stride;
  int64_t rows, dim;
  int64_t num_groups;   // of keys
  const int64_t* keys;  // at each position
  const RowBlock* blocks;
  int64_t block_step;
  double scale;
  A* scratch;  // attention_scratch() elements, aligned to 64 bytes
};

// Whether the tile's keys are transposed once, for several blocks.
constexpr bool attention_packs_keys(int64_t rows) {
  return rows > kBlockRows;
}

constexpr int64_t attention_scratch(int64_t num_groups, int64_t rows, int64_t dim) {
  const int64_t width = (dim + 15) / 16 * 16;
  const int64_t positions = num_groups * kKeyGroup;
  const int64_t packed_keys = attention_packs_keys(rows) ? positions * dim : 0;
  return packed_keys + positions * width + kBlockRows * (positions + 2 * width);
}

PYNAR_DECLARE_KERNEL(template <typename T> void attend(const AttentionTile<T>& tile))

}  // namespace pynar

#ifdef PYNAR_ISA

#include "attention/micro_kernels.h"

namespace pynar::PYNAR_ISA {
namespace {

template <typename T, typename U>
constexpr bool kSame = false;
template <typename T>
constexpr bool kSame<T, T> = true;

template <typename A>
constexpr A kLn2 = static_cast<A>(0.6931471805599453);

inline float logarithm(float x) {
  return __builtin_logf(x);
}
inline double logarithm(double x) {
  return __builtin_log(x);
}

template <typename T>
class Attend {
 public:
  using A = accumulation_t<T>;
  using Vector = Simd<A>;

  explicit Attend(const AttentionTile<T>& tile)
      : t_(tile),
        positions_(tile.num_groups * kKeyGroup),
        width_(round_up(tile.dim, Vector::kLanes)),
        packs_keys_(attention_packs_keys(tile.rows)),
        // Converted once for all blocks, or filled up to whole vectors.
        packs_values_(width_ != tile.dim || (!kSame<T, A> && tile.rows > 2 * kBlockRows)) {
    A* next = tile.scratch;
    const auto take = [&](int64_t count) {
      A* taken = next;
      next += count;
      return taken;
    };
    scores_ = take(kBlockRows * positions_);
    sums_ = take(kBlockRows * width_);
    q_ = take(kBlockRows * width_);
    packed_keys_ = packs_keys_ ? take(positions_ * tile.dim) : nullptr;
    packed_values_ = packs_values_ ? take(positions_ * width_) : nullptr;
  }

  void run() {
    for (int64_t g = 0; packs_keys_ && g < t_.num_groups; ++g) {
      pack_transposed(load_group(g), t_.dim, packed_keys_ + g * t_.dim * kKeyGroup);
    }
    if (packs_values_) {
      pack_rows(t_.v, t_.v_stride, t_.keys, positions_, t_.dim, packed_values_, width_);
    }
    const RowBlock* block = t_.blocks;
    for (int64_t r = 0; r < t_.rows; r += kBlockRows, block += t_.block_step) {
      with_constant<kBlockRows>(t_.rows - r < kBlockRows ? t_.rows - r : kBlockRows,
                                [&](auto rows) { run_block<decltype(rows)::value>(*block, r); });
    }
  }

 private:
  // The keys of a group; their values, and the keys of the next head, are what is read next.
  GroupRows<T> load_group(int64_t g) const {
    const int64_t* keys = t_.keys + g * kKeyGroup;
    prefetch(GroupRows<T>(t_.v, t_.v_stride, keys), t_.dim);
    prefetch(GroupRows<T>(t_.next_k, t_.k_stride, keys), t_.dim);
    return GroupRows<T>(t_.k, t_.k_stride, keys);
  }

  template <int kRows>
  void run_block(const RowBlock& block, int64_t first) {
    score<kRows>(block, first);
    A max[kRows];
    for (int r = 0; r < kRows; ++r) {
      A* scores = scores_ + r * positions_;
      fill(block.gaps[r], scores, kLowest);
      max[r] = exponentiate(block, scores);
      fill(block.gaps[r], scores, A(0));
    }
    A total[kRows];
    sum<kRows>(0, block.runs.begin(), block.runs.end(), total);
    for (int r = 0; r < kRows; ++r) {
      // An infinity or NaN times the zero of a query that does not see it is NaN.
      if (block.mixed && !is_finite(sums_ + r * width_)) {
        sum<1>(r, block.seen[r].begin(), block.seen[r].end(), total + r);
      }
      finish(first + r, sums_ + r * width_, total[r], max[r], block.seen[r].count > 0);
    }
  }

  template <int kRows>
  void score(const RowBlock& block, int64_t first) {
    const T* q = t_.q + first * t_.q_stride;
    const A* x;
    int64_t x_stride;
    if constexpr (kSame<T, A>) {
      x = q;
      x_stride = t_.q_stride;
    } else {
      pack_rows(q, t_.q_stride, static_cast<const int64_t*>(nullptr), kRows, t_.dim, q_, width_);
      x = q_;
      x_stride = width_;
    }
    const A scale = static_cast<A>(t_.scale * 1.4426950408889634);
    if (packs_keys_) {
      score_groups<kRows>(block.groups, x, x_stride, static_cast<const A*>(packed_keys_), t_.dim,
                          scale, scores_, positions_);
      return;
    }
    for (int i = 0; i < block.groups.count; ++i) {
      for (int64_t g = block.groups.range[i].begin; g < block.groups.range[i].end; ++g) {
        score_direct<kRows>(x, x_stride, load_group(g), t_.dim, scale, scores_ + g * kKeyGroup,
                            positions_);
      }
    }
  }

  // Replaces the scores of a row by 2^(score - max); returns their maximum.
  A exponentiate(const RowBlock& block, A* scores) {
    Vector max = Vector::broadcast(kLowest);
    for (const Range& groups : block.groups) {
      for (int64_t j = groups.begin * kKeyGroup; j < groups.end * kKeyGroup; j += Vector::kLanes) {
        max = pynar::PYNAR_ISA::max(Vector::load(scores + j), max);
      }
    }
    const A greatest = reduce_max(max);
    const Vector offset = Vector::broadcast(greatest);
    for (const Range& groups : block.groups) {
      for (int64_t j = groups.begin * kKeyGroup; j < groups.end * kKeyGroup; j += Vector::kLanes) {
        exp2<Precision::kFull>(sub(Vector::load(scores + j), offset)).store(scores + j);
      }
    }
    return greatest;
  }

  template <int kRows>
  void sum(int64_t row, const Range* first_run, const Range* last_run, A* total) {
    const A* weights = scores_ + row * positions_;
    A* out = sums_ + row * width_;
    if (packs_values_) {
      weighted_sums<kRows>(weights, positions_, static_cast<const A*>(packed_values_), width_,
                           nullptr, first_run, last_run, width_, out, width_, total);
    } else {
      weighted_sums<kRows>(weights, positions_, t_.v, t_.v_stride, t_.keys, first_run, last_run,
                           width_, out, width_, total);
    }
  }

  bool is_finite(const A* x) const {
    Vector zero = Vector::broadcast(0);
    for (int64_t c = 0; c < width_; c += Vector::kLanes) {
      zero = multiply_add(Vector::load(x + c), Vector::broadcast(0), zero);
    }
    return reduce_add(zero) == 0;
  }

  void finish(int64_t row, const A* sums, A total, A max, bool sees) {
    T* out = t_.out + row * t_.out_stride;
    const A factor = sees ? A(1) / total : A(0);
    store_scaled(sums, factor, t_.dim, out);
    t_.lse[row * t_.lse_stride] = sees ? max * kLn2<A> + logarithm(total) : kLowest;
  }

  static constexpr A kLowest = -static_cast<A>(__builtin_huge_val());

  const AttentionTile<T>& t_;
  int64_t positions_;
  int64_t width_;
  bool packs_keys_;
  bool packs_values_;
  A* scores_;         // [kBlockRows, positions], then their exponentials
  A* sums_;           // [kBlockRows, width]
  A* q_;              // [kBlockRows, width]
  A* packed_keys_;    // [groups, dim, kKeyGroup]
  A* packed_values_;  // [positions, width]
};

}  // namespace

template <typename T>
void attend(const AttentionTile<T>& tile) {
  Attend<T>(tile).run();
}

template void attend(const AttentionTile<float>&);
template void attend(const AttentionTile<double>&);
template void attend(const AttentionTile<BFloat16>&);
template void attend(const AttentionTile<Half>&);

}  // namespace pynar::PYNAR_ISA

#else

#include <optional>

#include "attention/interval_arguments.h"
#include "common/parallel.h"
#ifdef PYNAR_WITH_CUDA
#include "common/cuda_launch.h"
#endif

namespace pynar {
namespace {

constexpr const char* kName = "interval_attention";

template <typename T>
void interval_attention_cpu(const IntervalAttentionParams<T>& p) {
  const IntervalView view = interval_view(p.intervals, p.sizes);
  const TileList tiles(Check(kName), view);
  const auto attend = PYNAR_SELECT_KERNEL(attend<T>);
  const int64_t heads = p.sizes.heads;
  const int64_t work = heads * tiles.total();
  parallel_for(work, attention_grain(p.sizes), [&](int64_t first, int64_t last) {
    thread_local TilePlan plan;
    thread_local Scratch scratch;
    const TileSpan* planned = nullptr;
    const auto run = [&](const TileSpan& span, int64_t h) {
      if (planned != &span) plan.build(view, span);
      planned = &span;
      AttentionTile<T> tile;
      tile.q = p.q.at(span.b, h, span.first);
      tile.k = p.k.at(span.b, h, 0);
      tile.next_k = h + 1 < heads ? p.k.at(span.b, h + 1, 0) : tile.k;
      tile.v = p.v.at(span.b, h, 0);
      tile.out = p.out.at(span.b, h, span.first);
      tile.lse = p.lse.at(span.b, h, span.first);
      tile.q_stride = p.q.stride_t;
      tile.k_stride = p.k.stride_t;
      tile.v_stride = p.v.stride_t;
      tile.out_stride = p.out.stride_t;
      tile.lse_stride = p.lse.stride_t;
      tile.rows = span.rows;
      tile.dim = p.sizes.dim;
      tile.num_groups = plan.num_groups();
      tile.keys = plan.keys();
      tile.blocks = plan.blocks();
      tile.block_step = plan.block_step();
      tile.scale = p.scale;
      tile.scratch =
          scratch.get<accumulation_t<T> >(attention_scratch(tile.num_groups, tile.rows, tile.dim));
      attend(tile);
    };
    for_each_share(tiles.tiles(), tiles.total(), heads, first, last, run);
  });
}

}  // namespace

std::optional<LaunchPlan> interval_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& intervals, double scale,
                                             const Tensor& out, const Tensor& lse) {
  const Check check(kName);
  check_attention(check, q, k, v, intervals);
  check_like(check, "out", out, "q", q);
  check_output(check, "out", out);
  check_lse(check, lse, q);
  check_output(check, "lse", lse);
  if (q.numel() == 0) return std::nullopt;
  const bool packed = q.dim() == 3;
  return dispatch_floating(q.dtype(), [&]<typename T>() -> std::optional<LaunchPlan> {
    using A = accumulation_t<T>;
    const IntervalAttentionParams<T> params{
        head_rows<const T>(q, packed),    head_rows<const T>(k, packed),
        head_rows<const T>(v, packed),    interval_rows(intervals),
        head_rows<T>(out, packed),        head_rows<A>(lse, packed),
        attention_sizes(q, k, intervals), scale,
        rows_aligned({&q, &k, &v})};
    if (q.device().type == dlpack::kCpu) {
      interval_attention_cpu(params);
      return std::nullopt;
    }
#ifdef PYNAR_WITH_CUDA
    if (!use_nvrtc()) {
      const DeviceGuard guard(q.device().index);
      interval_attention_cuda(params, q.stream());
      return std::nullopt;
    }
#endif
    const AttentionSizes& sizes = params.sizes;
    const int64_t blocks = attention_blocks(sizes, sizeof(T));
    LaunchPlan plan("attention/interval_attention.cuh", params, q);
    if (attention_takes_tiles(sizeof(T), sizes.queries, sizes.keys)) {
      plan.add<T>("interval_attention_tiles", attention_tile_dim(sizes.dim), kAttentionTileThreads,
                  blocks);
    } else {
      plan.add<T>("interval_attention_rows", kAttentionRowThreads, blocks);
    }
    return plan;
  });
}

}  // namespace pynar

#endif
