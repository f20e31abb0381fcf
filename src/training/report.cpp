// What a Trainer tells: the announcement, each step's record, evaluations.
#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

#include "base/error.h"
#include "config/load.h"
#include "monitor/hardware.h"
#include "training/device.h"
#include "training/trainer.h"

namespace dsv3 {
namespace {

void add_attention(Record& record, const Config& config, double fallback_rate) {
  const auto& mla = config.model.mla;
  const auto latent = static_cast<double>(mla.kv_lora_rank + mla.qk_rope_head_dim);
  const auto expanded = static_cast<double>(mla.num_heads * (mla.qk_head_dim() + mla.v_head_dim));
  const auto rows = static_cast<double>(config.model.num_layers * config.data.sequence_length);
  record.add(metric::kKvCacheSize,
             rows * latent * static_cast<double>(size_of(config.model.dtype)) / 1e6);
  record.add(metric::kCompressionRatio, expanded / latent);
  record.add(metric::kFallbackRate, fallback_rate);
}

double mean_of(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

void add_depths(Record& record, const StepNumbers& numbers) {
  if (numbers.mtp_losses.empty()) return;
  record.add(metric::kMtpLoss, mean_of(numbers.mtp_losses));
  record.add(metric::kMtpAcceptance, mean_of(numbers.mtp_acceptances));
  for (size_t i = 0; i < numbers.mtp_losses.size(); ++i) {
    const auto depth = static_cast<int64_t>(i) + 1;
    record.add(name_of_depth(metric::kMtpLoss, depth), numbers.mtp_losses[i]);
    record.add(name_of_depth(metric::kMtpAcceptance, depth), numbers.mtp_acceptances[i]);
  }
}

/// A statistic of kernels::LoadStatistics under its metric's name, and how layers become one
/// number.
struct RoutingMetric {
  kernels::LoadStatistic column;
  const char* name;
  bool worst;  // the largest over layers, else the mean
};
constexpr RoutingMetric kRoutingMetrics[] = {
    {kernels::kMaxViolation, metric::kMaxViolation, true},
    {kernels::kMicroViolation, metric::kMicroViolation, true},
    {kernels::kLoadImbalance, metric::kLoadImbalance, false},
    {kernels::kEntropy, metric::kEntropy, false},
    {kernels::kUtilization, metric::kUtilization, false},
    {kernels::kBiasSpread, metric::kBiasSpread, true},
};

/// Layers one by one, and the table of loads, only in the steps whose loads left the device.
void add_routing(Record& record, const StepNumbers& numbers, const std::vector<int64_t>& layers,
                 bool biased) {
  if (numbers.layers.empty()) return;
  for (const auto& [column, name, worst] : kRoutingMetrics) {
    if (column == kernels::kBiasSpread && !biased) continue;
    std::vector<double> values;
    for (const auto& layer : numbers.layers) values.push_back(layer[column]);
    record.add(name, worst ? *std::ranges::max_element(values) : mean_of(values));
    if (numbers.loads.empty()) continue;
    for (size_t i = 0; i < values.size(); ++i)
      record.add(name_of_layer(name, layers[i]), values[i]);
  }
  record.add(metric::kBalanceLoss, numbers.balance_loss);
  if (!numbers.loads.empty())
    record.tables.push_back({metric::kExpertDistribution, layers, numbers.loads});
}

}  // namespace

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
}

double Trainer::seconds_left(int64_t step) const {
  const double by_steps = smooth_step_seconds_ * static_cast<double>(config_.training.steps - step);
  if (config_.training.time_limit_minutes <= 0) return by_steps;
  const double spent = seconds_between(started_, Clock::now());
  return std::min(by_steps, std::max(0.0, config_.training.time_limit_minutes * 60 - spent));
}

Record Trainer::make_record(const StepNumbers& numbers, const StepInfo& info,
                            double seconds) const {
  Record record{.step = info.step, .values = {}, .tables = {}};
  const auto add = [&record](const char* name, double value) { record.add(name, value); };
  add(metric::kLoss, numbers.loss);
  if (config_.data.tokenizer == "bytes")
    add(metric::kBitsPerByte, numbers.loss / std::numbers::ln2);
  add(metric::kAccuracy, numbers.accuracy);
  add(metric::kLearningRate, info.learning_rate);
  add(metric::kGradNorm, numbers.grad_norm);
  if (!std::isnan(numbers.update_to_weight)) add(metric::kUpdateToWeight, numbers.update_to_weight);
  add(metric::kTokens, static_cast<double>(info.tokens_done));
  add(metric::kSequences, static_cast<double>(info.sequences));
  const double tokens_per_second = static_cast<double>(info.tokens) / seconds;
  add(metric::kTokensPerSecond, tokens_per_second);
  const double tflops = tokens_per_second * flops_per_token_ / 1e12;
  add(metric::kTflops, tflops);
  if (peak_tflops_) add(metric::kMfu, tflops / *peak_tflops_);
  add(metric::kStepTime, seconds);
  add(metric::kDataTime, info.data_seconds);
  add(metric::kForwardTime, numbers.seconds[static_cast<size_t>(Phase::kForward)]);
  add(metric::kBackwardTime, numbers.seconds[static_cast<size_t>(Phase::kBackward)]);
  add(metric::kOptimizerTime, numbers.seconds[static_cast<size_t>(Phase::kOptimizer)]);
  add(metric::kCommunicationTime, 0);  // one process
  add(metric::kCheckpointTime, info.checkpoint_seconds);
  if (device_.is_cuda())
    add(metric::kGpuMemory, static_cast<double>(allocated_bytes(device_)) / 1e9);
  add(metric::kHostMemory, static_cast<double>(resident_bytes()) / 1e9);
  add_attention(record, config_, info.fallback_rate);
  add_depths(record, numbers);
  add_routing(record, numbers, model_->moe_layers(), config_.model.moe.use_bias);
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
  Record record{.step = steps_done_, .values = {}, .tables = {}};
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
