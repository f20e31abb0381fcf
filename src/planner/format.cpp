#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "planner/plan.h"

namespace dsv3 {
namespace {

std::string count(double value) {
  if (value >= 1e9) return fmt::format("{:.2f} B", value / 1e9);
  if (value >= 1e6) return fmt::format("{:.2f} M", value / 1e6);
  return fmt::format("{:.1f} K", value / 1e3);
}

std::string flops(double value) {
  return value >= 1e15 ? fmt::format("{:.4g} P", value / 1e15)
                       : fmt::format("{:.4g} T", value / 1e12);
}

std::string bytes(double value) {
  constexpr double kGiB = 1 << 30, kMiB = 1 << 20;
  return value >= kGiB ? fmt::format("{:.2f} GiB", value / kGiB)
                       : fmt::format("{:.1f} MiB", value / kMiB);
}

const char* name_of(Recompute recompute) {
  switch (recompute) {
    case Recompute::kNone:
      return "none";
    case Recompute::kSelective:
      return "selective";
    case Recompute::kFull:
      return "full";
  }
  return "?";
}

}  // namespace

std::string to_text(const Plan& plan, const Config& config) {
  std::string text = fmt::format("{:<18} {:>12} {:>12}\n", "parameters", "total", "active");
  for (int i = 0; i < kNumModelParts; ++i) {
    const auto& part = plan.parts[static_cast<size_t>(i)];
    if (part.total == 0 || static_cast<ModelPart>(i) == ModelPart::kMtp) continue;
    text += fmt::format("  {:<16} {:>12} {:>12}\n", name_of(static_cast<ModelPart>(i)),
                        count(static_cast<double>(part.total)), count(part.active));
  }
  text += fmt::format("  {:<16} {:>12} {:>12}\n", "model",
                      count(static_cast<double>(plan.model.total)), count(plan.model.active));
  const auto& mtp = plan.parts[static_cast<size_t>(ModelPart::kMtp)];
  if (mtp.total > 0) {
    text += fmt::format("  {:<16} {:>12} {:>12}   embedding and head are the model's\n",
                        name_of(ModelPart::kMtp), count(static_cast<double>(mtp.total)),
                        count(mtp.active));
  }
  text += fmt::format("\nFLOPs per trained token at {} tokens a sequence, causal: {:.4g} G",
                      config.data.sequence_length, plan.flops_per_token / 1e9);
  if (mtp.total > 0)
    text += fmt::format(" ({:.4g} G without MTP)", plan.flops_per_token_without_mtp / 1e9);
  text += fmt::format("\ntokens per step: {:.0f}, FLOPs per step: {}\n", plan.tokens_per_step,
                      flops(plan.tokens_per_step * plan.flops_per_token));
  const auto& layout = plan.layout;
  text += fmt::format("\nlayout: tp({}) × pp({}) × cp({}) × dp({}) = {} rank{}, ep({}), ZeRO {}\n",
                      layout.tensor, layout.pipeline, layout.context, layout.data, layout.ranks,
                      layout.ranks == 1 ? "" : "s", layout.expert, layout.zero_stage);
  const auto& memory = plan.memory;
  text += fmt::format(
      "memory on the fullest rank (stage {}, {} sequences a micro-batch, recompute {}):\n",
      memory.stage, config.training.micro_batch_size, name_of(config.training.recompute));
  const std::pair<const char*, double> rows[] = {{"weights", memory.weights},
                                                 {"gradients", memory.gradients},
                                                 {"master weights", memory.masters},
                                                 {"moments", memory.moments},
                                                 {"activations ~", memory.activations},
                                                 {"logits ~", memory.logits},
                                                 {"total ~", memory.total()}};
  for (const auto& [name, value] : rows)
    text += fmt::format("  {:<16} {:>12}\n", name, bytes(value));
  return text;
}

std::string to_json(const Plan& plan) {
  nlohmann::ordered_json json;
  auto& parameters = json["parameters"];
  parameters["total"] = plan.model.total;
  parameters["active"] = plan.model.active;
  for (int i = 0; i < kNumModelParts; ++i) {
    const auto& part = plan.parts[static_cast<size_t>(i)];
    parameters["parts"][name_of(static_cast<ModelPart>(i))] = {{"total", part.total},
                                                               {"active", part.active}};
  }
  json["flops_per_token"] = plan.flops_per_token;
  json["flops_per_token_without_mtp"] = plan.flops_per_token_without_mtp;
  json["tokens_per_step"] = plan.tokens_per_step;
  const auto& layout = plan.layout;
  json["layout"] = {{"ranks", layout.ranks},
                    {"tensor_parallel_size", layout.tensor},
                    {"pipeline_parallel_size", layout.pipeline},
                    {"context_parallel_size", layout.context},
                    {"data_parallel_size", layout.data},
                    {"expert_parallel_size", layout.expert},
                    {"zero_stage", layout.zero_stage}};
  const auto& memory = plan.memory;
  json["memory_bytes"] = {{"stage", memory.stage},
                          {"weights", memory.weights},
                          {"gradients", memory.gradients},
                          {"master_weights", memory.masters},
                          {"moments", memory.moments},
                          {"activations_estimate", memory.activations},
                          {"logits_estimate", memory.logits},
                          {"total_estimate", memory.total()}};
  return json.dump(2);
}

}  // namespace dsv3
