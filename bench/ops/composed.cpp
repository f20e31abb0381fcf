#include "bench/ops/composed.h"

#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <memory>
#include <utility>

namespace dsv3::bench {

at::Tensor leaf(const at::Tensor& tensor) {
  return tensor.detach().requires_grad_(true);
}

std::function<void()> composed_forward(std::function<void()> forward) {
  return [forward = std::move(forward)] {
    const c10::AutoGradMode off(false);
    forward();
  };
}

std::function<void()> composed_backward(std::function<std::vector<at::Tensor>()> forward,
                                        std::vector<at::Tensor> inputs,
                                        std::vector<at::Tensor> upstream,
                                        std::function<void(const std::vector<at::Tensor>&)> then) {
  const auto outputs = std::make_shared<std::vector<at::Tensor>>();
  return [outputs, forward = std::move(forward), inputs = std::move(inputs),
          upstream = std::move(upstream), then = std::move(then)] {
    if (outputs->empty()) *outputs = forward();
    const auto gradients = torch::autograd::grad(*outputs, inputs, upstream, /*retain_graph=*/true);
    if (then) then(gradients);
  };
}

std::function<void()> composed_both(std::function<at::Tensor()> forward,
                                    std::vector<at::Tensor> inputs) {
  return [forward = std::move(forward), inputs = std::move(inputs)] {
    torch::autograd::grad({forward()}, inputs);
  };
}

}  // namespace dsv3::bench
