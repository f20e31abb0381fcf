#include "ops/rms_norm_fp8.h"

#include "base/error.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"
#include "ops/rms_norm_body.h"

namespace dsv3::ops {
namespace {

at::Tensor checked(const char* op, const at::Tensor& x, const Weight& weight) {
  check_rms_norm(op, x, weight.value);
  require(has_kernel(x), "[{}] x: expected dtype Float or BFloat16, got {}", op,
          c10::toString(x.scalar_type()));
  return rows_contiguous(x);
}

}  // namespace

NormFp8 rms_norm_fp8(const at::Tensor& input, const Weight& weight, double eps,
                     const QuantizeOptions& options, bool keep_y) {
  const at::Tensor x = checked("rms_norm_fp8", input, weight);
  const Fp8RowTiles tiles = empty_row_tiles(x.size(0), x.size(1), x);
  const Normalised result = run_rms_norm({x, {}, weight.value, {}, eps},
                                         scale_rule(options, "rms_norm_fp8"), &tiles, keep_y);
  const at::Tensor y = keep_y ? result.y : gradient_carrier(x.sizes(), x);
  if (recording({x, weight.value})) {
    record("rms_norm_fp8", {x, weight.value}, {y},
           [x = x.detach(), inv_rms = result.inv_rms, weight](const Tensors& grads) -> Tensors {
             if (!grads[0].defined()) return {at::Tensor(), at::Tensor()};
             return {run_rms_norm_backward({grads[0], {}, {}}, x, inv_rms, weight), at::Tensor()};
           });
  }
  return {y, tiles};
}

std::tuple<at::Tensor, NormFp8> add_rms_norm_fp8(const at::Tensor& input,
                                                 const at::Tensor& residual, const Weight& weight,
                                                 double eps, const QuantizeOptions& options,
                                                 bool keep_y) {
  const at::Tensor x = checked("add_rms_norm_fp8", input, weight);
  check_shape(residual, "add_rms_norm_fp8", "residual", input.sizes());
  check_like(residual, "add_rms_norm_fp8", "residual", input, "x");
  const Fp8RowTiles tiles = empty_row_tiles(x.size(0), x.size(1), x);
  const Normalised result = run_rms_norm({x, residual.contiguous(), weight.value, {}, eps},
                                         scale_rule(options, "add_rms_norm_fp8"), &tiles, keep_y);
  const at::Tensor y = keep_y ? result.y : gradient_carrier(x.sizes(), x);
  if (recording({x, residual, weight.value})) {
    record(
        "add_rms_norm_fp8", {x, residual, weight.value}, {result.sum, y},
        [sum = result.sum.detach(), inv_rms = result.inv_rms,
         weight](const Tensors& grads) -> Tensors {
          const at::Tensor& dsum = grads[0];
          if (!grads[1].defined()) return {dsum, dsum, at::Tensor()};
          const at::Tensor dx = run_rms_norm_backward({grads[1], {}, dsum}, sum, inv_rms, weight);
          return {dx, dx, at::Tensor()};
        });
  }
  return {result.sum, {y, tiles}};
}

}  // namespace dsv3::ops
