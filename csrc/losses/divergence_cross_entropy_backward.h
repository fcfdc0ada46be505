// The gradients of divergence_cross_entropy.h by the logits, for gradients a_h of the cross-entropy
// of head h and k_i of the divergence of pair i in a row. With w_hg = k_i / 2 for a pair of h and
// g, in either order, and 0 where there is none:
//
//   grad_h[v] = p^h_v (a_h + sum_g w_hg (1 + log p^h_v - log p^g_v - KL(h||g)))
//               - sum_g w_hg p^g_v - a_h (s / V + (1 - s) [v = y])
//
// A factor of zero takes its term out of the row, whatever it would be. An infinite divergence with
// another factor makes the row NaN in both heads; a head whose factors are all zero gets zeros.
#pragma once

#include "losses/divergence_cross_entropy.h"

namespace pynar {

// What does not depend on the type of the logits.
template <typename A>
struct DivergenceFactors {
  const A* cross_entropy;    // [C, N]            a
  const A* divergence;       // [P, N]            k
  const A* statistics;       // [2 C + 2 P, N]    of the forward pass, contiguous
  int64_t rows, vocabulary;  // N, V
  int64_t heads, pairs;      // C, P
  int64_t pair[kMaxPairs][2];
  int64_t cross_entropy_stride_h, cross_entropy_stride_n;
  int64_t divergence_stride_p, divergence_stride_n;
  double label_smoothing;
};

template <typename T>
struct DivergenceBackwardParams : DivergenceFactors<accumulation_t<T>> {
  const T* logits[kMaxHeads];        // [N, V] each
  int64_t logits_stride[kMaxHeads];  // of rows; the vocabulary is contiguous
  T* grads[kMaxHeads];               // [N, V] each       written
  int64_t grads_stride[kMaxHeads];   // of rows
  const int64_t* targets;            // [N]
  int64_t targets_stride;
  int64_t aligned;  // 1 if every row of logits and grads begins at a multiple of 16 bytes
};

enum class GradientKind : int { kZero, kRegular, kUndefined };

// What the gradients of a row have in common, for kHeads heads. Math is as in DivergenceSums.
template <typename Math, int kHeads>
struct DivergenceGradient {
  using A = typename Math::Number;

  A max[kHeads];
  A log_sum[kHeads];
  A scale[kHeads];           // a_h + sum_g w_hg (1 - KL(h||g))
  A smooth[kHeads];          // a_h s / V
  A hit[kHeads];             // a_h (1 - s), of the target alone
  A weight[kHeads][kHeads];  // w_hg, 0 for an infinite divergence: `kind` says what follows of it
  GradientKind kind[kHeads];

  // Of heads from `first` on; where that is not 0, or kHeads not all of them, there are no pairs.
  PYNAR_HOST_DEVICE void load(const DivergenceFactors<A>& p, int64_t first, int64_t row) {
    const A smoothing = static_cast<A>(p.label_smoothing);
    for (int h = 0; h < kHeads; ++h) {
      kind[h] = GradientKind::kZero;
      max[h] = log_sum[h] = scale[h] = smooth[h] = hit[h] = 0;
      for (int g = 0; g < kHeads; ++g) weight[h][g] = 0;
      if (first + h >= p.heads) continue;
      const A* statistics = p.statistics + (first + h) * p.rows + row;
      max[h] = statistics[0];
      log_sum[h] = statistics[p.heads * p.rows];
      const A a =
          p.cross_entropy[(first + h) * p.cross_entropy_stride_h + row * p.cross_entropy_stride_n];
      if (a == 0) continue;
      scale[h] = a;
      smooth[h] = a * smoothing / static_cast<A>(p.vocabulary);
      hit[h] = a * (1 - smoothing);
      kind[h] = log_sum[h] == log_sum[h] ? GradientKind::kRegular : GradientKind::kUndefined;
    }
    for (int64_t i = 0; kHeads > 1 && i < p.pairs; ++i) {
      const A w = p.divergence[i * p.divergence_stride_p + row * p.divergence_stride_n] / A(2);
      if (w == 0) continue;
      const A* statistics = p.statistics + (2 * p.heads + 2 * i) * p.rows + row;
      const A mean[2] = {statistics[0], statistics[p.rows]};
      const bool finite = mean[0] - mean[0] == 0 && mean[1] - mean[1] == 0;
      for (int side = 0; side < 2; ++side) {
        const int64_t h = p.pair[i][side];
        const int64_t g = p.pair[i][1 - side];
        if (!finite) {
          kind[h] = GradientKind::kUndefined;
          continue;
        }
        weight[h][g] = w;
        scale[h] += w * (1 - mean[side]);
        if (kind[h] == GradientKind::kZero) kind[h] = GradientKind::kRegular;
      }
    }
  }

  // The gradients by the logits of one symbol.
  PYNAR_HOST_DEVICE void at(const A (&x)[kHeads], bool is_target, A (&grad)[kHeads]) const {
    A log_prob[kHeads];
    A prob[kHeads];
    A factor[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      log_prob[h] = x[h] - max[h] - log_sum[h];
      prob[h] = Math::exp(log_prob[h]);
      factor[h] = scale[h];
      grad[h] = is_target ? -smooth[h] - hit[h] : -smooth[h];
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int g = h + 1; g < kHeads; ++g) {
        const A w = weight[h][g];
        if (w == 0) continue;
        // Where both are -inf, neither is defined less the other; both have probability zero.
        const bool both = prob[h] == 0 && prob[g] == 0;
        const A difference = both ? A(0) : log_prob[h] - log_prob[g];
        factor[h] += w * difference;
        factor[g] -= w * difference;
        grad[h] -= w * prob[g];
        grad[g] -= w * prob[h];
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      grad[h] += prob[h] * factor[h];
      if (kind[h] == GradientKind::kZero) grad[h] = 0;
      if (kind[h] == GradientKind::kUndefined)
        grad[h] = static_cast<A>(float_from_bits(0x7fc00000));
    }
  }
};

#if !defined(__CUDACC_RTC__)
// One launch on the current device, a block for each row and group of heads.
template <typename T>
void divergence_cross_entropy_backward_cuda(const DivergenceBackwardParams<T>& params,
                                            void* stream);
#endif

}  // namespace pynar
