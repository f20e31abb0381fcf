#include <fmt/chrono.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <ctime>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "checkpoint/catalogue.h"
#include "checkpoint/safetensors.h"
#include "cli/checks.h"
#include "cli/commands.h"
#include "monitor/metrics.h"
#include "training/resume.h"
#include "training/training_state.h"

namespace dsv3::cli {
namespace {

namespace fs = std::filesystem;

constexpr const char* kListExamples = R"(Examples:
  dsv3 checkpoint list runs/first          a line for each checkpoint: step, tokens, size, age, whether it is whole
Sizes are checked, bytes are not (dsv3 checkpoint verify does). Exit code 1 when one is damaged.)";

constexpr const char* kVerifyExamples = R"(Examples:
  dsv3 checkpoint verify runs/first                          every byte of every checkpoint
  dsv3 checkpoint verify runs/first --step 200
  dsv3 checkpoint verify runs/first/checkpoints/step_200     one directory, wherever it stands
Exit code 1 when one is damaged; each damaged file is named with its cause.)";

constexpr const char* kInspectExamples = R"(Examples:
  dsv3 checkpoint inspect runs/first                         what the newest checkpoint holds
  dsv3 checkpoint inspect runs/first --step 200 --tensors    every tensor with type and shape
Exit code 1 when it is damaged.)";

struct Arguments {
  std::string path;
  int64_t step = -1;
  bool tensors = false;
};

std::string megabytes(uint64_t bytes) {
  return fmt::format("{:.1f} MB", static_cast<double>(bytes) / 1e6);
}

std::string date(double unix_seconds) {
  const auto time = static_cast<std::time_t>(unix_seconds);
  return fmt::format("{:%Y-%m-%d %H:%M:%S}", fmt::localtime(time));
}

/// The checkpoints that the arguments mean: those of a run (or one of them), or the one directory.
std::vector<CheckpointEntry> chosen(const Arguments& arguments) {
  const fs::path path = arguments.path;
  if (!fs::is_directory(path)) throw IoError(fmt::format("{} is not a directory", path.string()));
  if (!fs::is_directory(path / "checkpoints")) {
    require(step_of(path) >= 0 || fs::exists(path / kManifestName),
            "{} is neither a run (no checkpoints/) nor a checkpoint (no {})", path.string(),
            kManifestName);
    return {{step_of(path), path}};
  }
  auto found = checkpoints_of(path);
  require(!found.empty(), "{} holds no checkpoint yet", path.string());
  if (arguments.step < 0) return found;
  std::erase_if(found, [&](const auto& entry) { return entry.step != arguments.step; });
  require(!found.empty(), "{} has no checkpoint of step {}", path.string(), arguments.step);
  return found;
}

std::string age_of(double unix_seconds) {
  return short_time(static_cast<double>(std::time(nullptr)) - unix_seconds);
}

void list(const Arguments& arguments) {
  bool damaged = false;
  const auto entries = chosen(arguments);
  fmt::print("{:>10}  {:>8}  {:>12}  {:>8}  {:<19}  {}\n", "step", "tokens", "size", "age", "saved",
             "state");
  for (const auto& entry : entries) {
    const auto damage = find_damage(entry.path, Check::kSizes);
    std::string tokens = "-", size = "-", age = "-", saved = "-";
    try {
      size = megabytes(read_manifest(entry.path).total_bytes());
      const TrainingState state = load_training_state(entry.path);
      tokens = short_count(static_cast<double>(state.tokens));
      age = age_of(state.saved_at);
      saved = date(state.saved_at);
    } catch (const std::exception&) {  // the damage says it
    }
    fmt::print("{:>10}  {:>8}  {:>12}  {:>8}  {:<19}  {}\n", entry.step, tokens, size, age, saved,
               damage.empty() ? "whole" : fmt::format("damaged: {}", fmt::join(damage, "; ")));
    damaged = damaged || !damage.empty();
  }
  if (damaged) throw ExitRequest{kFailure};
}

void verify(const Arguments& arguments) {
  std::optional<int64_t> newest_good;
  bool damaged = false;
  for (const auto& entry : chosen(arguments)) {
    const auto damage = find_damage(entry.path, Check::kChecksums);
    if (damage.empty()) {
      const Manifest manifest = read_manifest(entry.path);
      fmt::print("{}: whole, {} files, {}\n", entry.path.string(), manifest.files.size() + 1,
                 megabytes(manifest.total_bytes()));
      newest_good = entry.step;
      continue;
    }
    damaged = true;
    fmt::print("{}: damaged\n", entry.path.string());
    for (const std::string& line : damage) fmt::print("  {}\n", line);
  }
  if (!damaged) return;
  if (newest_good && fs::is_directory(fs::path(arguments.path) / "checkpoints"))
    fmt::print("the newest whole one: {} --from-step {}\n", resume_command(arguments.path),
               *newest_good);
  throw ExitRequest{kFailure};
}

std::string shape_text(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

/// Stems of the safetensors files that the manifest names: "model", "exp_avg", …
std::map<std::string, uint64_t> tensor_groups(const Manifest& manifest) {
  std::map<std::string, uint64_t> groups;
  for (const auto& [name, file] : manifest.files) {
    if (!name.ends_with(".safetensors")) continue;
    std::string stem = name.substr(0, name.size() - std::string(".safetensors").size());
    if (const size_t of = stem.find("-of-"); of != std::string::npos && of > 6)
      stem = stem.substr(0, of - 6);
    groups[stem] += file.bytes;
  }
  return groups;
}

void print_group(const fs::path& checkpoint, const std::string& stem, uint64_t bytes,
                 bool each_tensor) {
  const WeightFiles files(checkpoint, stem);
  std::map<std::string, int64_t> types;
  int64_t numbers = 0;
  for (const std::string& name : files.names()) {
    const StoredTensor& tensor = *files.find(name);
    ++types[name_of(tensor.type)];
    numbers += tensor.numel();
  }
  std::string kinds;
  for (const auto& [type, count] : types)
    kinds += fmt::format("{}{} {}", kinds.empty() ? "" : ", ", count, type);
  fmt::print("  {:<12} {:>8} tensors  {:>8} numbers  {:>12}  ({})\n", stem, files.names().size(),
             short_count(static_cast<double>(numbers)), megabytes(bytes), kinds);
  if (!each_tensor) return;
  for (const std::string& name : files.names()) {
    const StoredTensor& tensor = *files.find(name);
    fmt::print("    {:<72} {:<5} {}\n", name, name_of(tensor.type), shape_text(tensor.shape));
  }
}

void inspect(const Arguments& arguments) {
  const CheckpointEntry entry = chosen(arguments).back();
  const auto damage = find_damage(entry.path, Check::kChecksums);
  fmt::print("{}\n", entry.path.string());
  for (const std::string& line : damage) fmt::print("  damaged: {}\n", line);
  if (!damage.empty()) throw ExitRequest{kFailure};
  const Manifest manifest = read_manifest(entry.path);
  const TrainingState state = load_training_state(entry.path);
  fmt::print("  step         {}{}\n", state.step, state.finished ? " (finished)" : "");
  fmt::print("  tokens       {}\n", state.tokens);
  fmt::print("  samples      {} (by source: {})\n", state.data.next_sample,
             fmt::join(state.data.source_samples, ", "));
  fmt::print("  evaluated    {}\n", state.evaluated_step < 0
                                        ? std::string("never")
                                        : fmt::format("after step {}", state.evaluated_step));
  fmt::print("  seed         {}\n", state.seed);
  fmt::print("  saved        {} ({} ago)\n", date(state.saved_at), age_of(state.saved_at));
  fmt::print("  files        {}, {}\n", manifest.files.size() + 1,
             megabytes(manifest.total_bytes()));
  fmt::print("tensors\n");
  for (const auto& [stem, bytes] : tensor_groups(manifest))
    print_group(entry.path, stem, bytes, arguments.tensors);
}

CLI::App* add(CLI::App& parent, const char* name, const char* about, const char* examples,
              void (*action)(const Arguments&), const std::shared_ptr<Arguments>& arguments) {
  auto* command = parent.add_subcommand(name, about);
  command->add_option("path", arguments->path, "Directory of a run, or of one checkpoint")
      ->required();
  command->footer(examples);
  command->callback([arguments, action] { action(*arguments); });
  return command;
}

}  // namespace

void add_checkpoint_command(CLI::App& app) {
  auto* command = app.add_subcommand("checkpoint", "What a run has saved, and whether it is whole");
  command->require_subcommand(1);
  command->footer(
      "Examples:\n  dsv3 checkpoint list runs/first\n  dsv3 checkpoint verify runs/first\n"
      "  dsv3 checkpoint inspect runs/first --step 200 --tensors");
  const auto arguments = std::make_shared<Arguments>();
  add(*command, "list", "One line for each checkpoint", kListExamples, list, arguments);
  auto* verifying = add(*command, "verify", "Check every byte against the manifest",
                        kVerifyExamples, verify, arguments);
  auto* inspecting =
      add(*command, "inspect", "What one checkpoint holds", kInspectExamples, inspect, arguments);
  for (auto* sub : {verifying, inspecting})
    sub->add_option("--step", arguments->step, "Only the checkpoint of this step")
        ->check(non_negative());
  inspecting->add_flag("--tensors", arguments->tensors, "List every tensor");
}

}  // namespace dsv3::cli
