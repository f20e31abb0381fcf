#include "ops/gate.h"

#include <ATen/ops/mm.h>

#include "base/error.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"
#include "ops/gate_split.h"
#include "ops/range.h"
#include "ops/weight_grad.h"

namespace dsv3::ops {
namespace {

void check_gate(const at::Tensor& x, const at::Tensor& weight) {
  check_shape(x, "gate", "x", {-1, weight.size(-1)});
  require(weight.dim() == 2 &&
              (weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kDouble),
          "[gate] weight: expected [E, D] of dtype Float (the router computes in FP32), got {} "
          "dims of {}",
          weight.dim(), c10::toString(weight.scalar_type()));
  require(x.scalar_type() == weight.scalar_type() || x.scalar_type() == at::kBFloat16,
          "[gate] x: expected dtype BFloat16 or {}, got {}", c10::toString(weight.scalar_type()),
          c10::toString(x.scalar_type()));
  require(x.device() == weight.device(), "[gate] x: expected device {} (as weight), got {}",
          weight.device().str(), x.device().str());
}

bool splits(const at::Tensor& x, const Weight& weight) {
  return x.is_cuda() && x.scalar_type() == at::kBFloat16 &&
         (!weight.grad.defined() || weight.grad.scalar_type() == at::kFloat);
}

}  // namespace

at::Tensor gate_gradient(const at::Tensor& dlogits, const at::Tensor& x, const Weight& weight,
                         bool needs_dx) {
  const NoRecord guard;
  at::Tensor dx;
  if (splits(x, weight)) {
    const at::Tensor terms = split_gradient(dlogits);
    if (needs_dx) dx = split_product_dx(terms, weight.value);
    if (weight.grad.defined()) add_split_product_dweight(terms, x, weight.grad);
    return dx;
  }
  if (needs_dx) dx = at::mm(dlogits, weight.value).to(x.scalar_type());
  if (weight.grad.defined()) {
    add_weight_grad(dlogits, x.to(weight.value.scalar_type()), weight.grad);
  }
  return dx;
}

at::Tensor gate(const Remakable& x, const Weight& weight) {
  const Range range("gate");
  check_gate(x.value, weight.value);
  at::Tensor y;
  {
    const NoRecord guard;
    y = splits(x.value, weight) ? split_product(x.value, weight.value)
                                : reference::gate(x.value, weight.value);
  }
  if (!recording({x.value, weight.value})) return y;
  const bool needs_dx = x.value.requires_grad();
  const at::Tensor saved = x.remake ? at::Tensor() : x.value.detach();
  record(
      "gate", {x.value, weight.value}, {y},
      [saved, remake = x.remake, weight, needs_dx](const Tensors& grads) -> Tensors {
        if (!grads[0].defined()) return {at::Tensor(), at::Tensor()};
        return {gate_gradient(grads[0], remake ? remake() : saved, weight, needs_dx), at::Tensor()};
      });
  return y;
}

namespace reference {

at::Tensor gate(const at::Tensor& x, const at::Tensor& weight) {
  return at::mm(x.to(weight.scalar_type()), weight.t());
}

}  // namespace reference
}  // namespace dsv3::ops
