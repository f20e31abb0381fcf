#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "checkpoint/catalogue.h"
#include "cli/checks.h"
#include "cli/commands.h"
#include "config/load.h"
#include "inference/generate.h"
#include "training/replay.h"
#include "training/resume.h"
#include "training/run_directory.h"
#include "training/stop_signals.h"
#include "training/trainer.h"

namespace dsv3::cli {
namespace {

constexpr const char* kExamples = R"(Examples:
  dsv3 train configs/deepseek_v3_tiny.yaml
  dsv3 train configs/deepseek_v3_tiny.yaml --out runs/first --steps 200
  dsv3 train configs/deepseek_v3_small.yaml optimizer.learning_rate=1e-3 checkpoint.every_steps=500
  dsv3 train configs/deepseek_v3_tiny.yaml --device cpu training.num_threads=2 --time-limit 03:55:00
  dsv3 train runs/first                            go on with a run, as its config.yaml says
  dsv3 train runs/first --steps 400                the same, and further
  dsv3 train runs/first --from-step 100            go on from an earlier checkpoint
  cd runs/first && dsv3 train                      go on with the run in this directory
  dsv3 train runs/first --replay 120               look into step 120: norms of every tensor, nothing is changed

The run's directory holds config.yaml (resolved), metrics.jsonl (one object a step), log.txt and checkpoints/step_N. Where
it already holds a run, that run goes on from its newest checkpoint; --overwrite starts a new one.
Ctrl-C or SIGTERM finishes the step, saves and stops; a second one stops at once. SIGUSR1 saves and goes on.
Exit codes: 0 trained, or stopped at a time limit; 1 a file, a device, memory or the numbers failed; 2 wrong command line
or config; 130 stopped by Ctrl-C, 143 by SIGTERM. docs/reliability.md says what a checkpoint holds and what may change
when a run goes on.)";

struct TrainArguments {
  std::string config;
  std::vector<std::string> overrides;
  std::string out;
  std::string device;
  std::string deepspeed;
  int64_t steps = 0;
  int64_t from_step = -1;
  int64_t replay_step = 0;
  std::string time_limit;
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

void print_next_steps(const std::filesystem::path& run) {
  fmt::print(
      "\ngo on with the run:\n"
      "  dsv3 generate {0} --prompt \"…\"\n"
      "  dsv3 eval {0} DATA\n"
      "  {1} --steps N\n",
      run.string(), resume_command(run));
}

/// "HH:MM:SS", "MM:SS" or "D-HH:MM:SS", as Slurm writes it, in seconds.
double parse_time_limit(const std::string& text) {
  std::string_view rest = text;
  double days = 0, seconds = 0;
  const auto number = [&text](std::string_view digits) {
    require(!digits.empty() && digits.size() <= 6 &&
                digits.find_first_not_of("0123456789") == std::string_view::npos,
            "--time-limit: '{}', but it is HH:MM:SS (or MM:SS, or D-HH:MM:SS)", text);
    return std::stod(std::string(digits));
  };
  if (const size_t dash = rest.find('-'); dash != std::string_view::npos) {
    days = number(rest.substr(0, dash));
    rest.remove_prefix(dash + 1);
  }
  require(std::ranges::count(rest, ':') >= 1 && std::ranges::count(rest, ':') <= 2,
          "--time-limit: '{}', but it is HH:MM:SS (or MM:SS, or D-HH:MM:SS)", text);
  while (!rest.empty()) {
    const size_t colon = std::min(rest.find(':'), rest.size());
    seconds = seconds * 60 + number(rest.substr(0, colon));
    rest.remove_prefix(std::min(colon + 1, rest.size()));
  }
  seconds += days * 86400;
  require(seconds > 0, "--time-limit: '{}' is no time", text);
  return seconds;
}

/// A config with the directory that its run goes to.
struct Task {
  Config config;
  std::filesystem::path run;
};

/// Without a config, the run in this directory is meant, and relative paths of its config start
/// where it was trained.
std::filesystem::path enter_run_here() {
  const auto here = std::filesystem::current_path();
  require(std::filesystem::exists("config.yaml") && holds_run("."),
          "config: give a YAML file, or the directory of a run, or call it inside one (try dsv3 "
          "train --help)");
  const auto state = peek_training_state(here);
  if (state && std::filesystem::is_directory(state->working_directory))
    std::filesystem::current_path(state->working_directory);
  const auto shorter = here.lexically_proximate(std::filesystem::current_path());
  return shorter.string().starts_with("..") ? here : shorter;
}

Task read_task(const TrainArguments& arguments) {
  std::vector<std::string> overrides = arguments.overrides;
  if (arguments.steps > 0) overrides.push_back(fmt::format("training.steps={}", arguments.steps));
  if (!arguments.profile.empty())
    overrides.push_back(
        fmt::format("profile.steps=[{}, {}]", arguments.profile[0], arguments.profile[1]));
  if (!arguments.device.empty()) overrides.push_back("training.device=" + arguments.device);
  const std::filesystem::path given =
      arguments.config.empty() ? enter_run_here() : std::filesystem::path(arguments.config);
  if (!std::filesystem::is_directory(given)) {
    const auto run = arguments.out.empty() ? std::filesystem::path("runs") / given.stem()
                                           : std::filesystem::path(arguments.out);
    return {load_config(given, overrides, arguments.deepspeed), run};
  }
  require(std::filesystem::exists(given / "config.yaml"),
          "{} is a directory without config.yaml; give a YAML file or the directory of a run",
          given.string());
  require(arguments.out.empty(), "--out: a run goes on in its own directory, {}", given.string());
  return {load_config(given / "config.yaml", overrides, arguments.deepspeed), given};
}

/// Whether the run has nothing left to do; says so, and what would lengthen it.
bool is_finished(const Task& task, const TrainArguments& arguments) {
  if (arguments.overwrite || arguments.from_step >= 0) return false;
  const auto state = peek_training_state(task.run);
  if (!state || !state->finished || state->step < task.config.training.steps) return false;
  try {  // a kill after the last save may have left half a removal
    const RunLock lock(task.run);
    remove_stale(task.run);
  } catch (const std::exception&) {  // somebody is at work there, or may only read: no matter
  }
  fmt::print("{} is finished: {} of {} steps are done. To train on, give it more: {} --steps {}\n",
             task.run.string(), state->step, task.config.training.steps, resume_command(task.run),
             2 * state->step);
  return true;
}

ExitCode exit_code_of_stop() {
  return StopSignals::signal() == SIGTERM ? kTerminated : kInterrupted;
}

void run_replay(const TrainArguments& arguments) {
  const std::filesystem::path run =
      arguments.config.empty() ? enter_run_here() : std::filesystem::path(arguments.config);
  require(std::filesystem::is_directory(run), "--replay: {} is no run's directory", run.string());
  require(arguments.overrides.empty() && arguments.out.empty() && !arguments.overwrite &&
              arguments.from_step < 0 && arguments.steps == 0,
          "--replay runs one step again as it was; it takes --device alone");
  fmt::print("{}", to_text(replay(run, arguments.replay_step, arguments.device)));
}

void run_train(const TrainArguments& arguments) {
  if (arguments.replay_step > 0) return run_replay(arguments);
  const auto started = std::chrono::steady_clock::now();
  require(!arguments.overwrite || arguments.from_step < 0,
          "--overwrite starts a new run, --from-step goes on with one; give one of them");
  const double limit = arguments.time_limit.empty() ? 0 : parse_time_limit(arguments.time_limit);
  const Task task = read_task(arguments);
  if (is_finished(task, arguments)) return;
  TrainingResult result;
  ExitCode code = kOk;
  {
    const StopSignals signals;
    Trainer trainer(
        task.config,
        {.directory = task.run,
         .overwrite = arguments.overwrite,
         .from_step = arguments.from_step >= 0 ? std::optional(arguments.from_step) : std::nullopt,
         .console = stdout,
         .terminal = ::isatty(STDOUT_FILENO) == 1,
         .stop_requested = StopSignals::requested,
         .save_requested = StopSignals::take_save_request,
         .wall_clock_limit = limit,
         .started = started});
    result = trainer.run();
    if (result.reason == StopReason::kRequested) code = exit_code_of_stop();
    if (result.reason == StopReason::kFinished || result.reason == StopReason::kTimeLimit)
      print_sample(trainer);
  }
  if (result.reason == StopReason::kRequested || result.reason == StopReason::kWallClock) {
    fmt::print("\nsaved after step {}; go on with:\n  {}\n", result.steps,
               resume_command(task.run));
  } else {
    print_next_steps(task.run);
  }
  std::fflush(stdout);
  if (code != kOk) throw ExitRequest{code};
}

}  // namespace

void add_train_command(CLI::App& app) {
  auto* command = app.add_subcommand("train", "Train a model as a YAML file says");
  const auto arguments = std::make_shared<TrainArguments>();
  command->add_option("config", arguments->config,
                      "YAML file, or the directory of a run that goes on (default: the run here)");
  command->add_option("overrides", arguments->overrides, "key.path=value …, as in dsv3 config");
  command->add_option("--out", arguments->out,
                      "Directory of the run (default: runs/NAME of the config)");
  command->add_option("--steps", arguments->steps, "Optimizer steps; the same as training.steps=N")
      ->check(positive());
  command->add_option("--device", arguments->device, "The same as training.device=…")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  command->add_option("--deepspeed", arguments->deepspeed,
                      "DeepSpeed JSON; its values win over the YAML's");
  command->add_option("--time-limit", arguments->time_limit,
                      "HH:MM:SS after the start by which the run must be saved and stopped");
  command
      ->add_option("--from-step", arguments->from_step,
                   "Go on from this checkpoint; later ones are moved to RUN/set_aside/")
      ->check(non_negative());
  command
      ->add_option("--replay", arguments->replay_step,
                   "Run this step of a run again and print norms layer by layer, to find the first "
                   "bad tensor (docs/faults.md); changes nothing")
      ->check(positive());
  command->add_flag("--overwrite", arguments->overwrite,
                    "Start anew; a run that is in the directory is moved to NAME.1, NAME.2, …");
  command
      ->add_option("--profile", arguments->profile,
                   "FIRST,LAST: the same as profile.steps=[FIRST, LAST]")
      ->delimiter(',')
      ->expected(2)
      ->check(positive());
  command->footer(kExamples);
  command->callback([arguments] { run_train(*arguments); });
}

}  // namespace dsv3::cli
