#include "attention/interval_attention.h"

#include "attention/interval_tiles.h"
#include "common/cpu.h"

namespace pynar {

// One head of the keys of a family.
template <typename T>
struct AttentionKeys {
  using A = accumulation_t<T>;
  const T* k;  // of the sentence
  const T* v;
  int64_t k_stride, v_stride;
  // The same keys of what comes next, or about: the next head, or the next family's first one.
  const T* next_k;
  const T* next_v;
  int64_t dim;
  int64_t num_groups;
  const int64_t* keys;  // at each position
  bool packed;          // whether they were, for several blocks
  A* scratch;           // attention_scratch() elements, aligned to 64 bytes

  int64_t positions() const { return num_groups * kKeyGroup; }
};

// One head of one tile.
template <typename T>
struct AttentionTile {
  using A = accumulation_t<T>;
  const T* q;  // of the tile's first query
  T* out;
  A* lse;
  int64_t q_stride, out_stride, lse_stride;
  int64_t rows;
  const RowBlock* blocks;
  int64_t block_step;
  const float* masks;
  Range ahead;  // positions of what comes next to be read ahead of time meanwhile
  double scale;
};

// For packed keys and values, and the scores, sums and queries of a block.
constexpr int64_t attention_scratch(int64_t num_groups, int64_t dim) {
  const int64_t positions = num_groups * kKeyGroup;
  return positions * (dim + attention_width(dim)) +
         kBlockRows * (positions + kKeyGroup + 2 * attention_width(dim));
}

PYNAR_DECLARE_KERNEL(template <typename T> void pack_keys(const AttentionKeys<T>& keys))
PYNAR_DECLARE_KERNEL(template <typename T>
                     void attend(const AttentionKeys<T>& keys, const AttentionTile<T>& tile))

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

  explicit Attend(const AttentionKeys<T>& keys)
      : k_(keys),
        positions_(keys.positions()),
        width_(round_up(keys.dim, Vector::kLanes)),
        stride_(positions_ + kKeyGroup) {
    A* next = keys.scratch;
    const auto take = [&](int64_t count) {
      A* taken = next;
      next += count;
      return taken;
    };
    packed_keys_ = take(positions_ * k_.dim);
    packed_values_ = take(positions_ * width_);
    scores_ = take(kBlockRows * stride_);
    sums_ = take(kBlockRows * width_);
    q_ = take(kBlockRows * width_);
  }

  void pack() {
    const auto rows = [&](const T* x, int64_t stride, int64_t g) {
      return GroupRows<T>(x, stride, k_.keys + g * kKeyGroup);
    };
    for (int64_t g = 0; g < k_.num_groups; ++g) {
      const int64_t next = g + 1 < k_.num_groups ? g + 1 : g;
      prefetch(rows(k_.k, k_.k_stride, next), k_.dim);
      prefetch(rows(k_.v, k_.v_stride, next), k_.dim);
      if (k_.packed) {
        pack_transposed(rows(k_.k, k_.k_stride, g), k_.dim, packed_keys_ + g * k_.dim * kKeyGroup);
      }
      if (packs_values()) {
        pack_panels(k_.v, k_.v_stride, k_.keys, g * kKeyGroup, (g + 1) * kKeyGroup, positions_,
                    k_.dim, width_, packed_values_);
      }
    }
  }

  void run(const AttentionTile<T>& tile) {
    const RowBlock* block = tile.blocks;
    for (int64_t r = 0; r < tile.rows; r += kBlockRows, block += tile.block_step) {
      with_constant<kBlockRows>(
          tile.rows - r < kBlockRows ? tile.rows - r : kBlockRows,
          [&](auto rows) { run_block<decltype(rows)::value>(tile, *block, r); });
    }
  }

 private:
  // Where rows of values are not whole vectors they must be packed.
  bool packs_values() const { return k_.packed || width_ != k_.dim; }

  template <int kRows>
  void run_block(const AttentionTile<T>& tile, const RowBlock& block, int64_t first) {
    for (int r = 0; r < kRows; ++r) {
      prefetch_output(tile.out + (first + r) * tile.out_stride, k_.dim);
    }
    score<kRows>(tile, block, first);
    A max[kRows];
    exponentiate<kRows>(tile, block, max);
    sum<kRows>(0, block.runs.begin(), block.runs.end());
    A total[kRows];
    if (block.mixed) {
      for (int r = 0; r < kRows; ++r) {
        sum_ranges<1>(block.seen[r], scores_ + r * stride_, stride_, total + r);
      }
      // An infinity or NaN times the zero of a query that does not see it is NaN.
      if (!is_finite(sums_, kRows * width_)) {
        for (int r = 0; r < kRows; ++r) sum<1>(r, block.seen[r].begin(), block.seen[r].end());
      }
    } else {
      sum_ranges<kRows>(block.seen[0], scores_, stride_, total);
    }
    for (int r = 0; r < kRows; ++r) {
      finish(tile, first + r, sums_ + r * width_, total[r], max[r], block.seen[r].count > 0);
    }
    read_ahead(tile, first, first + kRows);
  }

  // Its share of what the blocks of a tile ask for. All at once it would have to be waited for.
  void read_ahead(const AttentionTile<T>& tile, int64_t first, int64_t last) {
    const int64_t count = tile.ahead.end - tile.ahead.begin;
    const int64_t end = tile.ahead.begin + count * last / tile.rows;
    for (int64_t i = tile.ahead.begin + count * first / tile.rows; i < end; ++i) {
      prefetch_later(k_.next_k + k_.keys[i] * k_.k_stride, k_.dim);
      prefetch_later(k_.next_v + k_.keys[i] * k_.v_stride, k_.dim);
    }
  }

  template <int kRows>
  void score(const AttentionTile<T>& tile, const RowBlock& block, int64_t first) {
    const T* q = tile.q + first * tile.q_stride;
    pack_rows(q, tile.q_stride, kRows, k_.dim, q_, width_);
    const A scale = static_cast<A>(tile.scale * 1.4426950408889634);
    if (k_.packed) {
      score_groups<kRows>(block.groups, static_cast<const A*>(q_), width_,
                          static_cast<const A*>(packed_keys_), k_.dim, scale, scores_, stride_);
      return;
    }
    for (const Range& groups : block.groups) {
      for (int64_t g = groups.begin; g < groups.end; ++g) {
        score_direct<kRows>(static_cast<const A*>(q_), width_,
                            GroupRows<T>(k_.k, k_.k_stride, k_.keys + g * kKeyGroup), k_.dim, scale,
                            scores_ + g * kKeyGroup, stride_);
      }
    }
  }

  // Replaces the scores of the rows by 2^(score - max), and gives their maxima.
  template <int kRows>
  void exponentiate(const AttentionTile<T>& tile, const RowBlock& block, A* greatest) {
    Vector max[kRows];
    for (int r = 0; r < kRows; ++r) max[r] = Vector::broadcast(kLowest);
    for_each_vector<kRows, A>(block, tile.masks, [&](int64_t j, const auto& mask) {
      for (int r = 0; r < kRows; ++r) {
        const Vector x = Vector::load(scores_ + r * stride_ + j);
        max[r] = pynar::PYNAR_ISA::max(select(mask, r, x, Vector::broadcast(kLowest)), max[r]);
      }
    });
    for (int r = 0; r < kRows; ++r) greatest[r] = reduce_max(max[r]);
    for_each_vector<kRows, A>(block, tile.masks, [&](int64_t j, const auto& mask) {
      for (int r = 0; r < kRows; ++r) {
        A* x = scores_ + r * stride_ + j;
        const Vector y = sub(Vector::load(x), Vector::broadcast(greatest[r]));
        select(mask, r, exp2<Precision::kFull>(y), Vector::broadcast(0)).store(x);
      }
    });
    // For sum_ranges().
    for (const Range& groups : block.groups) {
      for (int r = 0; r < kRows; ++r) {
        Vector::broadcast(0).store(scores_ + r * stride_ + groups.end * kKeyGroup);
      }
    }
  }

  template <int kRows>
  void sum(int64_t row, const Range* first_run, const Range* last_run) {
    const A* weights = scores_ + row * stride_;
    A* out = sums_ + row * width_;
    if (packs_values()) {
      weighted_panels<kRows>(weights, stride_, static_cast<const A*>(packed_values_), positions_,
                             first_run, last_run, width_, out, width_);
    } else {
      weighted_sums<kRows>(weights, stride_, k_.v, k_.v_stride, k_.keys, first_run, last_run,
                           width_, out, width_);
    }
  }

  static bool is_finite(const A* x, int64_t count) {
    Vector zero = Vector::broadcast(0);
    for (int64_t c = 0; c < count; c += Vector::kLanes) {
      zero = multiply_add(Vector::load(x + c), Vector::broadcast(0), zero);
    }
    return reduce_add(zero) == 0;
  }

  void finish(const AttentionTile<T>& tile, int64_t row, const A* sums, A total, A max, bool sees) {
    const A factor = sees ? A(1) / total : A(0);
    store_scaled(sums, factor, k_.dim, tile.out + row * tile.out_stride);
    tile.lse[row * tile.lse_stride] = sees ? max * kLn2<A> + logarithm(total) : kLowest;
  }

  static constexpr A kLowest = -static_cast<A>(__builtin_huge_val());

  const AttentionKeys<T>& k_;
  int64_t positions_;
  int64_t width_;
  int64_t stride_;    // of the scores, which leave room for a vector of zeros
  A* packed_keys_;    // [groups, dim, kKeyGroup]
  A* packed_values_;  // see pack_panels()
  A* scores_;         // [kBlockRows, stride], then their exponentials
  A* sums_;           // [kBlockRows, width]
  A* q_;              // [kBlockRows, width]
};

}  // namespace

template <typename T>
void pack_keys(const AttentionKeys<T>& keys) {
  Attend<T>(keys).pack();
}

template <typename T>
void attend(const AttentionKeys<T>& keys, const AttentionTile<T>& tile) {
  Attend<T>(keys).run(tile);
}

template void pack_keys(const AttentionKeys<float>&);
template void pack_keys(const AttentionKeys<double>&);
template void pack_keys(const AttentionKeys<BFloat16>&);
template void pack_keys(const AttentionKeys<Half>&);
template void attend(const AttentionKeys<float>&, const AttentionTile<float>&);
template void attend(const AttentionKeys<double>&, const AttentionTile<double>&);
template void attend(const AttentionKeys<BFloat16>&, const AttentionTile<BFloat16>&);
template void attend(const AttentionKeys<Half>&, const AttentionTile<Half>&);

}  // namespace pynar::PYNAR_ISA

#else

#include <algorithm>
#include <optional>

#include "attention/interval_arguments.h"
#include "common/parallel.h"
#ifdef PYNAR_WITH_CUDA
#include "common/cuda_launch.h"
#endif

namespace pynar {
namespace {

constexpr const char* kName = "interval_attention";

// Queries that share packed keys: as many as leave each thread a few pieces of work.
int64_t family_rows(const AttentionSizes& sizes) {
  const int64_t rows = sizes.batch * sizes.queries * sizes.heads;
  return std::clamp<int64_t>(rows / (4 * max_threads()), TileList::kMaxRows,
                             8 * TileList::kMaxRows);
}

template <typename T>
void interval_attention_cpu(const IntervalAttentionParams<T>& p) {
  using A = accumulation_t<T>;
  const IntervalView view = interval_view(p.intervals, p.sizes);
  const TileList tiles(Check(kName), view);
  const TileFamilies families(tiles, view, family_rows(p.sizes));
  const auto pack_keys = PYNAR_SELECT_KERNEL(pack_keys<T>);
  const auto attend = PYNAR_SELECT_KERNEL(attend<T>);
  const int64_t heads = p.sizes.heads;
  const int64_t work = heads * families.total();
  parallel_for(work, attention_grain(p.sizes), [&](int64_t first, int64_t last) {
    thread_local TilePlan plan;
    thread_local Scratch scratch;
    const TileFamily* planned = nullptr;
    const auto run = [&](const TileFamily& family, int64_t h) {
      if (planned != &family) plan.build(view, families.tiles(family));
      planned = &family;
      // What this thread does next, unless its share ends here.
      const bool same = h + 1 < heads || &family == &families.families().back();
      const TileFamily& next = same ? family : (&family)[1];
      const int64_t next_head = h + 1 < heads ? h + 1 : 0;
      const int64_t shift = next.keys.begin - family.keys.begin;
      AttentionKeys<T> keys;
      keys.k = p.k.at(family.b, h, 0);
      keys.v = p.v.at(family.b, h, 0);
      keys.next_k = p.k.at(next.b, next_head, shift);
      keys.next_v = p.v.at(next.b, next_head, shift);
      keys.k_stride = p.k.stride_t;
      keys.v_stride = p.v.stride_t;
      keys.dim = p.sizes.dim;
      keys.num_groups = plan.num_groups();
      keys.keys = plan.keys();
      keys.packed = family.rows > kBlockRows;
      keys.scratch = scratch.get<A>(attention_scratch(keys.num_groups, keys.dim));
      pack_keys(keys);
      int64_t rows = 0;
      for (const TileBlocks& blocks : plan.tiles()) {
        const TileSpan& span = *blocks.span;
        AttentionTile<T> tile;
        tile.q = p.q.at(span.b, h, span.first);
        tile.out = p.out.at(span.b, h, span.first);
        tile.lse = p.lse.at(span.b, h, span.first);
        tile.q_stride = p.q.stride_t;
        tile.out_stride = p.out.stride_t;
        tile.lse_stride = p.lse.stride_t;
        tile.rows = span.rows;
        tile.blocks = plan.blocks() + blocks.first;
        tile.block_step = blocks.step;
        tile.masks = plan.masks();
        tile.ahead = {plan.num_keys() * rows / family.rows,
                      plan.num_keys() * (rows + span.rows) / family.rows};
        tile.scale = p.scale;
        attend(keys, tile);
        rows += span.rows;
      }
    };
    for_each_share(families.families(), families.total(), heads, first, last, run);
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
