// The inner loops of interval attention on the CPU, forward and backward. For files that are
// compiled once per instruction set.
//
// Every sum runs over its terms in order, one multiply-add after the other, so that its value does
// not depend on what is computed beside it.
//
// Loops over sums are unrolled by pragmas: left to itself GCC 12 does so too late, and keeps the
// sums in memory before and after the loop over their terms.
#pragma once

#include "attention/interval_tiles.h"
#include "common/simd.h"

namespace pynar::PYNAR_ISA {

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls body(Constant<count>()) for the first of ascending counts that is not below n, or the last.
template <int kFirst, int... kMore, typename Body>
inline void with_at_least(int64_t n, const Body& body) {
  if constexpr (sizeof...(kMore) > 0) {
    if (n > kFirst) return with_at_least<kMore...>(n, body);
  }
  body(Constant<kFirst>());
}

// Calls body(Constant<padded_rows(rows)>()).
template <typename Body>
inline void with_rows(int64_t rows, const Body& body) {
  with_at_least<1, 2, 4, kBlockRows>(rows, body);
}

// Calls body(Constant<n>()) for n in [1, kMost].
template <int kMost, typename Body>
inline void with_constant(int64_t n, const Body& body) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_constant<kMost - 1>(n, body);
  }
  body(Constant<kMost>());
}

template <typename A>
constexpr int kGroupVectors = kKeyGroup / Simd<A>::kLanes;

// Accumulators must fit into the registers: 32 with AVX-512, 16 with AVX2, 16 pairs with NEON.
template <typename A>
constexpr int kMaxGroups = Simd<A>::kLanes == 16 ? 4 : 1;
template <typename A>
constexpr int kMaxVectors = Simd<A>::kLanes == 16 ? 4 : 2;

// Calls body(first, Constant<vectors>()) for the parts of `width` channels that fit into registers.
template <typename A, typename Body>
inline void for_each_part(int64_t width, const Body& body) {
  constexpr int kLanes = Simd<A>::kLanes;
  for (int64_t c = 0; c < width;) {
    const int64_t vectors = (width - c) / kLanes;
    const int64_t take = vectors < kMaxVectors<A> ? vectors : kMaxVectors<A>;
    with_constant<kMaxVectors<A>>(take, [&](auto count) { body(c, count); });
    c += take * kLanes;
  }
}

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Factors of type O (see OperandType) that hold n numbers, and what they take.
template <typename O>
constexpr int kPer = Factor<O>::kPer;
template <typename O>
inline int64_t factors(int64_t n) {
  return (n + kPer<O> - 1) / kPer<O>;
}
template <typename O>
inline int64_t in_factors(int64_t n) {
  return factors<O>(n) * kPer<O>;
}

// The rows of a group of keys, and of the last one again where the list ends.
template <typename T>
struct GroupRows {
  const T* row[kKeyGroup];

  GroupRows(const T* x, int64_t stride, const int64_t* keys) {
    for (int i = 0; i < kKeyGroup; ++i) row[i] = x + keys[i] * stride;
  }
};

// Asks for a row ahead of its use, or of its being written. Heads lie side by side, so that the
// rows of one head are too short and too far apart for the processor to see them coming. They share
// few sets of the caches, too, so that one asked for too early is gone again.
template <typename T>
inline void prefetch_row(const T* row, int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t c = 0; c < dim; c += kLine) __builtin_prefetch(row + c);
}

// Into the second cache, for what comes later and would drive out what is in use.
template <typename T>
inline void prefetch_later(const T* row, int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t c = 0; c < dim; c += kLine) __builtin_prefetch(row + c, 0, 2);
}

template <typename T>
inline void prefetch_output(const T* row, int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t c = 0; c < dim; c += kLine) __builtin_prefetch(row + c, 1);
}

template <typename T>
inline void prefetch(const GroupRows<T>& group, int64_t dim) {
  for (int i = 0; i < kKeyGroup; ++i) prefetch_later(group.row[i], dim);
}

// Calls body(c, v, column) for each channel c and vector v of a group with the keys' values.
template <typename A, typename T, typename Body>
inline void for_each_column(const GroupRows<T>& group, int64_t dim, const Body& body) {
  using Load = Columns<A, T>;
  constexpr int kLanes = Simd<A>::kLanes;
  int64_t c = 0;
  for (; c + Load::kCount <= dim; c += Load::kCount) {
    for (int v = 0; v < kGroupVectors<A>; ++v) {
      Simd<A> column[Load::kCount];
      Load::load(group.row + v * kLanes, c, column);
      for (int i = 0; i < Load::kCount; ++i) body(c + i, v, column[i]);
    }
  }
  for (; c < dim; ++c) {
    for (int v = 0; v < kGroupVectors<A>; ++v) {
      A lane[kLanes];
      for (int i = 0; i < kLanes; ++i) lane[i] = to_accumulation(group.row[v * kLanes + i][c]);
      body(c, v, Simd<A>::load(lane));
    }
  }
}

// packed[channel][key of the group], or packed[pair of channels][key][channel of the pair]
template <typename A, typename T>
inline void pack_transposed(const GroupRows<T>& group, int64_t dim, A* packed) {
  for_each_column<A>(group, dim, [&](int64_t c, int v, Simd<A> column) {
    column.store(packed + c * kKeyGroup + v * Simd<A>::kLanes);
  });
}
#if defined(__AVX512BF16__)
inline void pack_transposed(const GroupRows<BFloat16>& group, int64_t dim, BFloat16* packed) {
  int64_t c = 0;
  for (; c + 8 <= dim; c += 8) {
    Factor<BFloat16> pairs[4];
    load_column_pairs(group.row, c, pairs);
    for (int u = 0; u < 4; ++u) pairs[u].store(packed + (c + 2 * u) * kKeyGroup);
  }
  for (; c < dim; c += 2) {
    for (int i = 0; i < kKeyGroup; ++i) {
      BFloat16* pair = packed + c * kKeyGroup + 2 * i;
      pair[0] = group.row[i][c];
      pair[1] = c + 1 < dim ? group.row[i][c + 1] : BFloat16{0};
    }
  }
}
#endif

// Channels whose sums a block's queries keep in registers.
template <typename A>
constexpr int64_t kPanel = kMaxVectors<A> * Simd<A>::kLanes;

// `dim` channels of a row, and zeros up to `width`, a multiple of the lanes.
template <typename A, typename T>
inline void pack_row(const T* row, int64_t dim, int64_t width, A* packed) {
  constexpr int kLanes = Simd<A>::kLanes;
  int64_t c = 0;
  for (; c + kLanes <= dim; c += kLanes) Simd<A>::load(row + c).store(packed + c);
  for (; c < dim; ++c) packed[c] = to_accumulation(row[c]);
  for (; c < width; ++c) packed[c] = 0;
}
inline void pack_row(const BFloat16* row, int64_t dim, int64_t width, BFloat16* packed) {
  constexpr int kCopied = 16;
  int64_t c = 0;
  for (; c + kCopied <= dim; c += kCopied) memcpy(packed + c, row + c, kCopied * sizeof(BFloat16));
  for (; c < dim; ++c) packed[c] = row[c];
  for (; c < width; ++c) packed[c] = BFloat16{0};
}

// packed[row][channel], rows filled up with zeros, and after `num_rows` more zeros up to `capacity`
// rows. Asks for the rows of the block after.
template <typename A, typename T>
inline void pack_rows(const T* x, int64_t stride, int64_t num_rows, int64_t capacity, int64_t dim,
                      A* packed, int64_t width) {
  for (int64_t i = 0; i < num_rows; ++i) {
    prefetch_row(x + (i + kBlockRows) * stride, dim);
    pack_row(x + i * stride, dim, width, packed + i * width);
  }
  for (int64_t c = num_rows * width; c < capacity * width; ++c) packed[c] = A();
}

// packed[panel][row][channel of the panel] for the rows [first, last) of `num_rows`: what a
// weighted sum reads lies together. `keys` gives the row at a position; null where that is the
// position itself.
template <typename A, typename T>
inline void pack_panels(const T* x, int64_t stride, const int64_t* keys, int64_t first,
                        int64_t last, int64_t num_rows, int64_t dim, int64_t width, A* packed) {
  for (int64_t i = first; i < last; ++i) {
    const T* row = x + (keys != nullptr ? keys[i] : i) * stride;
    int64_t c = 0;
    for (; c + kPanel<A> <= dim; c += kPanel<A>) {
      Simd<A> part[kMaxVectors<A>];
      for (int v = 0; v < kMaxVectors<A>; ++v) {
        part[v] = Simd<A>::load(row + c + v * Simd<A>::kLanes);
      }
      A* to = packed + c * num_rows + i * kPanel<A>;
      for (int v = 0; v < kMaxVectors<A>; ++v) part[v].store(to + v * Simd<A>::kLanes);
    }
    for (; c < width; c += kPanel<A>) {
      const int64_t wide = width - c < kPanel<A> ? width - c : kPanel<A>;
      const int64_t left = dim - c < wide ? dim - c : wide;
      pack_row(row + c, left, wide, packed + c * num_rows + i * wide);
    }
  }
}

#if defined(__AVX512BF16__)
// packed[panel][pair of rows][channel of the panel][row of the pair, last one first], from an even
// row on.
inline void pack_panels(const BFloat16* x, int64_t stride, const int64_t* keys, int64_t first,
                        int64_t last, int64_t num_rows, int64_t dim, int64_t width,
                        BFloat16* packed) {
  constexpr int kLanes = Simd<float>::kLanes;
  for (int64_t i = first; i < last; i += 2) {
    const BFloat16* rows[2];
    for (int k = 0; k < 2; ++k) rows[k] = x + (keys != nullptr ? keys[i + k] : i + k) * stride;
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t panel = c / kPanel<float> * kPanel<float>;
      const int64_t wide = width - panel < kPanel<float> ? width - panel : kPanel<float>;
      BFloat16* to = packed + panel * num_rows + i * wide + 2 * (c - panel);
      if (c + kLanes <= dim) {
        store_pairs(rows[0] + c, rows[1] + c, to);
        continue;
      }
      BFloat16 end[2][kLanes];
      for (int k = 0; k < 2; ++k) pack_row(rows[k] + c, dim - c, kLanes, end[k]);
      store_pairs(end[0], end[1], to);
    }
  }
}
#endif

// scores[r][j] = scale * x[r] . y[j] for kRows rows of x and kGroups groups of transposed rows y
template <int kRows, int kGroups, typename O, typename A>
inline void score_packed(const O* x, int64_t x_stride, const O* y, int64_t dim, A scale, A* scores,
                         int64_t scores_stride) {
  using Vector = Simd<A>;
  constexpr int kVectors = kGroups * kGroupVectors<A>;
  Vector sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector::broadcast(0);
  }
  const int64_t count = factors<O>(dim);
  for (int64_t c = 0; c < count; ++c) {
    Factor<O> column[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t group = v / kGroupVectors<A>;
      const int64_t lane = v % kGroupVectors<A> * Vector::kLanes;
      column[v] = Factor<O>::load(y + ((group * count + c) * kKeyGroup + lane) * kPer<O>);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Factor<O> factor = Factor<O>::broadcast(x + r * x_stride + c * kPer<O>);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(factor, column[v], sum[r][v]);
    }
  }
  const Vector by = Vector::broadcast(scale);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      mul(sum[r][v], by).store(scores + r * scores_stride + v * Vector::kLanes);
    }
  }
}

// The same for one group of rows y as they are, without a transposed copy.
template <int kRows, typename A>
inline void score_direct(const A* x, int64_t x_stride, const GroupRows<A>& y, int64_t dim, A scale,
                         A* scores, int64_t scores_stride) {
  using Vector = Simd<A>;
  Vector sum[kRows][kGroupVectors<A>];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kGroupVectors<A>; ++v) sum[r][v] = Vector::broadcast(0);
  }
  for_each_column<A>(y, dim, [&](int64_t c, int v, Vector column) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sum[r][v] = multiply_add(Vector::broadcast(x[r * x_stride + c]), column, sum[r][v]);
    }
  });
  const Vector by = Vector::broadcast(scale);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kGroupVectors<A>; ++v) {
      mul(sum[r][v], by).store(scores + r * scores_stride + v * Vector::kLanes);
    }
  }
}

// score_packed() over runs of groups; `scores` and `y` begin at group 0.
template <int kRows, int kCapacity, typename O, typename A>
inline void score_groups(const Ranges<kCapacity>& runs, const O* x, int64_t x_stride, const O* y,
                         int64_t dim, A scale, A* scores, int64_t scores_stride) {
  for (int i = 0; i < runs.count; ++i) {
    for (int64_t g = runs.range[i].begin; g < runs.range[i].end;) {
      const int64_t left = runs.range[i].end - g;
      const int64_t take = left < kMaxGroups<A> ? left : kMaxGroups<A>;
      with_constant<kMaxGroups<A>>(take, [&](auto count) {
        score_packed<kRows, decltype(count)::value>(x, x_stride,
                                                    y + g * in_factors<O>(dim) * kKeyGroup, dim,
                                                    scale, scores + g * kKeyGroup, scores_stride);
      });
      g += take;
    }
  }
}

// out[r][c] = sum_j weights[r][j] y[j][c] over the positions j of `runs`, for kRows rows and
// kVectors vectors of channels. `keys` gives the row of y at a position; null where that is the
// position itself. Factors that hold several positions are read whole, those beyond a run with
// weights of 0, unless it must be kExact: then they may hold anything.
template <int kRows, int kVectors, bool kExact = false, typename O, typename A>
inline void weighted_sum(const O* weights, int64_t weights_stride, const O* y, int64_t y_stride,
                         const int64_t* keys, const Range* first_run, const Range* last_run, A* out,
                         int64_t out_stride) {
  using Vector = Simd<A>;
  Vector sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector::broadcast(0);
  }
  for (const Range* run = first_run; run != last_run; ++run) {
    const int64_t end = factors<O>(run->end);
    for (int64_t j = run->begin / kPer<O>; j < end; ++j) {
      const O* row = y + (keys != nullptr ? keys[j] : j) * y_stride;
      Factor<O> value[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const O* p = row + v * Vector::kLanes * kPer<O>;
        value[v] =
            kExact ? Factor<O>::load_some(p, j * kPer<O> >= run->begin, j * kPer<O> + 1 < run->end)
                   : Factor<O>::load(p);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Factor<O> weight = Factor<O>::broadcast(weights + r * weights_stride + j * kPer<O>);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(weight, value[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v].store(out + r * out_stride + v * Vector::kLanes);
  }
}

// weighted_sum() over `width` channels, a multiple of the lanes, of the rows `keys` of y.
template <int kRows, typename A>
inline void weighted_sums(const A* weights, int64_t weights_stride, const A* y, int64_t y_stride,
                          const int64_t* keys, const Range* first_run, const Range* last_run,
                          int64_t width, A* out, int64_t out_stride) {
  for_each_part<A>(width, [&](int64_t c, auto vectors) {
    weighted_sum<kRows, decltype(vectors)::value>(weights, weights_stride, y + c, y_stride, keys,
                                                  first_run, last_run, out + c, out_stride);
  });
}

// The same of rows that pack_panels() has packed.
template <int kRows, bool kExact = false, typename O, typename A>
inline void weighted_panels(const O* weights, int64_t weights_stride, const O* panels,
                            int64_t num_rows, const Range* first_run, const Range* last_run,
                            int64_t width, A* out, int64_t out_stride) {
  for_each_part<A>(width, [&](int64_t c, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    const int64_t* in_order = nullptr;
    weighted_sum<kRows, kVectors, kExact>(weights, weights_stride, panels + c * num_rows,
                                          kVectors * Simd<A>::kLanes * kPer<O>, in_order, first_run,
                                          last_run, out + c, out_stride);
  });
}

// Lanes of ones, then of zeros.
template <typename A>
struct Keep {
  A lane[2 * Simd<A>::kLanes];

  constexpr Keep() : lane() {
    for (int i = 0; i < Simd<A>::kLanes; ++i) lane[i] = 1;
  }
};
template <typename A>
constexpr Keep<A> kKeep;

// Sorted ranges, those that touch as one.
template <int kCapacity>
inline Ranges<kCapacity> joined(const Ranges<kCapacity>& ranges) {
  Ranges<kCapacity> out;
  for (const Range& range : ranges) {
    if (out.count > 0 && out.range[out.count - 1].end == range.begin) {
      out.range[out.count - 1].end = range.end;
    } else {
      out.range[out.count++] = range;
    }
  }
  return out;
}

// sums[r] = the sum of x[r] over ranges, for kRows rows. Lanes are counted from where a range
// begins, so that the order of the sum is that of the ranges alone, wherever they lie. What follows
// a range in its last vector must be finite.
template <int kRows, int kCapacity, typename A>
inline void sum_ranges(const Ranges<kCapacity>& ranges, const A* x, int64_t x_stride, A* sums) {
  using Vector = Simd<A>;
  Vector sum[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum[r] = Vector::broadcast(0);
  for (const Range& range : ranges) {
    int64_t j = range.begin;
    for (; j + Vector::kLanes <= range.end; j += Vector::kLanes) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r] = add(sum[r], Vector::load(x + r * x_stride + j));
    }
    if (j == range.end) continue;
    const Vector keep = Vector::load(kKeep<A>.lane + Vector::kLanes - (range.end - j));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sum[r] = multiply_add(Vector::load(x + r * x_stride + j), keep, sum[r]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sums[r] = reduce_add(sum[r]);
}

// out[r][c] += sum_i weights[i][r] y[i][c] over the rows i of `runs`, for kRows neighbouring
// columns of the weights and kVectors vectors of channels. Where factors hold several numbers,
// these are of several rows, and strides are from one such group of rows to the next.
template <int kRows, int kVectors, typename O, typename A>
inline void add_weighted_rows(const O* weights, int64_t weights_stride, const O* y,
                              int64_t y_stride, const Range* first_run, const Range* last_run,
                              A* out, int64_t out_stride) {
  using Vector = Simd<A>;
  Vector sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = Vector::load(out + r * out_stride + v * Vector::kLanes);
    }
  }
  for (const Range* run = first_run; run != last_run; ++run) {
    const int64_t end = factors<O>(run->end);
    for (int64_t i = run->begin / kPer<O>; i < end; ++i) {
      Factor<O> value[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        value[v] = Factor<O>::load(y + i * y_stride + v * Vector::kLanes * kPer<O>);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Factor<O> weight = Factor<O>::broadcast(weights + i * weights_stride + r * kPer<O>);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(weight, value[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v].store(out + r * out_stride + v * Vector::kLanes);
  }
}

// Of `count` numbers, whole vectors.
template <typename A>
inline bool is_finite(const A* x, int64_t count) {
  Simd<A> zero = Simd<A>::broadcast(0);
  for (int64_t c = 0; c < count; c += Simd<A>::kLanes) {
    zero = multiply_add(Simd<A>::load(x + c), Simd<A>::broadcast(0), zero);
  }
  return reduce_add(zero) == 0;
}

// x * factor in the storage type, `dim` channels.
template <typename T, typename A>
inline void store_scaled(const A* x, A factor, int64_t dim, T* out) {
  const Simd<A> by = Simd<A>::broadcast(factor);
  int64_t c = 0;
  for (; c + Simd<A>::kLanes <= dim; c += Simd<A>::kLanes) {
    mul(Simd<A>::load(x + c), by).store(out + c);
  }
  for (; c < dim; ++c) out[c] = from_accumulation<T>(x[c] * factor);
}

// Calls body(j, mask) for each vector of positions of a block's groups: mask(r) tells, by negative
// lanes, what row r sees of it. Where all rows see all of it, mask is null.
template <int kRows, typename A, typename Body>
inline void for_each_vector(const RowBlock& block, const float* masks, const Body& body) {
  using Vector = Simd<A>;
  const int64_t mask_rows = block.mixed ? kRows : 1;
  for (const GroupRun* part = block.parts; part != block.parts + block.num_parts; ++part) {
    const int64_t begin = part->begin * kKeyGroup;
    const int64_t end = part->end * kKeyGroup;
    if (!part->masked()) {
      for (int64_t j = begin; j < end; j += Vector::kLanes) body(j, nullptr);
      continue;
    }
    const float* mask = masks + part->mask;
    for (int64_t j = begin; j < end; j += kKeyGroup, mask += mask_rows * kKeyGroup) {
      for (int v = 0; v < kGroupVectors<A>; ++v) {
        body(j + v * Vector::kLanes, [&](int r) {
          return Vector::load(mask + (block.mixed ? r * kKeyGroup : 0) + v * Vector::kLanes);
        });
      }
    }
  }
}

// x where a mask of for_each_vector() says so, and `other` elsewhere.
template <typename A, typename Mask>
inline Simd<A> select(const Mask& mask, int r, Simd<A> x, Simd<A> other) {
  return where(mask(r), x, other);
}
template <typename A>
inline Simd<A> select(decltype(nullptr), int, Simd<A> x, Simd<A>) {
  return x;
}

}  // namespace pynar::PYNAR_ISA
