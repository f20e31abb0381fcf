#include "ops/swiglu.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "base/error.h"
#include "kernels/elementwise.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"
#include "ops/range.h"

namespace dsv3::ops {
namespace {

at::Tensor run_forward(const at::Tensor& gate_up) {
  const NoRecord guard;
  const int64_t T = gate_up.size(0), I = gate_up.size(1) / 2;
  at::Tensor y = at::empty({T, I}, gate_up.options());
  kernels::swiglu_forward({.num_tokens = T,
                           .intermediate = I,
                           .dtype = dtype_of(gate_up, "swiglu", "gate_up"),
                           .gate_up = gate_up.const_data_ptr(),
                           .y = y.mutable_data_ptr()},
                          stream_of(gate_up));
  return y;
}

at::Tensor run_backward(const at::Tensor& grad, const at::Tensor& gate_up) {
  const at::Tensor dy = grad.contiguous();
  at::Tensor dgate_up = at::empty_like(gate_up);
  kernels::swiglu_backward({.num_tokens = gate_up.size(0),
                            .intermediate = gate_up.size(1) / 2,
                            .dtype = dtype_of(gate_up, "swiglu", "gate_up"),
                            .dy = dy.const_data_ptr(),
                            .gate_up = gate_up.const_data_ptr(),
                            .dgate_up = dgate_up.mutable_data_ptr()},
                           stream_of(gate_up));
  return dgate_up;
}

Remake make_remake(const at::Tensor& gate_up) {
  return [gate_up = gate_up.detach()] {
    if (has_kernel(gate_up)) return run_forward(gate_up);
    const NoRecord guard;
    return reference::swiglu(gate_up);
  };
}

}  // namespace

Remakable swiglu(const at::Tensor& input) {
  const Range range("swiglu");
  check_shape(input, "swiglu", "gate_up", {-1, -1});
  require(input.size(1) % 2 == 0, "[swiglu] gate_up: expected [T, 2I], got an odd width {}",
          input.size(1));
  if (!has_kernel(input)) return {reference::swiglu(input), make_remake(input)};
  const at::Tensor gate_up = input.contiguous();
  const at::Tensor y = run_forward(gate_up);
  if (recording({gate_up})) {
    record("swiglu", {gate_up}, {y}, [gate_up = gate_up.detach()](const Tensors& grads) -> Tensors {
      if (!grads[0].defined()) return {at::Tensor()};
      return {run_backward(grads[0], gate_up)};
    });
  }
  return {y, make_remake(gate_up)};
}

namespace reference {

at::Tensor swiglu(const at::Tensor& gate_up) {
  const bool narrow = gate_up.scalar_type() == at::kBFloat16;
  const at::Tensor wide = narrow ? gate_up.to(at::kFloat) : gate_up;
  const int64_t I = gate_up.size(-1) / 2;
  const at::Tensor gate = wide.narrow(-1, 0, I), up = wide.narrow(-1, I, I);
  return gate.mul(gate.sigmoid()).mul(up).to(gate_up.scalar_type());
}

}  // namespace reference
}  // namespace dsv3::ops
