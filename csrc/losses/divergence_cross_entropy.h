// Cross-entropies of up to four heads for the same targets, and symmetric Kullback-Leibler
// divergences of pairs of them. For row n, target y = targets[n], smoothing s and the softmax p of
// a row of head h, q of another's:
//
//   cross_entropy[h,n] = -(1 - s) log p_y - s/V sum_v log p_v
//   KL(p||q)           = sum_v p_v (log p_v - log q_v)
//   divergence[i,n]    = (KL(p||q) + KL(q||p)) / 2                     for pair i = (p, q)
//
// With d_v = x_v - max x and log_sum = log sum_v exp(d_v) of each head, log p_v = d_v - log_sum, so
//
//   KL(p||q) = sum_v p_v (d^p_v - d^q_v) - (log_sum_p - log_sum_q)
//
// comes, like all the rest, from sums over v that one pass makes: when a greater maximum turns up
// they are changed to it. A symbol with logit -inf in p adds nothing to KL(p||q); one with -inf in
// q alone makes it inf. A row with a NaN or +inf, or with -inf alone, has NaN in its place.
#pragma once

#include "common/scalar.h"

namespace pynar {

constexpr int kMaxHeads = 4;
constexpr int kMaxPairs = 6;

// What does not depend on the type of the logits.
template <typename A>
struct DivergenceResults {
  A* cross_entropy;          // [C, N]          written, contiguous
  A* divergence;             // [P, N]          written, contiguous
  A* statistics;             // [2 C + 2 P, N]  written, contiguous: max, log_sum, and KL(p||q),
                             // KL(q||p) of each pair in turn
  int64_t rows, vocabulary;  // N, V
  int64_t heads, pairs;      // C, P
  int64_t pair[kMaxPairs][2];
  double label_smoothing;
};

template <typename T>
struct DivergenceParams : DivergenceResults<accumulation_t<T>> {
  const T* logits[kMaxHeads];        // [N, V] each
  int64_t logits_stride[kMaxHeads];  // of rows; the vocabulary is contiguous
  const int64_t* targets;            // [N]
  int64_t targets_stride;
  int64_t aligned;  // 1 if every row of logits begins at a multiple of 16 bytes

  // The logit of a row's target, NaN where that is not in the vocabulary.
  PYNAR_HOST_DEVICE accumulation_t<T> target_logit(int64_t head, int64_t row) const {
    const int64_t target = targets[row * targets_stride];
    if (target < 0 || target >= this->vocabulary) return float_from_bits(0x7fc00000);
    return to_accumulation(logits[head][row * logits_stride[head] + target]);
  }
};

// The sums over a row's symbols. Math brings the type of numbers, exp and log, and is a type of the
// file that uses it, so that no instruction set gets another one's functions.
template <typename Math, int kHeads>
struct DivergenceSums {
  using A = typename Math::Number;

  A max[kHeads];
  A sum[kHeads];             // of exp(d)
  A total[kHeads];           // of the logits
  A moment[kHeads][kHeads];  // [p][q]: of exp(d^p) (d^p - d^q)
  uint32_t infinite = 0;     // bit 4 p + q: KL(p||q) is inf

  PYNAR_HOST_DEVICE DivergenceSums() {
    for (int h = 0; h < kHeads; ++h) {
      max[h] = lowest();
      sum[h] = total[h] = 0;
      for (int g = 0; g < kHeads; ++g) moment[h][g] = 0;
    }
  }

  PYNAR_HOST_DEVICE static A lowest() { return static_cast<A>(float_from_bits(0xff800000)); }

  // What is subtracted from logits; while there were none but -inf, any number would do.
  PYNAR_HOST_DEVICE A shift(int h) const { return max[h] == lowest() ? A(0) : max[h]; }

  PYNAR_HOST_DEVICE void raise_max(int h, A to) {
    if (max[h] == lowest()) {
      max[h] = to;
      return;
    }
    const A delta = to - max[h];
    const A factor = Math::exp(-delta);
    for (int g = 0; g < kHeads; ++g) {
      if (g == h) continue;
      moment[h][g] = (moment[h][g] - delta * sum[h]) * factor;
      moment[g][h] += delta * sum[g];
    }
    sum[h] *= factor;
    max[h] = to;
  }

  PYNAR_HOST_DEVICE void set_infinite(int p, int q) { infinite |= 1u << (4 * p + q); }
  PYNAR_HOST_DEVICE bool is_infinite(int p, int q) const { return infinite >> (4 * p + q) & 1; }

  // Adds the logits of one symbol, none of them above its head's maximum.
  PYNAR_HOST_DEVICE void add(const A (&x)[kHeads]) {
    A d[kHeads];
    A e[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      d[h] = x[h] - shift(h);
      e[h] = Math::exp(d[h]);
      sum[h] += e[h];
      total[h] += x[h];
    }
    add_moments(d, e);
  }

  // The moments alone. Both at -inf, and NaN: nothing is added.
  PYNAR_HOST_DEVICE void add_moments(const A (&d)[kHeads], const A (&e)[kHeads]) {
    for (int p = 0; p < kHeads; ++p) {
      for (int q = p + 1; q < kHeads; ++q) {
        const A difference = d[p] - d[q];
        if (difference - difference == 0) {
          moment[p][q] += e[p] * difference;
          moment[q][p] -= e[q] * difference;
        } else if (difference == -lowest()) {
          set_infinite(p, q);
        } else if (difference == lowest()) {
          set_infinite(q, p);
        }
      }
    }
  }

  // Writes the results of a row, for kHeads heads from head `first` on; pairs are of all heads.
  template <typename Result>
  PYNAR_HOST_DEVICE void finish(const DivergenceResults<Result>& p, int64_t first, int64_t row,
                                const Result (&target_logit)[kHeads]) const {
    const A nan = lowest() - lowest();
    const A smoothing = static_cast<A>(p.label_smoothing);
    A log_sum[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      log_sum[h] = max[h] == lowest() ? nan : Math::log(sum[h]);
      const A log_prob = target_logit[h] - max[h] - log_sum[h];
      A loss = -(1 - smoothing) * log_prob;
      if (smoothing != 0) {
        loss -= smoothing * (total[h] / static_cast<A>(p.vocabulary) - max[h] - log_sum[h]);
      }
      p.cross_entropy[(first + h) * p.rows + row] = static_cast<Result>(loss);
      auto* statistics = p.statistics + (first + h) * p.rows + row;
      statistics[0] = static_cast<Result>(max[h]);
      statistics[p.heads * p.rows] = static_cast<Result>(log_sum[h]);
    }
    if constexpr (kHeads > 1) {
      for (int64_t i = 0; i < p.pairs; ++i) {
        A directed[2] = {nan, nan};
        // Loops with bounds known to the compiler: an index known to it alone is a register.
        for (int a = 0; a < kHeads; ++a) {
          for (int b = 0; b < kHeads; ++b) {
            if (a == b) continue;
            const A offset = log_sum[a] - log_sum[b];
            const A mean = is_infinite(a, b) ? -lowest() : moment[a][b] / sum[a];
            if (p.pair[i][0] == a && p.pair[i][1] == b) directed[0] = mean - offset;
            if (p.pair[i][0] == b && p.pair[i][1] == a) directed[1] = mean - offset;
          }
        }
        p.divergence[i * p.rows + row] = static_cast<Result>((directed[0] + directed[1]) / 2);
        auto* statistics = p.statistics + (2 * p.heads + 2 * i) * p.rows + row;
        statistics[0] = static_cast<Result>(directed[0]);
        statistics[p.rows] = static_cast<Result>(directed[1]);
      }
    }
  }
};

// How many heads a row is taken with at a time: heads without pairs have nothing in common.
PYNAR_HOST_DEVICE constexpr int64_t divergence_group(int64_t heads, int64_t pairs) {
  return pairs > 0 ? heads : 1;
}

constexpr int kDivergenceThreads = 256;

#if !defined(__CUDACC_RTC__)
// One launch on the current device, a block for each row and group of heads.
template <typename T>
void divergence_cross_entropy_cuda(const DivergenceParams<T>& params, void* stream);
#endif

}  // namespace pynar
