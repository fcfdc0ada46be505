#include "attention/interval_attention_backward.h"

#include "attention/interval_tiles.h"
#include "common/cpu.h"

namespace pynar {

// One head of one tile.
template <typename T>
struct AttentionBackwardTile {
  using A = accumulation_t<T>;
  const T* grad_out;  // of the tile's first query
  const T* q;
  const T* k;  // of the sentence
  const T* v;
  const T* out;
  const A* lse;
  T* grad_q;
  int64_t grad_out_stride, q_stride, k_stride, v_stride, out_stride, lse_stride, grad_q_stride;
  int64_t rows, dim;
  int64_t num_keys, num_groups;
  const int64_t* keys;  // at each position
  const RowBlock* blocks;
  int64_t block_step;
  const Range* group_rows;  // see TilePlan
  const int64_t* group_starts;
  double scale;
  A* grad_k;  // [keys from first_key on, width], added to
  A* grad_v;
  int64_t first_key;
  A* scratch;  // attention_backward_scratch() elements, aligned to 64 bytes
};

// Channels in whole vectors of any instruction set.
constexpr int64_t attention_width(int64_t dim) {
  return (dim + 15) / 16 * 16;
}

constexpr int64_t attention_backward_scratch(int64_t num_groups, int64_t rows, int64_t dim) {
  const int64_t positions = num_groups * kKeyGroup;
  const int64_t width = attention_width(dim);
  return 2 * positions * dim + (positions + 2 * rows + kBlockRows) * width + 2 * rows * positions;
}

PYNAR_DECLARE_KERNEL(template <typename T>
                     void attend_backward(const AttentionBackwardTile<T>& tile))
// out = x in the storage type, for `rows` rows of `width` into rows of `dim` elements
PYNAR_DECLARE_KERNEL(template <typename T> void store_rows(const accumulation_t<T>* x, int64_t rows,
                                                           int64_t dim, T* out, int64_t out_stride))

}  // namespace pynar

#ifdef PYNAR_ISA

#include "attention/micro_kernels.h"

namespace pynar::PYNAR_ISA {
namespace {

template <typename T>
class AttendBackward {
 public:
  using A = accumulation_t<T>;
  using Vector = Simd<A>;

  explicit AttendBackward(const AttentionBackwardTile<T>& tile)
      : t_(tile), positions_(tile.num_groups * kKeyGroup), width_(attention_width(tile.dim)) {
    A* next = tile.scratch;
    const auto take = [&](int64_t count) {
      A* taken = next;
      next += count;
      return taken;
    };
    keys_ = take(positions_ * width_);
    q_ = take(tile.rows * width_);
    grad_out_ = take(tile.rows * width_);
    grad_q_ = take(kBlockRows * width_);
    weights_ = take(tile.rows * positions_);
    grad_scores_ = take(tile.rows * positions_);
    transposed_keys_ = take(positions_ * tile.dim);
    transposed_values_ = take(positions_ * tile.dim);
  }

  void run() {
    const int64_t* in_order = nullptr;
    pack_rows(t_.q, t_.q_stride, in_order, t_.rows, t_.dim, q_, width_);
    pack_rows(t_.grad_out, t_.grad_out_stride, in_order, t_.rows, t_.dim, grad_out_, width_);
    pack_rows(t_.k, t_.k_stride, t_.keys, t_.num_keys, t_.dim, keys_, width_);
    for (int64_t g = 0; g < t_.num_groups; ++g) {
      const int64_t* keys = t_.keys + g * kKeyGroup;
      const int64_t at = g * t_.dim * kKeyGroup;
      pack_transposed(GroupRows<T>(t_.k, t_.k_stride, keys), t_.dim, transposed_keys_ + at);
      pack_transposed(GroupRows<T>(t_.v, t_.v_stride, keys), t_.dim, transposed_values_ + at);
    }
    const RowBlock* block = t_.blocks;
    for (int64_t r = 0; r < t_.rows; r += kBlockRows, block += t_.block_step) {
      with_constant<kBlockRows>(t_.rows - r < kBlockRows ? t_.rows - r : kBlockRows,
                                [&](auto rows) { run_block<decltype(rows)::value>(*block, r); });
    }
    for (int64_t j = 0; j < t_.num_keys; j += kBlockRows) {
      with_constant<kBlockRows>(t_.num_keys - j < kBlockRows ? t_.num_keys - j : kBlockRows,
                                [&](auto keys) { run_keys<decltype(keys)::value>(j); });
    }
  }

 private:
  // The weights of a block's queries, the gradients of their scores, and their own.
  template <int kRows>
  void run_block(const RowBlock& block, int64_t first) {
    A* weights = weights_ + first * positions_;
    A* grad_scores = grad_scores_ + first * positions_;
    score_groups<kRows>(block.groups, q_ + first * width_, width_,
                        static_cast<const A*>(transposed_keys_), t_.dim,
                        static_cast<A>(t_.scale * 1.4426950408889634), weights, positions_);
    score_groups<kRows>(block.groups, grad_out_ + first * width_, width_,
                        static_cast<const A*>(transposed_values_), t_.dim, A(1), grad_scores,
                        positions_);
    for (int r = 0; r < kRows; ++r) {
      finish_row(block, first + r, weights + r * positions_, grad_scores + r * positions_);
      fill(block.gaps[r], weights + r * positions_, A(0));
      fill(block.gaps[r], grad_scores + r * positions_, A(0));
    }
    A totals[kRows];
    weighted_sums<kRows>(grad_scores, positions_, static_cast<const A*>(keys_), width_, nullptr,
                         block.runs.range, block.runs.range + block.runs.count, width_, grad_q_,
                         width_, totals);
    for (int r = 0; r < kRows; ++r) {
      store_scaled(grad_q_ + r * width_, A(1), t_.dim, t_.grad_q + (first + r) * t_.grad_q_stride);
    }
  }

  void finish_row(const RowBlock& block, int64_t row, A* weights, A* grad_scores) {
    const T* out = t_.out + row * t_.out_stride;
    const A* grad_out = grad_out_ + row * width_;
    Vector products = Vector::broadcast(0);
    int64_t c = 0;
    for (; c + Vector::kLanes <= t_.dim; c += Vector::kLanes) {
      products = multiply_add(Vector::load(grad_out + c), Vector::load(out + c), products);
    }
    A product = reduce_add(products);
    for (; c < t_.dim; ++c) product += grad_out[c] * to_accumulation(out[c]);
    const Vector offset = Vector::broadcast(t_.lse[row * t_.lse_stride] * kLog2E<A>);
    const Vector mean = Vector::broadcast(product);
    const Vector scale = Vector::broadcast(static_cast<A>(t_.scale));
    for (int i = 0; i < block.groups.count; ++i) {
      const int64_t end = block.groups.range[i].end * kKeyGroup;
      for (int64_t j = block.groups.range[i].begin * kKeyGroup; j < end; j += Vector::kLanes) {
        const Vector p = exp2<Precision::kFull>(sub(Vector::load(weights + j), offset));
        p.store(weights + j);
        mul(mul(p, scale), sub(Vector::load(grad_scores + j), mean)).store(grad_scores + j);
      }
    }
  }

  // The share of the tile's queries in the gradients of the keys at `first` and after.
  template <int kKeys>
  void run_keys(int64_t first) {
    A* grad_k[kKeys];
    A* grad_v[kKeys];
    for (int i = 0; i < kKeys; ++i) {
      const int64_t key = t_.keys[first + i] - t_.first_key;
      grad_k[i] = t_.grad_k + key * width_;
      grad_v[i] = t_.grad_v + key * width_;
    }
    const int64_t* starts = t_.group_starts + first / kKeyGroup;
    const Range* rows = t_.group_rows + starts[0];
    const Range* last = t_.group_rows + starts[1];
    for_each_part<A>(width_, [&](int64_t c, auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      add_weighted_rows<kKeys, kVectors>(weights_ + first, positions_,
                                         static_cast<const A*>(grad_out_), width_, rows, last, c,
                                         grad_v);
      add_weighted_rows<kKeys, kVectors>(grad_scores_ + first, positions_,
                                         static_cast<const A*>(q_), width_, rows, last, c, grad_k);
    });
  }

  const AttentionBackwardTile<T>& t_;
  int64_t positions_;
  int64_t width_;
  A* keys_;               // [positions, width]
  A* q_;                  // [rows, width]
  A* grad_out_;           // [rows, width]
  A* grad_q_;             // [kBlockRows, width]
  A* weights_;            // [rows, positions], first the scores
  A* grad_scores_;        // [rows, positions], first the gradients of the weights
  A* transposed_keys_;    // [groups, dim, kKeyGroup]
  A* transposed_values_;  // [groups, dim, kKeyGroup]
};

}  // namespace

template <typename T>
void attend_backward(const AttentionBackwardTile<T>& tile) {
  AttendBackward<T>(tile).run();
}

template <typename T>
void store_rows(const accumulation_t<T>* x, int64_t rows, int64_t dim, T* out, int64_t out_stride) {
  using A = accumulation_t<T>;
  for (int64_t i = 0; i < rows; ++i) {
    store_scaled(x + i * attention_width(dim), A(1), dim, out + i * out_stride);
  }
}

template void attend_backward(const AttentionBackwardTile<float>&);
template void attend_backward(const AttentionBackwardTile<double>&);
template void attend_backward(const AttentionBackwardTile<BFloat16>&);
template void attend_backward(const AttentionBackwardTile<Half>&);
template void store_rows(const float*, int64_t, int64_t, float*, int64_t);
template void store_rows(const double*, int64_t, int64_t, double*, int64_t);
template void store_rows(const float*, int64_t, int64_t, BFloat16*, int64_t);
template void store_rows(const float*, int64_t, int64_t, Half*, int64_t);

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

constexpr const char* kName = "interval_attention_backward";

template <typename T>
void interval_attention_backward_cpu(const IntervalAttentionBackwardParams<T>& p) {
  using A = accumulation_t<T>;
  const IntervalView view = interval_view(p.intervals, p.sizes);
  const TileList tiles(Check(kName), view);
  const TileFamilies families(tiles, view);
  const auto attend_backward = PYNAR_SELECT_KERNEL(attend_backward<T>);
  const auto store_rows = PYNAR_SELECT_KERNEL(store_rows<T>);
  const int64_t heads = p.sizes.heads;
  const int64_t dim = p.sizes.dim;
  const int64_t work = heads * families.total();
  parallel_for(work, attention_grain(p.sizes) / 2, [&](int64_t first, int64_t last) {
    thread_local TilePlan plan;
    thread_local Scratch scratch;
    thread_local Scratch gradients;
    const TileSpan* planned = nullptr;
    const auto run = [&](const TileFamily& family, int64_t h) {
      const int64_t num_keys = family.keys.end - family.keys.begin;
      const int64_t size = num_keys * attention_width(dim);
      A* grad_k = gradients.get<A>(2 * size);
      A* grad_v = grad_k + size;
      std::fill_n(grad_k, 2 * size, A(0));
      for (const TileSpan* span : family.tiles) {
        if (planned != span) {
          plan.build(view, *span);
          plan.build_group_rows(span->rows);
        }
        planned = span;
        AttentionBackwardTile<T> tile;
        tile.grad_out = p.grad_out.at(span->b, h, span->first);
        tile.q = p.q.at(span->b, h, span->first);
        tile.k = p.k.at(span->b, h, 0);
        tile.v = p.v.at(span->b, h, 0);
        tile.out = p.out.at(span->b, h, span->first);
        tile.lse = p.lse.at(span->b, h, span->first);
        tile.grad_q = p.grad_q.at(span->b, h, span->first);
        tile.grad_out_stride = p.grad_out.stride_t;
        tile.q_stride = p.q.stride_t;
        tile.k_stride = p.k.stride_t;
        tile.v_stride = p.v.stride_t;
        tile.out_stride = p.out.stride_t;
        tile.lse_stride = p.lse.stride_t;
        tile.grad_q_stride = p.grad_q.stride_t;
        tile.rows = span->rows;
        tile.dim = dim;
        tile.num_keys = plan.num_keys();
        tile.num_groups = plan.num_groups();
        tile.keys = plan.keys();
        tile.blocks = plan.blocks();
        tile.block_step = plan.block_step();
        tile.group_rows = plan.group_rows();
        tile.group_starts = plan.group_starts();
        tile.scale = p.scale;
        tile.grad_k = grad_k;
        tile.grad_v = grad_v;
        tile.first_key = family.keys.begin;
        tile.scratch =
            scratch.get<A>(attention_backward_scratch(tile.num_groups, tile.rows, tile.dim));
        attend_backward(tile);
      }
      const int64_t begin = family.keys.begin;
      store_rows(grad_k, num_keys, dim, p.grad_k.at(family.b, h, begin), p.grad_k.stride_t);
      store_rows(grad_v, num_keys, dim, p.grad_v.at(family.b, h, begin), p.grad_v.stride_t);
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
