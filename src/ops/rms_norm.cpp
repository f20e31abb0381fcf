#include "ops/rms_norm.h"

#include <ATen/ops/zeros_like.h>

#include "ops/autograd.h"
#include "ops/bucket_leaf.h"
#include "ops/dispatch.h"
#include "ops/range.h"
#include "ops/rms_norm_body.h"

namespace dsv3::ops {
namespace {

/// `inv_rms` is the first forward's: another body (x and the residual may have been unaligned, the
/// sum is not) adds a row's squares in another order, but y has the same bits.
Remake make_remake(const at::Tensor& x, const Weight& weight, double eps,
                   const at::Tensor& inv_rms = {}) {
  return [x = x.detach(), weight = weight.value.detach(), eps, inv_rms] {
    if (has_kernel(x)) return run_rms_norm({x, {}, weight, {}, eps, inv_rms}).y;
    const NoRecord guard;
    return reference::rms_norm(x, weight, eps);
  };
}

}  // namespace

Remakable rms_norm(const at::Tensor& input, const Weight& weight, double eps) {
  const Range range("rms_norm");
  check_rms_norm("rms_norm", input, weight.value);
  const at::Tensor x = rows_contiguous(input);
  if (!has_kernel(x)) {
    return {reference::rms_norm(x, bucket_leaf(weight), eps), make_remake(x, weight, eps)};
  }
  const Normalised result = run_rms_norm({x, {}, weight.value, {}, eps});
  if (recording({x, weight.value})) {
    record("rms_norm", {x, weight.value}, {result.y},
           [x = x.detach(), inv_rms = result.inv_rms, weight](const Tensors& grads) -> Tensors {
             if (!grads[0].defined()) return {at::Tensor(), at::Tensor()};
             return {run_rms_norm_backward({grads[0], {}, {}}, x, inv_rms, weight), at::Tensor()};
           });
  }
  return {result.y, make_remake(x, weight, eps, result.inv_rms)};
}

std::tuple<at::Tensor, Remakable> add_rms_norm(const at::Tensor& input, const at::Tensor& residual,
                                               const Weight& weight, double eps) {
  const Range range("add_rms_norm");
  check_rms_norm("add_rms_norm", input, weight.value);
  check_shape(residual, "add_rms_norm", "residual", input.sizes());
  check_like(residual, "add_rms_norm", "residual", input, "x");
  const at::Tensor x = rows_contiguous(input);
  if (!has_kernel(x)) {
    const at::Tensor sum = x.add(residual);
    return {sum,
            {reference::rms_norm(sum, bucket_leaf(weight), eps), make_remake(sum, weight, eps)}};
  }
  const Normalised result = run_rms_norm({x, residual.contiguous(), weight.value, {}, eps});
  const at::Tensor saved = result.sum.detach();
  if (recording({x, residual, weight.value})) {
    record(
        "add_rms_norm", {x, residual, weight.value}, {result.sum, result.y},
        [saved, inv_rms = result.inv_rms, weight](const Tensors& grads) -> Tensors {
          const at::Tensor& dsum = grads[0];
          if (!grads[1].defined()) return {dsum, dsum, at::Tensor()};
          const at::Tensor dx = run_rms_norm_backward({grads[1], {}, dsum}, saved, inv_rms, weight);
          return {dx, dx, at::Tensor()};
        });
  }
  return {result.sum, {result.y, make_remake(saved, weight, eps, result.inv_rms)}};
}

std::pair<Remakable, Remakable> rms_norm_pair(const at::Tensor& input, const Weight& first,
                                              const Weight& second, double eps) {
  check_rms_norm("rms_norm_pair", input, first.value);
  check_rms_norm("rms_norm_pair", input, second.value);
  const at::Tensor x = rows_contiguous(input);
  if (!has_kernel(x)) {
    return {{reference::rms_norm(x, bucket_leaf(first), eps), make_remake(x, first, eps)},
            {reference::rms_norm(x, bucket_leaf(second), eps), make_remake(x, second, eps)}};
  }
  const Normalised result = run_rms_norm({x, {}, first.value, second.value, eps});
  if (recording({x, first.value, second.value})) {
    record(
        "rms_norm_pair", {x, first.value, second.value}, {result.y, result.second},
        [x = x.detach(), inv_rms = result.inv_rms, first, second](const Tensors& grads) -> Tensors {
          if (!grads[0].defined() && !grads[1].defined()) return {{}, {}, {}};
          // A norm whose result went unused has the gradient zero.
          const auto given = [](const at::Tensor& grad, const at::Tensor& other) {
            return grad.defined() ? grad : at::zeros_like(other);
          };
          const NormGradients both{given(grads[0], grads[1]), given(grads[1], grads[0]), {}};
          return {run_rms_norm_backward(both, x, inv_rms, first, &second), {}, {}};
        });
  }
  return {{result.y, make_remake(x, first, eps, result.inv_rms)},
          {result.second, make_remake(x, second, eps, result.inv_rms)}};
}

namespace reference {

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const bool narrow = x.scalar_type() == at::kBFloat16;
  const at::Tensor wide = narrow ? x.to(at::kFloat) : x;
  const at::Tensor inv_rms = wide.square().mean(-1, /*keepdim=*/true).add(eps).rsqrt();
  return wide.mul(inv_rms).mul(weight.to(wide.scalar_type())).to(x.scalar_type());
}

}  // namespace reference
}  // namespace dsv3::ops
