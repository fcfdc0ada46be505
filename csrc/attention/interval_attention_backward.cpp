#include "attention/interval_attention_backward.h"

#include "attention/interval_tiles.h"
#include "common/cpu.h"

namespace pynar {

// One head of the keys of a family.
template <typename T>
struct AttentionBackwardKeys {
  using A = accumulation_t<T>;
  const T* k;  // of the sentence
  const T* v;
  int64_t k_stride, v_stride;
  const T* next_k;  // as AttentionKeys::next_k
  const T* next_v;
  int64_t dim;
  int64_t num_keys, num_groups;
  const int64_t* keys;  // at each position
  int64_t rows;         // of the longest tile, in whole blocks
  A* scratch;           // attention_backward_scratch() elements, aligned to 64 bytes
  A* grad_k;            // [positions, width], added to
  A* grad_v;

  int64_t positions() const { return num_groups * kKeyGroup; }
};

// One head of one tile.
template <typename T>
struct AttentionBackwardTile {
  using A = accumulation_t<T>;
  const T* grad_out;  // of the tile's first query
  const T* q;
  const T* out;
  const A* lse;
  T* grad_q;
  int64_t grad_out_stride, q_stride, out_stride, lse_stride, grad_q_stride;
  int64_t rows;
  const RowBlock* blocks;
  int64_t block_step;
  const float* masks;
  Range ahead;              // positions of what comes next to be read ahead of time meanwhile
  const Range* group_rows;  // see TilePlan
  const int64_t* group_starts;
  double scale;
};

// From one query's weights to the next: an odd number of cache lines, so that a column of them
// does not end up in a few sets of the cache.
constexpr int64_t attention_weights_stride(int64_t num_groups) {
  return (num_groups | 1) * kKeyGroup;
}

constexpr int64_t attention_backward_scratch(int64_t num_groups, int64_t rows, int64_t dim) {
  const int64_t positions = num_groups * kKeyGroup;
  const int64_t width = attention_width(dim);
  return 2 * positions * dim + (positions + 2 * rows + kBlockRows) * width +
         (2 * rows + 3 * kBlockRows) * attention_weights_stride(num_groups);
}

PYNAR_DECLARE_KERNEL(template <typename T> void pack_backward(const AttentionBackwardKeys<T>& keys))
PYNAR_DECLARE_KERNEL(template <typename T>
                     void attend_backward(const AttentionBackwardKeys<T>& keys,
                                          const AttentionBackwardTile<T>& tile))
// out[rows[i]] = x[i] in the storage type, for `count` rows of `width` into rows of `dim` elements
PYNAR_DECLARE_KERNEL(template <typename T> void store_rows(const accumulation_t<T>* x,
                                                           const int64_t* rows, int64_t count,
                                                           int64_t dim, T* out, int64_t out_stride))

}  // namespace pynar

#ifdef PYNAR_ISA

#include "attention/micro_kernels.h"

namespace pynar::PYNAR_ISA {
namespace {

// What is done with the keys of a family, multiplied as numbers of type O: compiled once for all
// element types.
template <typename O>
class BlockGradients {
 public:
  using A = accumulation_t<O>;
  using Vector = Simd<A>;
  // Rounded to bf16 they do not need more.
  static constexpr Precision kPrecision = kPer<O> == 1 ? Precision::kFull : Precision::kShort;
  // Where factors hold several numbers, sums over queries want them in another order than sums over
  // keys or channels.
  static constexpr bool kOneOrder = kPer<O> == 1;

  template <typename T>
  explicit BlockGradients(const AttentionBackwardKeys<T>& keys)
      : grad_k_(keys.grad_k),
        grad_v_(keys.grad_v),
        dim_(keys.dim),
        num_keys_(keys.num_keys),
        num_groups_(keys.num_groups),
        positions_(keys.positions()),
        width_(attention_width(keys.dim)),
        stride_(attention_weights_stride(keys.num_groups)) {
    char* next = reinterpret_cast<char*>(keys.scratch);
    const auto take = [&](auto*& taken, int64_t count) {
      taken = reinterpret_cast<decltype(+taken)>(next);
      next += count * sizeof(*taken);
    };
    take(keys_, positions_ * width_);
    take(transposed_keys_, positions_ * in_factors<O>(dim_));
    take(transposed_values_, positions_ * in_factors<O>(dim_));
    take(q_, keys.rows * width_);
    take(grad_out_, keys.rows * width_);
    take(grad_q_, kBlockRows * width_);
    take(weights_, keys.rows * stride_);
    take(grad_scores_, keys.rows * stride_);
    if constexpr (kOneOrder) {
      q_pairs_ = q_;
      grad_out_pairs_ = grad_out_;
    } else {
      take(q_pairs_, keys.rows * width_);
      take(grad_out_pairs_, keys.rows * width_);
      take(scores_, kBlockRows * stride_);
      take(grad_weights_, kBlockRows * stride_);
      take(block_grad_scores_, kBlockRows * stride_);
    }
  }

  int64_t width() const { return width_; }
  int64_t positions() const { return positions_; }
  O* keys() const { return keys_; }
  O* transposed_keys() const { return transposed_keys_; }
  O* transposed_values() const { return transposed_values_; }
  O* q() const { return q_; }
  O* grad_out() const { return grad_out_; }
  const A* grad_q() const { return grad_q_; }

  // After q() and grad_out() have been written for `capacity` queries, a multiple of kBlockRows.
  void set_queries(int64_t capacity) {
    if constexpr (!kOneOrder) {
      for (int64_t r = 0; r < capacity; r += 2) {
        for (int64_t c = r * width_; c < (r + 1) * width_; c += Vector::kLanes) {
          const int64_t to = 2 * c - r * width_;
          store_pairs(q_ + c, q_ + c + width_, q_pairs_ + to);
          store_pairs(grad_out_ + c, grad_out_ + c + width_, grad_out_pairs_ + to);
        }
      }
    }
  }

  // The weights of a block's queries, from `first` on, the gradients of their scores, and, in
  // grad_q(), their own. `lse` and `mean`, g_i . out_i, are given for padded_rows(rows) rows.
  void run_block(const RowBlock& block, int64_t first, int64_t rows, const float* masks,
                 double scale, const A* lse, const A* mean) {
    with_rows(rows, [&](auto count) {
      run_rows<decltype(count)::value>(block, first, rows, masks, scale, lse, mean);
    });
  }

  // The share of a tile's queries in the gradients of the keys, of each group for the queries
  // group_rows[starts[g]] to group_rows[starts[g + 1]].
  void run_keys(const Range* group_rows, const int64_t* starts) {
    for (int64_t g = 0; g < num_groups_; ++g) {
      if (starts[g] == starts[g + 1]) continue;
      const int64_t begin = g * kKeyGroup;
      const int64_t end = begin + kKeyGroup < num_keys_ ? begin + kKeyGroup : num_keys_;
      for (int64_t j = begin; j < end;) {
        // Sixteen are 6 + 6 + 4. Beside the last of all keys there is room up to a whole group.
        with_at_least<4, kBlockRows>(end - j, [&](auto keys) {
          add_keys<decltype(keys)::value>(j, group_rows + starts[g], group_rows + starts[g + 1]);
          j += decltype(keys)::value;
        });
      }
    }
  }

 private:
  template <int kRows>
  void run_rows(const RowBlock& block, int64_t first, int64_t rows, const float* masks,
                double scale, const A* lse, const A* mean) {
    if constexpr (kOneOrder) {
      scores_ = weights_ + first * stride_;
      grad_weights_ = block_grad_scores_ = grad_scores_ + first * stride_;
    }
    score_groups<kRows>(block.groups, static_cast<const O*>(q_ + first * width_), width_,
                        static_cast<const O*>(transposed_keys_), dim_,
                        static_cast<A>(scale * 1.4426950408889634), scores_, stride_);
    score_groups<kRows>(block.groups, static_cast<const O*>(grad_out_ + first * width_), width_,
                        static_cast<const O*>(transposed_values_), dim_, A(1), grad_weights_,
                        stride_);
    finish_scores<kRows>(block, first, rows, masks, static_cast<A>(scale), lse, mean);
    weighted_panels<kRows>(static_cast<const O*>(block_grad_scores_), stride_,
                           static_cast<const O*>(keys_), positions_, block.runs.begin(),
                           block.runs.end(), width_, grad_q_, width_);
    // As in the forward pass.
    if ((kOneOrder && !block.mixed) || is_finite(grad_q_, rows * width_)) return;
    for (int64_t r = 0; r < rows; ++r) {
      const auto runs = joined(block.seen[r]);
      weighted_panels<1, true>(static_cast<const O*>(block_grad_scores_ + r * stride_), stride_,
                               static_cast<const O*>(keys_), positions_, runs.begin(), runs.end(),
                               width_, grad_q_ + r * width_, width_);
    }
  }

  // Turns scores into weights, and gradients of weights into those of scores.
  template <int kRows>
  void finish_scores(const RowBlock& block, int64_t first, [[maybe_unused]] int64_t rows,
                     const float* masks, A by, const A* lse, const A* mean) {
    A offset[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) offset[r] = lse[r] * kLog2E<A>;
    const Vector scale = Vector::broadcast(by);
    const Vector zero = Vector::broadcast(0);
    for_each_vector<kRows, A>(block, masks, [&](int64_t j, const auto& mask) {
      const auto finish = [&](int r, Vector& weight, Vector& grad_score) {
        const Vector p = exp2<kPrecision>(
            sub(Vector::load(scores_ + r * stride_ + j), Vector::broadcast(offset[r])));
        const Vector difference =
            sub(Vector::load(grad_weights_ + r * stride_ + j), Vector::broadcast(mean[r]));
        weight = select(mask, r, p, zero);
        grad_score = select(mask, r, mul(mul(p, scale), difference), zero);
      };
      if constexpr (kOneOrder) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          Vector weight, grad_score;
          finish(r, weight, grad_score);
          weight.store(scores_ + r * stride_ + j);
          grad_score.store(grad_weights_ + r * stride_ + j);
        }
      } else {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r += 2) {
          Vector weight[2] = {zero, zero};
          Vector grad_score[2] = {zero, zero};
          for (int i = 0; i < 2 && r + i < kRows; ++i) {
            // A pair's second row may be none. What is made up for it could be NaN.
            if (r + i < rows) finish(r + i, weight[i], grad_score[i]);
            store_factors(grad_score[i], block_grad_scores_ + (r + i) * stride_ + j);
          }
          const int64_t to = (first + r) * stride_ + 2 * j;
          store_pairs(weight[0], weight[1], weights_ + to);
          store_pairs(grad_score[0], grad_score[1], grad_scores_ + to);
        }
      }
    });
  }

  template <int kKeys>
  void add_keys(int64_t first, const Range* rows, const Range* last) {
    A* grad_k = grad_k_ + first * width_;
    A* grad_v = grad_v_ + first * width_;
    const int64_t at = first * kPer<O>;
    const int64_t stride = stride_ * kPer<O>;
    for_each_part<A>(width_, [&](int64_t c, auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      const int64_t from = c * kPer<O>;
      const int64_t width = width_ * kPer<O>;
      add_weighted_rows<kKeys, kVectors>(static_cast<const O*>(weights_ + at), stride,
                                         static_cast<const O*>(grad_out_pairs_ + from), width, rows,
                                         last, grad_v + c, width_);
      add_weighted_rows<kKeys, kVectors>(static_cast<const O*>(grad_scores_ + at), stride,
                                         static_cast<const O*>(q_pairs_ + from), width, rows, last,
                                         grad_k + c, width_);
    });
  }

  A* grad_k_;  // [positions, width]
  A* grad_v_;
  int64_t dim_;
  int64_t num_keys_, num_groups_;
  int64_t positions_;
  int64_t width_;
  int64_t stride_;
  O* keys_;               // see pack_panels()
  O* transposed_keys_;    // see pack_transposed(), for each group
  O* transposed_values_;  // the same
  O* q_;                  // [rows, width]
  O* grad_out_;           // [rows, width]
  O* q_pairs_;            // the same numbers, [factors of rows, width, rows of a factor]
  O* grad_out_pairs_;     // the same
  A* grad_q_;             // [kBlockRows, width]
  O* weights_;            // [factors of rows, stride, rows of a factor]
  O* grad_scores_;        // the same
  // Of a block, [kBlockRows, stride]; in place of what comes of them where there is one order.
  A* scores_;
  A* grad_weights_;
  O* block_grad_scores_;
};

template <typename T>
class AttendBackward {
 public:
  using A = accumulation_t<T>;
  using O = operand_t<T>;
  using Vector = Simd<A>;

  explicit AttendBackward(const AttentionBackwardKeys<T>& keys) : k_(keys), blocks_(keys) {}

  void pack() {
    const auto rows = [&](const T* x, int64_t stride, int64_t g) {
      return GroupRows<T>(x, stride, k_.keys + g * kKeyGroup);
    };
    for (int64_t g = 0; g < k_.num_groups; ++g) {
      const int64_t next = g + 1 < k_.num_groups ? g + 1 : g;
      prefetch(rows(k_.k, k_.k_stride, next), k_.dim);
      prefetch(rows(k_.v, k_.v_stride, next), k_.dim);
      const int64_t at = g * in_factors<O>(k_.dim) * kKeyGroup;
      pack_transposed(rows(k_.k, k_.k_stride, g), k_.dim, blocks_.transposed_keys() + at);
      pack_transposed(rows(k_.v, k_.v_stride, g), k_.dim, blocks_.transposed_values() + at);
      pack_panels(k_.k, k_.k_stride, k_.keys, g * kKeyGroup, (g + 1) * kKeyGroup,
                  blocks_.positions(), k_.dim, blocks_.width(), blocks_.keys());
    }
  }

  void run(const AttentionBackwardTile<T>& tile) {
    const int64_t rows = tile.rows;
    const int64_t width = blocks_.width();
    const int64_t capacity = round_up(rows, kBlockRows);
    prefetch_outputs(tile, 0);
    pack_rows(tile.q, tile.q_stride, rows, capacity, k_.dim, blocks_.q(), width);
    pack_rows(tile.grad_out, tile.grad_out_stride, rows, capacity, k_.dim, blocks_.grad_out(),
              width);
    blocks_.set_queries(capacity);
    const RowBlock* block = tile.blocks;
    for (int64_t r = 0; r < rows; r += kBlockRows, block += tile.block_step) {
      run_block(tile, *block, r, rows - r < kBlockRows ? rows - r : kBlockRows);
    }
    blocks_.run_keys(tile.group_rows, tile.group_starts);
  }

 private:
  void run_block(const AttentionBackwardTile<T>& tile, const RowBlock& block, int64_t first,
                 int64_t rows) {
    const T* out = tile.out + first * tile.out_stride;
    T* grad_q = tile.grad_q + first * tile.grad_q_stride;
    prefetch_outputs(tile, first + rows);
    for (int64_t r = 0; r < rows; ++r) prefetch_output(grad_q + r * tile.grad_q_stride, k_.dim);
    const int64_t width = blocks_.width();
    A lse[kBlockRows] = {};
    A mean[kBlockRows] = {};
    for (int64_t r = 0; r < rows; ++r) {
      lse[r] = tile.lse[(first + r) * tile.lse_stride];
      mean[r] = dot(blocks_.grad_out() + (first + r) * width, out + r * tile.out_stride);
    }
    blocks_.run_block(block, first, rows, tile.masks, tile.scale, lse, mean);
    for (int64_t r = 0; r < rows; ++r) {
      store_scaled(blocks_.grad_q() + r * width, A(1), k_.dim, grad_q + r * tile.grad_q_stride);
    }
    read_ahead(tile, first, first + rows);
  }

  // Of the block that begins with this query, if there is one.
  void prefetch_outputs(const AttentionBackwardTile<T>& tile, int64_t first) {
    for (int64_t r = first; r < tile.rows && r < first + kBlockRows; ++r) {
      prefetch_row(tile.out + r * tile.out_stride, k_.dim);
    }
  }

  // Its share of what the blocks of a tile ask for.
  void read_ahead(const AttentionBackwardTile<T>& tile, int64_t first, int64_t last) {
    const int64_t count = tile.ahead.end - tile.ahead.begin;
    const int64_t end = tile.ahead.begin + count * last / tile.rows;
    for (int64_t i = tile.ahead.begin + count * first / tile.rows; i < end; ++i) {
      prefetch_later(k_.next_k + k_.keys[i] * k_.k_stride, k_.dim);
      prefetch_later(k_.next_v + k_.keys[i] * k_.v_stride, k_.dim);
    }
  }

  A dot(const O* x, const T* y) const {
    Vector products = Vector::broadcast(0);
    int64_t c = 0;
    for (; c + Vector::kLanes <= k_.dim; c += Vector::kLanes) {
      products = multiply_add(Vector::load(x + c), Vector::load(y + c), products);
    }
    A product = reduce_add(products);
    for (; c < k_.dim; ++c) product += to_accumulation(x[c]) * to_accumulation(y[c]);
    return product;
  }

  const AttentionBackwardKeys<T>& k_;
  BlockGradients<O> blocks_;
};

}  // namespace

template <typename T>
void pack_backward(const AttentionBackwardKeys<T>& keys) {
  AttendBackward<T>(keys).pack();
}

template <typename T>
void attend_backward(const AttentionBackwardKeys<T>& keys, const AttentionBackwardTile<T>& tile) {
  AttendBackward<T>(keys).run(tile);
}

template <typename T>
void store_rows(const accumulation_t<T>* x, const int64_t* rows, int64_t count, int64_t dim, T* out,
                int64_t out_stride) {
  using A = accumulation_t<T>;
  for (int64_t i = 0; i < count; ++i) {
    store_scaled(x + i * attention_width(dim), A(1), dim, out + rows[i] * out_stride);
  }
}

#define PYNAR_ATTENTION_BACKWARD(T)                                                                \
  template void pack_backward(const AttentionBackwardKeys<T>&);                                    \
  template void attend_backward(const AttentionBackwardKeys<T>&, const AttentionBackwardTile<T>&); \
  template void store_rows(const accumulation_t<T>*, const int64_t*, int64_t, int64_t, T*, int64_t);
PYNAR_ATTENTION_BACKWARD(BFloat16)
#ifndef __AVX512BF16__  // what has products of bf16 is chosen for these alone
PYNAR_ATTENTION_BACKWARD(float)
PYNAR_ATTENTION_BACKWARD(Half)
#endif
#ifdef PYNAR_FLOAT64
PYNAR_ATTENTION_BACKWARD(double)
#endif
#undef PYNAR_ATTENTION_BACKWARD

}  // namespace pynar::PYNAR_ISA

#else

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <span>

#include "attention/interval_arguments.h"
#include "common/parallel.h"
#ifdef PYNAR_WITH_CUDA
#include "common/cuda_launch.h"
#endif

namespace pynar {
namespace {

constexpr const char* kName = "interval_attention_backward";

// Writes zeros to the rows of a range that are not among `rows`, which are in order.
template <typename T>
void clear_others(Range range, std::span<const int64_t> rows, int64_t dim, T* out,
                  int64_t out_stride) {
  int64_t next = range.begin;
  const auto clear_to = [&](int64_t end) {
    for (; next < end; ++next) std::memset(out + next * out_stride, 0, dim * sizeof(T));
  };
  for (const int64_t row : rows) {
    clear_to(row);
    next = row + 1;
  }
  clear_to(range.end);
}

template <typename T>
void interval_attention_backward_cpu(const IntervalAttentionBackwardParams<T>& p) {
  using A = accumulation_t<T>;
  const IntervalView view = interval_view(p.intervals, p.sizes);
  const TileList tiles(Check(kName), view);
  // Not cut: the gradient of a key is one sum.
  const TileFamilies families(tiles, view, std::numeric_limits<int64_t>::max());
  const auto pack_backward = PYNAR_SELECT_DOT_KERNEL_OF(T, pack_backward<T>);
  const auto attend_backward = PYNAR_SELECT_DOT_KERNEL_OF(T, attend_backward<T>);
  const auto store_rows = PYNAR_SELECT_DOT_KERNEL_OF(T, store_rows<T>);
  const int64_t heads = p.sizes.heads;
  const int64_t dim = p.sizes.dim;
  const int64_t work = heads * families.total();
  parallel_for(work, attention_grain(p.sizes) / 2, [&](int64_t first, int64_t last) {
    thread_local TilePlan plan;
    thread_local Scratch scratch;
    thread_local Scratch gradients;
    const TileFamily* planned = nullptr;
    const auto run = [&](const TileFamily& family, int64_t h) {
      if (planned != &family) {
        plan.build(view, families.tiles(family));
        plan.build_group_rows();
      }
      planned = &family;
      // What this thread does next, unless its share ends here.
      const bool same = h + 1 < heads || &family == &families.families().back();
      const TileFamily& next = same ? family : (&family)[1];
      const int64_t next_head = h + 1 < heads ? h + 1 : 0;
      const int64_t shift = next.keys.begin - family.keys.begin;
      AttentionBackwardKeys<T> keys;
      keys.k = p.k.at(family.b, h, 0);
      keys.v = p.v.at(family.b, h, 0);
      keys.k_stride = p.k.stride_t;
      keys.v_stride = p.v.stride_t;
      keys.next_k = p.k.at(next.b, next_head, shift);
      keys.next_v = p.v.at(next.b, next_head, shift);
      keys.dim = dim;
      keys.num_keys = plan.num_keys();
      keys.num_groups = plan.num_groups();
      keys.keys = plan.keys();
      keys.rows = 0;
      for (const TileBlocks& blocks : plan.tiles()) {
        keys.rows = std::max(keys.rows, blocks.span->rows);
      }
      keys.rows = (keys.rows + kBlockRows - 1) / kBlockRows * kBlockRows;
      keys.scratch = scratch.get<A>(attention_backward_scratch(keys.num_groups, keys.rows, dim));
      const int64_t size = keys.positions() * attention_width(dim);
      keys.grad_k = gradients.get<A>(2 * size);
      keys.grad_v = keys.grad_k + size;
      std::memset(keys.grad_k, 0, 2 * size * sizeof(A));
      pack_backward(keys);
      int64_t rows = 0;
      for (size_t i = 0; i < plan.tiles().size(); ++i) {
        const TileBlocks& blocks = plan.tiles()[i];
        const TileSpan& span = *blocks.span;
        AttentionBackwardTile<T> tile;
        tile.grad_out = p.grad_out.at(span.b, h, span.first);
        tile.q = p.q.at(span.b, h, span.first);
        tile.out = p.out.at(span.b, h, span.first);
        tile.lse = p.lse.at(span.b, h, span.first);
        tile.grad_q = p.grad_q.at(span.b, h, span.first);
        tile.grad_out_stride = p.grad_out.stride_t;
        tile.q_stride = p.q.stride_t;
        tile.out_stride = p.out.stride_t;
        tile.lse_stride = p.lse.stride_t;
        tile.grad_q_stride = p.grad_q.stride_t;
        tile.masks = plan.masks();
        tile.ahead = {plan.num_keys() * rows / family.rows,
                      plan.num_keys() * (rows + span.rows) / family.rows};
        tile.rows = span.rows;
        tile.blocks = plan.blocks() + blocks.first;
        tile.block_step = blocks.step;
        tile.group_rows = plan.group_rows();
        tile.group_starts = plan.group_starts(static_cast<int64_t>(i));
        tile.scale = p.scale;
        attend_backward(keys, tile);
        rows += span.rows;
      }
      const std::span<const int64_t> seen(keys.keys, keys.num_keys);
      const auto store = [&](const A* grad, T* out, int64_t stride) {
        store_rows(grad, seen.data(), keys.num_keys, dim, out, stride);
        clear_others(family.keys, seen, dim, out, stride);
      };
      store(keys.grad_k, p.grad_k.at(family.b, h, 0), p.grad_k.stride_t);
      store(keys.grad_v, p.grad_v.at(family.b, h, 0), p.grad_v.stride_t);
    };
    for_each_share(families.families(), families.total(), heads, first, last, run);
  });
}

}  // namespace

int64_t interval_attention_backward_workspace(int64_t batch, int64_t heads, int64_t queries,
                                              int64_t element_size) {
  const int64_t accumulation = element_size == 8 ? 8 : 4;
  return batch * heads * queries * accumulation + batch * attention_chunks(queries) * 8;
}

std::optional<LaunchPlan> interval_attention_backward(const Tensor& grad_out, const Tensor& q,
                                                      const Tensor& k, const Tensor& v,
                                                      const Tensor& intervals, const Tensor& out,
                                                      const Tensor& lse, double scale,
                                                      const Tensor& grad_q, const Tensor& grad_k,
                                                      const Tensor& grad_v,
                                                      const std::optional<Tensor>& workspace) {
  const Check check(kName);
  check_attention(check, q, k, v, intervals);
  check_like(check, "grad_out", grad_out, "q", q);
  check_inner_contiguous(check, "grad_out", grad_out);
  check_like(check, "out", out, "q", q);
  check_inner_contiguous(check, "out", out);
  check_lse(check, lse, q);
  check_like(check, "grad_q", grad_q, "q", q);
  check_output(check, "grad_q", grad_q);
  check_like(check, "grad_k", grad_k, "k", k);
  check_output(check, "grad_k", grad_k);
  check_like(check, "grad_v", grad_v, "v", v);
  check_output(check, "grad_v", grad_v);
  const AttentionSizes sizes = attention_sizes(q, k, intervals);
  const bool on_cpu = q.device().type == dlpack::kCpu;
  if (!on_cpu) {
    const int64_t bytes = interval_attention_backward_workspace(sizes.batch, sizes.heads,
                                                                sizes.queries, q.dtype().bits / 8);
    if (!workspace) check.fail("workspace", "be given on cuda", "None");
    check.shape("workspace", *workspace, {bytes}, "bytes");
    check.dtype("workspace", *workspace, {kUInt8});
    check.device("workspace", *workspace, "q", q);
  }
  const bool packed = q.dim() == 3;
  return dispatch_floating(q.dtype(), [&]<typename T>() -> std::optional<LaunchPlan> {
    using A = accumulation_t<T>;
    A* delta = on_cpu ? nullptr : workspace->data<A>();
    const int64_t rows = sizes.batch * sizes.heads * sizes.queries;
    const IntervalAttentionBackwardParams<T> params{
        head_rows<const T>(grad_out, packed),
        head_rows<const T>(q, packed),
        head_rows<const T>(k, packed),
        head_rows<const T>(v, packed),
        interval_rows(intervals),
        head_rows<const T>(out, packed),
        head_rows<const A>(lse, packed),
        head_rows<T>(grad_q, packed),
        head_rows<T>(grad_k, packed),
        head_rows<T>(grad_v, packed),
        delta,
        on_cpu ? nullptr : reinterpret_cast<int32_t*>(delta + rows),
        sizes,
        scale,
        rows_aligned({&grad_out, &q, &k, &v})};
    if (on_cpu) {
      interval_attention_backward_cpu(params);
      return std::nullopt;
    }
#ifdef PYNAR_WITH_CUDA
    if (!use_nvrtc()) {
      const DeviceGuard guard(q.device().index);
      interval_attention_backward_cuda(params, q.stream());
      return std::nullopt;
    }
#endif
    const AttentionBackwardBlocks blocks = attention_backward_blocks(sizes, sizeof(T));
    LaunchPlan plan("attention/interval_attention_backward.cuh", params, q);
    if (blocks.delta > 0) {
      plan.add<T>("interval_attention_delta", kAttentionRowThreads, blocks.delta);
      plan.add<T>("interval_attention_hulls", kAttentionRowThreads, blocks.hulls);
    }
    const std::string form = blocks.tiles ? "_tiles" : "_rows";
    const int64_t threads = blocks.tiles ? kAttentionTileThreads : kAttentionRowThreads;
    const int64_t argument = blocks.tiles ? attention_tile_dim(sizes.dim) : threads;
    if (blocks.grad_q > 0) {
      plan.add<T>("interval_attention_grad_q" + form, argument, threads, blocks.grad_q);
    }
    if (blocks.grad_kv > 0) {
      plan.add<T>("interval_attention_grad_kv" + form, argument, threads, blocks.grad_kv);
    }
    return plan;
  });
}

}  // namespace pynar

#endif
