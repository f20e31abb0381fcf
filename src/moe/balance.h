#pragma once

#include "base/tensor_fwd.h"

namespace dsv3 {

/// Auxiliary-loss-free balancing (report §2.1.2, arXiv:2408.15664), after each optimizer step:
///   b_i += γ · sign(mean(load) - load_i).
/// bias [E] FP32, changed in place; load [E]: tokens per expert over the whole global batch; skip:
/// scalar int32 on the device, or undefined: anything but 0 leaves the bias as it is, bit by bit.
void update_router_bias(at::Tensor& bias, const at::Tensor& load, double update_rate,
                        const at::Tensor& skip);

/// max_i load_i / mean(load) - 1 (MaxVio, arXiv:2408.15664 §3); 0 when nothing was routed. Scalar
/// tensor.
at::Tensor max_violation(const at::Tensor& load);

}  // namespace dsv3
