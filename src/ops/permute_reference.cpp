// Expert order by a stable sort, for tests and float64.

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/full.h>

#include "ops/permute.h"

namespace dsv3::ops::reference {

Permutation make_permutation(const at::Tensor& experts, int64_t num_experts, int64_t row_multiple) {
  const at::Tensor ids = experts.flatten().to(at::kLong);
  const at::Tensor order = at::argsort(ids, /*stable=*/true);
  const at::Tensor counts = at::bincount(ids, {}, num_experts);
  const at::Tensor sizes = (counts + row_multiple - 1).div(row_multiple, "floor") * row_multiple;
  // Without padding row r holds the r-th choice; each expert's rows then move by the padding before
  // them.
  const at::Tensor shift = (sizes - counts).cumsum(0) - (sizes - counts);
  const at::Tensor rows = at::argsort(order) + shift.index_select(0, ids);
  const int64_t num_choices = ids.numel();
  const int64_t used = std::min(num_choices, num_experts);
  const int64_t num_rows = (num_choices + used * (row_multiple - 1)) / row_multiple * row_multiple;
  at::Tensor choice_of = at::full({num_rows}, -1, ids.options());
  choice_of.index_put_({rows}, at::arange(num_choices, ids.options()));
  return {counts.to(at::kInt), sizes.cumsum(0).to(at::kInt),
          rows.view(experts.sizes()).to(at::kInt), choice_of.to(at::kInt)};
}

at::Tensor permute(const at::Tensor& x, const Permutation& permutation) {
  const int64_t num_choices = permutation.row_of.size(1);
  const at::Tensor padding = permutation.choice_of.lt(0);
  const at::Tensor tokens = permutation.choice_of.clamp_min(0).div(num_choices, "floor");
  if (x.size(0) == 0) return x;
  return x.index_select(0, tokens).masked_fill(padding.unsqueeze(-1), 0.0);
}

at::Tensor combine(const at::Tensor& rows, const at::Tensor& weights,
                   const Permutation& permutation, const at::Tensor& base) {
  const auto& row_of = permutation.row_of;
  const at::Tensor chosen = rows.to(weights.scalar_type())
                                .index_select(0, row_of.flatten())
                                .view({row_of.size(0), row_of.size(1), rows.size(1)});
  at::Tensor y = (chosen * weights.unsqueeze(-1)).sum(1);
  if (base.defined()) y = y + base;
  return y.to(rows.scalar_type());
}

}  // namespace dsv3::ops::reference
