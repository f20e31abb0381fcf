#pragma once

#include "ops/weight.h"

namespace dsv3::ops {

/// How tokens choose experts (technical report §2.1.2; NUMERICS traps 1–7).
struct RouterOptions {
  int64_t num_experts = 0;            // E
  int64_t num_experts_per_token = 0;  // K
  int64_t n_group = 1;
  int64_t topk_group = 1;
  bool sigmoid = true;           // else softmax
  bool group_score_top2 = true;  // else the group's maximum
  bool normalize = true;         // weights / (their sum + 1e-20)
  double scale = 1.0;            // routed_scaling_factor
};

/// The sequence-wise balance loss (report eq. 17–20), summed over the sequences of this
/// micro-batch:
///   Σ_seq Σ_i f_i P_i,  f_i = E / (K n) · #{valid tokens whose raw top-K (no bias, no groups)
///   holds i}, P_i = 1/n Σ_valid s_i / Σ_j s_j,  n = valid tokens of the sequence; f is a constant
///   for the gradient. α and 1/sequences of the global batch are the caller's.
struct SequenceBalance {
  int64_t num_sequences = 0;  // a divisor of T; 0 = no loss
  at::Tensor valid;           // [T] bool, undefined = all
};

struct Routing {
  at::Tensor experts;  // [T, K] int32, descending biased score; ties to the lower expert id
  at::Tensor weights;  // [T, K] FP32, from the UNBIASED affinities, normalised and scaled
  at::Tensor scores;   // [T, E] FP32 affinities s (sigmoid or softmax of the logits); no gradient
  at::Tensor counts;   // [E] int32, choices per expert over all T tokens
  at::Tensor balance_loss;  // scalar FP32; undefined without num_sequences
};

/// logits [T, E] FP32 (FP64 in tests); bias [E] FP32 or undefined: added for selection only;
/// unchosen groups are masked with -inf. One kernel forward, one backward. Gradient: through
/// weights and balance_loss into logits.
Routing route(const at::Tensor& logits, const at::Tensor& bias, const RouterOptions& options,
              const SequenceBalance& balance = {});

namespace reference {
/// Slow, obvious, differentiable (scores too), float64-capable.
Routing route(const at::Tensor& logits, const at::Tensor& bias, const RouterOptions& options,
              const SequenceBalance& balance = {});
}  // namespace reference

}  // namespace dsv3::ops
