#pragma once

#include "ops/weight.h"

namespace dsv3::ops {

/// y = silu(gate) · up, with gate_up [T, 2I] = [gate | up]; y [T, I]. silu(g) = g / (1 + e^-g), in
/// FP32. The result's remake makes y again from gate_up.
Remakable swiglu(const at::Tensor& gate_up);

namespace reference {
at::Tensor swiglu(const at::Tensor& gate_up);
}  // namespace reference

}  // namespace dsv3::ops
