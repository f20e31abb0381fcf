#pragma once

#include <cstdint>

#include "base/tensor_fwd.h"

namespace dsv3 {

/// Auxiliary-loss-free balancing (report §2.1.2, arXiv:2408.15664), after each optimizer step:
///   b_i += γ · sign(mean(load) - load_i).
/// bias [E] FP32, changed in place; load [E]: tokens per expert over the whole global batch; skip:
/// scalar int32 on the device, or undefined: anything but 0 leaves the bias as it is, bit by bit.
void update_router_bias(at::Tensor& bias, const at::Tensor& load, double update_rate,
                        const at::Tensor& skip);

/// How many of the `valid` tokens chose each expert: [E] int32 on their device. experts [T, K]
/// int32 in [0, E), valid [T] bool. Nothing waits for the device.
at::Tensor count_tokens(const at::Tensor& experts, const at::Tensor& valid, int64_t num_experts);

}  // namespace dsv3
