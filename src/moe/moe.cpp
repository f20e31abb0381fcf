#include "moe/moe.h"

#include <fmt/format.h>

#include "moe/balance.h"
#include "ops/checkpoint.h"
#include "ops/gate.h"
#include "ops/linear.h"
#include "ops/permute.h"
#include "ops/router.h"
#include "ops/swiglu.h"

namespace dsv3 {
namespace {

Parameter* declare_experts(ParameterSet& parameters, const ModelConfig& config, int64_t layer,
                           const std::string& prefix, bool gate_up) {
  const MoeConfig& moe = config.moe;
  const int64_t hidden = config.hidden_size;
  const int64_t inner = moe.moe_intermediate_size;
  ParameterSpec spec{
      .name = prefix + (gate_up ? "experts.gate_up_proj" : "experts.down_proj"),
      .shape = gate_up ? std::vector<int64_t>{moe.num_experts, 2 * inner, hidden}
                       : std::vector<int64_t>{moe.num_experts, hidden, inner},
      .pieces = {},
      .layer = layer,
      .expert = true,
      .init_std = config.initializer_range,
      .active_fraction =
          static_cast<double>(moe.num_experts_per_token) / static_cast<double>(moe.num_experts),
  };
  for (int64_t expert = 0; expert < moe.num_experts; ++expert) {
    const std::string name = fmt::format("{}experts.{}.", prefix, expert);
    if (gate_up) {
      spec.pieces.push_back({name + "gate_proj.weight", expert, 0, inner, 0});
      spec.pieces.push_back({name + "up_proj.weight", expert, inner, 2 * inner, 0});
    } else {
      spec.pieces.push_back({name + "down_proj.weight", expert, 0, hidden, 1});
    }
  }
  return &parameters.declare(std::move(spec));
}

ops::RouterOptions router_options(const MoeConfig& moe) {
  return {.num_experts = moe.num_experts,
          .num_experts_per_token = moe.num_experts_per_token,
          .n_group = moe.n_group,
          .topk_group = moe.topk_group,
          .sigmoid = moe.scoring == MoeConfig::Scoring::kSigmoid,
          .group_score_top2 = moe.group_score == MoeConfig::GroupScore::kTop2Sum,
          .normalize = moe.norm_topk_prob,
          .scale = moe.routed_scaling_factor};
}

/// What the router tells of this forward: the balance loss only where it is wanted.
ops::SequenceBalance balance_of(const MoeConfig& moe, const ForwardContext& context,
                                const MoeStatistics* statistics) {
  const bool wanted = statistics != nullptr && moe.sequence_loss_alpha > 0;
  return {.num_sequences = wanted ? context.num_sequences : 0, .valid = context.valid};
}

}  // namespace

Moe Moe::declare(ParameterSet& parameters, const ModelConfig& config, int64_t layer,
                 const std::string& prefix) {
  const MoeConfig& moe = config.moe;
  Moe module;
  module.config = &config;
  module.gate = &parameters.declare({
      .name = prefix + "gate.weight",
      .shape = {moe.num_experts, config.hidden_size},
      .pieces = {{.name = prefix + "gate.weight", .row_end = moe.num_experts}},
      .layer = layer,
      .float32 = true,
      .init_std = config.initializer_range,
  });
  if (moe.use_bias) {
    module.gate_bias = &parameters.declare({
        .name = prefix + "gate.e_score_correction_bias",
        .shape = {moe.num_experts},
        .pieces = {{.name = prefix + "gate.e_score_correction_bias", .row_end = moe.num_experts}},
        .layer = layer,
        .float32 = true,
        .decay = false,
        .trainable = false,
        .init = Init::kZeros,
    });
  }
  module.experts_gate_up = declare_experts(parameters, config, layer, prefix, /*gate_up=*/true);
  module.experts_down = declare_experts(parameters, config, layer, prefix, /*gate_up=*/false);
  if (moe.num_shared_experts > 0) {
    module.shared = Mlp::declare(parameters, config, layer, prefix + "shared_experts.",
                                 moe.num_shared_experts * moe.moe_intermediate_size);
  }
  return module;
}

at::Tensor Moe::forward(const ops::Remakable& input, const ForwardContext& context,
                        MoeStatistics* statistics) const {
  const MoeConfig& moe = config->moe;
  const ops::Remakable x = context.keep_or_remake(input);

  const ops::Routing routing = ops::route(
      ops::gate(x, gate->weight), gate_bias != nullptr ? gate_bias->value() : at::Tensor(),
      router_options(moe), balance_of(moe, context, statistics));
  const ops::Permutation permutation = ops::make_permutation(routing.experts, moe.num_experts);

  ops::Remakable rows{ops::permute(x.value, permutation), {}};
  if (context.recompute == Recompute::kSelective) {
    const auto source = x.remake ? x.remake : [value = x.value.detach()] { return value; };
    rows.remake = [source, permutation] { return ops::permute(source(), permutation); };
  }
  const at::Tensor projected =
      ops::grouped_linear(rows, experts_gate_up->weight, permutation.offsets);
  const at::Tensor outputs = ops::grouped_linear(context.keep_or_remake(ops::swiglu(projected)),
                                                 experts_down->weight, permutation.offsets);
  const at::Tensor base = shared.down != nullptr ? shared.forward(x, context) : at::Tensor();
  at::Tensor y = ops::combine(outputs, routing.weights, permutation, base);

  if (statistics != nullptr) {
    if (!ops::recomputing()) {
      statistics->counts = context.valid.defined()
                               ? count_tokens(routing.experts, context.valid, moe.num_experts)
                               : routing.counts;
    }
    statistics->balance_loss = routing.balance_loss;
  }
  return y;
}

}  // namespace dsv3
