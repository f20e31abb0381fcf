#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/kernel.h"

namespace dsv3::kernels {

// Letters: T tokens, E experts, K choices per token, D hidden, B sequences of S tokens.
inline constexpr int32_t kMaxExperts = 512;
inline constexpr int32_t kMaxChoices = 16;
inline constexpr int32_t kMaxGroups = 64;
inline constexpr int32_t kMaxSplitTerms = 3;

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

/// From logits to the choice in one pass (report §2.1.2, eq. 12–20):
///   s = sigmoid or softmax of the logits, FP32;
///   experts = the K largest of s + bias, in the topk_group best groups only (the others count as
///     -inf); equal values go to the lower expert, equal groups to the lower group; NaN counts as
///     -inf;
///   weights = the s of the chosen, / (their sum + 1e-20) with normalize, · scale;
///   counts[e] = choices of e over all T tokens.
/// With `coefficients`, also the sequence-wise balance loss over the valid tokens of each of B
/// sequences of S = T / B tokens (n valid ones in a sequence):
///   coefficients[b, i] = f_i / n = E / (K n²) · #{valid tokens whose raw top-K (no bias, no
///     groups) holds i}; 0 where n = 0;
///   loss = Σ_b Σ_i coefficients[b, i] · Σ_valid s_i / (Σ_j s_j + 1e-20).
/// Integer counts and sums in a fixed order: the same bits on every run. Reads T·E words, writes
/// T·(E + 2K).
struct RouteForward {
  int64_t num_tokens;         // T
  int64_t num_sequences = 1;  // B ≥ 1, a divisor of T; 1 without a loss
  RouterShape shape;
  const float* logits;            // [T, E]
  const float* bias;              // [E], may be null: added for selection only
  int32_t* experts;               // [T, K] by descending biased score
  float* weights;                 // [T, K]
  float* scores;                  // [T, E] s, kept for backward
  int32_t* counts = nullptr;      // [E], may be null
  const bool* valid = nullptr;    // [T], may be null (= all): tokens that the loss counts
  float* coefficients = nullptr;  // [B, E], may be null (= no loss), kept for backward
  float* loss = nullptr;          // [1]; with coefficients
  void* workspace = nullptr;      // route_workspace() bytes, 16-byte aligned
};
int64_t route_workspace(int64_t num_tokens, int64_t num_sequences, int32_t num_experts);

/// dlogits from the gradients of weights and loss, in one pass; selection and coefficients c are
/// constants. The loss gives ds[t, i] = dloss · (c_i - Σ_j c_j s_j / Σ_j s_j) / Σ_j s_j for valid
/// tokens. Reads and writes T·E words.
struct RouteBackward {
  int64_t num_tokens;         // T
  int64_t num_sequences = 1;  // B
  RouterShape shape;
  const int32_t* experts;               // [T, K]
  const float* scores;                  // [T, E]
  const float* dweights;                // [T, K], may be null (= 0)
  const bool* valid = nullptr;          // [T], may be null (= all)
  const float* coefficients = nullptr;  // [B, E], may be null (= no loss)
  const float* dloss = nullptr;         // [1] on the kernel's device; with coefficients
  float* dlogits;                       // [T, E]
};

/// What a BF16 product can read of an FP32 matrix: term j of x is the BF16 nearest to what the
/// terms before it left over. Three terms hold FP32's 24 bits, two hold 16: the error is at most
/// 2^-25 or 2^-17 of the element. y[r · row_stride + i · term_stride + c] = term terms[i] of
/// x[r, c]. Reads 4 bytes an element, writes 2 · num_terms.
struct SplitBf16 {
  int64_t num_rows;               // R
  int64_t num_columns;            // C
  int32_t num_terms;              // 1 … kMaxSplitTerms
  int32_t terms[kMaxSplitTerms];  // 0, 1 or 2: which term the i-th block of y holds
  const float* x;                 // [R, C]
  void* y;                        // BF16
  int64_t row_stride;             // elements: C for blocks under each other, num_terms · C beside
  int64_t term_stride;            // R · C or C
};
/// Throws std::invalid_argument naming the number that is out of range.
void check_split_bf16(const SplitBf16& p);

/// Sorts the T·K choices by expert, stably, by counting; each expert's rows begin at a multiple of
/// row_multiple. No atomics decide an order; nothing meets the host.
struct MakePermutation {
  int64_t num_tokens;             // T
  int32_t num_experts_per_token;  // K
  int32_t num_experts;            // E ≤ kMaxExperts
  int32_t row_multiple = 1;       // M ≥ 1; 1 = no padding
  const int32_t* experts;         // [T, K] in [0, E)
  int32_t* counts;                // [E] without padding
  int32_t* offsets;               // [E] inclusive ends, padding of the expert included
  int32_t* row_of;                // [T, K]
  int32_t* choice_of;  // [Rows = permutation_rows(T·K, E, M)] t·K + k of each row, -1 for padding
  int32_t* workspace;  // permutation_workspace() ints
};
int64_t permutation_workspace(int64_t num_choices, int32_t num_experts);

/// Rows that are enough for every distribution of the choices: a static bound, T·K without padding.
/// A multiple of row_multiple with it.
int64_t permutation_rows(int64_t num_choices, int32_t num_experts, int32_t row_multiple);

/// y[row_of[t, k]] = x[t] for every choice; padding rows become 0. Reads T rows, writes Rows.
/// kF8E4M3 rows bring their scales (kernels/quantize.h: Fp8Rows) and, with `weights`, carry
/// weights[t, k] in them: so combine's gradient travels in FP8 too.
struct PermuteForward {
  int64_t num_tokens;                  // T
  int32_t num_experts_per_token;       // K
  int64_t hidden;                      // D
  int64_t num_rows = 0;                // Rows; 0 = T·K, no padding
  DType dtype;                         // of x and y: kF32, kBF16 or kF8E4M3
  const void* x;                       // [T, D]
  const int32_t* row_of;               // [T, K]
  const int32_t* choice_of = nullptr;  // [Rows], read only when Rows > T·K or with scales
  void* y;                             // [Rows, D]
  int32_t num_scales = 0;              // G per row; 0 = no scales
  const float* x_scales = nullptr;     // of token t: x_scales[g · x_scale_stride + t]
  int64_t x_scale_stride = 0;          // ≥ T
  const float* weights = nullptr;      // [T, K], may be null (= 1)
  float* y_scales = nullptr;           // of row r: y_scales[g · y_scale_stride + r]; padding 0
  int64_t y_scale_stride = 0;          // ≥ Rows
};

/// y[t] = base[t] + Σ_k weights[t, k] · rows[row_of[t, k]], FP32 sums in the order of k, rounded
/// once. Reads T·K rows (+ base), writes T; padding rows are not read.
struct CombineForward {
  int64_t num_tokens;             // T
  int32_t num_experts_per_token;  // K
  int64_t hidden;                 // D
  DType dtype;                    // of rows, base, y: kF32 or kBF16
  const void* rows;               // [Rows, D]
  const float* weights;           // [T, K], may be null (= 1): then this is permute's backward
  const int32_t* row_of;          // [T, K]
  const void* base;               // [T, D], may be null (= 0)
  void* y;                        // [T, D]
};

/// drows[row_of[t, k]] = weights[t, k] · dy[t], padding rows 0; dweights[t, k] = rows[row_of[t, k]]
/// · dy[t] (FP32).
struct CombineBackward {
  int64_t num_tokens;
  int32_t num_experts_per_token;
  int64_t hidden;
  int64_t num_rows = 0;                // Rows; 0 = T·K, no padding
  DType dtype;                         // of dy, rows, drows: kF32 or kBF16
  const void* dy;                      // [T, D]
  const void* rows;                    // [Rows, D]; read only when dweights is given
  const float* weights;                // [T, K]
  const int32_t* row_of;               // [T, K]
  const int32_t* choice_of = nullptr;  // [Rows], read only when Rows > T·K
  void* drows;                         // [Rows, D], may be null
  float* dweights;                     // [T, K], may be null
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
DSV3_DECLARE_KERNEL(split_bf16, SplitBf16)
DSV3_DECLARE_KERNEL(make_permutation, MakePermutation)
DSV3_DECLARE_KERNEL(permute_forward, PermuteForward)
DSV3_DECLARE_KERNEL(combine_forward, CombineForward)
DSV3_DECLARE_KERNEL(combine_backward, CombineBackward)
DSV3_DECLARE_KERNEL(add_load, AddLoad)
DSV3_DECLARE_KERNEL(load_statistics, LoadStatistics)

}  // namespace dsv3::kernels
