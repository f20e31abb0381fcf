#include "ops/checkpoint.h"

#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include "ops/autograd.h"
#include "ops/range.h"

namespace dsv3::ops {
namespace {

thread_local bool is_recomputing = false;

struct Recomputing {
  Recomputing() { is_recomputing = true; }
  ~Recomputing() { is_recomputing = false; }
};

}  // namespace

bool recomputing() {
  return is_recomputing;
}

Tensors checkpoint(const std::function<Tensors(const at::Tensor&)>& fn, const at::Tensor& x) {
  if (!recording({x})) return fn(x);
  Tensors results;
  {
    const NoRecord guard;
    results = fn(x);
  }
  Tensors outputs;  // the defined ones
  for (const auto& result : results) {
    if (result.defined()) outputs.push_back(result);
  }
  record("checkpoint", {x}, outputs, [fn, x = x.detach()](const Tensors& grads) -> Tensors {
    const c10::AutoGradMode grad_mode(true);
    const at::Tensor input = x.detach().requires_grad_(true);
    Tensors again;
    {
      const Recomputing flag;
      const Range range("recompute");
      again = fn(input);
    }
    Tensors roots, root_grads;
    size_t next = 0;
    for (const auto& result : again) {
      if (!result.defined()) continue;
      const at::Tensor& grad = grads[next++];
      if (!grad.defined() || !result.requires_grad()) continue;
      roots.push_back(result);
      root_grads.push_back(grad);
    }
    if (roots.empty()) return {at::Tensor()};
    return torch::autograd::grad(roots, {input}, root_grads, /*retain_graph=*/false,
                                 /*create_graph=*/false, /*allow_unused=*/true);
  });
  return results;
}

}  // namespace dsv3::ops
