#include "ops/permute.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "base/error.h"
#include "kernels/routing.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"
#include "ops/fp8.h"
#include "ops/range.h"

namespace dsv3::ops {
namespace {

constexpr int64_t kMaxRowMultiple = 4096;

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
       .num_rows = permutation.choice_of.size(0),
       .dtype = dtype_of(dy, "combine", "dy"),
       .dy = dy.const_data_ptr(),
       .rows = rows.const_data_ptr(),
       .weights = weights.const_data_ptr<float>(),
       .row_of = permutation.row_of.const_data_ptr<int32_t>(),
       .choice_of = permutation.choice_of.const_data_ptr<int32_t>(),
       .drows = wants_rows ? drows.mutable_data_ptr() : nullptr,
       .dweights = wants_weights ? dweights.mutable_data_ptr<float>() : nullptr},
      stream_of(dy));
  return {drows, dweights};
}

/// A permutation that was not made for what it is used on would have kernels read elsewhere.
void check_permutation(const char* op, const Permutation& permutation, const at::Tensor& like) {
  check_shape(permutation.row_of, op, "row_of", {-1, -1});
  check_shape(permutation.choice_of, op, "choice_of", {-1});
  check_int32(permutation.row_of, op, "row_of", like);
  check_int32(permutation.choice_of, op, "choice_of", like);
  require(permutation.row_of.is_contiguous() && permutation.choice_of.is_contiguous() &&
              permutation.choice_of.numel() >= permutation.row_of.numel(),
          "[{}] permutation: expected contiguous tensors and a row for each of the {} choices, got "
          "{} rows",
          op, permutation.row_of.numel(), permutation.choice_of.numel());
}

/// What must be right before outputs can be allocated; the kernel checks the rest.
void check_sizes(const at::Tensor& experts, int64_t num_experts, int64_t row_multiple) {
  require(num_experts >= 1 && num_experts <= kernels::kMaxExperts,
          "[make_permutation] num_experts: expected 1 to {}, got {}", kernels::kMaxExperts,
          num_experts);
  require(row_multiple >= 1 && row_multiple <= kMaxRowMultiple,
          "[make_permutation] row_multiple: expected 1 to {}, got {}", kMaxRowMultiple,
          row_multiple);
  require(experts.size(1) >= 1, "[make_permutation] experts: expected [T, K ≥ 1], got [{}, 0]",
          experts.size(0));
}

void check_fp8(const at::Tensor& data, const at::Tensor& scales, const Permutation& permutation,
               const at::Tensor& weights) {
  check_permutation("permute_fp8", permutation, data);
  const int64_t num_tokens = permutation.row_of.size(0);
  check_shape(data, "permute_fp8", "data", {num_tokens, -1});
  check_shape(scales, "permute_fp8", "scales", {num_tokens, (data.size(1) + 127) / 128});
  require(data.scalar_type() == at::kFloat8_e4m3fn && data.is_contiguous(),
          "[permute_fp8] data: expected contiguous Float8_e4m3fn, got {}",
          c10::toString(data.scalar_type()));
  require(scales.scalar_type() == at::kFloat && scales.device() == data.device(),
          "[permute_fp8] scales: expected Float on {}, got {} on {}", data.device().str(),
          c10::toString(scales.scalar_type()), scales.device().str());
  require(num_tokens <= 1 || scales.stride(0) == 1,
          "[permute_fp8] scales: expected tokens next to each other (stride 1), got stride {}",
          scales.stride(0));
  if (!weights.defined()) return;
  check_shape(weights, "permute_fp8", "weights", permutation.row_of.sizes());
  check_like(weights, "permute_fp8", "weights", scales, "scales");
}

void check_combine(const at::Tensor& rows, const at::Tensor& weights,
                   const Permutation& permutation, const at::Tensor& base) {
  check_permutation("combine", permutation, rows);
  check_shape(rows, "combine", "rows", {permutation.choice_of.size(0), -1});
  check_number(rows, "combine", "rows");
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

Permutation make_permutation(const at::Tensor& experts, int64_t num_experts, int64_t row_multiple) {
  const Range range("make_permutation");
  const NoRecord guard;
  check_shape(experts, "make_permutation", "experts", {-1, -1});
  check_int32(experts, "make_permutation", "experts", experts);
  check_sizes(experts, num_experts, row_multiple);
  const at::Tensor ids = experts.contiguous();
  const int64_t num_choices = ids.numel();
  const auto count = static_cast<int32_t>(num_experts);
  const auto multiple = static_cast<int32_t>(row_multiple);
  Permutation result{
      at::empty({num_experts}, ids.options()), at::empty({num_experts}, ids.options()),
      at::empty(ids.sizes(), ids.options()),
      at::empty({kernels::permutation_rows(num_choices, count, multiple)}, ids.options())};
  const at::Tensor workspace =
      at::empty({kernels::permutation_workspace(num_choices, count)}, ids.options());
  kernels::make_permutation({.num_tokens = ids.size(0),
                             .num_experts_per_token = static_cast<int32_t>(ids.size(1)),
                             .num_experts = count,
                             .row_multiple = multiple,
                             .experts = ids.const_data_ptr<int32_t>(),
                             .counts = result.counts.mutable_data_ptr<int32_t>(),
                             .offsets = result.offsets.mutable_data_ptr<int32_t>(),
                             .row_of = result.row_of.mutable_data_ptr<int32_t>(),
                             .choice_of = result.choice_of.mutable_data_ptr<int32_t>(),
                             .workspace = workspace.mutable_data_ptr<int32_t>()},
                            stream_of(ids));
  return result;
}

Fp8RowTiles permute_fp8(const Fp8RowTiles& x, const Permutation& permutation,
                        const at::Tensor& weights) {
  const NoRecord guard;
  check_fp8(x.data, x.scales, permutation, weights);
  const int64_t num_rows = permutation.choice_of.size(0);
  const at::Tensor w = weights.defined() ? weights.contiguous() : weights;
  const Fp8RowTiles y = empty_row_tiles(num_rows, x.data.size(1), x.data);
  const kernels::Fp8Rows from = rows_of(x), to = rows_of(y);
  kernels::permute_forward({.num_tokens = x.data.size(0),
                            .num_experts_per_token = choices_of(permutation),
                            .hidden = x.data.size(1),
                            .num_rows = num_rows,
                            .dtype = DType::kF8E4M3,
                            .x = from.data,
                            .row_of = permutation.row_of.const_data_ptr<int32_t>(),
                            .choice_of = permutation.choice_of.const_data_ptr<int32_t>(),
                            .y = to.data,
                            .num_scales = static_cast<int32_t>(x.scales.size(1)),
                            .x_scales = from.scales,
                            .x_scale_stride = from.scale_stride,
                            .weights = w.defined() ? w.const_data_ptr<float>() : nullptr,
                            .y_scales = to.scales,
                            .y_scale_stride = to.scale_stride},
                           stream_of(x.data));
  return y;
}

at::Tensor permute(const at::Tensor& x, const Permutation& permutation) {
  const Range range("permute");
  check_permutation("permute", permutation, x);
  check_shape(x, "permute", "x", {permutation.row_of.size(0), -1});
  check_number(x, "permute", "x");
  if (!has_kernel(x)) return reference::permute(x, permutation);
  at::Tensor y;
  {
    const NoRecord guard;
    const at::Tensor rows = x.contiguous();
    y = at::empty({permutation.choice_of.size(0), x.size(1)}, x.options());
    kernels::permute_forward({.num_tokens = x.size(0),
                              .num_experts_per_token = choices_of(permutation),
                              .hidden = x.size(1),
                              .num_rows = permutation.choice_of.size(0),
                              .dtype = dtype_of(x, "permute", "x"),
                              .x = rows.const_data_ptr(),
                              .row_of = permutation.row_of.const_data_ptr<int32_t>(),
                              .choice_of = permutation.choice_of.const_data_ptr<int32_t>(),
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
