#include "ops/router.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "base/error.h"
#include "kernels/routing.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"
#include "ops/range.h"

namespace dsv3::ops {
namespace {

kernels::RouterShape shape_of(const RouterOptions& options) {
  return {.num_experts = static_cast<int32_t>(options.num_experts),
          .num_experts_per_token = static_cast<int32_t>(options.num_experts_per_token),
          .n_group = static_cast<int32_t>(options.n_group),
          .topk_group = static_cast<int32_t>(options.topk_group),
          .sigmoid = options.sigmoid,
          .group_score_top2 = options.group_score_top2,
          .normalize = options.normalize,
          .scale = static_cast<float>(options.scale)};
}

void check_balance(const at::Tensor& logits, const SequenceBalance& balance) {
  const auto& [num_sequences, valid] = balance;
  require(num_sequences >= 0 && (num_sequences == 0 || logits.size(0) % num_sequences == 0),
          "[route] num_sequences: expected a divisor of the {} tokens, or 0 for no loss, got {}",
          logits.size(0), num_sequences);
  if (!valid.defined()) return;
  check_shape(valid, "route", "valid", {logits.size(0)});
  require(valid.scalar_type() == at::kBool && valid.device() == logits.device(),
          "[route] valid: expected Bool on {}, got {} on {}", logits.device().str(),
          c10::toString(valid.scalar_type()), valid.device().str());
}

void check_route(const at::Tensor& logits, const at::Tensor& bias, const RouterOptions& options,
                 const SequenceBalance& balance) {
  kernels::check_router_shape(shape_of(options));
  check_shape(logits, "route", "logits", {-1, options.num_experts});
  require(logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kDouble,
          "[route] logits: expected dtype Float (the router computes in FP32), got {}",
          c10::toString(logits.scalar_type()));
  check_balance(logits, balance);
  if (!bias.defined()) return;
  check_shape(bias, "route", "bias", {options.num_experts});
  check_like(bias, "route", "bias", logits, "logits");
}

template <typename T>
const T* pointer_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

/// What backward needs of a forward.
struct Saved {
  kernels::RouterShape shape;
  int64_t num_sequences;
  at::Tensor experts, scores, valid, coefficients;
};

/// dlogits from the gradients of weights and loss, either of which may be undefined.
at::Tensor route_gradient(const Saved& saved, const at::Tensor& dweights, const at::Tensor& dloss) {
  const at::Tensor dw = dweights.defined() ? dweights.contiguous() : dweights;
  at::Tensor dlogits = at::empty_like(saved.scores);
  kernels::route_backward(
      {.num_tokens = saved.scores.size(0),
       .num_sequences = saved.num_sequences,
       .shape = saved.shape,
       .experts = saved.experts.const_data_ptr<int32_t>(),
       .scores = saved.scores.const_data_ptr<float>(),
       .dweights = pointer_or_null<float>(dw),
       .valid = pointer_or_null<bool>(saved.valid),
       .coefficients = dloss.defined() ? pointer_or_null<float>(saved.coefficients) : nullptr,
       .dloss = pointer_or_null<float>(dloss),
       .dlogits = dlogits.mutable_data_ptr<float>()},
      stream_of(saved.scores));
  return dlogits;
}

/// The kernel on contiguous FP32 tensors; `coefficients` (undefined = no loss) is filled.
Routing run(const at::Tensor& logits, const at::Tensor& bias, const kernels::RouterShape& shape,
            int64_t num_sequences, const at::Tensor& valid, const at::Tensor& coefficients) {
  const int64_t num_tokens = logits.size(0), num_choices = shape.num_experts_per_token;
  const auto ints = logits.options().dtype(at::kInt);
  Routing result{.experts = at::empty({num_tokens, num_choices}, ints),
                 .weights = at::empty({num_tokens, num_choices}, logits.options()),
                 .scores = at::empty(logits.sizes(), logits.options()),
                 .counts = at::empty({shape.num_experts}, ints),
                 .balance_loss = {}};
  if (coefficients.defined()) result.balance_loss = at::empty({}, logits.options());
  const at::Tensor workspace =
      at::empty({kernels::route_workspace(num_tokens, num_sequences, shape.num_experts)},
                ints.dtype(at::kByte));
  kernels::route_forward(
      {.num_tokens = num_tokens,
       .num_sequences = num_sequences,
       .shape = shape,
       .logits = logits.const_data_ptr<float>(),
       .bias = pointer_or_null<float>(bias),
       .experts = result.experts.mutable_data_ptr<int32_t>(),
       .weights = result.weights.mutable_data_ptr<float>(),
       .scores = result.scores.mutable_data_ptr<float>(),
       .counts = result.counts.mutable_data_ptr<int32_t>(),
       .valid = pointer_or_null<bool>(valid),
       .coefficients = coefficients.defined() ? coefficients.mutable_data_ptr<float>() : nullptr,
       .loss = coefficients.defined() ? result.balance_loss.mutable_data_ptr<float>() : nullptr,
       .workspace = workspace.mutable_data_ptr()},
      stream_of(logits));
  return result;
}

}  // namespace

Routing route(const at::Tensor& logits, const at::Tensor& bias, const RouterOptions& options,
              const SequenceBalance& balance) {
  const Range range("route");
  check_route(logits, bias, options, balance);
  if (logits.scalar_type() == at::kDouble) return reference::route(logits, bias, options, balance);
  const bool with_loss = balance.num_sequences > 0;
  Saved saved{.shape = shape_of(options),
              .num_sequences = with_loss ? balance.num_sequences : 1,
              .experts = {},
              .scores = {},
              .valid = {},
              .coefficients = {}};
  Routing result;
  {
    const NoRecord guard;
    const at::Tensor x = logits.contiguous();
    if (with_loss) {
      saved.coefficients = at::empty({balance.num_sequences, options.num_experts}, x.options());
      if (balance.valid.defined()) saved.valid = balance.valid.contiguous();
    }
    result = run(x, bias.defined() ? bias.contiguous() : bias, saved.shape, saved.num_sequences,
                 saved.valid, saved.coefficients);
  }
  if (!recording({logits})) return result;
  saved.experts = result.experts;
  saved.scores = result.scores;
  Tensors outputs{result.weights};
  if (with_loss) outputs.push_back(result.balance_loss);
  record("route", {logits}, outputs, [saved](const Tensors& grads) -> Tensors {
    const at::Tensor dloss = grads.size() > 1 ? grads[1] : at::Tensor();
    if (!grads[0].defined() && !dloss.defined()) return {at::Tensor()};
    return {route_gradient(saved, grads[0], dloss)};
  });
  return result;
}

}  // namespace dsv3::ops
