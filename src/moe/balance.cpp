#include "moe/balance.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/sign.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "base/error.h"
#include "ops/autograd.h"

namespace dsv3 {

void update_router_bias(at::Tensor& bias, const at::Tensor& load, double update_rate,
                        const at::Tensor& skip) {
  require(bias.dim() == 1 && load.sizes() == bias.sizes(),
          "[update_router_bias] load: expected [{}] (= experts), got {} elements", bias.numel(),
          load.numel());
  const ops::NoRecord guard;
  const at::Tensor tokens = load.to(at::kDouble);
  const at::Tensor direction = at::sign(tokens.mean() - tokens);
  // Note: x + (-0.0) is x for every x, -0.0 included; x + 0.0 is not.
  bias.add_(skip.defined() ? at::where(skip.ne(0), -0.0, direction) : direction, update_rate);
}

at::Tensor count_tokens(const at::Tensor& experts, const at::Tensor& valid, int64_t num_experts) {
  require(experts.dim() == 2 && valid.dim() == 1 && valid.size(0) == experts.size(0),
          "[count_tokens] valid: expected [{}] (= tokens), got {} elements",
          experts.dim() == 2 ? experts.size(0) : 0, valid.numel());
  const ops::NoRecord guard;
  const at::Tensor ones = valid.to(at::kInt).unsqueeze(1).expand(experts.sizes());
  at::Tensor counts = at::zeros({num_experts}, ones.options());
  // Note: adding integers gives the same counts in any order, so atomics do no harm here.
  return counts.scatter_add_(0, experts.flatten().to(at::kLong), ones.flatten());
}

}  // namespace dsv3
