#pragma once

#include "base/tensor_fwd.h"

namespace dsv3::ops {

/// grad += dyᵀ · x. dy [T, N] and x [T, K] of one dtype (contiguous or transposed), grad [N, K] of
/// that dtype or FP32. On CUDA an FP32 bucket is accumulated by the product itself; an undefined
/// grad is left alone.
void add_weight_grad(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& grad);

/// grad[e] += dy_eᵀ · x_e over the rows of each expert (see grouped_linear). dy [T', N], x [T', K],
/// grad [E, N, K].
void add_grouped_weight_grad(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& offsets,
                             const at::Tensor& grad);

}  // namespace dsv3::ops
