// The maps of one level of a flow on rows without padding, one after the other without a way back
// to Python between them: actnorm, flow_linear, and affine couplings, whose network is a layer of
// packed_layers with bare attention and a linear map to shift and scale. `kinds` tells them apart:
//
//   0     actnorm        log scale and bias [C] of `linear`
//   1, 2  flow_linear    log scale and bias [1, C] and matrix [1, d, d] of `linear`; contiguous or
//                        strided heads
//   3...  couplings      3 + 2 split + (1 if the second half decides), split by the first and last
//                        channels, by even and odd ones, or by even and odd rows
//
// With `inverse` they are undone from the last to the first. A coupling's network reads rows [N, W]
// of the half that decides, or [N / 2, W] if it is every second row: `rows`, or `pairs`, are the
// positions [n, W] that are added to it, and which rows of its sentence [n, R, 2] and of `memory`
// [n, R, 2] a row attends to. Keys and values, each W wide, are neighbours in `memory`.
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "common/operators.h"
#include "common/parallel.h"
#include "linear/host.h"

// It copies rows; see csrc/attention/interval_tiles.cpp.
#pragma GCC optimize("O2")

namespace pynar {
namespace {

constexpr const char* kName = "packed_flow";
// A second thread is not worth it for fewer numbers.
constexpr int64_t kGrain = 1 << 15;

enum Kind : int64_t { kActNorm, kContiguous, kStrided, kCoupling };
enum class Split : int64_t { kFeatures, kAlternate, kSteps };

// Maps of each coupling, and normalisations with weight and bias each.
constexpr size_t kMaps = 5;
constexpr size_t kNorms = 6;

bool is_coupling(int64_t kind) {
  return kind >= kCoupling;
}

Split split_of(int64_t kind) {
  return static_cast<Split>((kind - kCoupling) / 2);
}

// One half of rows [N, C]: `count` rows of `width` channels, both of them so far apart.
struct HalfRows {
  float* data;
  int64_t count, width;
  int64_t row, channel;

  static HalfRows of(float* x, int64_t rows, int64_t dim, Split split, bool second) {
    if (split == Split::kSteps) return {x + second * dim, rows / 2, dim, 2 * dim, 1};
    if (split == Split::kAlternate) return {x + second, rows, dim / 2, dim, 2};
    return {x + second * (dim / 2), rows, dim / 2, dim, 1};
  }
};

template <typename Body>
void each_row(const HalfRows& half, const Body& body) {
  parallel_for(half.count, kGrain / half.width + 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i, half.data + i * half.row);
  });
}

// out [count, width] = half
void take(const HalfRows& half, float* out) {
  each_row(half, [&](int64_t i, const float* x) {
    float* y = out + i * half.width;
    for (int64_t c = 0; c < half.width; ++c) y[c] = x[c * half.channel];
  });
}

// out [count, width] = half + positions
void take_at(const HalfRows& half, const Tensor& positions, float* out) {
  each_row(half, [&](int64_t i, const float* x) {
    const float* p = positions.data<float>() + i * positions.stride(0);
    float* y = out + i * half.width;
    for (int64_t c = 0; c < half.width; ++c) y[c] = x[c * half.channel] + p[c];
  });
}

// half = in [count, width]
void put(const float* in, const HalfRows& half) {
  each_row(half, [&](int64_t i, float* x) {
    const float* y = in + i * half.width;
    for (int64_t c = 0; c < half.width; ++c) x[c * half.channel] = y[c];
  });
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
  }
}

void check_count(const Check& check, const char* name, const std::vector<Tensor>& tensors,
                 size_t wanted, const char* meaning) {
  if (tensors.size() == wanted) return;
  check.fail(name, "have " + std::to_string(wanted) + " tensors (" + meaning + ")",
             std::to_string(tensors.size()));
}

std::vector<Tensor> part(const std::vector<Tensor>& tensors, size_t first, size_t count) {
  if (tensors.empty()) return {};
  return {tensors.begin() + first, tensors.begin() + first + count};
}

std::optional<Tensor> at(const std::vector<Tensor>& tensors, size_t i) {
  if (tensors.empty()) return std::nullopt;
  return tensors[i];
}

}  // namespace

void packed_flow(const Tensor& x, const std::vector<int64_t>& kinds,
                 const std::vector<Tensor>& linear, const std::vector<Tensor>& weights,
                 const std::vector<Tensor>& scales, const std::vector<Tensor>& column_sums,
                 const std::vector<Tensor>& biases, const std::vector<Tensor>& norms,
                 const std::vector<Tensor>& memory, const std::vector<Tensor>& rows,
                 const std::vector<Tensor>& pairs, int64_t heads, double eps, bool inverse,
                 const Tensor& y, const Tensor& logdet) {
  const Check check(kName);
  check.dims("x", x, 2, "[N, C]");
  check.dtype("x", x, {kFloat32});
  check_cpu(check, "x", x);
  check_rows(check, "x", x);
  const int64_t count = x.size(0);
  const int64_t dim = x.size(1);
  size_t couplings = 0, numbers = 0;
  bool by_steps = false;
  for (const int64_t kind : kinds) {
    if (kind < 0 || kind > kCoupling + 5) {
      check.fail("kinds", "be in [0, 8]", std::to_string(kind));
    }
    couplings += is_coupling(kind);
    by_steps = by_steps || (is_coupling(kind) && split_of(kind) == Split::kSteps);
    numbers += is_coupling(kind) ? 0 : kind == kActNorm ? 2 : 3;
  }
  if (couplings > 0 && dim % 2 != 0) {
    check.fail("x", "have an even number of channels", std::to_string(dim));
  }
  if (by_steps && count % 2 != 0) {
    check.fail("x", "have an even number of rows", std::to_string(count));
  }
  check_count(check, "linear", linear, numbers, "two for each actnorm, three for each flow_linear");
  check_count(check, "weights", weights, kMaps * couplings, "five for each coupling");
  check_count(check, "biases", biases, kMaps * couplings, "five for each coupling");
  if (!scales.empty() || !column_sums.empty()) {
    check_count(check, "scales", scales, kMaps * couplings, "five for each coupling, or none");
    check_count(check, "column_sums", column_sums, kMaps * couplings,
                "five for each coupling, or none");
  }
  check_count(check, "norms", norms, kNorms * couplings, "six for each coupling");
  check_count(check, "memory", memory, couplings, "one for each coupling");
  if (couplings > 0 && (heads < 1 || dim / 2 % heads != 0)) {
    check.fail("heads", "divide half the channels of `x` (" + std::to_string(dim / 2) + ")",
               std::to_string(heads));
  }
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

  // What a coupling holds in between: the network's input and states, the half that changes before
  // and after, shift and scale, and a log-determinant a row, twice.
  const int64_t half = count * dim / 2;
  const auto scratch = std::make_unique_for_overwrite<float[]>(6 * half + 2 * count);
  float* const given = scratch.get();
  float* const made = given + half;
  float* const before = made + half;
  float* const after = before + half;
  float* const parameters = after + half;
  float* const row_logdet = parameters + 2 * half;
  // Each row is a sequence of one step, with a log-determinant of its own.
  const std::vector<int64_t> ones(count, 1);
  const auto lengths_of = [&](int64_t number) {
    return View(const_cast<int64_t*>(ones.data()), kInt64, {number}, {1});
  };
  const View all(states, kFloat32, {1, count, dim}, {count * dim, dim, 1});
  int64_t whole = count;
  const View whole_length(&whole, kInt64, {1}, {1});

  const auto couple = [&](int64_t kind, size_t number) {
    const Split split = split_of(kind);
    const bool second_decides = (kind - kCoupling) % 2 == 1;
    const HalfRows deciding = HalfRows::of(states, count, dim, split, second_decides);
    const HalfRows changing = HalfRows::of(states, count, dim, split, !second_decides);
    const int64_t n = deciding.count;
    const int64_t width = deciding.width;
    const std::vector<Tensor>& own = split == Split::kSteps ? pairs : rows;
    const Tensor& source = memory[number];
    check.dims("memory", source, 2, "[S, 2 W]");
    check.shape("memory", source, {source.size(0), 2 * width}, "keys and values");
    check_rows(check, "memory", source);
    const auto of_heads = [&](int64_t begin) {
      return View(source.data<float>() + begin, source.dtype(),
                  {source.size(0), heads, width / heads}, {source.stride(0), width / heads, 1});
    };
    const View keys = of_heads(0);
    const View values = of_heads(width);
    const size_t first = kMaps * number;
    take_at(deciding, own[0], given);
    packed_layers(View(given, n, width), part(weights, first, kMaps - 1),
                  part(scales, first, kMaps - 1), part(column_sums, first, kMaps - 1),
                  part(biases, first, kMaps - 1), part(norms, kNorms * number, kNorms), own[1],
                  {keys}, {values}, own[2], std::nullopt, n, 1, heads, 1, eps,
                  View(made, n, width));
    const size_t last = first + kMaps - 1;
    packed_linear(View(made, n, width), weights[last], at(scales, last), at(column_sums, last),
                  biases[last], std::nullopt, std::nullopt, std::nullopt, 0, -1, 0,
                  View(parameters, n, 2 * width));
    take(changing, before);
    const auto steps = [&](float* data, int64_t stride) {
      return View(data, kFloat32, {n, 1, width}, {stride, stride, 1});
    };
    affine_coupling(steps(before, width), lengths_of(n), steps(parameters, 2 * width),
                    steps(parameters + width, 2 * width), inverse, steps(after, width),
                    View(row_logdet, kFloat32, {n}, {1}),
                    View(row_logdet + count, kFloat32, {n, 1}, {1, 1}));
    put(after, changing);
    // Of a pair of rows it counts for the first.
    const int64_t apart = count / n;
    for (int64_t i = 0; i < n; ++i) total[i * apart] += row_logdet[i];
  };

  size_t coupling = inverse ? couplings : 0;
  size_t next = inverse ? numbers : 0;
  for (size_t i = 0; i < kinds.size(); ++i) {
    const int64_t kind = kinds[inverse ? kinds.size() - 1 - i : i];
    if (is_coupling(kind)) {
      couple(kind, inverse ? --coupling : coupling++);
      continue;
    }
    const size_t size = kind == kActNorm ? 2 : 3;
    const size_t here = inverse ? next -= size : (next += size) - size;
    if (kind == kActNorm) {
      actnorm(all, whole_length, linear[here], linear[here + 1], inverse, all);
    } else {
      flow_linear("flow_linear", all, whole_length, linear[here], linear[here + 1],
                  linear[here + 2], kind - kContiguous, inverse, all);
    }
  }
}

}  // namespace pynar
