#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

namespace dsv3::ops {

/// A parameter as operators see it. `value` is a leaf that requires a gradient, so that autograd
/// records the operator; the operator's backward ADDS the gradient into `grad` (a view into a flat
/// bucket) and returns nothing for the leaf. An undefined `grad` freezes the parameter.
struct Weight {
  at::Tensor value;
  at::Tensor grad;  // same shape; FP32, or the dtype of `value`
};

/// Makes a tensor again in backward instead of keeping it: what selective recomputation hands to
/// the operator that would have saved it. Empty = keep.
using Remake = std::function<at::Tensor()>;

/// A tensor with the way to make it again (may be empty).
struct Remakable {
  at::Tensor value;
  Remake remake;
};

}  // namespace dsv3::ops
