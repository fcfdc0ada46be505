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
  bool packed;          // for several blocks, or where they are not in the accumulation type
  A* scratch;           // attention_scratch() elements, aligned to 64 bytes

  int64_t positions() const { return num_groups * kKeyGroup; }
  // The rows as they are, null where they are packed.
  const A* k_rows() const { return as_they_are(k); }
  const A* v_rows() const { return as_they_are(v); }

 private:
  static const A* as_they_are(const A* rows) { return rows; }
  template <typename U>
  static const A* as_they_are(const U*) {
    return nullptr;
  }
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

// For packed keys and values, and the scores, sums and queries of a block. (Those of keys, values
// and queries take half where they are multiplied as bf16, and the weights of a block what is
// left.)
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

#include <type_traits>

#include "attention/micro_kernels.h"

namespace pynar::PYNAR_ISA {
namespace {

template <typename A>
constexpr A kLn2 = static_cast<A>(0.6931471805599453);
template <typename A>
constexpr A kLowest = -static_cast<A>(__builtin_huge_val());

inline float logarithm(float x) {
  return __builtin_logf(x);
}
inline double logarithm(double x) {
  return __builtin_log(x);
}

// What is done with the keys of a family, multiplied as numbers of type O: compiled once for all
// element types.
template <typename O>
class BlockAttention {
 public:
  using A = accumulation_t<O>;
  using Vector = Simd<A>;
  // Rounded to bf16 they do not need more.
  static constexpr Precision kPrecision = kPer<O> == 1 ? Precision::kFull : Precision::kShort;
  // Scores become weights in place where these are of the same type.
  static constexpr bool kInPlace = kPer<O> == 1;

  template <typename T>
  explicit BlockAttention(const AttentionKeys<T>& keys)
      : k_(keys.k_rows()),
        v_(keys.v_rows()),
        k_stride_(keys.k_stride),
        v_stride_(keys.v_stride),
        keys_(keys.keys),
        dim_(keys.dim),
        packed_(keys.packed),
        positions_(keys.positions()),
        width_(round_up(keys.dim, Vector::kLanes)),
        stride_(positions_ + kKeyGroup) {
    char* next = reinterpret_cast<char*>(keys.scratch);
    const auto take = [&](auto*& taken, int64_t count) {
      taken = reinterpret_cast<decltype(+taken)>(next);
      next += count * sizeof(*taken);
    };
    take(packed_keys_, positions_ * in_factors<O>(dim_));
    take(packed_values_, positions_ * width_);
    take(scores_, kBlockRows * stride_);
    take(sums_, kBlockRows * width_);
    take(q_, kBlockRows * width_);
    if constexpr (kInPlace) {
      weights_ = scores_;
    } else {
      take(weights_, kBlockRows * stride_);
    }
  }

  int64_t width() const { return width_; }
  int64_t positions() const { return positions_; }
  // Where rows of values are not whole vectors they must be packed.
  bool packs_values() const { return packed_ || width_ != dim_; }
  O* packed_keys() const { return packed_keys_; }
  O* packed_values() const { return packed_values_; }
  O* q() const { return q_; }
  const A* sums() const { return sums_; }

  // For padded_rows(rows) queries: sums() of the values by exp2(score - max), with the maximum and
  // the sum of the weights of each row.
  void run(const RowBlock& block, const O* q, int64_t q_stride, int64_t rows, const float* masks,
           A scale, A* max, A* total) {
    with_rows(rows, [&](auto count) {
      run_rows<decltype(count)::value>(block, q, q_stride, rows, masks, scale, max, total);
    });
  }

 private:
  template <int kRows>
  void run_rows(const RowBlock& block, const O* q, int64_t q_stride, int64_t rows,
                const float* masks, A scale, A* max, A* total) {
    score<kRows>(block, q, q_stride, scale);
    exponentiate<kRows>(block, masks, max);
    sum<kRows>(0, block.runs.begin(), block.runs.end());
    if (!block.mixed) {
      sum_ranges<kRows>(block.seen[0], scores_, stride_, total);
      // No position is read that not all of them see.
      if (kPer<O> == 1) return;
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        sum_ranges<1>(block.seen[r], scores_ + r * stride_, stride_, total + r);
      }
    }
    // An infinity or NaN times the zero of a query that does not see it is NaN.
    if (is_finite(sums_, rows * width_)) return;
    for (int64_t r = 0; r < rows; ++r) {
      const auto runs = joined(block.seen[r]);
      sum<1, true>(r, runs.begin(), runs.end());
    }
  }

  template <int kRows>
  void score(const RowBlock& block, const O* q, int64_t q_stride, A scale) {
    if (packed_) {
      score_groups<kRows>(block.groups, q, q_stride, static_cast<const O*>(packed_keys_), dim_,
                          scale, scores_, stride_);
      return;
    }
    if constexpr (kInPlace) {
      for (const Range& groups : block.groups) {
        for (int64_t g = groups.begin; g < groups.end; ++g) {
          score_direct<kRows>(q, q_stride, GroupRows<A>(k_, k_stride_, keys_ + g * kKeyGroup), dim_,
                              scale, scores_ + g * kKeyGroup, stride_);
        }
      }
    }
  }

  // Replaces the scores of the rows by 2^(score - max), and gives their maxima.
  template <int kRows>
  void exponentiate(const RowBlock& block, const float* masks, A* greatest) {
    Vector max[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) max[r] = Vector::broadcast(kLowest<A>);
    for_each_vector<kRows, A>(block, masks, [&](int64_t j, const auto& mask) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vector x = Vector::load(scores_ + r * stride_ + j);
        max[r] = pynar::PYNAR_ISA::max(select(mask, r, x, Vector::broadcast(kLowest<A>)), max[r]);
      }
    });
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) greatest[r] = reduce_max(max[r]);
    for_each_vector<kRows, A>(block, masks, [&](int64_t j, const auto& mask) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        A* x = scores_ + r * stride_ + j;
        const Vector y = sub(Vector::load(x), Vector::broadcast(greatest[r]));
        const Vector weight = select(mask, r, exp2<kPrecision>(y), Vector::broadcast(0));
        weight.store(x);
        if constexpr (!kInPlace) store_factors(weight, weights_ + r * stride_ + j);
      }
    });
    // For sum_ranges().
    for (const Range& groups : block.groups) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        Vector::broadcast(0).store(scores_ + r * stride_ + groups.end * kKeyGroup);
      }
    }
  }

  template <int kRows, bool kExact = false>
  void sum(int64_t row, const Range* first_run, const Range* last_run) {
    const O* weights = weights_ + row * stride_;
    A* out = sums_ + row * width_;
    if (packs_values()) {
      weighted_panels<kRows, kExact>(weights, stride_, static_cast<const O*>(packed_values_),
                                     positions_, first_run, last_run, width_, out, width_);
    } else if constexpr (kInPlace) {
      weighted_sums<kRows>(weights, stride_, v_, v_stride_, keys_, first_run, last_run, width_, out,
                           width_);
    }
  }

  const A* k_;  // where they are not packed
  const A* v_;
  int64_t k_stride_, v_stride_;
  const int64_t* keys_;  // at each position
  int64_t dim_;
  bool packed_;
  int64_t positions_;
  int64_t width_;
  int64_t stride_;    // of the scores, which leave room for a vector of zeros
  O* packed_keys_;    // see pack_transposed(), for each group
  O* packed_values_;  // see pack_panels()
  A* scores_;         // [kBlockRows, stride], then their exponentials
  A* sums_;           // [kBlockRows, width]
  O* q_;              // [kBlockRows, width]
  O* weights_;        // [kBlockRows, stride], the exponentials
};

template <typename T>
class Attend {
 public:
  using A = accumulation_t<T>;
  using O = operand_t<T>;

  explicit Attend(const AttentionKeys<T>& keys) : k_(keys), blocks_(keys) {}

  void pack() {
    const auto rows = [&](const T* x, int64_t stride, int64_t g) {
      return GroupRows<T>(x, stride, k_.keys + g * kKeyGroup);
    };
    for (int64_t g = 0; g < k_.num_groups; ++g) {
      const int64_t next = g + 1 < k_.num_groups ? g + 1 : g;
      prefetch(rows(k_.k, k_.k_stride, next), k_.dim);
      prefetch(rows(k_.v, k_.v_stride, next), k_.dim);
      if (k_.packed) {
        pack_transposed(rows(k_.k, k_.k_stride, g), k_.dim,
                        blocks_.packed_keys() + g * in_factors<O>(k_.dim) * kKeyGroup);
      }
      if (blocks_.packs_values()) {
        pack_panels(k_.v, k_.v_stride, k_.keys, g * kKeyGroup, (g + 1) * kKeyGroup,
                    blocks_.positions(), k_.dim, blocks_.width(), blocks_.packed_values());
      }
    }
  }

  void run(const AttentionTile<T>& tile) {
    const RowBlock* block = tile.blocks;
    for (int64_t r = 0; r < tile.rows; r += kBlockRows, block += tile.block_step) {
      run_block(tile, *block, r, tile.rows - r < kBlockRows ? tile.rows - r : kBlockRows);
    }
  }

 private:
  void run_block(const AttentionTile<T>& tile, const RowBlock& block, int64_t first, int64_t rows) {
    T* out = tile.out + first * tile.out_stride;
    for (int64_t r = 0; r < rows; ++r) prefetch_output(out + r * tile.out_stride, k_.dim);
    const T* rows_of_q = tile.q + first * tile.q_stride;
    const O* q = blocks_.q();
    int64_t q_stride = blocks_.width();
    bool as_they_are = false;
    if constexpr (std::is_same_v<T, O>) {
      // Whole blocks of whole factors.
      if (rows == padded_rows(rows) && k_.dim % kPer<O> == 0) {
        q = rows_of_q;
        q_stride = tile.q_stride;
        as_they_are = true;
      }
    }
    if (!as_they_are) {
      pack_rows(rows_of_q, tile.q_stride, rows, padded_rows(rows), k_.dim, blocks_.q(), q_stride);
    }
    A max[kBlockRows];
    A total[kBlockRows];
    blocks_.run(block, q, q_stride, rows, tile.masks,
                static_cast<A>(tile.scale * 1.4426950408889634), max, total);
    for (int64_t r = 0; r < kBlockRows; ++r) {
      prefetch_row(rows_of_q + (kBlockRows + r) * tile.q_stride, k_.dim);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const bool sees = block.seen[r].count > 0;
      store_scaled(blocks_.sums() + r * blocks_.width(), sees ? A(1) / total[r] : A(0), k_.dim,
                   out + r * tile.out_stride);
      tile.lse[(first + r) * tile.lse_stride] =
          sees ? max[r] * kLn2<A> + logarithm(total[r]) : kLowest<A>;
    }
    read_ahead(tile, first, first + rows);
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

  const AttentionKeys<T>& k_;
  BlockAttention<O> blocks_;
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

#define PYNAR_ATTENTION(T)                          \
  template void pack_keys(const AttentionKeys<T>&); \
  template void attend(const AttentionKeys<T>&, const AttentionTile<T>&);
PYNAR_ATTENTION(BFloat16)
#ifndef __AVX512BF16__  // what has products of bf16 is chosen for these alone
PYNAR_ATTENTION(float)
PYNAR_ATTENTION(Half)
#endif
#ifdef PYNAR_FLOAT64
PYNAR_ATTENTION(double)
#endif
#undef PYNAR_ATTENTION

}  // namespace pynar::PYNAR_ISA

#else

#include <algorithm>
#include <optional>
#include <type_traits>

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
  const auto pack_keys = PYNAR_SELECT_DOT_KERNEL_OF(T, pack_keys<T>);
  const auto attend = PYNAR_SELECT_DOT_KERNEL_OF(T, attend<T>);
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
      keys.packed = family.rows > kBlockRows || !std::is_same_v<T, A>;
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
