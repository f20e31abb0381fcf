#pragma once

#include "ops/weight.h"

namespace dsv3::ops {

/// The router's product at FP32 accuracy (NUMERICS trap 5): logits = x · Wᵀ, FP32.
/// x [T, D] BF16 or FP32 (FP64 with an FP64 weight), weight [E, D] FP32, logits [T, E].
/// On CUDA a BF16 x stays BF16: see gate_split.h. Elsewhere it is widened to FP32, again in
/// backward with a remake. Backward: dx in x's dtype; dW += dlogitsᵀ · x straight into the weight's
/// bucket.
at::Tensor gate(const Remakable& x, const Weight& weight);

/// gate's gradient by itself: returns dx (undefined without needs_dx) and adds dW to the weight's
/// bucket, where there is one. dlogits [T, E] FP32, x [T, D].
at::Tensor gate_gradient(const at::Tensor& dlogits, const at::Tensor& x, const Weight& weight,
                         bool needs_dx);

namespace reference {
/// Plain, differentiable, in the weight's dtype (FP32 or FP64), to which x is widened.
at::Tensor gate(const at::Tensor& x, const at::Tensor& weight);
}  // namespace reference

}  // namespace dsv3::ops
