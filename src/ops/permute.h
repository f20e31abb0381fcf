#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace dsv3::ops {

/// Where each (token, choice) goes when tokens are laid out expert by expert. All on the device.
/// Rows = T·K without padding, else a bound that depends on shapes only.
struct Permutation {
  at::Tensor counts;     // [E] int32: choices per expert
  at::Tensor offsets;    // [E] int32: inclusive ends of the experts' rows, their padding included
  at::Tensor row_of;     // [T, K] int32: the row of choice k of token t
  at::Tensor choice_of;  // [Rows] int32: t·K + k of each row, -1 for padding
};

/// Stable and deterministic: rows of one expert keep token order. experts [T, K] int32 in [0, E).
/// Each expert's rows begin at a multiple of row_multiple (1 = no padding).
Permutation make_permutation(const at::Tensor& experts, int64_t num_experts,
                             int64_t row_multiple = 1);

/// x [T, D] → [Rows, D] in expert order, padding rows 0. Backward: dx[t] = Σ_k dy[row_of[t, k]], in
/// the order of k.
at::Tensor permute(const at::Tensor& x, const Permutation& permutation);

/// The same for FP8 rows with one FP32 scale per 1×128 tile: data [T, D] Float8_e4m3fn contiguous,
/// scales [T, G] with tokens next to each other (strides 1 and ≥ T). Returns data [Rows, D] and
/// scales [Rows, G] with strides 1 and Rows rounded up to 4. With weights [T, K] (undefined = 1) a
/// choice's scales are multiplied by its weight: combine's gradient for the rows, from an FP8 dy.
/// Records no gradient.
std::pair<at::Tensor, at::Tensor> permute_fp8(const at::Tensor& data, const at::Tensor& scales,
                                              const Permutation& permutation,
                                              const at::Tensor& weights = {});

/// y[t] = base[t] + Σ_k weights[t, k] · rows[row_of[t, k]], in FP32, rounded once. rows [Rows, D]
/// in expert order, weights [T, K] FP32, base [T, D] or undefined (shared experts' output joins
/// here). Gradient to rows (padding 0), weights (dot products of rows) and base.
at::Tensor combine(const at::Tensor& rows, const at::Tensor& weights,
                   const Permutation& permutation, const at::Tensor& base);

namespace reference {
Permutation make_permutation(const at::Tensor& experts, int64_t num_experts,
                             int64_t row_multiple = 1);
at::Tensor permute(const at::Tensor& x, const Permutation& permutation);
at::Tensor combine(const at::Tensor& rows, const at::Tensor& weights,
                   const Permutation& permutation, const at::Tensor& base);
}  // namespace reference

}  // namespace dsv3::ops
