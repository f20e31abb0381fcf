#pragma once

#include "ops/weight.h"

namespace dsv3::ops {

/// y = silu(gate) · up, with gate_up [T, 2I] = [gate | up]; y [T, I]. silu(g) = g / (1 + e^-g), in
/// FP32. The result's remake makes y again from gate_up.
Remakable swiglu(const at::Tensor& gate_up);

/// y[t] = silu(gate[t]) · up[t] · row_weight[t]: with the routing weight of each expert row [T]
/// FP32 (FP64 input: FP64) and its gradient.
Remakable weighted_swiglu(const at::Tensor& gate_up, const at::Tensor& row_weight);

namespace reference {
/// Plain, differentiable, float64-capable; row_weight may be undefined.
at::Tensor swiglu(const at::Tensor& gate_up, const at::Tensor& row_weight = {});
}  // namespace reference

}  // namespace dsv3::ops
