#include "moe/balance.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/sign.h>
#include <ATen/ops/where.h>

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

at::Tensor max_violation(const at::Tensor& load) {
  const ops::NoRecord guard;
  const at::Tensor tokens = load.to(at::kDouble);
  const at::Tensor mean = tokens.mean();
  return (tokens.max() - mean) / mean.clamp_min(1e-9) * mean.sign();
}

}  // namespace dsv3
