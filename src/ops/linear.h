#pragma once

#include "ops/weight.h"

namespace dsv3::ops {

/// y = x · Wᵀ. x [T, K], weight [N, K], y [T, N], all of one dtype.
/// Backward: dx = dy · W, and dW += dyᵀ · x straight into the weight's gradient bucket (in FP32
/// when the bucket is; ops/weight_grad.h says how exactly). With a remake, x is not kept.
at::Tensor linear(const Remakable& x, const Weight& weight);
at::Tensor linear(const at::Tensor& x, const Weight& weight);

/// One product per expert: rows offsets[e-1] … offsets[e] of x (0 before the first) meet weight[e].
/// x [T', K] sorted by expert, weight [E, N, K], offsets [E] int32 inclusive ends on x's device.
/// y [T', N]; rows behind the last offset belong to no expert: they change nothing and their y is
/// undefined. An expert without rows adds nothing to its gradient. On CUDA the host never waits for
/// the offsets: BF16 with K and N multiples of 8 takes LibTorch's grouped kernel (which does wait
/// on GPUs older than sm_90), everything else a plain kernel of ours.
at::Tensor grouped_linear(const Remakable& x, const Weight& weight, const at::Tensor& offsets);

}  // namespace dsv3::ops
