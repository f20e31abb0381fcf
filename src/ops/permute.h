#pragma once

#include <ATen/core/Tensor.h>

namespace dsv3::ops {

/// Where each (token, choice) goes when tokens are laid out expert by expert. All on the device.
struct Permutation {
  at::Tensor counts;     // [E] int32: choices per expert
  at::Tensor offsets;    // [E] int32: inclusive ends of the experts' rows in expert order
  at::Tensor row_of;     // [T, K] int32: the row of choice k of token t
  at::Tensor choice_of;  // [T·K] int32: t·K + k of each row, the inverse of row_of
};

/// Stable and deterministic: rows of one expert keep token order. experts [T, K] int32 in [0, E).
Permutation make_permutation(const at::Tensor& experts, int64_t num_experts);

/// x [T, D] → [T·K, D] in expert order. Backward: dx[t] = Σ_k dy[row_of[t, k]], in the order of k.
at::Tensor permute(const at::Tensor& x, const Permutation& permutation);

/// y[t] = base[t] + Σ_k weights[t, k] · rows[row_of[t, k]], in FP32, rounded once. rows [T·K, D] in
/// expert order, weights [T, K] FP32, base [T, D] or undefined (shared experts' output joins here).
/// Gradient to rows, weights (dot products of rows) and base.
at::Tensor combine(const at::Tensor& rows, const at::Tensor& weights,
                   const Permutation& permutation, const at::Tensor& base);

namespace reference {
Permutation make_permutation(const at::Tensor& experts, int64_t num_experts);
at::Tensor permute(const at::Tensor& x, const Permutation& permutation);
at::Tensor combine(const at::Tensor& rows, const at::Tensor& weights,
                   const Permutation& permutation, const at::Tensor& base);
}  // namespace reference

}  // namespace dsv3::ops
