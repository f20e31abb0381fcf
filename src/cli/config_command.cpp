#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "cli/commands.h"
#include "config/load.h"

namespace dsv3::cli {
namespace {

constexpr const char* kExamples = R"(Examples:
  dsv3 config configs/deepseek_v3_tiny.yaml                               every key, resolved
  dsv3 config configs/deepseek_v3_small.yaml training.steps=200 optimizer.learning_rate=1e-3
  dsv3 config my.yaml 'optimizer.learning_rate={type: cosine, peak: 1e-3, warmup_steps: 100}'
  dsv3 config configs/deepseek_v3_small.yaml --deepspeed configs/deepspeed_config.json
  dsv3 config --keys                                                      all keys, as Markdown

The output is YAML that loads back to the same config. What is wrong goes to stderr, all of it at
once, as FILE:LINE:COLUMN: key: what is wrong, what would be right; the exit code is then 2.
Every key is described in configs/README.md.)";

struct ConfigArguments {
  std::string config;
  std::vector<std::string> overrides;
  std::string deepspeed;
  bool keys = false;
};

void run_config(const ConfigArguments& arguments) {
  if (arguments.keys) {
    fmt::print("{}", keys_as_markdown());
    return;
  }
  require(!arguments.config.empty(), "config: expected a YAML file, or --keys");
  fmt::print("{}",
             to_yaml(load_config(arguments.config, arguments.overrides, arguments.deepspeed)));
}

}  // namespace

void add_config_command(CLI::App& app) {
  auto* command = app.add_subcommand("config", "Check a config and print it resolved");
  const auto arguments = std::make_shared<ConfigArguments>();
  command->add_option("config", arguments->config, "YAML file");
  command->add_option("overrides", arguments->overrides,
                      "key.path=value …, which win over the file");
  command->add_option("--deepspeed", arguments->deepspeed,
                      "DeepSpeed JSON; its values win over the YAML's, \"auto\" takes the YAML's");
  command->add_flag("--keys", arguments->keys, "Print the table of all keys in Markdown");
  command->footer(kExamples);
  command->callback([arguments] { run_config(*arguments); });
}

}  // namespace dsv3::cli
