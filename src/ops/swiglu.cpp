#include "ops/swiglu.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "base/error.h"
#include "kernels/elementwise.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"
#include "ops/range.h"
#include "ops/swiglu_body.h"

namespace dsv3::ops {

void check_swiglu(const char* op, const at::Tensor& gate_up, const at::Tensor& row_weight) {
  check_shape(gate_up, op, "gate_up", {-1, -1});
  check_number(gate_up, op, "gate_up");
  require(gate_up.size(1) % 2 == 0, "[{}] gate_up: expected [T, 2I], got an odd width {}", op,
          gate_up.size(1));
  if (!row_weight.defined()) return;
  check_shape(row_weight, op, "row_weight", {gate_up.size(0)});
  const auto expected = gate_up.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  require(row_weight.scalar_type() == expected && row_weight.device() == gate_up.device(),
          "[{}] row_weight: expected {} on {}, got {} on {}", op, c10::toString(expected),
          gate_up.device().str(), c10::toString(row_weight.scalar_type()),
          row_weight.device().str());
}

at::Tensor run_swiglu(const at::Tensor& gate_up, const at::Tensor& row_weight,
                      const Fp8Forms& forms, bool keep_y) {
  const NoRecord guard;
  const int64_t T = gate_up.size(0), I = gate_up.size(1) / 2;
  at::Tensor y;
  if (keep_y) y = at::empty({T, I}, gate_up.options());
  const at::Tensor weights = row_weight.defined() ? row_weight.contiguous() : row_weight;
  kernels::swiglu_forward(
      {.num_tokens = T,
       .intermediate = I,
       .dtype = dtype_of(gate_up, "swiglu", "gate_up"),
       .gate_up = gate_up.const_data_ptr(),
       .y = keep_y ? y.mutable_data_ptr() : nullptr,
       .row_weight = weights.defined() ? weights.const_data_ptr<float>() : nullptr,
       .rule = forms.rule,
       .rows = forms.rows != nullptr ? rows_of(*forms.rows) : kernels::Fp8Rows(),
       .columns = forms.columns != nullptr ? columns_of(*forms.columns) : kernels::Fp8Columns()},
      stream_of(gate_up));
  return y;
}

SwigluGrads run_swiglu_backward(const at::Tensor& grad, const at::Tensor& gate_up,
                                const at::Tensor& row_weight, const Fp8Forms& forms, bool keep) {
  const NoRecord guard;
  const at::Tensor dy = grad.contiguous();
  const int64_t T = gate_up.size(0), I = gate_up.size(1) / 2;
  const at::Tensor weights = row_weight.defined() ? row_weight.contiguous() : row_weight;
  const bool tiled = forms.rows != nullptr || forms.columns != nullptr;
  SwigluGrads result;
  at::Tensor scratch;
  if (keep) result.dgate_up = at::empty_like(gate_up);
  if (weights.defined()) result.drow_weight = at::empty_like(weights);
  if (tiled) {
    scratch =
        at::empty({kernels::swiglu_backward_scratch(T, I)}, gate_up.options().dtype(at::kFloat));
  }
  kernels::swiglu_backward(
      {.num_tokens = T,
       .intermediate = I,
       .dtype = dtype_of(gate_up, "swiglu", "gate_up"),
       .dy = dy.const_data_ptr(),
       .gate_up = gate_up.const_data_ptr(),
       .dgate_up = keep ? result.dgate_up.mutable_data_ptr() : nullptr,
       .row_weight = weights.defined() ? weights.const_data_ptr<float>() : nullptr,
       .drow_weight = weights.defined() ? result.drow_weight.mutable_data_ptr<float>() : nullptr,
       .scratch = scratch.defined() ? scratch.mutable_data_ptr<float>() : nullptr,
       .rule = forms.rule,
       .rows = forms.rows != nullptr ? rows_of(*forms.rows) : kernels::Fp8Rows(),
       .columns = forms.columns != nullptr ? columns_of(*forms.columns) : kernels::Fp8Columns()},
      stream_of(gate_up));
  return result;
}

namespace {

Remakable run_operator(const char* op, const at::Tensor& input, const at::Tensor& row_weight) {
  const Range range(op);
  check_swiglu(op, input, row_weight);
  const at::Tensor weights = row_weight.defined() ? row_weight.detach() : row_weight;
  if (!has_kernel(input)) {
    return {reference::swiglu(input, row_weight), [gate_up = input.detach(), weights] {
              const NoRecord guard;
              return reference::swiglu(gate_up, weights);
            }};
  }
  const at::Tensor gate_up = input.contiguous();
  const at::Tensor y = run_swiglu(gate_up, weights);
  if (recording({gate_up, row_weight})) {
    record(op, {gate_up, row_weight}, {y},
           [gate_up = gate_up.detach(), weights](const Tensors& grads) -> Tensors {
             if (!grads[0].defined()) return {at::Tensor(), at::Tensor()};
             const SwigluGrads back = run_swiglu_backward(grads[0], gate_up, weights);
             return {back.dgate_up, back.drow_weight};
           });
  }
  return {y, [gate_up = gate_up.detach(), weights] { return run_swiglu(gate_up, weights); }};
}

}  // namespace

Remakable swiglu(const at::Tensor& gate_up) {
  return run_operator("swiglu", gate_up, at::Tensor());
}

Remakable weighted_swiglu(const at::Tensor& gate_up, const at::Tensor& row_weight) {
  require(row_weight.defined(), "[weighted_swiglu] row_weight: expected [T], got none");
  return run_operator("weighted_swiglu", gate_up, row_weight);
}

namespace reference {

at::Tensor swiglu(const at::Tensor& gate_up, const at::Tensor& row_weight) {
  const bool narrow = gate_up.scalar_type() == at::kBFloat16;
  const at::Tensor wide = narrow ? gate_up.to(at::kFloat) : gate_up;
  const int64_t I = gate_up.size(-1) / 2;
  const at::Tensor gate = wide.narrow(-1, 0, I), up = wide.narrow(-1, I, I);
  at::Tensor y = gate.mul(gate.sigmoid()).mul(up);
  if (row_weight.defined()) y = y.mul(row_weight.unsqueeze(-1));
  return y.to(gate_up.scalar_type());
}

}  // namespace reference
}  // namespace dsv3::ops
