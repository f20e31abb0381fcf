#include "ops/gate.h"

#include "base/error.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"
#include "ops/gate_split.h"
#include "ops/linear.h"

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

/// The widened x is made again in backward, not kept.
at::Tensor widened(const Remakable& x, const Weight& weight) {
  const auto wide = weight.value.scalar_type();
  const auto source = x.remake ? x.remake : [value = x.value.detach()] { return value; };
  return linear({x.value.to(wide), [source, wide] { return source().to(wide); }}, weight);
}

bool splits(const at::Tensor& x, const Weight& weight) {
  return x.is_cuda() && x.scalar_type() == at::kBFloat16 &&
         (!weight.grad.defined() || weight.grad.scalar_type() == at::kFloat);
}

}  // namespace

at::Tensor gate(const Remakable& x, const Weight& weight) {
  check_gate(x.value, weight.value);
  if (!splits(x.value, weight)) return widened(x, weight);
  at::Tensor y;
  {
    const NoRecord guard;
    y = split_product(x.value, weight.value);
  }
  if (!recording({x.value, weight.value})) return y;
  const bool needs_dx = x.value.requires_grad();
  const at::Tensor saved = x.remake ? at::Tensor() : x.value.detach();
  record("gate", {x.value, weight.value}, {y},
         [saved, remake = x.remake, weight, needs_dx](const Tensors& grads) -> Tensors {
           if (!grads[0].defined()) return {at::Tensor(), at::Tensor()};
           const at::Tensor terms = split_gradient(grads[0]);
           at::Tensor dx;
           if (needs_dx) dx = split_product_dx(terms, weight.value);
           if (weight.grad.defined()) {
             const NoRecord guard;
             add_split_product_dweight(terms, remake ? remake() : saved, weight.grad);
           }
           return {dx, at::Tensor()};
         });
  return y;
}

}  // namespace dsv3::ops
