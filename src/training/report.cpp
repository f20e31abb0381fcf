// What a Trainer tells: the announcement, each step's record, evaluations.
#include <cmath>
#include <numbers>

#include "base/error.h"
#include "config/load.h"
#include "monitor/hardware.h"
#include "training/device.h"
#include "training/trainer.h"

namespace dsv3 {

void Trainer::announce() {
  monitor_->info(to_yaml(config_));
  monitor_->info(fmt::format("run       {}", options_.directory.string()));
  monitor_->info(
      fmt::format("device    {} ({})", device_.is_cuda() ? "cuda" : "cpu", device_name(device_)));
  monitor_->info(
      fmt::format("model     {} parameters, {} active per token, {} FLOPs per trained token, {}",
                  short_count(static_cast<double>(parameters_.total_parameters())),
                  short_count(parameters_.active_parameters()), short_count(flops_per_token_),
                  name_of(config_.model.dtype)));
  monitor_->info(fmt::format(
      "data      {} documents, {} tokens; held out: {}",
      short_count(static_cast<double>(train_->num_documents())),
      short_count(static_cast<double>(train_->num_tokens())),
      validation_ ? fmt::format("{} documents, {} tokens",
                                short_count(static_cast<double>(validation_->num_documents())),
                                short_count(static_cast<double>(validation_->num_tokens())))
                  : "nothing, so there is no evaluation"));
  if (config_.parallel.zero_stage > 0)
    monitor_->warning("parallel.zero_stage: one process has nothing to share its states with");
  if (config_.model.moe.use_deep_ep)
    monitor_->warning("model.moe.use_deep_ep: no effect on one process");
  if (config_.monitor.tensorboard)
    monitor_->warning(
        "monitor.tensorboard: event files are not written yet; metrics.jsonl has every number");
  if (config_.monitor.wandb)
    monitor_->warning("monitor.wandb: nothing is sent yet; metrics.jsonl has every number");
}

double Trainer::seconds_left(int64_t step) const {
  const double by_steps = smooth_step_seconds_ * static_cast<double>(config_.training.steps - step);
  if (config_.training.time_limit_minutes <= 0) return by_steps;
  const double spent = seconds_between(started_, Clock::now());
  return std::min(by_steps, std::max(0.0, config_.training.time_limit_minutes * 60 - spent));
}

Record Trainer::make_record(const StepNumbers& numbers, const StepInfo& info,
                            double seconds) const {
  Record record{.step = info.step, .values = {}};
  const auto add = [&record](const char* name, double value) { record.add(name, value); };
  const auto add_known = [&record](const char* name, double value) {
    if (!std::isnan(value)) record.add(name, value);
  };
  add(metric::kLoss, numbers.loss);
  if (config_.data.tokenizer == "bytes")
    add(metric::kBitsPerByte, numbers.loss / std::numbers::ln2);
  add(metric::kAccuracy, numbers.accuracy);
  add(metric::kLearningRate, info.learning_rate);
  add(metric::kGradNorm, numbers.grad_norm);
  add(metric::kTokens, static_cast<double>(info.tokens_done));
  add(metric::kSequences, static_cast<double>(info.sequences));
  const double tokens_per_second = static_cast<double>(info.tokens) / seconds;
  add(metric::kTokensPerSecond, tokens_per_second);
  const double tflops = tokens_per_second * flops_per_token_ / 1e12;
  add(metric::kTflops, tflops);
  if (peak_tflops_) add(metric::kMfu, tflops / *peak_tflops_);
  add(metric::kStepTime, seconds);
  add(metric::kDataTime, info.data_seconds);
  if (device_.is_cuda())
    add(metric::kGpuMemory, static_cast<double>(allocated_bytes(device_)) / 1e9);
  add(metric::kHostMemory, static_cast<double>(resident_bytes()) / 1e9);
  add_known(metric::kMtpLoss, numbers.mtp_loss);
  add_known(metric::kMtpAcceptance, numbers.mtp_acceptance);
  add_known(metric::kMaxViolation, numbers.max_violation);
  add_known(metric::kLoadImbalance, numbers.load_imbalance);
  add_known(metric::kBalanceLoss, numbers.balance_loss);
  return record;
}

void Trainer::report(PendingNumbers pending, const StepInfo& info) {
  const StepNumbers numbers = pending.wait();
  const auto now = Clock::now();
  const double seconds = seconds_between(mark_, now);
  mark_ = now;
  smooth_step_seconds_ =
      smooth_step_seconds_ == 0 ? seconds : 0.9 * smooth_step_seconds_ + 0.1 * seconds;
  longest_step_seconds_ = std::max(seconds, 0.98 * longest_step_seconds_);
  monitor_->step(make_record(numbers, info, seconds), seconds_left(info.step));
  const auto reason = watch_->judge(info.step, numbers, info.origins, *train_, *monitor_);
  if (!reason) return;
  const std::string again = resume_command(options_.directory);
  const std::string go_on =
      saved_.empty() ? std::string("Nothing was saved before; train from the start")
                     : fmt::format(
                           "The checkpoints are untouched: {} goes on from the newest, {}, and "
                           "--from-step N from an earlier one; do so",
                           again, saved_.string());
  const auto message = fmt::format(
      "{}; the run stops here. {} --replay {} names the first bad tensor of the last step. {} with "
      "a "
      "lower optimizer.learning_rate, other data or model.dtype=fp32",
      *reason, again, info.step, go_on);
  monitor_->warning(message);
  throw std::runtime_error(message);
}

Evaluation Trainer::evaluate_weights() {
  return evaluate(*model_, *validation_,
                  {.device = device_,
                   .sequences_per_batch = config_.training.micro_batch_size,
                   .num_batches = config_.training.eval_batches,
                   .mask_documents = config_.data.mask_across_documents,
                   .stop_requested = [this] { return must_stop(); }});
}

bool Trainer::evaluate_average(Record& record) {
  ema_->wait();
  saver_->before_change(device_);
  const AveragedWeights average(parameters_, ema_->average());
  const Evaluation result = evaluate_weights();
  if (!result.complete) return false;
  record.add(metric::kEvalEmaLoss, result.loss);
  record.add(metric::kEvalEmaBitsPerByte, result.bits_per_byte);
  record.add(metric::kEvalEmaAccuracy, result.accuracy);
  return true;
}

std::optional<Evaluation> Trainer::evaluate_now() {
  if (!validation_) return std::nullopt;
  const Evaluation result = evaluate_weights();
  if (!result.complete) return std::nullopt;
  Record record{.step = steps_done_, .values = {}};
  record.add(metric::kEvalLoss, result.loss);
  if (result.bytes > 0) record.add(metric::kEvalBitsPerByte, result.bits_per_byte);
  record.add(metric::kEvalAccuracy, result.accuracy);
  record.add(metric::kEvalTokens, static_cast<double>(result.tokens));
  record.add(metric::kEvalTime, result.seconds);
  // Half an evaluation is none: a run that goes on makes it up whole.
  if (ema_ && config_.training.ema.evaluate && ema_->updates() > 0 && !evaluate_average(record))
    return std::nullopt;
  evaluated_step_ = steps_done_;
  monitor_->evaluation(record);
  return result;
}

}  // namespace dsv3
