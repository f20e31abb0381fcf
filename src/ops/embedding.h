#pragma once

#include "ops/weight.h"

namespace dsv3::ops {

/// Rows of the table: ids [T] int32 in [0, V), weight [V, D], result [T, D].
/// Backward adds each row's gradient in token order: deterministic, without atomics or a host sort.
at::Tensor embedding(const at::Tensor& ids, const Weight& weight);

}  // namespace dsv3::ops
