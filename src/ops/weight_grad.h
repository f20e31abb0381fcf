#pragma once

#include <cstdint>

#include "base/tensor_fwd.h"

namespace dsv3::ops {

/// grad += dyᵀ · x. dy [T, N] and x [T, K] of one dtype (contiguous or transposed), grad [N, K] of
/// that dtype or FP32; an undefined grad is left alone.
///
/// Precision with BF16 operands and an FP32 bucket: sums over T are FP32 everywhere. Dense on CUDA
/// the product accumulates straight into the bucket. On the CPU, and over experts on CUDA where
/// LibTorch's grouped kernel is taken, the product of this call is rounded to BF16 once (relative
/// error up to 2^-8 an element, of this micro-batch's share) and then added in FP32: LibTorch gives
/// a BF16 product no FP32 result there, and the ways around it cost 4 times the product's time.
void add_weight_grad(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& grad);

/// grad[e] += dy_eᵀ · x_e over the rows of each expert (see grouped_linear); exactly nothing for an
/// expert without rows. dy [T', N], x [T', K], grad [E, N, K] contiguous.
void add_grouped_weight_grad(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& offsets,
                             const at::Tensor& grad);

/// Whether LibTorch's grouped kernel takes these operands on CUDA: BF16, and every row starts at a
/// multiple of 16 bytes.
bool has_grouped_mm(const at::Tensor& x, int64_t in_size, int64_t out_size);

}  // namespace dsv3::ops
