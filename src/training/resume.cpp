#include "training/resume.h"

#include <algorithm>
#include <string_view>

#include "base/error.h"
#include "checkpoint/catalogue.h"
#include "config/compare.h"
#include "config/load.h"
#include "training/run_directory.h"

namespace dsv3 {

namespace fs = std::filesystem;

namespace {

/// Keys that may change when a run goes on; one that ends with a dot stands for its section.
constexpr std::string_view kFree[] = {
    "model.preset",  // a name; the values that it stood for are compared one by one
    "model.moe.bias_update_rate",
    "model.moe.sequence_loss_alpha",
    "model.moe.use_deep_ep",
    "model.mla.use_fp8_kv",
    "model.mtp.loss_weight",
    "data.cache_dir",
    "data.num_workers",
    "training.steps",
    "training.micro_batch_size",
    "training.global_batch_size",
    "training.deterministic",
    "training.recompute",
    "training.eval_every",
    "training.eval_batches",
    "training.log_every",
    "training.time_limit_minutes",
    "training.device",
    "training.num_threads",
    "training.sample_prompt",
    "training.sample_tokens",
    "training.max_skipped_steps",
    "training.spike.",
    "training.ema.",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.clip",
    "checkpoint.",
    "monitor.",
    "profile.",
};

bool is_free(std::string_view key) {
  return std::ranges::any_of(kFree, [key](std::string_view free) {
    return free.ends_with('.') ? key.starts_with(free) : key == free;
  });
}

/// Throws the error of a damaged checkpoint, with the way out of it.
void require_whole(const fs::path& directory, const CheckpointEntry& entry) {
  const auto damage = find_damage(entry.path, Check::kChecksums);
  if (damage.empty()) return;
  const auto good = newest_whole(directory, entry.step);
  throw IoError(fmt::format(
      "{} is damaged: {}; {}", entry.path.string(), fmt::join(damage, "; "),
      good ? fmt::format("the newest whole one before it is step_{}, go on from there with: {} "
                         "--from-step {}",
                         good->step, resume_command(directory), good->step)
           : fmt::format("no checkpoint before it is whole; {} --overwrite trains from the start "
                         "and moves what is there aside",
                         resume_command(directory))));
}

ResumePoint open_checkpoint(const fs::path& directory, const CheckpointEntry& entry) {
  require_whole(directory, entry);
  return {.checkpoint = entry.path,
          .state = load_training_state(entry.path),
          .config = load_config(entry.path / "dsv3.yaml")};
}

}  // namespace

std::string resume_command(const fs::path& directory) {
  const std::string path = directory.string();
  const bool plain = std::ranges::all_of(path, [](unsigned char c) {
    return std::isalnum(c) != 0 ||
           std::string_view("/._-+=:@%,").find(static_cast<char>(c)) != std::string_view::npos;
  });
  if (plain && !path.empty()) return "dsv3 train " + path;
  std::string quoted;
  for (const char c : path) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return "dsv3 train '" + quoted + "'";
}

std::optional<ResumePoint> find_resume_point(const fs::path& directory,
                                             std::optional<int64_t> from_step) {
  const auto found = checkpoints_of(directory);
  if (from_step) {
    const auto wanted = std::ranges::find(found, *from_step, &CheckpointEntry::step);
    std::vector<int64_t> steps;
    for (const auto& entry : found) steps.push_back(entry.step);
    require(wanted != found.end(), "{} has no checkpoint of step {} (it has: {})",
            directory.string(), *from_step,
            steps.empty() ? "none" : fmt::format("{}", fmt::join(steps, ", ")));
    return open_checkpoint(directory, *wanted);
  }
  if (!found.empty()) return open_checkpoint(directory, found.back());
  if (!holds_run(directory)) return std::nullopt;
  const fs::path config = directory / "config.yaml";
  require(fs::exists(config),
          "{} holds the metrics of a run, but neither a checkpoint nor config.yaml; choose another "
          "directory with --out, or --overwrite to move it aside",
          directory.string());
  return ResumePoint{.checkpoint = {}, .state = {}, .config = load_config(config)};
}

std::optional<TrainingState> peek_training_state(const fs::path& directory) {
  try {
    const auto found = checkpoints_of(directory);
    if (!found.empty()) return load_training_state(found.back().path);
  } catch (const std::exception&) {  // said with its cause by find_resume_point()
  }
  return std::nullopt;
}

std::vector<std::string> allowed_changes(const Config& saved, const Config& now,
                                         const fs::path& directory) {
  Config resolved = now;  // 0 stands for the tokenizer's
  if (resolved.model.vocab_size == 0) resolved.model.vocab_size = saved.model.vocab_size;
  std::vector<std::string> changes, refused;
  for (const auto& difference : config_differences(saved, resolved)) {
    (is_free(difference.key) ? changes : refused)
        .push_back(fmt::format("{}: {} in the run, {} now", difference.key, difference.first,
                               difference.second));
  }
  require(refused.empty(),
          "{} holds a run that cannot go on with another {}. What may change: {}. Give it the "
          "values of the run, choose another directory with --out, or --overwrite to move the run "
          "aside and train from the start",
          directory.string(), fmt::join(refused, "; "), fmt::join(kFree, ", "));
  return changes;
}

}  // namespace dsv3
