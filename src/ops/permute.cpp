#include "ops/permute.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "base/error.h"
#include "kernels/routing.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"
#include "ops/range.h"

namespace dsv3::ops {
namespace {

int32_t choices_of(const Permutation& permutation) {
  return static_cast<int32_t>(permutation.row_of.size(1));
}

/// y[t] = base[t] + Σ_k weights[t, k] · rows[row_of[t, k]]; undefined weights are 1, an undefined
/// base 0.
at::Tensor combine_rows(const at::Tensor& rows, const at::Tensor& weights,
                        const Permutation& permutation, const at::Tensor& base) {
  const int64_t num_tokens = permutation.row_of.size(0), hidden = rows.size(1);
  at::Tensor y = at::empty({num_tokens, hidden}, rows.options());
  kernels::combine_forward(
      {.num_tokens = num_tokens,
       .num_experts_per_token = choices_of(permutation),
       .hidden = hidden,
       .dtype = dtype_of(rows, "combine", "rows"),
       .rows = rows.const_data_ptr(),
       .weights = weights.defined() ? weights.const_data_ptr<float>() : nullptr,
       .row_of = permutation.row_of.const_data_ptr<int32_t>(),
       .base = base.defined() ? base.const_data_ptr() : nullptr,
       .y = y.mutable_data_ptr()},
      stream_of(rows));
  return y;
}

/// {drows, dweights}, each only where it is wanted.
Tensors combine_gradient(const at::Tensor& dy, const at::Tensor& rows, const at::Tensor& weights,
                         const Permutation& permutation, bool wants_rows, bool wants_weights) {
  at::Tensor drows, dweights;
  if (wants_rows) drows = at::empty_like(rows);
  if (wants_weights) dweights = at::empty_like(weights);
  if (!wants_rows && !wants_weights) return {drows, dweights};
  kernels::combine_backward(
      {.num_tokens = dy.size(0),
       .num_experts_per_token = choices_of(permutation),
       .hidden = dy.size(1),
       .dtype = dtype_of(dy, "combine", "dy"),
       .dy = dy.const_data_ptr(),
       .rows = rows.const_data_ptr(),
       .weights = weights.const_data_ptr<float>(),
       .row_of = permutation.row_of.const_data_ptr<int32_t>(),
       .drows = wants_rows ? drows.mutable_data_ptr() : nullptr,
       .dweights = wants_weights ? dweights.mutable_data_ptr<float>() : nullptr},
      stream_of(dy));
  return {drows, dweights};
}

void check_combine(const at::Tensor& rows, const at::Tensor& weights,
                   const Permutation& permutation, const at::Tensor& base) {
  check_shape(rows, "combine", "rows", {permutation.choice_of.size(0), -1});
  check_shape(weights, "combine", "weights", permutation.row_of.sizes());
  require(weights.scalar_type() == (has_kernel(rows) ? at::kFloat : at::kDouble),
          "[combine] weights: expected dtype Float (Double with Double rows), got {}",
          c10::toString(weights.scalar_type()));
  require(weights.device() == rows.device(), "[combine] weights: expected device {}, got {}",
          rows.device().str(), weights.device().str());
  if (!base.defined()) return;
  check_shape(base, "combine", "base", {permutation.row_of.size(0), rows.size(1)});
  check_like(base, "combine", "base", rows, "rows");
}

}  // namespace

Permutation make_permutation(const at::Tensor& experts, int64_t num_experts) {
  const Range range("make_permutation");
  const NoRecord guard;
  check_shape(experts, "make_permutation", "experts", {-1, -1});
  check_int32(experts, "make_permutation", "experts", experts);
  const at::Tensor ids = experts.contiguous();
  const int64_t num_choices = ids.numel();
  const auto count = static_cast<int32_t>(num_experts);
  Permutation result{at::empty({num_experts}, ids.options()),
                     at::empty({num_experts}, ids.options()), at::empty(ids.sizes(), ids.options()),
                     at::empty({num_choices}, ids.options())};
  const at::Tensor workspace =
      at::empty({kernels::permutation_workspace(num_choices, count)}, ids.options());
  kernels::make_permutation({.num_tokens = ids.size(0),
                             .num_experts_per_token = static_cast<int32_t>(ids.size(1)),
                             .num_experts = count,
                             .experts = ids.const_data_ptr<int32_t>(),
                             .counts = result.counts.mutable_data_ptr<int32_t>(),
                             .offsets = result.offsets.mutable_data_ptr<int32_t>(),
                             .row_of = result.row_of.mutable_data_ptr<int32_t>(),
                             .choice_of = result.choice_of.mutable_data_ptr<int32_t>(),
                             .workspace = workspace.mutable_data_ptr<int32_t>()},
                            stream_of(ids));
  return result;
}

at::Tensor permute(const at::Tensor& x, const Permutation& permutation) {
  const Range range("permute");
  check_shape(x, "permute", "x", {permutation.row_of.size(0), -1});
  if (!has_kernel(x)) return reference::permute(x, permutation);
  at::Tensor y;
  {
    const NoRecord guard;
    const at::Tensor rows = x.contiguous();
    y = at::empty({permutation.choice_of.size(0), x.size(1)}, x.options());
    kernels::permute_forward({.num_tokens = x.size(0),
                              .num_experts_per_token = choices_of(permutation),
                              .hidden = x.size(1),
                              .dtype = dtype_of(x, "permute", "x"),
                              .x = rows.const_data_ptr(),
                              .row_of = permutation.row_of.const_data_ptr<int32_t>(),
                              .y = y.mutable_data_ptr()},
                             stream_of(x));
  }
  if (!recording({x})) return y;
  record("permute", {x}, {y}, [permutation](const Tensors& grads) -> Tensors {
    if (!grads[0].defined()) return {at::Tensor()};
    return {combine_rows(grads[0].contiguous(), at::Tensor(), permutation, at::Tensor())};
  });
  return y;
}

at::Tensor combine(const at::Tensor& rows, const at::Tensor& weights,
                   const Permutation& permutation, const at::Tensor& base) {
  const Range range("combine");
  check_combine(rows, weights, permutation, base);
  if (!has_kernel(rows)) return reference::combine(rows, weights, permutation, base);
  at::Tensor y, saved_rows, saved_weights;
  {
    const NoRecord guard;
    saved_rows = rows.contiguous();
    saved_weights = weights.contiguous();
    y = combine_rows(saved_rows, saved_weights, permutation,
                     base.defined() ? base.contiguous() : base);
  }
  if (!recording({rows, weights, base})) return y;
  const bool wants_rows = rows.requires_grad(), wants_weights = weights.requires_grad();
  const bool wants_base = base.defined() && base.requires_grad();
  record("combine", {rows, weights, base}, {y},
         [permutation, wants_rows, wants_weights, wants_base, saved_rows = saved_rows.detach(),
          saved_weights = saved_weights.detach()](const Tensors& grads) -> Tensors {
           if (!grads[0].defined()) return {at::Tensor(), at::Tensor(), at::Tensor()};
           const at::Tensor dy = grads[0].contiguous();
           Tensors result = combine_gradient(dy, saved_rows, saved_weights, permutation, wants_rows,
                                             wants_weights);
           result.push_back(wants_base ? dy : at::Tensor());
           return result;
         });
  return y;
}

}  // namespace dsv3::ops
