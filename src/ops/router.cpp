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

void check_route(const at::Tensor& logits, const at::Tensor& bias, const RouterOptions& options) {
  kernels::check_router_shape(shape_of(options));
  check_shape(logits, "route", "logits", {-1, options.num_experts});
  require(logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kDouble,
          "[route] logits: expected dtype Float (the router computes in FP32), got {}",
          c10::toString(logits.scalar_type()));
  if (!bias.defined()) return;
  check_shape(bias, "route", "bias", {options.num_experts});
  check_like(bias, "route", "bias", logits, "logits");
}

/// dlogits from the gradients of weights and scores, either of which may be undefined.
at::Tensor route_gradient(const kernels::RouterShape& shape, const at::Tensor& experts,
                          const at::Tensor& scores, const at::Tensor& dweights,
                          const at::Tensor& dscores) {
  const at::Tensor dw = dweights.defined() ? dweights.contiguous() : dweights;
  const at::Tensor ds = dscores.defined() ? dscores.contiguous() : dscores;
  at::Tensor dlogits = at::empty_like(scores);
  kernels::route_backward({.num_tokens = scores.size(0),
                           .shape = shape,
                           .experts = experts.const_data_ptr<int32_t>(),
                           .scores = scores.const_data_ptr<float>(),
                           .dweights = dw.defined() ? dw.const_data_ptr<float>() : nullptr,
                           .dscores = ds.defined() ? ds.const_data_ptr<float>() : nullptr,
                           .dlogits = dlogits.mutable_data_ptr<float>()},
                          stream_of(scores));
  return dlogits;
}

}  // namespace

Routing route(const at::Tensor& logits, const at::Tensor& bias, const RouterOptions& options) {
  const Range range("route");
  check_route(logits, bias, options);
  if (logits.scalar_type() == at::kDouble) return reference::route(logits, bias, options);
  const auto shape = shape_of(options);
  const int64_t num_tokens = logits.size(0), num_choices = options.num_experts_per_token;
  Routing result;
  {
    const NoRecord guard;
    const at::Tensor x = logits.contiguous();
    const at::Tensor b = bias.defined() ? bias.contiguous() : bias;
    result.experts = at::empty({num_tokens, num_choices}, x.options().dtype(at::kInt));
    result.weights = at::empty({num_tokens, num_choices}, x.options());
    result.scores = at::empty({num_tokens, options.num_experts}, x.options());
    kernels::route_forward({.num_tokens = num_tokens,
                            .shape = shape,
                            .logits = x.const_data_ptr<float>(),
                            .bias = b.defined() ? b.const_data_ptr<float>() : nullptr,
                            .experts = result.experts.mutable_data_ptr<int32_t>(),
                            .weights = result.weights.mutable_data_ptr<float>(),
                            .scores = result.scores.mutable_data_ptr<float>()},
                           stream_of(x));
  }
  if (!recording({logits})) return result;
  record("route", {logits}, {result.weights, result.scores},
         [shape, experts = result.experts,
          scores = result.scores.detach()](const Tensors& grads) -> Tensors {
           if (!grads[0].defined() && !grads[1].defined()) return {at::Tensor()};
           return {route_gradient(shape, experts, scores, grads[0], grads[1])};
         });
  return result;
}

}  // namespace dsv3::ops
