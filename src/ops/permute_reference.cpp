// Expert order by a stable sort, for tests and float64.

#include <ATen/TensorOperators.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/bincount.h>

#include "ops/permute.h"

namespace dsv3::ops::reference {

Permutation make_permutation(const at::Tensor& experts, int64_t num_experts) {
  const at::Tensor ids = experts.flatten().to(at::kLong);
  const at::Tensor choice_of = at::argsort(ids, /*stable=*/true);
  const at::Tensor counts = at::bincount(ids, {}, num_experts);
  return {counts.to(at::kInt), counts.cumsum(0).to(at::kInt),
          at::argsort(choice_of).view(experts.sizes()).to(at::kInt), choice_of.to(at::kInt)};
}

at::Tensor permute(const at::Tensor& x, const Permutation& permutation) {
  const int64_t num_choices = permutation.row_of.size(1);
  return x.index_select(0, permutation.choice_of.div(num_choices, "floor"));
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
