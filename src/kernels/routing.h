#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/kernel.h"

namespace dsv3::kernels {

// Letters: T tokens, E experts, K choices per token, D hidden, B sequences of S tokens.
inline constexpr int32_t kMaxExperts = 512;
inline constexpr int32_t kMaxChoices = 16;
inline constexpr int32_t kMaxGroups = 64;

/// How tokens choose experts (technical report §2.1.2); ops/router.h names the same fields.
struct RouterShape {
  int32_t num_experts;            // E, 1 … kMaxExperts
  int32_t num_experts_per_token;  // K, 1 … kMaxChoices, ≤ topk_group · E / n_group
  int32_t n_group;                // divides E, ≤ kMaxGroups
  int32_t topk_group;             // 1 … n_group
  bool sigmoid;                   // else softmax
  bool group_score_top2;          // a group's score is the sum of its two best (else its best)
  bool normalize;                 // weights / (their sum + 1e-20)
  float scale;                    // times the weights
};

/// Throws std::invalid_argument naming the number that is out of range.
void check_router_shape(const RouterShape& shape);

/// Scores, biased group-limited selection (ties to the lower id, NaN as -inf) and unbiased weights
/// in one pass. Reads T·E, writes T·(E + 2K) words: memory bound.
struct RouteForward {
  int64_t num_tokens;  // T
  RouterShape shape;
  const float* logits;  // [T, E]
  const float* bias;    // [E], may be null: added for selection only
  int32_t* experts;     // [T, K] by descending biased score
  float* weights;       // [T, K]
  float* scores;        // [T, E] sigmoid or softmax of the logits
};

/// dlogits from the gradients of weights and scores; the selection is a constant.
struct RouteBackward {
  int64_t num_tokens;  // T
  RouterShape shape;
  const int32_t* experts;  // [T, K]
  const float* scores;     // [T, E]
  const float* dweights;   // [T, K], may be null (= 0)
  const float* dscores;    // [T, E], may be null (= 0)
  float* dlogits;          // [T, E]
};

/// The sequence-wise balance loss (report eq. 17–20): loss = Σ_b Σ_i coefficients[b, i] · Σ_valid
/// s_i / Σ_j s_j with coefficients[b, i] = f_i / n = E / (K n²) · #{valid tokens whose raw top-K
/// holds i}; 0 where n = 0. Integer counts and fixed-order sums: the same bits on every run.
struct SequenceBalanceForward {
  int64_t num_sequences;          // B
  int64_t sequence_length;        // S
  int32_t num_experts;            // E
  int32_t num_experts_per_token;  // K
  const float* scores;            // [B·S, E]
  const bool* valid;              // [B·S], may be null (= all)
  float* coefficients;            // [B, E], kept for backward
  float* loss;                    // [1]
  void* workspace;                // sequence_balance_workspace() bytes, 16-byte aligned
};
int64_t sequence_balance_workspace(int64_t num_sequences, int64_t sequence_length,
                                   int32_t num_experts);

/// dscores[t, i] = dloss · (c_i - Σ_j c_j s_j / Σ_j s_j) / Σ_j s_j with c = coefficients of t's
/// sequence; 0 for invalid tokens.
struct SequenceBalanceBackward {
  int64_t num_sequences;
  int64_t sequence_length;
  int32_t num_experts;
  const float* scores;        // [B·S, E]
  const bool* valid;          // [B·S], may be null
  const float* coefficients;  // [B, E]
  const float* dloss;         // [1], on the kernel's device
  float* dscores;             // [B·S, E]
};

/// Sorts the T·K choices by expert, stably, by counting. No atomics decide an order; nothing meets
/// the host.
struct MakePermutation {
  int64_t num_tokens;             // T; T·K < 2³¹ - 1024
  int32_t num_experts_per_token;  // K
  int32_t num_experts;            // E ≤ kMaxExperts
  const int32_t* experts;         // [T, K] in [0, E)
  int32_t* counts;                // [E]
  int32_t* offsets;               // [E] inclusive ends
  int32_t* row_of;                // [T, K]
  int32_t* choice_of;             // [T·K]
  int32_t* workspace;             // permutation_workspace() ints
};
int64_t permutation_workspace(int64_t num_choices, int32_t num_experts);

/// y[row_of[t, k]] = x[t] for every choice: reads T rows, writes T·K.
struct PermuteForward {
  int64_t num_tokens;             // T
  int32_t num_experts_per_token;  // K
  int64_t hidden;                 // D
  DType dtype;                    // of x and y: kF32 or kBF16
  const void* x;                  // [T, D]
  const int32_t* row_of;          // [T, K]
  void* y;                        // [T·K, D]
};

/// y[t] = base[t] + Σ_k weights[t, k] · rows[row_of[t, k]], FP32 sums in the order of k, rounded
/// once.
struct CombineForward {
  int64_t num_tokens;             // T
  int32_t num_experts_per_token;  // K
  int64_t hidden;                 // D
  DType dtype;                    // of rows, base, y: kF32 or kBF16
  const void* rows;               // [T·K, D]
  const float* weights;           // [T, K], may be null (= 1): then this is permute's backward
  const int32_t* row_of;          // [T, K]
  const void* base;               // [T, D], may be null (= 0)
  void* y;                        // [T, D]
};

/// drows[row_of[t, k]] = weights[t, k] · dy[t]; dweights[t, k] = rows[row_of[t, k]] · dy[t] (FP32).
struct CombineBackward {
  int64_t num_tokens;
  int32_t num_experts_per_token;
  int64_t hidden;
  DType dtype;            // of dy, rows, drows: kF32 or kBF16
  const void* dy;         // [T, D]
  const void* rows;       // [T·K, D]; read only when dweights is given
  const float* weights;   // [T, K]
  const int32_t* row_of;  // [T, K]
  void* drows;            // [T·K, D], may be null
  float* dweights;        // [T, K], may be null
};

/// One micro-batch's counts enter the step's: loads += counts, violations[l] += max / mean - 1 of
/// counts[l] (0 for a layer without tokens). A few bytes per expert: launch bound, so both in one
/// pass.
struct AddLoad {
  int32_t num_layers;     // L
  int32_t num_experts;    // E
  const int32_t* counts;  // [L, E]
  int64_t* loads;         // [L, E]
  double* violations;     // [L]
};

/// What a step's routing was like, layer by layer, in FP64. Row l of `statistics`, for the loads
/// n_i of layer l over the global batch, with mean n̄ and shares p_i = n_i / Σ n; all 0 without
/// tokens:
///   kMaxViolation       max n / n̄ - 1 (arXiv:2408.15664 §3)
///   kMicroViolation     violations[l] / num_micro_batches
///   kLoadImbalance      √(Σ (n_i - n̄)² / E) / n̄
///   kEntropy            -Σ p ln p / ln E; 1 for E = 1
///   kUtilization        share of experts with n_i > 0
///   kBiasSpread         max bias - min bias; 0 without a bias
enum LoadStatistic : int32_t {
  kMaxViolation,
  kMicroViolation,
  kLoadImbalance,
  kEntropy,
  kUtilization,
  kBiasSpread,
  kNumLoadStatistics
};
inline constexpr int32_t kLoadStatisticsLayers = 64;  // of one call
struct LoadStatistics {
  int32_t num_layers;   // L ≤ kLoadStatisticsLayers
  int32_t num_experts;  // E
  int32_t num_micro_batches;
  const int64_t* loads;                        // [L, E]
  const double* violations;                    // [L], as AddLoad left it
  const float* biases[kLoadStatisticsLayers];  // [E] each, or null
  double* statistics;                          // [L, kNumLoadStatistics]
};

DSV3_DECLARE_KERNEL(route_forward, RouteForward)
DSV3_DECLARE_KERNEL(route_backward, RouteBackward)
DSV3_DECLARE_KERNEL(sequence_balance_forward, SequenceBalanceForward)
DSV3_DECLARE_KERNEL(sequence_balance_backward, SequenceBalanceBackward)
DSV3_DECLARE_KERNEL(make_permutation, MakePermutation)
DSV3_DECLARE_KERNEL(permute_forward, PermuteForward)
DSV3_DECLARE_KERNEL(combine_forward, CombineForward)
DSV3_DECLARE_KERNEL(combine_backward, CombineBackward)
DSV3_DECLARE_KERNEL(add_load, AddLoad)
DSV3_DECLARE_KERNEL(load_statistics, LoadStatistics)

}  // namespace dsv3::kernels
