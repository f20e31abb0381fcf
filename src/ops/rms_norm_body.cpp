#include "ops/rms_norm_body.h"

#include <ATen/ops/empty.h>

#include "base/error.h"
#include "kernels/elementwise.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"

namespace dsv3::ops {
namespace {

const void* pointer(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}
void* pointer_out(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

at::Tensor contiguous_or_none(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.contiguous() : tensor;
}

}  // namespace

void check_rms_norm(const char* op, const at::Tensor& x, const at::Tensor& weight) {
  check_shape(x, op, "x", {-1, -1});
  check_number(x, op, "x");
  require(x.size(1) > 0, "[{}] x: expected rows of at least one element, got [{}, 0]", op,
          x.size(0));
  check_shape(weight, op, "weight", {x.size(1)});
  check_like(weight, op, "weight", x, "x");
}

Normalised run_rms_norm(const NormInputs& inputs, const kernels::ScaleRule& rule,
                        const Fp8RowTiles* tiles, bool keep_y) {
  const NoRecord guard;
  const at::Tensor& x = inputs.x;
  const at::Tensor weight = inputs.weight.contiguous();
  const at::Tensor second_weight = contiguous_or_none(inputs.second_weight);
  const int64_t T = x.size(0), D = x.size(1);
  Normalised result;
  if (keep_y) result.y = at::empty({T, D}, x.options());
  if (inputs.second_weight.defined()) result.second = at::empty({T, D}, x.options());
  if (inputs.residual.defined()) result.sum = at::empty({T, D}, x.options());
  const bool given = inputs.inv_rms.defined();
  result.inv_rms = given ? inputs.inv_rms : at::empty({T}, x.options().dtype(at::kFloat));
  kernels::rms_norm_forward({.num_tokens = T,
                             .hidden = D,
                             .x_stride = x.stride(0),
                             .eps = static_cast<float>(inputs.eps),
                             .dtype = dtype_of(x, "rms_norm", "x"),
                             .x = x.const_data_ptr(),
                             .residual = pointer(inputs.residual),
                             .weight = weight.const_data_ptr(),
                             .sum = pointer_out(result.sum),
                             .y = pointer_out(result.y),
                             .inv_rms = result.inv_rms.mutable_data_ptr<float>(),
                             .inv_rms_given = given,
                             .second_weight = pointer(second_weight),
                             .second_y = pointer_out(result.second),
                             .rule = rule,
                             .quantized = tiles != nullptr ? rows_of(*tiles) : kernels::Fp8Rows()},
                            stream_of(x));
  return result;
}

at::Tensor run_rms_norm_backward(const NormGradients& grads, const at::Tensor& x,
                                 const at::Tensor& inv_rms, const Weight& weight,
                                 const Weight* second) {
  const at::Tensor dy = grads.dy.contiguous();
  const at::Tensor dsum = contiguous_or_none(grads.dsum);
  const at::Tensor second_dy = second != nullptr ? grads.second_dy.contiguous() : at::Tensor();
  const at::Tensor scale = weight.value.detach().contiguous();
  const at::Tensor second_scale =
      second != nullptr ? second->value.detach().contiguous() : at::Tensor();
  const int64_t T = x.size(0), D = x.size(1);
  at::Tensor dx = at::empty({T, D}, x.options());
  at::Tensor bucket = weight.grad, second_bucket, scratch;
  if (second != nullptr) second_bucket = second->grad;
  for (const at::Tensor& grad : {bucket, second_bucket}) {
    if (!grad.defined()) continue;
    check_bucket(grad, "rms_norm", {D}, x);
    scratch =
        at::empty({kernels::rms_norm_backward_scratch(T, D, second != nullptr)}, inv_rms.options());
  }
  if (bucket.defined() && second_bucket.defined()) {
    check_like(second_bucket, "rms_norm", "second weight gradient", bucket, "weight gradient");
  }
  const at::Tensor& any = bucket.defined() ? bucket : second_bucket;
  kernels::rms_norm_backward(
      {.num_tokens = T,
       .hidden = D,
       .x_stride = x.stride(0),
       .dtype = dtype_of(x, "rms_norm", "x"),
       .dy = dy.const_data_ptr(),
       .x = x.const_data_ptr(),
       .weight = scale.const_data_ptr(),
       .inv_rms = inv_rms.const_data_ptr<float>(),
       .dsum = pointer(dsum),
       .dx = dx.mutable_data_ptr(),
       .dweight = pointer_out(bucket),
       .dweight_dtype = any.defined() ? dtype_of(any, "rms_norm", "weight gradient") : DType::kF32,
       .scratch = scratch.defined() ? scratch.mutable_data_ptr<float>() : nullptr,
       .second_dy = pointer(second_dy),
       .second_weight = pointer(second_scale),
       .second_dweight = pointer_out(second_bucket)},
      stream_of(x));
  return dx;
}

}  // namespace dsv3::ops
