#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

#include "cli/checks.h"
#include "cli/commands.h"
#include "config/load.h"
#include "data/tokenizer.h"
#include "planner/plan.h"

namespace dsv3::cli {
namespace {

constexpr const char* kExamples = R"(Examples:
  dsv3 plan configs/deepseek_v3_base.yaml                          671 B parameters, 37 B active
  dsv3 plan configs/deepseek_v3_base.yaml --ranks 2048 parallel.pipeline_parallel_size=16 \
    parallel.expert_parallel_size=64 parallel.zero_stage=1         memory of one GPU in that layout
  dsv3 plan configs/deepseek_v3_small.yaml --json                  the same as one JSON object

Nothing is allocated. Activations and logits are estimates, marked with ~; the rest is counted.)";

struct PlanArguments {
  std::string config;
  std::vector<std::string> overrides;
  int64_t ranks = 0;
  bool json = false;
};

void run_plan(const PlanArguments& arguments) {
  Config config = load_config(arguments.config, arguments.overrides);
  if (config.model.vocab_size == 0)
    config.model.vocab_size = make_tokenizer(config.data.tokenizer)->vocab_size();
  const Plan plan = make_plan(config, arguments.ranks);
  fmt::print("{}{}", arguments.json ? to_json(plan) : to_text(plan, config),
             arguments.json ? "\n" : "");
}

}  // namespace

void add_plan_command(CLI::App& app) {
  auto* command = app.add_subcommand(
      "plan", "Parameters, FLOPs per token and memory of a config, without allocating anything");
  const auto arguments = std::make_shared<PlanArguments>();
  command->add_option("config", arguments->config, "YAML file")->required();
  command->add_option("overrides", arguments->overrides, "key.path=value …, as in dsv3 config");
  command
      ->add_option("--ranks", arguments->ranks,
                   "Processes (default: the fewest that the layout allows)")
      ->check(positive());
  command->add_flag("--json", arguments->json, "One JSON object instead of tables");
  command->footer(kExamples);
  command->callback([arguments] { run_plan(*arguments); });
}

}  // namespace dsv3::cli
