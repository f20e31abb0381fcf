#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "config/load.h"
#include "inference/generate.h"
#include "training/stop_signals.h"
#include "training/trainer.h"

namespace dsv3::cli {
namespace {

constexpr const char* kExamples = R"(Examples:
  dsv3 train configs/deepseek_v3_tiny.yaml
  dsv3 train configs/deepseek_v3_tiny.yaml --out runs/first --steps 200
  dsv3 train configs/deepseek_v3_small.yaml optimizer.learning_rate=1e-3 training.micro_batch_size=4
  dsv3 train configs/deepseek_v3_tiny.yaml --device cpu training.num_threads=2 training.time_limit_minutes=10

The run's directory holds config.yaml (resolved), metrics.jsonl (one object a step), log.txt and checkpoints/step_N.
Ctrl-C or SIGTERM finishes the step, saves and exits with 130; a second one stops at once.
Exit codes: 0 trained; 1 a file, a device, memory or the numbers failed; 2 wrong command line or config; 130 stopped.)";

struct TrainArguments {
  std::string config;
  std::vector<std::string> overrides;
  std::string out;
  std::string device;
  std::string deepspeed;
  int64_t steps = 0;
  bool overwrite = false;
  std::vector<int64_t> profile;
};

/// Text that the trained model writes after training.sample_prompt.
void print_sample(Trainer& trainer) {
  const auto& training = trainer.config().training;
  // Ids of another program's tokenizer stand for no text.
  if (training.sample_tokens <= 0 || trainer.tokenizer().name() != "bytes") return;
  GenerateOptions options;
  options.max_tokens = training.sample_tokens;
  options.sampling = {.temperature = 0.8, .top_k = 0, .top_p = 0.95};
  options.seed = static_cast<uint64_t>(training.seed);
  options.stop_tokens = {trainer.tokenizer().specials().end_of_document};
  const std::string text = generate_text(trainer.model(), trainer.device(), trainer.tokenizer(),
                                         training.sample_prompt, options);
  fmt::print("\nsample (temperature 0.8, top-p 0.95):\n{}{}\n", training.sample_prompt, text);
}

void print_next_steps(const std::filesystem::path& run, const std::string& config) {
  fmt::print(
      "\ngo on with the run:\n"
      "  dsv3 generate {0} --prompt \"…\"\n"
      "  dsv3 eval {0} DATA\n"
      "train again, the old run moved aside:\n"
      "  dsv3 train {1} --out {0} --overwrite\n",
      run.string(), config);
}

void run_train(const TrainArguments& arguments) {
  std::vector<std::string> overrides = arguments.overrides;
  if (arguments.steps > 0) overrides.push_back(fmt::format("training.steps={}", arguments.steps));
  if (!arguments.device.empty()) overrides.push_back("training.device=" + arguments.device);
  const Config config = load_config(arguments.config, overrides, arguments.deepspeed);
  const std::filesystem::path run =
      arguments.out.empty()
          ? std::filesystem::path("runs") / std::filesystem::path(arguments.config).stem()
          : std::filesystem::path(arguments.out);
  TrainingResult result;
  {
    const StopSignals signals;
    Trainer trainer(config, {.directory = run,
                             .overwrite = arguments.overwrite,
                             .console = stdout,
                             .terminal = ::isatty(STDOUT_FILENO) == 1,
                             .stop_requested = StopSignals::requested,
                             .profile_first = arguments.profile.empty() ? 0 : arguments.profile[0],
                             .profile_last = arguments.profile.empty() ? 0 : arguments.profile[1]});
    result = trainer.run();
    if (result.reason != StopReason::kRequested) print_sample(trainer);
  }
  print_next_steps(run, arguments.config);
  std::fflush(stdout);
  if (result.reason == StopReason::kRequested) throw ExitRequest{kInterrupted};
}

}  // namespace

void add_train_command(CLI::App& app) {
  auto* command = app.add_subcommand("train", "Train a model as a YAML file says");
  const auto arguments = std::make_shared<TrainArguments>();
  command->add_option("config", arguments->config, "YAML file")->required();
  command->add_option("overrides", arguments->overrides, "key.path=value …, as in dsv3 config");
  command->add_option("--out", arguments->out,
                      "Directory of the run (default: runs/NAME of the config)");
  command->add_option("--steps", arguments->steps, "Optimizer steps; the same as training.steps=N")
      ->check(CLI::PositiveNumber);
  command->add_option("--device", arguments->device, "The same as training.device=…")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  command->add_option("--deepspeed", arguments->deepspeed,
                      "DeepSpeed JSON; its values win over the YAML's");
  command->add_flag("--overwrite", arguments->overwrite,
                    "Move a run that is already in the directory aside (to NAME.1, NAME.2, …)");
  command
      ->add_option("--profile", arguments->profile,
                   "FIRST,LAST: write a Chrome trace of these steps to RUN/profile/")
      ->delimiter(',')
      ->expected(2)
      ->check(CLI::PositiveNumber);
  command->footer(kExamples);
  command->callback([arguments] { run_train(*arguments); });
}

}  // namespace dsv3::cli
