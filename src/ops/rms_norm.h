#pragma once

#include <tuple>
#include <utility>

#include "ops/weight.h"

namespace dsv3::ops {

/// y[t] = x[t] / sqrt(mean(x[t]²) + eps) · weight, row by row; sums in FP32 (FP64 input: FP64).
/// x [T, D] (rows may be strided, the last dim contiguous), weight [D] of x's dtype, y [T, D]
/// contiguous. Zhang & Sennrich 2019, arXiv:1910.07467. dweight is summed in FP32, in a fixed
/// order. The result's remake makes y again from x.
Remakable rms_norm(const at::Tensor& x, const Weight& weight, double eps);

/// sum = x + residual; y = rms_norm(sum). One pass over memory. Returns {sum, y}.
std::tuple<at::Tensor, Remakable> add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                                               const Weight& weight, double eps);

/// Two norms of one input, each with its own weight, reading it once; the gradient's way back reads
/// it once too. Returns {y of first, y of second}.
std::pair<Remakable, Remakable> rms_norm_pair(const at::Tensor& x, const Weight& first,
                                              const Weight& second, double eps);

namespace reference {
/// Plain, differentiable, float64-capable.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);
}  // namespace reference

}  // namespace dsv3::ops
