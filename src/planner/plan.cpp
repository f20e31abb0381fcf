#include "planner/plan.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "model/model.h"
#include "planner/memory.h"

namespace dsv3 {
namespace {

Layout make_layout(const ParallelConfig& parallel, int64_t ranks) {
  Layout layout;
  layout.tensor = parallel.tensor_parallel_size;
  layout.pipeline = parallel.pipeline_parallel_size;
  layout.context = parallel.context_parallel_size;
  layout.expert = parallel.expert_parallel_size;
  layout.zero_stage = parallel.zero_stage;
  const int64_t replica = layout.tensor * layout.pipeline * layout.context;
  if (ranks > 0) {
    require(ranks % replica == 0, "tp({}) × pp({}) × cp({}) = {} does not divide {} ranks",
            layout.tensor, layout.pipeline, layout.context, replica, ranks);
    layout.data = ranks / replica;
    require(parallel.data_parallel_size == 0 || parallel.data_parallel_size == layout.data,
            "tp({}) × pp({}) × cp({}) × dp({}) = {}, but there are {} ranks", layout.tensor,
            layout.pipeline, layout.context, parallel.data_parallel_size,
            replica * parallel.data_parallel_size, ranks);
  } else if (parallel.data_parallel_size > 0) {
    layout.data = parallel.data_parallel_size;
  } else {
    // The smallest data parallelism over which the experts' ranks fold.
    layout.data = layout.expert / std::gcd(layout.expert, layout.tensor * layout.context);
  }
  layout.ranks = replica * layout.data;
  const int64_t foldable = layout.tensor * layout.context * layout.data;
  require(foldable % layout.expert == 0, "ep({}) does not divide tp({}) × cp({}) × dp({}) = {}",
          layout.expert, layout.tensor, layout.context, layout.data, foldable);
  return layout;
}

}  // namespace

Plan make_plan(const Config& config, int64_t ranks) {
  require(ranks >= 0, "{} ranks: give 1 or more", ranks);
  require(config.model.vocab_size > 0,
          "model.vocab_size: 0, but a plan needs the vocabulary's size");
  ParameterSet parameters;
  const Model model(config.model, parameters);
  Plan plan;
  for (const auto& parameter : parameters.parameters()) {
    const auto& spec = parameter.spec;
    if (!spec.trainable) continue;
    const auto part = part_of(spec, config.model);
    const double active = static_cast<double>(spec.numel()) * spec.active_fraction;
    auto& count = plan.parts[static_cast<size_t>(part)];
    count.total += spec.numel();
    count.active += active;
    if (part == ModelPart::kMtp) continue;
    plan.model.total += spec.numel();
    plan.model.active += active;
  }
  const int64_t length = config.data.sequence_length;
  plan.flops_per_token = flops_per_token(config.model, parameters, length, true);
  plan.flops_per_token_without_mtp = flops_per_token(config.model, parameters, length, false);
  plan.tokens_per_step = config.training.global_batch_size.at(0, 0) * static_cast<double>(length);
  plan.layout = make_layout(config.parallel, ranks);
  plan.memory = plan_memory(config, parameters, plan.layout);
  return plan;
}

}  // namespace dsv3
