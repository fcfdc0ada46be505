// The maps of one level of a flow on rows without padding, one after the other without a way back
// to Python between them: actnorm, flow_linear, and affine couplings, whose network is a layer of
// packed_layers with bare attention and a linear map to shift and scale. `kinds` tells them apart:
//
//   0     actnorm        log scale and bias [C] of `linear`
//   1, 2  flow_linear    log scale and bias [C] and matrix [d, d] of `linear`; contiguous or
//                        strided heads
//   3...  couplings      3 + 2 split + (1 if the second half decides), split by the first and last
//                        channels, by even and odd ones, or by even and odd rows
//   9...  the same       9 + (1 if the second half decides), split by the first and last channels,
//                        of which the network's input is gathered by position
//
// With `inverse` they are undone from the last to the first. A coupling's network reads rows [N, W]
// of the half that decides, or [N / 2, W] if it is every second row: `rows`, or `pairs`, are the
// positions [n, W] that are added to it, and which rows of its sentence [n, R, 2] and of `memory`
// [n, R, 2] a row attends to. The columns of `memory` are keys and values of each coupling. What is
// gathered by position is LayerNorm(p + attention of positions p to the half that decides).
//
// What maps have of their own lies in one tensor of each sort, map after map: of a coupling five
// weights ([3 W, W], [W, W], [F, W], [W, F], [2 W, W], packed), their scales and column sums where
// they are int8, biases, and weight and bias of three normalisations; before them those of keys and
// values [2 W, W], queries [W, W] and a normalisation by position. Tensors by the thousand would
// take longer to hand over than the products do; and the next weight is what follows in memory,
// which is what the kernels prefetch.
#include <algorithm>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "common/operators.h"
#include "linear/layer.h"
#include "linear/packed_linear.h"

namespace pynar {
namespace {

constexpr const char* kName = "packed_flow";

enum Kind : int64_t { kActNorm, kContiguous, kStrided, kCoupling, kByPosition = kCoupling + 6 };
enum class Split : int64_t { kFeatures, kAlternate, kSteps };

// Linear maps of a coupling, the first ones by position alone, and vectors of its normalisations.
constexpr size_t kMaps = 7;
constexpr size_t kPositionMaps = 2;
constexpr size_t kNorms = 8;
constexpr size_t kPositionNorms = 2;

bool is_coupling(int64_t kind) {
  return kind >= kCoupling;
}

Split split_of(int64_t kind) {
  return kind >= kByPosition ? Split::kFeatures : static_cast<Split>((kind - kCoupling) / 2);
}

// One half of rows [N, C]: rows of `width` channels, both of them so far apart.
struct HalfRows {
  float* data;
  int64_t width;
  int64_t row, channel;

  static HalfRows of(float* x, int64_t dim, Split split, bool second) {
    if (split == Split::kSteps) return {x + second * dim, dim, 2 * dim, 1};
    if (split == Split::kAlternate) return {x + second, dim / 2, dim, 2};
    return {x + second * (dim / 2), dim / 2, dim, 1};
  }
};

void take(const HalfRows& half, int64_t first, int64_t last, float* out) {
  for (int64_t i = first; i < last; ++i) {
    const float* x = half.data + i * half.row;
    float* y = out + (i - first) * half.width;
    for (int64_t c = 0; c < half.width; ++c) y[c] = x[c * half.channel];
  }
}

// The positions of rows [first, last) to `out` [n, width].
void add_positions(const Tensor& positions, int64_t first, int64_t last, int64_t width,
                   float* out) {
  for (int64_t i = first; i < last; ++i, out += width) {
    const float* p = positions.data<float>() + i * positions.stride(0);
    for (int64_t c = 0; c < width; ++c) out[c] += p[c];
  }
}

void put(const float* in, int64_t first, int64_t last, const HalfRows& half) {
  for (int64_t i = first; i < last; ++i) {
    const float* y = in + (i - first) * half.width;
    float* x = half.data + i * half.row;
    for (int64_t c = 0; c < half.width; ++c) x[c * half.channel] = y[c];
  }
}

void check_rows_of(const Check& check, const char* name, const std::vector<Tensor>& rows,
                   int64_t count, int64_t width) {
  if (rows.size() != 3) {
    check.fail(name, "have 3 tensors (positions, and what a row attends to)",
               std::to_string(rows.size()));
  }
  check.shape(name, rows[0], {count, width}, "rows, channels of half the states");
  check.dtype(name, rows[0], {kFloat32});
  check_cpu(check, name, rows[0]);
  check_rows(check, name, rows[0]);
  for (size_t i = 1; i < 3; ++i) {
    check.dims(name, rows[i], 3, "[N, R, 2]");
    check.shape(name, rows[i], {count, rows[i].size(1), 2}, "rows, R, begin and end");
    check.dtype(name, rows[i], {kInt32});
    check_cpu(check, name, rows[i]);
  }
}

void check_flat(const Check& check, const char* name, const Tensor& tensor, DataType dtype,
                int64_t size) {
  check.shape(name, tensor, {size}, "numbers of all maps");
  check.dtype(name, tensor, {dtype});
  check_cpu(check, name, tensor);
  check.contiguous(name, tensor);
}

// Outputs and inputs of a coupling's maps, for a width and a width of the hidden layer.
struct Maps {
  int64_t width;
  size_t first;  // that it has
  int64_t outputs[kMaps];
  int64_t inputs[kMaps];

  Maps(int64_t kind, int64_t dim, int64_t hidden)
      : width(split_of(kind) == Split::kSteps ? dim : dim / 2),
        first(kind >= kByPosition ? 0 : kPositionMaps),
        outputs{2 * width, width, 3 * width, width, hidden, width, 2 * width},
        inputs{width, width, width, width, width, hidden, width} {}

  size_t norms() const { return first == 0 ? kNorms : kNorms - kPositionNorms; }
};

// Where a coupling begins in each of the tensors, or how much it takes of them.
struct Place {
  int64_t data, sums, biases, norms, memory;

  static Place of(const Maps& maps, WeightFormat format) {
    Place place{0, 0, 0, static_cast<int64_t>(maps.norms()) * maps.width, 2 * maps.width};
    const int64_t per_word = depth_per_word(format);
    for (size_t i = maps.first; i < kMaps; ++i) {
      const int64_t columns = div_up(maps.outputs[i], kPanel) * kPanel;
      place.data += columns * div_up(maps.inputs[i], per_word) * per_word;
      place.sums += format == WeightFormat::kInt8 ? columns : 0;
      place.biases += maps.outputs[i];
    }
    return place;
  }
  void move(const Place& by, int64_t sign) {
    data += sign * by.data;
    sums += sign * by.sums;
    biases += sign * by.biases;
    norms += sign * by.norms;
    memory += sign * by.memory;
  }
};

// A coupling's network, as views of the tensors of all.
class Network {
 public:
  Network(const Maps& maps, Place place, const Tensor& data, const Tensor& all_scales,
          const Tensor& all_sums, const Tensor& all_biases, const Tensor& all_norms)
      : first_(maps.first) {
    const WeightFormat format = format_of(data.dtype());
    const int64_t per_word = depth_per_word(format);
    const int64_t bytes = data.dtype().bits / 8;
    for (size_t i = maps.first; i < kMaps; ++i) {
      const int64_t columns = div_up(maps.outputs[i], kPanel) * kPanel;
      const int64_t strip = strip_columns();
      const int64_t steps = div_up(maps.inputs[i], per_word);
      const int64_t step = strip * per_word;
      add(weights_, data.data<char>() + place.data * bytes, data.dtype(),
          {columns / strip, steps, strip, per_word}, {steps * step, step, per_word, 1});
      place.data += columns * steps * per_word;
      add(biases_, all_biases.data<float>() + place.biases, kFloat32, {maps.outputs[i]}, {1});
      place.biases += maps.outputs[i];
      if (format != WeightFormat::kInt8) continue;
      add(scales_, all_scales.data<float>() + place.sums, kFloat32, {columns}, {1});
      add(sums_, all_sums.data<int32_t>() + place.sums, kInt32, {columns}, {1});
      place.sums += columns;
    }
    for (size_t i = 0; i < maps.norms(); ++i) {
      add(norms_, all_norms.data<float>() + place.norms, kFloat32, {maps.width}, {1});
      place.norms += maps.width;
    }
  }

  LayerTensors layer() const {
    const size_t i = kPositionMaps - first_;
    const bool few_bits = !scales_.empty();
    return {&weights_[i], few_bits ? &scales_[i] : nullptr, few_bits ? &sums_[i] : nullptr,
            &biases_[i], &norms_[first_ == 0 ? kPositionNorms : 0]};
  }
  // Those of the gathering by position.
  OutputNorm position_norm(double eps) const {
    return {norms_[0].data<float>(), norms_[1].data<float>(), static_cast<float>(eps)};
  }

  // A linear map that is none of the layer's.
  void run(size_t map, const Tensor& x, const Tensor& y) const {
    const size_t i = map - first_;
    std::optional<Tensor> scale, sums;
    if (!scales_.empty()) {
      scale = scales_[i];
      sums = sums_[i];
    }
    packed_linear(x, weights_[i], scale, sums, biases_[i], std::nullopt, std::nullopt, std::nullopt,
                  0, -1, 0, y);
  }

 private:
  void add(std::vector<Tensor>& to, void* data, DataType dtype,
           std::initializer_list<int64_t> shape, std::initializer_list<int64_t> strides) {
    to.push_back(views_.emplace_back(data, dtype, shape, strides));
  }

  size_t first_;
  std::vector<Tensor> weights_, scales_, sums_, biases_, norms_;
  std::deque<View> views_;  // which tensors point into
};

LayerShape shape_of(int64_t rows, int64_t width, int64_t hidden, int64_t heads, double eps) {
  return {rows, width, hidden, heads, rows, static_cast<int64_t>(Activation::kRelu), 3, true, eps};
}

}  // namespace

void packed_flow(const Tensor& x, const std::vector<int64_t>& kinds, const Tensor& linear,
                 const Tensor& weights, const Tensor& scales, const Tensor& column_sums,
                 const Tensor& biases, const Tensor& norms, const Tensor& memory,
                 const std::vector<Tensor>& rows, const std::vector<Tensor>& pairs, int64_t heads,
                 int64_t hidden, int64_t matrix, double eps, bool inverse, const Tensor& y,
                 const Tensor& logdet) {
  const Check check(kName);
  check.dims("x", x, 2, "[N, C]");
  check.dtype("x", x, {kFloat32});
  check_cpu(check, "x", x);
  check_rows(check, "x", x);
  check.dtype("weights", weights, {kFloat32, kBFloat16, kInt8});
  const WeightFormat format = format_of(weights.dtype());
  const int64_t count = x.size(0);
  const int64_t dim = x.size(1);
  if (hidden < 1) check.fail("hidden", "be at least 1", std::to_string(hidden));
  if (matrix < 1) check.fail("matrix", "be at least 1", std::to_string(matrix));
  const auto numbers_of = [&](int64_t kind) {
    return 2 * dim + (kind == kActNorm ? 0 : matrix * matrix);
  };
  int64_t couplings = 0, numbers = 0;
  bool by_steps = false;
  Place all_places{};
  for (const int64_t kind : kinds) {
    if (kind < 0 || kind > kByPosition + 1) {
      check.fail("kinds", "be in [0, 10]", std::to_string(kind));
    }
    if (!is_coupling(kind)) {
      numbers += numbers_of(kind);
      continue;
    }
    ++couplings;
    by_steps = by_steps || split_of(kind) == Split::kSteps;
    all_places.move(Place::of(Maps(kind, dim, hidden), format), 1);
  }
  if (couplings > 0 && dim % 2 != 0) {
    check.fail("x", "have an even number of channels", std::to_string(dim));
  }
  if (by_steps && count % 2 != 0) {
    check.fail("x", "have an even number of rows", std::to_string(count));
  }
  if (couplings > 0 && (heads < 1 || dim / 2 % heads != 0)) {
    check.fail("heads", "divide half the channels of `x` (" + std::to_string(dim / 2) + ")",
               std::to_string(heads));
  }
  check_flat(check, "linear", linear, kFloat32, numbers);
  check_flat(check, "weights", weights, weights.dtype(), all_places.data);
  check_flat(check, "scales", scales, kFloat32, all_places.sums);
  check_flat(check, "column_sums", column_sums, kInt32, all_places.sums);
  check_flat(check, "biases", biases, kFloat32, all_places.biases);
  check_flat(check, "norms", norms, kFloat32, all_places.norms);
  check.dims("memory", memory, 2, "[S, M]");
  check.shape("memory", memory, {memory.size(0), all_places.memory},
              "keys and values of each coupling");
  check.dtype("memory", memory, {kFloat32});
  check_cpu(check, "memory", memory);
  check_rows(check, "memory", memory);
  if (couplings > 0) check_rows_of(check, "rows", rows, count, dim / 2);
  if (by_steps) check_rows_of(check, "pairs", pairs, count / 2, dim);
  check.shape("y", y, {count, dim}, "that of `x`");
  check.dtype("y", y, {kFloat32});
  check_cpu(check, "y", y);
  check.contiguous("y", y);
  check.writable("y", y);
  check.shape("logdet", logdet, {count}, "rows of `x`");
  check.dtype("logdet", logdet, {kFloat32});
  check.contiguous("logdet", logdet);
  check.writable("logdet", logdet);
  float* const states = y.data<float>();
  for (int64_t i = 0; i < count; ++i) {
    const float* row = x.data<float>() + i * x.stride(0);
    std::copy(row, row + dim, states + i * dim);
  }
  float* const total = logdet.data<float>();
  std::fill(total, total + count, 0.f);
  if (count == 0) return;

  // What couplings hold in between: the network's input, and what rows project for others, which
  // has two places that take turns, see packed_layers.cpp.
  const int64_t half = count * dim / 2;
  const LayerShape whole_shape = shape_of(count, dim / 2, hidden, heads, eps);
  const LayerShape pairs_shape = shape_of(count / 2, dim, hidden, heads, eps);
  const int64_t projected_size = whole_shape.projected();
  thread_local Scratch scratch;
  float* const given = scratch.get<float>(4 * half + count * heads + 2 * projected_size);
  float* const projected = given + half;
  float* const gathered = projected + 2 * projected_size;  // keys and values, queries, lse
  // Each row is a sequence of one step, which has a log-determinant of its own.
  const auto ones = std::make_unique_for_overwrite<int64_t[]>(count);
  std::fill(ones.get(), ones.get() + count, 1);

  const auto normalise = PYNAR_SELECT_DOT_KERNEL(normalise_rows);
  const auto couple = [&](const Team& team, int64_t kind, const Place& place, int64_t turn) {
    const Split split = split_of(kind);
    const Maps maps(kind, dim, hidden);
    const bool second_decides = (kind - kCoupling) % 2 == 1;
    const HalfRows deciding = HalfRows::of(states, dim, split, second_decides);
    const HalfRows changing = HalfRows::of(states, dim, split, !second_decides);
    const bool paired = split == Split::kSteps;
    const LayerShape& shape = paired ? pairs_shape : whole_shape;
    const int64_t width = shape.dim;
    const std::vector<Tensor>& own = paired ? pairs : rows;
    const Network network(maps, place, weights, scales, column_sums, biases, norms);
    const auto of_heads = [&](float* data, int64_t number, int64_t stride) {
      return View(data, kFloat32, {number, heads, width / heads}, {stride, width / heads, 1});
    };
    float* const source = memory.data<float>() + place.memory;
    const View keys = of_heads(source, memory.size(0), memory.stride(0));
    const View values = of_heads(source + width, memory.size(0), memory.stride(0));
    const View input(given, shape.rows, width);
    const std::optional<LayerMemory> read(LayerMemory{keys, values, own[2]});
    const std::optional<LayerCache> no_cache;
    const Layer layer(shape, network.layer(), input, own[1], read, no_cache, nullptr,
                      projected + turn % 2 * projected_size);
    // A thread keeps to its rows, or pairs of rows, from map to map.
    const auto each = [&](const auto& body) {
      if (paired || !by_steps) return team.each(shape.rows, body);
      team.each(shape.rows / 2, [&](int64_t first, int64_t last) { body(2 * first, 2 * last); });
    };
    if (kind >= kByPosition) {
      float* const queries = gathered + 2 * count * width;
      each([&](int64_t first, int64_t last) {
        const int64_t n = last - first;
        take(deciding, first, last, given + first * width);
        network.run(0, View(given + first * width, n, width),
                    View(gathered + first * 2 * width, n, 2 * width));
        float* const at = own[0].data<float>() + first * own[0].stride(0);
        network.run(1, View(at, kFloat32, {n, width}, {own[0].stride(0), 1}),
                    View(queries + first * width, n, width));
      });
      team.wait();
      each([&](int64_t first, int64_t last) {
        const int64_t n = last - first;
        const Tensor& sees = own[1];
        const View intervals(sees.data<int32_t>() + first * sees.stride(0), kInt32,
                             {n, sees.size(1), 2},
                             {sees.stride(0), sees.stride(1), sees.stride(2)});
        interval_attention(of_heads(queries + first * width, n, width),
                           of_heads(gathered, count, 2 * width),
                           of_heads(gathered + width, count, 2 * width), intervals, 1.0,
                           of_heads(given + first * width, n, width),
                           View(queries + count * width + first * heads, n, heads));
        add_positions(own[0], first, last, width, given + first * width);
        normalise(network.position_norm(eps), given, width, first, last);
        layer.project(first, last);
      });
    } else {
      each([&](int64_t first, int64_t last) {
        take(deciding, first, last, given + first * width);
        add_positions(own[0], first, last, width, given + first * width);
        layer.project(first, last);
      });
    }
    team.wait();
    const auto finish = [&](int64_t first, int64_t last) {
      // The network's states, the half that changes before and after, shift and scale, and a
      // log-determinant a row, twice.
      const int64_t n = last - first;
      thread_local Scratch tile;
      float* const made = tile.get<float>(n * (5 * width + 2));
      float* const before = made + n * width;
      float* const after = before + n * width;
      float* const parameters = after + n * width;
      float* const row_logdet = parameters + 2 * n * width;
      const View output(made, n, width);
      layer.finish(first, last, output);
      network.run(kMaps - 1, output, View(parameters, n, 2 * width));
      take(changing, first, last, before);
      const auto steps = [&](float* data, int64_t stride) {
        return View(data, kFloat32, {n, 1, width}, {stride, stride, 1});
      };
      affine_coupling(steps(before, width), View(ones.get(), kInt64, {n}, {1}),
                      steps(parameters, 2 * width), steps(parameters + width, 2 * width), inverse,
                      steps(after, width), View(row_logdet, kFloat32, {n}, {1}),
                      View(row_logdet + n, kFloat32, {n, 1}, {1, 1}));
      put(after, first, last, changing);
      // Of a pair of rows it counts for the first.
      for (int64_t i = first; i < last; ++i) total[paired ? 2 * i : i] += row_logdet[i - first];
    };
    each([&](int64_t first, int64_t last) { layer.in_tiles(first, last, finish); });
  };
  const auto map_linearly = [&](int64_t kind, float* numbers, int64_t first, int64_t last) {
    float* const bias = numbers + dim;
    int64_t length = last - first;
    const View length_view(&length, kInt64, {1}, {1});
    const View own(states + first * dim, kFloat32, {1, length, dim}, {length * dim, dim, 1});
    if (kind == kActNorm) {
      const View log_scale(numbers, kFloat32, {dim}, {1});
      actnorm(own, length_view, log_scale, View(bias, kFloat32, {dim}, {1}), inverse, 1, own);
      return;
    }
    const View log_scale(numbers, 1, dim);
    const View bias_view(bias, 1, dim);
    const View product(bias + dim, kFloat32, {1, matrix, matrix}, {matrix * matrix, matrix, 1});
    flow_linear("flow_linear", own, length_view, static_cast<const Tensor&>(log_scale),
                static_cast<const Tensor&>(bias_view), product, kind - kContiguous, inverse, 1,
                own);
  };

  in_team(count >= kRowsToShare * max_threads(), [&](const Team& team) {
    Place place = inverse ? all_places : Place{};
    int64_t number = inverse ? numbers : 0;
    int64_t turn = 0;
    for (size_t i = 0; i < kinds.size(); ++i) {
      const int64_t kind = kinds[inverse ? kinds.size() - 1 - i : i];
      if (is_coupling(kind)) {
        const Place size = Place::of(Maps(kind, dim, hidden), format);
        if (inverse) place.move(size, -1);
        couple(team, kind, place, turn++);
        if (!inverse) place.move(size, 1);
        continue;
      }
      const int64_t size = numbers_of(kind);
      if (inverse) number -= size;
      const int64_t unit = by_steps ? 2 : 1;
      team.each(count / unit, [&](int64_t first, int64_t last) {
        map_linearly(kind, linear.data<float>() + number, unit * first, unit * last);
      });
      if (!inverse) number += size;
    }
  });
}

}  // namespace pynar
