#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace dsv3::ops {

/// Runs fn(x) without keeping what its operators would save; backward runs it again, recording, and
/// goes through it. fn must compute the same twice; entries of its result may be undefined.
/// Gradients of weights are added once (in backward).
std::vector<at::Tensor> checkpoint(
    const std::function<std::vector<at::Tensor>(const at::Tensor&)>& fn, const at::Tensor& x);

/// True while checkpoint() runs fn for the second time: counters (expert load) must not count
/// again.
bool recomputing();

}  // namespace dsv3::ops
