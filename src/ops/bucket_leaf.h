#pragma once

#include "ops/weight.h"

namespace dsv3::ops {

/// The weight for a body that ATen's own operators differentiate (float64, references): an alias of
/// `value` whose gradient is added into weight.grad, as the operators of ours do. A frozen weight
/// (undefined grad) comes detached.
at::Tensor bucket_leaf(const Weight& weight);

}  // namespace dsv3::ops
