// The router and its sequence-wise loss as the report writes them, for tests and float64.

#include <ATen/TensorOperators.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "ops/router.h"

namespace dsv3::ops::reference {
namespace {

/// Ids of the k largest of the last dim, descending, ties to the lower id.
at::Tensor top(const at::Tensor& x, int64_t k) {
  return std::get<1>(at::sort(x, /*stable=*/true, -1, /*descending=*/true)).narrow(-1, 0, k);
}

/// `biased` [T, E] with -inf in all groups but the topk_group best.
at::Tensor limit_to_groups(const at::Tensor& biased, const RouterOptions& options) {
  const int64_t size = options.num_experts / options.n_group;
  const at::Tensor groups = biased.view({-1, options.n_group, size});
  const int64_t counted = options.group_score_top2 ? std::min<int64_t>(2, size) : 1;
  const at::Tensor group_scores = groups.gather(-1, top(groups, counted)).sum(-1);
  at::Tensor chosen =
      at::zeros({biased.size(0), options.n_group}, biased.options().dtype(at::kBool));
  chosen.scatter_(1, top(group_scores, options.topk_group), true);
  return groups
      .masked_fill(chosen.logical_not().unsqueeze(-1), -std::numeric_limits<double>::infinity())
      .view_as(biased);
}

/// {Σ_seq Σ_i f_i P_i} from scores [T, E].
at::Tensor balance_loss(const at::Tensor& scores, const SequenceBalance& balance,
                        int64_t num_choices) {
  const int64_t num_experts = scores.size(1), num_sequences = balance.num_sequences;
  const at::Tensor mask = balance.valid.defined() ? balance.valid.to(scores.scalar_type())
                                                  : scores.detach().select(1, 0).mul(0).add(1);
  at::Tensor chosen = at::zeros(scores.sizes(), scores.options());
  chosen.scatter_(1, top(scores.detach(), num_choices), 1.0);
  const at::Tensor share = scores / (scores.sum(1, true) + 1e-20);
  const auto per_sequence = [&](const at::Tensor& x) {
    return (x * mask.unsqueeze(1)).view({num_sequences, -1, num_experts}).sum(1);
  };
  // A sequence without valid tokens has sums of 0 and adds 0.
  const at::Tensor n = mask.view({num_sequences, -1}).sum(1, true).clamp_min(1.0);
  const at::Tensor f = per_sequence(chosen) * num_experts / (n * num_choices);
  return (f * per_sequence(share) / n).sum();
}

}  // namespace

Routing route(const at::Tensor& logits, const at::Tensor& bias, const RouterOptions& options,
              const SequenceBalance& balance) {
  const at::Tensor scores = options.sigmoid ? at::sigmoid(logits) : at::softmax(logits, -1);
  at::Tensor biased = scores.detach();
  if (bias.defined()) biased = biased + bias;
  if (options.topk_group < options.n_group) biased = limit_to_groups(biased, options);
  const at::Tensor experts = top(biased, options.num_experts_per_token);
  at::Tensor weights = scores.gather(1, experts);
  if (options.normalize) weights = weights / (weights.sum(1, true) + 1e-20);
  const at::Tensor counts = at::bincount(experts.flatten(), {}, options.num_experts);
  at::Tensor loss;
  if (balance.num_sequences > 0) {
    loss = balance_loss(scores, balance, options.num_experts_per_token);
  }
  return {experts.to(at::kInt), weights * options.scale, scores, counts.to(at::kInt), loss};
}

}  // namespace dsv3::ops::reference
