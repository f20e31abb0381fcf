#include "ops/swiglu_fp8.h"

#include "base/error.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"
#include "ops/swiglu_body.h"

namespace dsv3::ops {
namespace {

at::Tensor checked(const char* op, const at::Tensor& gate_up, const at::Tensor& row_weight,
                   const SwigluFp8Options& options) {
  check_swiglu(op, gate_up, row_weight);
  require(has_kernel(gate_up), "[{}] gate_up: expected dtype Float or BFloat16, got {}", op,
          c10::toString(gate_up.scalar_type()));
  require(options.rows || options.columns, "[{}] options: expected rows, columns or both", op);
  return gate_up.contiguous();
}

}  // namespace

SwigluFp8 swiglu_fp8(const at::Tensor& input, const at::Tensor& row_weight,
                     const SwigluFp8Options& options) {
  const at::Tensor gate_up = checked("swiglu_fp8", input, row_weight, options);
  const int64_t T = gate_up.size(0), I = gate_up.size(1) / 2;
  const at::Tensor weights = row_weight.defined() ? row_weight.detach() : row_weight;
  SwigluFp8 result;
  Fp8Forms forms{.rule = scale_rule(options.quantize, "swiglu_fp8")};
  if (options.rows) {
    result.rows = empty_row_tiles(T, I, gate_up);
    forms.rows = &result.rows;
  }
  if (options.columns) {
    result.columns = empty_column_tiles(T, I, gate_up);
    forms.columns = &result.columns;
  }
  result.y = run_swiglu(gate_up, weights, forms, options.keep);
  if (!options.keep) result.y = gradient_carrier({T, I}, gate_up);
  if (recording({gate_up, row_weight})) {
    record("swiglu_fp8", {gate_up, row_weight}, {result.y},
           [gate_up = gate_up.detach(), weights](const Tensors& grads) -> Tensors {
             if (!grads[0].defined()) return {at::Tensor(), at::Tensor()};
             const SwigluGrads back = run_swiglu_backward(grads[0], gate_up, weights);
             return {back.dgate_up, back.drow_weight};
           });
  }
  return result;
}

SwigluGradientFp8 swiglu_gradient_fp8(const at::Tensor& dy, const at::Tensor& input,
                                      const at::Tensor& row_weight,
                                      const SwigluFp8Options& options) {
  const NoRecord guard;
  const at::Tensor gate_up = checked("swiglu_gradient_fp8", input, row_weight, options);
  const int64_t T = gate_up.size(0), I = gate_up.size(1) / 2;
  check_shape(dy, "swiglu_gradient_fp8", "dy", {T, I});
  check_like(dy, "swiglu_gradient_fp8", "dy", gate_up, "gate_up");
  const at::Tensor weights = row_weight.defined() ? row_weight.detach() : row_weight;
  SwigluGradientFp8 result;
  if (I % kernels::kFp8Tile != 0) {
    const SwigluGrads back = run_swiglu_backward(dy, gate_up, weights);
    if (options.rows && options.columns) {
      std::tie(result.rows, result.columns) = quantize_both(back.dgate_up, options.quantize);
    } else if (options.rows) {
      result.rows = quantize_rows(back.dgate_up, options.quantize);
    } else {
      result.columns = quantize_columns(back.dgate_up, options.quantize);
    }
    if (options.keep) result.dgate_up = back.dgate_up;
    result.drow_weight = back.drow_weight;
    return result;
  }
  Fp8Forms forms{.rule = scale_rule(options.quantize, "swiglu_gradient_fp8")};
  if (options.rows) {
    result.rows = empty_row_tiles(T, 2 * I, gate_up);
    forms.rows = &result.rows;
  }
  if (options.columns) {
    result.columns = empty_column_tiles(T, 2 * I, gate_up);
    forms.columns = &result.columns;
  }
  const SwigluGrads back = run_swiglu_backward(dy, gate_up, weights, forms, options.keep);
  result.dgate_up = back.dgate_up;
  result.drow_weight = back.drow_weight;
  return result;
}

}  // namespace dsv3::ops
