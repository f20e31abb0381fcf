// How a Trainer saves itself, goes on from what was saved, and knows when to stop.
#include <chrono>
#include <filesystem>
#include <thread>

#include "base/error.h"
#include "checkpoint/catalogue.h"
#include "checkpoint/weights.h"
#include "config/load.h"
#include "training/trainer.h"

namespace dsv3 {

namespace fs = std::filesystem;

std::vector<Companion> Trainer::companions() const {
  std::vector<Companion> companions = optimizer_->state();
  if (ema_) companions.push_back({"ema", ema_->average()});
  return companions;
}

TrainingState Trainer::state() const {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  std::error_code ignored;
  return {.step = steps_done_,
          .tokens = tokens_done_,
          .optimizer_steps = optimizer_->steps_done(),
          .ema_updates = ema_ ? ema_->updates() : 0,
          .evaluated_step = evaluated_step_,
          .finished = finished_,
          .seed = config_.training.seed,
          .data = train_->state(),
          .watch = watch_->state(),
          .saved_at = std::chrono::duration<double>(now).count(),
          .working_directory = fs::current_path(ignored).string()};
}

void Trainer::restore(const ResumePoint& point) {
  if (point.checkpoint.empty()) return;  // nothing was saved: the fresh weights are the run's
  load_weights(point.checkpoint, parameters_, config_.model.num_layers);
  for (const Companion& companion : companions()) {
    // An average that is asked for only now begins now.
    if (companion.prefix == "ema" && !has_companion(point.checkpoint, "ema")) continue;
    load_companion(point.checkpoint, parameters_, companion);
    if (companion.prefix == "ema") ema_->restore(point.state.ema_updates);
  }
  watch_->restore(point.state.watch);
  optimizer_->restore_steps(point.state.step, point.state.optimizer_steps);
  train_->restore(point.state.data);
  steps_done_ = point.state.step;
  tokens_done_ = point.state.tokens;
  evaluated_step_ = point.state.evaluated_step;
  finished_ = point.state.finished;
  saved_ = point.checkpoint;
  policy_->saved(steps_done_);
}

std::vector<std::string> Trainer::settle_directory(const ResumePoint& point) {
  std::vector<std::string> notes;
  const fs::path& run = options_.directory;
  fs::create_directories(run / "checkpoints");
  notes.push_back(point.checkpoint.empty()
                      ? std::string("resumed   from the start: nothing was saved yet")
                      : fmt::format("resumed   after step {}, from {}", steps_done_,
                                    point.checkpoint.string()));
  if (const int64_t stale = remove_stale(run); stale > 0)
    notes.push_back(fmt::format("removed   {} unfinished save{} of a run that was killed", stale,
                                stale == 1 ? "" : "s"));
  for (const auto& moved : set_aside_after(run, steps_done_))
    notes.push_back(fmt::format("set aside {}: it is of a later step", moved.string()));
  if (const int64_t dropped = drop_metrics_after(run / "metrics.jsonl", steps_done_); dropped > 0)
    notes.push_back(fmt::format("dropped   {} line{} of metrics.jsonl that came after step {}",
                                dropped, dropped == 1 ? "" : "s", steps_done_));
  const auto& rate = config_.optimizer.learning_rate;
  if (steps_done_ < config_.training.steps && rate.at(steps_done_ + 1, tokens_done_) == 0 &&
      rate.at(config_.training.steps, tokens_done_) == 0)
    notes.push_back(
        "note      optimizer.learning_rate is 0 for the steps to come; give it another value to "
        "train on");
  return notes;
}

bool Trainer::out_of_time() const {
  const double limit = options_.wall_clock_limit;
  if (limit <= 0) return false;
  const double margin =
      stop_margin(limit, longest_step_seconds_, longest_save_seconds_, saved_state().num_bytes());
  return seconds_between(options_.started, Clock::now()) + margin >= limit;
}

bool Trainer::must_stop() const {
  return (options_.stop_requested && options_.stop_requested()) || out_of_time();
}

std::optional<StopReason> Trainer::stop_reason() const {
  if (steps_done_ >= config_.training.steps) return StopReason::kFinished;
  if (options_.stop_requested && options_.stop_requested()) return StopReason::kRequested;
  if (out_of_time()) return StopReason::kWallClock;
  const double limit = config_.training.time_limit_minutes * 60;
  if (limit > 0 && info_.step > 0 && seconds_between(started_, Clock::now()) >= limit)
    return StopReason::kTimeLimit;
  return std::nullopt;
}

SaveJob Trainer::save_job() const {
  if (ema_) ema_->wait();
  SaveJob job{.run = options_.directory,
              .step = steps_done_,
              .state = saved_state(),
              .options = {},
              .sync_first = {options_.directory / "metrics.jsonl"}};
  job.options.eos_token_ids = {tokenizer().specials().end_of_document};
  job.options.extra_files = {{"dsv3.yaml", to_yaml(config_)}, {"state.json", to_json(state())}};
  return job;
}

void Trainer::start_save() {
  const auto begin = Clock::now();
  finish_save(saver_->wait());
  SaveJob job = save_job();
  job.waited_seconds = seconds_between(begin, Clock::now());
  policy_->begun(seconds_between(started_, Clock::now()));
  saver_->start(std::move(job));
}

void Trainer::finish_save(const std::optional<SaveResult>& result) {
  if (!result) return;
  if (!result->error.empty()) {
    policy_->failed(steps_done_);
    monitor_->warning(fmt::format(
        "the checkpoint of step {} was not saved: {}. The run goes on, what was saved before is "
        "untouched; next try after step {}",
        result->step, result->error, policy_->next_try()));
    monitor_->event(result->step, "save_failed", {{"error", result->error}});
    return;
  }
  policy_->saved(result->step);
  checkpoint_seconds_ += result->stall_seconds;
  saved_ = result->directory;
  longest_save_seconds_ = std::max(longest_save_seconds_, result->seconds);
  monitor_->info(
      fmt::format("saved     {} ({:.1f} MB in {:.2f} s, training stood still for {:.2f} s)",
                  result->directory.string(), static_cast<double>(result->bytes) / 1e6,
                  result->seconds, result->stall_seconds));
  monitor_->event(result->step, "checkpoint",
                  {{"path", result->directory.string()},
                   {"bytes", static_cast<int64_t>(result->bytes)},
                   {"checkpoint/save_seconds", result->seconds},
                   {"checkpoint/stall_seconds", result->stall_seconds}});
  if (!result->warning.empty()) monitor_->warning(result->warning);
}

void Trainer::save_at_end() {
  constexpr int kTries = 3;
  if (!config_.checkpoint.at_end) return;
  if (policy_->last_saved_step() == steps_done_ && !finished_) return;
  const SaveJob job = save_job();
  for (int attempt = 1;; ++attempt) {
    const SaveResult result = saver_->save_now(job);
    if (result.error.empty()) return finish_save(result);
    if (attempt == kTries) {
      const std::string newest =
          saved_.empty() ? "nothing was saved before"
                         : fmt::format("the newest checkpoint is {}, go on from there with: {}",
                                       saved_.string(), resume_command(options_.directory));
      throw IoError(fmt::format("the checkpoint of step {} was not saved: {}; {}", steps_done_,
                                result.error, newest));
    }
    monitor_->warning(fmt::format("the checkpoint of step {} was not saved: {}; trying again",
                                  steps_done_, result.error));
    monitor_->event(steps_done_, "save_failed", {{"error", result.error}});
    std::this_thread::sleep_for(std::chrono::seconds(attempt));
  }
}

}  // namespace dsv3
