#pragma once

#include "ops/weight.h"

namespace dsv3::ops {

/// Rows of the table: ids [T] int32 in [0, V), weight [V, D], result [T, D].
/// Backward adds each row's gradient in token order: deterministic, without atomics or a host sort.
at::Tensor embedding(const at::Tensor& ids, const Weight& weight);

namespace reference {
/// Plain, differentiable with respect to the table, float64-capable.
at::Tensor embedding(const at::Tensor& ids, const at::Tensor& table);
}  // namespace reference

}  // namespace dsv3::ops
