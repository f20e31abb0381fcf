#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "base/error.h"
#include "kernels/routing.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"
#include "ops/range.h"
#include "ops/router.h"

namespace dsv3::ops {
namespace {

const bool* pointer_or_null(const at::Tensor& valid) {
  return valid.defined() ? valid.const_data_ptr<bool>() : nullptr;
}

void check_balance(const at::Tensor& scores, const at::Tensor& valid, int64_t num_sequences) {
  check_shape(scores, "sequence_balance_loss", "scores", {-1, -1});
  require(num_sequences > 0 && scores.size(0) % num_sequences == 0,
          "[sequence_balance_loss] num_sequences: expected a divisor of the {} tokens, got {}",
          scores.size(0), num_sequences);
  require(scores.scalar_type() == at::kFloat || scores.scalar_type() == at::kDouble,
          "[sequence_balance_loss] scores: expected dtype Float, got {}",
          c10::toString(scores.scalar_type()));
  if (!valid.defined()) return;
  check_shape(valid, "sequence_balance_loss", "valid", {scores.size(0)});
  require(valid.scalar_type() == at::kBool && valid.device() == scores.device(),
          "[sequence_balance_loss] valid: expected Bool on {}, got {} on {}", scores.device().str(),
          c10::toString(valid.scalar_type()), valid.device().str());
}

}  // namespace

at::Tensor sequence_balance_loss(const at::Tensor& scores, const at::Tensor& valid,
                                 int64_t num_sequences, int64_t num_experts_per_token) {
  const Range range("sequence_balance_loss");
  check_balance(scores, valid, num_sequences);
  if (scores.scalar_type() == at::kDouble) {
    return reference::sequence_balance_loss(scores, valid, num_sequences, num_experts_per_token);
  }
  const int64_t sequence_length = scores.size(0) / num_sequences;
  const auto num_experts = static_cast<int32_t>(scores.size(1));
  at::Tensor s, mask, coefficients, loss;
  {
    const NoRecord guard;
    s = scores.contiguous();
    mask = valid.defined() ? valid.contiguous() : valid;
    coefficients = at::empty({num_sequences, num_experts}, s.options());
    loss = at::empty({}, s.options());
    const at::Tensor workspace = at::empty(
        {kernels::sequence_balance_workspace(num_sequences, sequence_length, num_experts)},
        s.options().dtype(at::kByte));
    kernels::sequence_balance_forward(
        {.num_sequences = num_sequences,
         .sequence_length = sequence_length,
         .num_experts = num_experts,
         .num_experts_per_token = static_cast<int32_t>(num_experts_per_token),
         .scores = s.const_data_ptr<float>(),
         .valid = pointer_or_null(mask),
         .coefficients = coefficients.mutable_data_ptr<float>(),
         .loss = loss.mutable_data_ptr<float>(),
         .workspace = workspace.mutable_data_ptr()},
        stream_of(s));
  }
  if (!recording({scores})) return loss;
  record("sequence_balance_loss", {scores}, {loss},
         [=, s = s.detach()](const Tensors& grads) -> Tensors {
           if (!grads[0].defined()) return {at::Tensor()};
           at::Tensor dscores = at::empty_like(s);
           kernels::sequence_balance_backward({.num_sequences = num_sequences,
                                               .sequence_length = sequence_length,
                                               .num_experts = num_experts,
                                               .scores = s.const_data_ptr<float>(),
                                               .valid = pointer_or_null(mask),
                                               .coefficients = coefficients.const_data_ptr<float>(),
                                               .dloss = grads[0].const_data_ptr<float>(),
                                               .dscores = dscores.mutable_data_ptr<float>()},
                                              stream_of(s));
           return {dscores};
         });
  return loss;
}

}  // namespace dsv3::ops
