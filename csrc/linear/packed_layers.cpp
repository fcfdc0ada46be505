// Transformer layers of the same shape, packed_linear and interval_attention one after the other
// without a way back to Python between them. With norms a layer's sub-layers f do
// h <- LayerNorm(h + f(h)), else h <- h + f((h - mean(h)) / sqrt(var(h) + eps)):
//
//   self-attention    weights 0 [3 C, C] and 1 [C, C], among the first `content` rows of x [N, C]
//   cross-attention   weights 2 and 3 [C, C], to the layer's keys and values [S, H, D]; only where
//                     there are any
//   feed-forward      the last two weights, [F, C] and [C, F]
//
// Without weights 1 and 3 attention has no linear map behind it.
//
// With caches [places, capacity, 2 H, D], one a layer, those rows write their keys and values into
// the `slots` of the cache, places * capacity rows, and self-attention is to all of these.
//
// y [M, C] are the `chosen` rows [M], or all N of them; layers before the last one compute all.
#include <algorithm>
#include <optional>
#include <vector>

#include "common/operators.h"
#include "linear/layer.h"
#include "linear/packed_linear.h"

namespace pynar {
namespace {

// A second thread is not worth it for fewer numbers.
constexpr int64_t kGrain = 1 << 15;

// Rows `index` of `from`, which has so many numbers a row.
void gather(const float* from, int64_t stride, int64_t size, const Tensor& index, float* out) {
  for (int64_t i = 0; i < index.size(0); ++i) {
    const float* row = from + index.data<int64_t>()[i * index.stride(0)] * stride;
    out = std::copy(row, row + size, out);
  }
}

const Tensor* advance(const std::vector<Tensor>& tensors, size_t i) {
  return tensors.empty() ? nullptr : tensors.data() + i;
}

void check_count(const Check& check, const char* name, const std::vector<Tensor>& tensors,
                 size_t wanted, const char* meaning) {
  if (tensors.size() == wanted) return;
  check.fail(name, "have " + std::to_string(wanted) + " tensors (" + meaning + ")",
             std::to_string(tensors.size()));
}

void check_intervals(const Check& check, const char* name, const Tensor& intervals, int64_t rows) {
  check.dims(name, intervals, 3, "[N, R, 2]");
  check.shape(name, intervals, {rows, intervals.size(1), 2}, "rows of `x`, R, begin and end");
  check.dtype(name, intervals, {kInt32});
  check_cpu(check, name, intervals);
}

}  // namespace

// The map that begins a sub-layer.
void Layer::enter(size_t map, const Tensor& x, const Tensor& y, int64_t activation) const {
  run(map, x, std::nullopt, std::nullopt, std::nullopt, activation, norm_first() ? shape_.eps : -1,
      y);
}

// The one that ends it.
void Layer::leave(size_t part, size_t map, const Tensor& x, const Tensor& residual,
                  const Tensor& y) const {
  std::optional<Tensor> norm_weight, norm_bias;
  if (!norm_first()) {
    norm_weight = tensors_.norms[2 * part];
    norm_bias = tensors_.norms[2 * part + 1];
  }
  run(map, x, residual, norm_weight, norm_bias, 0, -1, y);
}

// The end of a sub-layer without such a map; all but the residual lies without gaps.
void Layer::leave(size_t part, const Tensor& x, const Tensor& residual, const Tensor& y) const {
  const int64_t columns = x.size(1);
  OutputNorm norm{};
  if (!norm_first()) {
    norm = {tensors_.norms[2 * part].data<float>(), tensors_.norms[2 * part + 1].data<float>(),
            static_cast<float>(shape_.eps)};
  }
  const auto normalise = PYNAR_SELECT_DOT_KERNEL(normalise_rows);
  float* const out = y.data<float>();
  parallel_for(x.size(0), kGrain / columns + 1, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* a = x.data<float>() + row * columns;
      const float* b = residual.data<float>() + row * residual.stride(0);
      for (int64_t i = 0; i < columns; ++i) out[row * columns + i] = a[i] + b[i];
    }
    if (norm.weight != nullptr) normalise(norm, out, columns, first, last);
  });
}

void Layer::run(size_t map, const Tensor& x, const std::optional<Tensor>& residual,
                const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                int64_t activation, double input_eps, const Tensor& y) const {
  std::optional<Tensor> scale, sums;
  if (tensors_.scales != nullptr) {
    scale = tensors_.scales[map];
    sums = tensors_.column_sums[map];
  }
  packed_linear(x, tensors_.weights[map], scale, sums, tensors_.biases[map], residual, norm_weight,
                norm_bias, activation, input_eps, shape_.eps, y);
}

void Layer::project(int64_t first, int64_t last) const {
  const int64_t dim = shape_.dim;
  const View from(x_.data<float>() + first * x_.stride(0), kFloat32, {last - first, dim},
                  {x_.stride(0), 1});
  enter(0, from, View(projected_ + first * 3 * dim, last - first, 3 * dim));
  if (!cache_) return;
  for (int64_t row = first; row < std::min(last, shape_.content); ++row) {
    std::copy_n(projected_ + row * 3 * dim + dim, 2 * dim,
                cache_->rows + cache_->slots[row] * 2 * dim);
  }
}

int64_t Layer::tile_end(int64_t first, int64_t last) const {
  // Rows too few to be shared out share the columns of each product instead.
  const int64_t most = first + std::max(kTileRows, kRowsToShare * max_threads());
  if (most >= last || chosen_ != nullptr) return std::min(most, last);
  const int32_t* begins = intervals_.data<int32_t>();
  const int64_t stride = intervals_.stride(0);
  if (intervals_.size(1) == 0) return most;
  for (int64_t end = most; end > first + kTileRows / 2; --end) {
    if (begins[end * stride] != begins[(end - 1) * stride]) return end;
  }
  return most;
}

void Layer::finish(int64_t first, int64_t last, const Tensor& y) const {
  const int64_t dim = shape_.dim;
  const int64_t heads = shape_.heads;
  const int64_t count = last - first;
  const size_t maps = shape_.maps();
  thread_local Scratch scratch;
  float* const memory = scratch.get<float>(count * (4 * dim + shape_.hidden + heads));
  const auto place = [&](int64_t number) { return memory + number * count * dim; };
  float* const inner_rows = place(4);
  float* const lse_rows = inner_rows + count * shape_.hidden;
  const auto of_heads = [&](float* data, int64_t number, int64_t stride) {
    return View(data, kFloat32, {number, heads, dim / heads}, {stride, dim / heads, 1});
  };
  float* const keys = cache_ ? cache_->rows : projected_ + dim;
  const int64_t number_of_keys = cache_ ? cache_->size : shape_.content;
  const int64_t to_next_key = cache_ ? 2 * dim : 3 * dim;
  const View k = of_heads(keys, number_of_keys, to_next_key);
  const View v = of_heads(keys + dim, number_of_keys, to_next_key);
  const View states(place(0), count, dim);
  const View attended(place(1), count, dim);
  const View query(place(2), count, dim);
  const View crossed(place(3), count, dim);
  std::vector<int32_t> chosen_intervals;
  const auto attend = [&](const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& sees) {
    // The scale is in the queries' weight.
    const View found = of_heads(place(1), count, dim);
    const View lse(lse_rows, count, heads);
    const int64_t number = sees.size(1);
    if (chosen_ == nullptr) {
      const View own(sees.data<int32_t>() + first * sees.stride(0), kInt32, {count, number, 2},
                     {sees.stride(0), sees.stride(1), sees.stride(2)});
      interval_attention(q, k, v, own, 1.0, found, lse);
      return;
    }
    chosen_intervals.clear();
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = chosen_->data<int64_t>()[i * chosen_->stride(0)];
      const int32_t* interval = sees.data<int32_t>() + row * sees.stride(0);
      for (int64_t r = 0; r < number; ++r, interval += sees.stride(1)) {
        chosen_intervals.push_back(interval[0]);
        chosen_intervals.push_back(interval[sees.stride(2)]);
      }
    }
    const View own(chosen_intervals.data(), kInt32, {count, number, 2}, {2 * number, 2, 1});
    interval_attention(q, k, v, own, 1.0, found, lse);
  };
  const auto end = [&](size_t part, size_t map, const Tensor& residual, const Tensor& out) {
    if (shape_.bare) return leave(part, attended, residual, out);
    leave(part, map, attended, residual, out);
  };

  if (chosen_ != nullptr) {
    const View index(chosen_->data<int64_t>() + first * chosen_->stride(0), kInt64, {count},
                     {chosen_->stride(0)});
    gather(projected_, 3 * dim, dim, index, place(2));
    gather(x_.data<float>(), x_.stride(0), dim, index, place(3));
    attend(of_heads(place(2), count, dim), k, v, intervals_);
    end(0, 1, crossed, states);  // what lies there is still x
  } else {
    attend(of_heads(projected_ + first * 3 * dim, count, 3 * dim), k, v, intervals_);
    end(0, 1,
        View(x_.data<float>() + first * x_.stride(0), kFloat32, {count, dim}, {x_.stride(0), 1}),
        states);
  }
  const Tensor* last_states = &static_cast<const Tensor&>(states);
  if (memory_) {
    enter(shape_.bare ? 1 : 2, states, query);
    attend(of_heads(place(2), count, dim), memory_->keys, memory_->values, memory_->intervals);
    end(1, 3, states, crossed);
    last_states = &static_cast<const Tensor&>(crossed);
  }
  const View inner(inner_rows, count, shape_.hidden);
  enter(maps - 2, *last_states, inner, shape_.activation);
  leave(shape_.parts - 1, maps - 1, inner, *last_states, y);
}

void packed_layers(const Tensor& x, const std::vector<Tensor>& weights,
                   const std::vector<Tensor>& scales, const std::vector<Tensor>& column_sums,
                   const std::vector<Tensor>& biases, const std::vector<Tensor>& norms,
                   const Tensor& intervals, const std::vector<Tensor>& keys,
                   const std::vector<Tensor>& values, const std::optional<Tensor>& memory_intervals,
                   const std::optional<Tensor>& chosen, const std::vector<Tensor>& caches,
                   const std::optional<Tensor>& slots, int64_t content, int64_t layers,
                   int64_t heads, int64_t activation, double eps, const Tensor& y) {
  // A step is this with caches and slots.
  const Check check(slots ? "packed_step" : "packed_layers");
  check.dims("x", x, 2, "[N, C]");
  check.dtype("x", x, {kFloat32});
  check_cpu(check, "x", x);
  check_rows(check, "x", x);
  const int64_t rows = x.size(0);
  const int64_t dim = x.size(1);
  if (heads < 1 || dim % heads != 0) {
    check.fail("heads", "divide the channels of `x` (" + std::to_string(dim) + ")",
               std::to_string(heads));
  }
  if (layers < 1) check.fail("layers", "be at least 1", std::to_string(layers));
  const auto number = static_cast<size_t>(layers);
  const bool crosses = !keys.empty();
  if (crosses) check_count(check, "keys", keys, number, "one for each layer, or none");
  check_count(check, "values", values, keys.size(), "one for each of `keys`");
  if (memory_intervals.has_value() != crosses) {
    check.fail("memory_intervals", "be given with `keys`, and only then",
               crosses ? "None" : "it alone");
  }
  const size_t parts = crosses ? 3 : 2;
  const bool bare = weights.size() == (parts + 1) * number;
  LayerShape shape{rows, dim, 0, heads, content, activation, parts, bare, eps};
  const size_t maps = shape.maps();
  check_count(check, "weights", weights, maps * number, "one for each linear map");
  check_count(check, "biases", biases, maps * number, "one for each linear map");
  if (!scales.empty() || !column_sums.empty()) {
    check_count(check, "scales", scales, maps * number, "one for each linear map, or none");
    check_count(check, "column_sums", column_sums, maps * number,
                "one for each linear map, or none");
  }
  if (!norms.empty()) {
    check_count(check, "norms", norms, 2 * parts * number,
                "weight and bias for each sub-layer, or none");
  }
  for (const Tensor& norm : norms) {
    check.shape("norms", norm, {dim}, "channels of `x`");
    check.dtype("norms", norm, {kFloat32});
    check.contiguous("norms", norm);
  }
  check.dims("biases", biases[maps - 2], 1, "[F]");
  const int64_t hidden = shape.hidden = biases[maps - 2].size(0);
  for (size_t map = 0; map < biases.size(); ++map) {
    const size_t place = map % maps;
    const int64_t columns = place == 0 ? 3 * dim : place == maps - 2 ? hidden : dim;
    check.shape("biases", biases[map], {columns}, "3 C, then C each, F and C");
  }
  check_intervals(check, "intervals", intervals, rows);
  if (crosses) check_intervals(check, "memory_intervals", *memory_intervals, rows);
  if (content < 0 || content > rows) {
    check.fail("content", "be in [0, " + std::to_string(rows) + "]", std::to_string(content));
  }
  int64_t wanted = rows;
  if (chosen) {
    check.dims("chosen", *chosen, 1, "[M]");
    check.dtype("chosen", *chosen, {kInt64});
    check.device("chosen", *chosen, "x", x);
    wanted = chosen->size(0);
    for (int64_t i = 0; i < wanted; ++i) {
      const int64_t row = chosen->data<int64_t>()[i * chosen->stride(0)];
      if (row >= 0 && row < rows) continue;
      check.fail("chosen", "lie in [0, " + std::to_string(rows) + ")", std::to_string(row));
    }
  }
  int64_t cached = 0;
  if (!caches.empty()) {
    check_count(check, "caches", caches, number, "one for each layer, or none");
    const int64_t places = caches[0].dim() > 0 ? caches[0].size(0) : 0;
    const int64_t capacity = caches[0].dim() > 1 ? caches[0].size(1) : 0;
    cached = places * capacity;
    for (const Tensor& cache : caches) {
      check.shape("caches", cache, {places, capacity, 2 * heads, dim / heads},
                  "places, capacity, 2 H, D");
      check.dtype("caches", cache, {kFloat32});
      check_cpu(check, "caches", cache);
      check.contiguous("caches", cache);
      check.writable("caches", cache);
    }
    if (!slots) check.fail("slots", "be given with `caches`", "None");
    check.shape("slots", *slots, {content}, "rows with keys and values");
    check.dtype("slots", *slots, {kInt64});
    check.device("slots", *slots, "x", x);
    check.contiguous("slots", *slots);
    for (int64_t i = 0; i < content; ++i) {
      const int64_t slot = slots->data<int64_t>()[i];
      if (slot >= 0 && slot < cached) continue;
      check.fail("slots", "lie in [0, " + std::to_string(cached) + ")", std::to_string(slot));
    }
  }
  check.shape("y", y, {wanted, dim}, "wanted rows, channels of `x`");
  check.dtype("y", y, {kFloat32});
  check_cpu(check, "y", y);
  check.contiguous("y", y);
  check.writable("y", y);
  if (wanted == 0) return;

  // Layers hand their states on in two places that take turns, and so do what they project, which
  // others may still read when a thread goes on: it is at most one layer ahead.
  const int64_t between = layers > 1 ? rows * dim : 0;
  thread_local Scratch scratch;
  float* const floats = scratch.get<float>(2 * (between + shape.projected()));
  float* const projected = floats + 2 * between;
  const View even(floats, rows, dim);
  const View odd(floats + between, rows, dim);
  in_team(rows >= kRowsToShare * max_threads(), [&](const Team& team) {
    const Tensor* from = &x;
    for (size_t i = 0; i < number; ++i) {
      const bool last = i + 1 == number;
      const Tensor* to = last ? &y : &static_cast<const Tensor&>(i % 2 == 0 ? even : odd);
      std::optional<LayerMemory> read;
      if (crosses) read.emplace(LayerMemory{keys[i], values[i], *memory_intervals});
      const LayerTensors tensors{advance(weights, i * maps), advance(scales, i * maps),
                                 advance(column_sums, i * maps), advance(biases, i * maps),
                                 advance(norms, 2 * parts * i)};
      std::optional<LayerCache> cache;
      if (!caches.empty()) {
        cache.emplace(LayerCache{caches[i].data<float>(), cached, slots->data<int64_t>()});
      }
      const Layer layer(shape, tensors, *from, intervals, read, cache,
                        last && chosen ? &*chosen : nullptr, projected + i % 2 * shape.projected());
      team.each(rows, [&](int64_t begin, int64_t end) { layer.project(begin, end); });
      team.wait();
      const auto finish = [&](int64_t begin, int64_t end) {
        layer.finish(begin, end, View(to->data<float>() + begin * dim, end - begin, dim));
      };
      team.each(to->size(0),
                [&](int64_t begin, int64_t end) { layer.in_tiles(begin, end, finish); });
      from = to;
    }
  });
}

}  // namespace pynar
