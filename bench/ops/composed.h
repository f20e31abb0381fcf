#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace dsv3::bench {

/// A copy of `tensor` (same memory) that asks for a gradient.
at::Tensor leaf(const at::Tensor& tensor);

/// Runs `forward` without recording a gradient: LibTorch's forward alone.
std::function<void()> composed_forward(std::function<void()> forward);

/// LibTorch's backward alone: the first call records `forward` once; every call goes back through
/// that graph from `upstream` (gradients of the outputs) to the gradients of `inputs`, which `then`
/// may use.
std::function<void()> composed_backward(
    std::function<std::vector<at::Tensor>()> forward, std::vector<at::Tensor> inputs,
    std::vector<at::Tensor> upstream,
    std::function<void(const std::vector<at::Tensor>&)> then = {});

/// Gradients of the scalar that `forward` returns, forward and backward in each call.
std::function<void()> composed_both(std::function<at::Tensor()> forward,
                                    std::vector<at::Tensor> inputs);

}  // namespace dsv3::bench
