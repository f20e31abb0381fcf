#include "ops/rms_norm.h"

#include <ATen/ops/empty.h>

#include "base/error.h"
#include "kernels/elementwise.h"
#include "ops/autograd.h"
#include "ops/bucket_leaf.h"
#include "ops/dispatch.h"
#include "ops/range.h"

namespace dsv3::ops {
namespace {

void check_rms_norm(const char* op, const at::Tensor& x, const Weight& weight) {
  check_shape(x, op, "x", {-1, -1});
  require(x.size(1) > 0, "[{}] x: expected rows of at least one element, got [{}, 0]", op,
          x.size(0));
  check_shape(weight.value, op, "weight", {x.size(1)});
  check_like(weight.value, op, "weight", x, "x");
}

/// What a forward makes; `sum` only with a residual.
struct Normalised {
  at::Tensor sum, y, inv_rms;
};

Normalised run_forward(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
                       double eps) {
  const NoRecord guard;
  const int64_t T = x.size(0), D = x.size(1);
  Normalised result;
  result.y = at::empty({T, D}, x.options());
  result.inv_rms = at::empty({T}, x.options().dtype(at::kFloat));
  if (residual.defined()) result.sum = at::empty({T, D}, x.options());
  kernels::rms_norm_forward({.num_tokens = T,
                             .hidden = D,
                             .x_stride = x.stride(0),
                             .eps = static_cast<float>(eps),
                             .dtype = dtype_of(x, "rms_norm", "x"),
                             .x = x.const_data_ptr(),
                             .residual = residual.defined() ? residual.const_data_ptr() : nullptr,
                             .weight = weight.const_data_ptr(),
                             .sum = residual.defined() ? result.sum.mutable_data_ptr() : nullptr,
                             .y = result.y.mutable_data_ptr(),
                             .inv_rms = result.inv_rms.mutable_data_ptr<float>()},
                            stream_of(x));
  return result;
}

/// dx (with dsum, which may be undefined, added), and the weight's gradient into its bucket.
at::Tensor run_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& inv_rms,
                        const Weight& weight, const at::Tensor& dsum) {
  const at::Tensor dy = grad.contiguous();
  const at::Tensor added = dsum.defined() ? dsum.contiguous() : at::Tensor();
  const int64_t T = x.size(0), D = x.size(1);
  at::Tensor dx = at::empty({T, D}, x.options());
  at::Tensor scratch;
  if (weight.grad.defined()) {
    check_shape(weight.grad, "rms_norm", "weight gradient", {D});
    scratch = at::empty({kernels::rms_norm_backward_scratch(T, D)}, inv_rms.options());
  }
  kernels::rms_norm_backward(
      {.num_tokens = T,
       .hidden = D,
       .x_stride = x.stride(0),
       .dtype = dtype_of(x, "rms_norm", "x"),
       .dy = dy.const_data_ptr(),
       .x = x.const_data_ptr(),
       .weight = weight.value.const_data_ptr(),
       .inv_rms = inv_rms.const_data_ptr<float>(),
       .dsum = added.defined() ? added.const_data_ptr() : nullptr,
       .dx = dx.mutable_data_ptr(),
       .dweight = weight.grad.defined() ? weight.grad.mutable_data_ptr() : nullptr,
       .dweight_dtype = weight.grad.defined() ? dtype_of(weight.grad, "rms_norm", "weight gradient")
                                              : DType::kF32,
       .scratch = scratch.defined() ? scratch.mutable_data_ptr<float>() : nullptr},
      stream_of(x));
  return dx;
}

Remake make_remake(const at::Tensor& x, const Weight& weight, double eps) {
  return [x = x.detach(), weight = weight.value.detach(), eps] {
    if (has_kernel(x)) return run_forward(x, at::Tensor(), weight, eps).y;
    const NoRecord guard;
    return reference::rms_norm(x, weight, eps);
  };
}

}  // namespace

Remakable rms_norm(const at::Tensor& input, const Weight& weight, double eps) {
  const Range range("rms_norm");
  check_rms_norm("rms_norm", input, weight);
  const at::Tensor x = rows_contiguous(input);
  if (!has_kernel(x)) {
    return {reference::rms_norm(x, bucket_leaf(weight), eps), make_remake(x, weight, eps)};
  }
  const Normalised result = run_forward(x, at::Tensor(), weight.value, eps);
  if (recording({x, weight.value})) {
    record("rms_norm", {x, weight.value}, {result.y},
           [x = x.detach(), inv_rms = result.inv_rms, weight](const Tensors& grads) -> Tensors {
             if (!grads[0].defined()) return {at::Tensor(), at::Tensor()};
             return {run_backward(grads[0], x, inv_rms, weight, at::Tensor()), at::Tensor()};
           });
  }
  return {result.y, make_remake(x, weight, eps)};
}

std::tuple<at::Tensor, Remakable> add_rms_norm(const at::Tensor& input, const at::Tensor& residual,
                                               const Weight& weight, double eps) {
  const Range range("add_rms_norm");
  check_rms_norm("add_rms_norm", input, weight);
  check_shape(residual, "add_rms_norm", "residual", input.sizes());
  check_like(residual, "add_rms_norm", "residual", input, "x");
  const at::Tensor x = rows_contiguous(input);
  if (!has_kernel(x)) {
    const at::Tensor sum = x.add(residual);
    return {sum,
            {reference::rms_norm(sum, bucket_leaf(weight), eps), make_remake(sum, weight, eps)}};
  }
  const Normalised result = run_forward(x, residual.contiguous(), weight.value, eps);
  const at::Tensor saved = result.sum.detach();
  if (recording({x, residual, weight.value})) {
    record("add_rms_norm", {x, residual, weight.value}, {result.sum, result.y},
           [saved, inv_rms = result.inv_rms, weight](const Tensors& grads) -> Tensors {
             const at::Tensor& dsum = grads[0];
             if (!grads[1].defined()) return {dsum, dsum, at::Tensor()};
             const at::Tensor dx = run_backward(grads[1], saved, inv_rms, weight, dsum);
             return {dx, dx, at::Tensor()};
           });
  }
  return {result.sum, {result.y, make_remake(saved, weight, eps)}};
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
