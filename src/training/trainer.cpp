#include "training/trainer.h"

#include "base/error.h"
#include "base/file.h"
#include "config/load.h"
#include "monitor/hardware.h"
#include "ops/attention.h"
#include "ops/range.h"
#include "planner/flops.h"
#include "training/device.h"

namespace dsv3 {

Trainer::Trainer(const Config& config, TrainerOptions options)
    : config_(config),
      options_(std::move(options)),
      device_(choose_device(config.training.device)) {
  require_single_process(config_.parallel);
  if (device_.is_cuda()) require_cuda_widths(config_.model);
  require(config_.training.steps > 0, "training.steps: {}, but a run needs at least 1",
          config_.training.steps);
  configure_process(config_.training.num_threads, config_.training.deterministic);
  std::optional<ResumePoint> point;
  const auto source = resume_source();
  std::vector<std::string> notes;
  if (holds_run(options_.directory)) lock_ = std::make_unique<RunLock>(options_.directory);
  if (!options_.overwrite) {
    point = find_resume_point(source, options_.from_step);
    if (point) notes = allowed_changes(point->config, config_, source);
    for (std::string& note : notes) note = "changed   " + note;
  }
  // The directory is touched only when this run has its data and its memory.
  open_data();
  build_model();
  if (point) restore(*point);
  if (point && options_.resume_from.empty()) {
    for (std::string& note : settle_directory(*point)) notes.push_back(std::move(note));
  } else if (lock_ == nullptr) {
    lock_ = begin_run_directory(options_.directory);
  } else {
    lock_.reset();
    const auto moved = prepare_run_directory(options_.directory);
    lock_ = std::make_unique<RunLock>(options_.directory);
    if (moved) notes.push_back(fmt::format("the earlier run was moved to {}", moved->string()));
  }
  monitor_ = std::make_unique<RunMonitor>(
      options_.directory,
      Console::Options{.out = options_.console,
                       .terminal = options_.terminal,
                       .total_steps = config_.training.steps,
                       .every = std::max<int64_t>(1, config_.training.log_every),
                       .bits_per_byte = config_.data.tokenizer == "bytes"},
      config_);
  write_file_atomically(options_.directory / "config.yaml", to_yaml(config_));
  announce();
  for (const std::string& note : notes) monitor_->info(note);
  if (point) monitor_->event(steps_done_, "resume", {{"checkpoint", point->checkpoint.string()}});
}

Trainer::~Trainer() = default;

void Trainer::open_data() {
  LoaderOptions options{.split = Split::kTrain,
                        .seed = config_.training.seed,
                        .default_cache_dir = options_.directory.parent_path() / "token_cache",
                        .progress = {}};
  train_ = std::make_unique<Loader>(config_.data, options);
  if (!config_.data.validation.empty() || config_.data.validation_every > 0) {
    options.split = Split::kValidation;
    validation_ = std::make_unique<Loader>(config_.data, options);
  }
  const int64_t vocabulary = train_->tokenizer().vocab_size();
  if (config_.model.vocab_size == 0) config_.model.vocab_size = vocabulary;
  require(config_.model.vocab_size >= vocabulary,
          "model.vocab_size: {}, but the tokenizer '{}' has {} ids", config_.model.vocab_size,
          config_.data.tokenizer, vocabulary);
}

void Trainer::build_model() {
  model_ = std::make_unique<Model>(config_.model, parameters_);
  if (!config_.optimizer.decay_embeddings) {
    for (auto& parameter : parameters_.parameters())
      if (parameter.spec.vocabulary) parameter.spec.decay = false;
  }
  parameters_.allocate({.dtype = config_.model.dtype,
                        .gradient_dtype = config_.optimizer.gradient_dtype,
                        .gradients = true,
                        .cuda = device_.is_cuda()});
  parameters_.initialize(static_cast<uint64_t>(config_.training.seed));
  const auto& optimizer = config_.optimizer;
  optimizer_ = std::make_unique<AdamW>(
      parameters_.buckets(), AdamWOptions{.beta1 = optimizer.beta1,
                                          .beta2 = optimizer.beta2,
                                          .eps = optimizer.eps,
                                          .weight_decay = optimizer.weight_decay,
                                          .clip = optimizer.clip,
                                          .master_weights = optimizer.master_weights,
                                          .moment_dtype = optimizer.moment_dtype,
                                          .stochastic_rounding = optimizer.stochastic_rounding,
                                          .seed = static_cast<uint64_t>(config_.training.seed)});
  saver_ = std::make_unique<Saver>(parameters_, config_.model,
                                   Saver::Options{.keep_last = config_.checkpoint.keep_last,
                                                  .keep_every = config_.checkpoint.keep_every});
  policy_.emplace(config_.checkpoint, 0.0);
  watch_ = std::make_unique<StepWatch>(config_.training, parameters_);
  if (config_.training.ema.decay > 0)
    ema_ = std::make_unique<Ema>(config_.training.ema, optimizer_->weights());
  if (ema_) ema_->before_average = [this] { saver_->before_change(at::Device(at::kCPU)); };
  flops_per_token_ = flops_per_token(config_.model, parameters_, config_.data.sequence_length);
  if (device_.is_cuda()) peak_tflops_ = peak_bf16_tflops(device_name(device_));
}

const std::filesystem::path& Trainer::resume_source() const {
  return options_.resume_from.empty() ? options_.directory : options_.resume_from;
}

GlobalBatch Trainer::next_global_batch() {
  const ops::Range range("data");
  const int64_t micro = config_.training.micro_batch_size;
  const int64_t sequences = global_batch_at(config_, steps_done_, tokens_done_);
  std::vector<Batch> batches;
  for (int64_t first = 0; first < sequences; first += micro) batches.push_back(train_->next(micro));
  return make_global_batch(std::move(batches), config_.model.mtp.num_nextn_predict_layers,
                           config_.data.mask_across_documents);
}

StepSums Trainer::accumulate(const GlobalBatch& batch, PhaseTimer* timer) const {
  return accumulate_gradients(
      *model_, batch,
      {.device = device_,
       .mask_documents = config_.data.mask_across_documents,
       .recompute = config_.training.recompute,
       .balance_alpha = config_.model.moe.sequence_loss_alpha,
       .mtp_weight = config_.model.mtp.loss_weight.at(steps_done_, tokens_done_)},
      timer);
}

PendingNumbers Trainer::step() {
  const ops::Range range("step", steps_done_ + 1);
  const auto start = Clock::now();
  const GlobalBatch batch = next_global_batch();
  info_.data_seconds = seconds_between(start, Clock::now());
  PhaseTimer timer(device_);
  const auto calls_before = ops::attention_calls();
  const StepSums sums = accumulate(batch, &timer);
  const auto calls = ops::attention_calls();
  timer.begin(Phase::kOptimizer);
  // Note: the learning rate is that at the END of the step, so that a warm-up from 0 does not waste
  // the first step and the last step has the schedule's last value.
  const double learning_rate =
      config_.optimizer.learning_rate.at(steps_done_ + 1, tokens_done_ + batch.tokens);
  const double bias_rate = config_.model.moe.bias_update_rate.at(steps_done_, tokens_done_);
  const ops::Range update("optimizer");
  GradientNorm norm = optimizer_->decide(watch_->guard(steps_done_ + 1, sums, batch));
  watch_->locate(norm, steps_done_ + 1);
  saver_->before_change(device_);  // a save under way still reads what changes now
  if (ema_) ema_->before_change();
  optimizer_->apply(learning_rate, norm);
  if (sums.load.tokens.defined() && config_.model.moe.use_bias && bias_rate != 0)
    model_->update_router_biases(sums.load.tokens, bias_rate, norm.skip);
  timer.end();
  ++steps_done_;
  if (ema_) ema_->after_step(steps_done_);
  tokens_done_ += batch.tokens;
  info_.step = steps_done_;
  info_.tokens_done = tokens_done_;
  info_.tokens = batch.tokens;
  info_.sequences = batch.sequences;
  info_.learning_rate = learning_rate;
  info_.origins.clear();
  for (const auto& micro_batch : batch.micro_batches)
    info_.origins.insert(info_.origins.end(), micro_batch.origins.begin(),
                         micro_batch.origins.end());
  info_.checkpoint_seconds = std::exchange(checkpoint_seconds_, 0.0);
  const auto attended = std::max<int64_t>(1, calls.all - calls_before.all);
  info_.fallback_rate =
      static_cast<double>(calls.fallbacks - calls_before.fallbacks) / static_cast<double>(attended);
  return {
      sums,
      norm,
      batch,
      {.biases = config_.model.moe.use_bias ? model_->router_biases() : std::vector<at::Tensor>(),
       .with_loads = wants_layers(steps_done_),
       .timer = std::move(timer)}};
}

bool Trainer::wants_layers(int64_t step) const {
  const int64_t every = config_.monitor.per_layer_every;
  return every > 0 && (step == 1 || step % every == 0);
}

void Trainer::profile_before_step() {
  if (config_.profile.steps.first > 0 && steps_done_ + 1 == config_.profile.steps.first)
    profiler_.start(device_.is_cuda());
}

void Trainer::profile_after_step() {
  if (profiler_.running() && steps_done_ >= config_.profile.steps.last) write_profile();
}

void Trainer::write_profile() {
  const auto directory = options_.directory / "profile";
  std::filesystem::create_directories(directory);
  const auto trace =
      directory / fmt::format("steps_{}_{}.json", config_.profile.steps.first, steps_done_);
  profiler_.stop(trace);
  monitor_->info(fmt::format("profile   {}", trace.string()));
}

void Trainer::train_to(int64_t last) {
  mark_ = Clock::now();
  while (steps_done_ < last) {
    PendingNumbers numbers = step();
    report(std::move(numbers), info_);
  }
}

TrainingResult Trainer::run() {
  const auto due = [this](int64_t every) { return every > 0 && steps_done_ % every == 0; };
  started_ = mark_ = Clock::now();
  if (finished_ && steps_done_ >= config_.training.steps)
    return {.reason = StopReason::kFinished,
            .steps = steps_done_,
            .evaluation = {},
            .checkpoint = saved_};
  if (device_.is_cuda() &&
      (config_.checkpoint.every_steps > 0 || config_.checkpoint.every_minutes > 0))
    saver_->prepare(saved_state());
  // A stop may have come between a step and its evaluation.
  if (steps_done_ > 0 && steps_done_ < config_.training.steps && due(config_.training.eval_every) &&
      evaluated_step_ != steps_done_)
    evaluate_now();
  std::optional<StopReason> reason;
  std::optional<std::pair<PendingNumbers, StepInfo>> pending;
  while (!(reason = stop_reason())) {
    profile_before_step();
    PendingNumbers numbers = step();
    profile_after_step();
    // On CUDA the step before is read while this one runs; the host is then always one step ahead.
    if (pending) report(std::move(pending->first), pending->second);
    pending.emplace(std::move(numbers), info_);
    finish_save(saver_->poll());
    const bool requested = options_.save_requested && options_.save_requested();
    const bool save = policy_->due(steps_done_, seconds_between(started_, Clock::now()), requested);
    const bool pause = due(config_.training.eval_every) || save;
    if (device_.is_cuda() && !pause) continue;
    report(std::move(pending->first), pending->second);
    pending.reset();
    if (steps_done_ >= config_.training.steps) continue;
    if (due(config_.training.eval_every)) evaluate_now();
    // Note: a save amid skipped steps could push the last good checkpoint out.
    if (save && watch_->skipping()) {
      policy_->failed(steps_done_);
    } else if (save) {
      start_save();
    }
    if (pause) mark_ = Clock::now();
  }
  if (pending) report(std::move(pending->first), pending->second);
  return finish(*reason);
}

TrainingResult Trainer::finish(StopReason reason) {
  finish_save(saver_->wait());
  if (profiler_.running()) write_profile();  // the run is shorter than the range
  TrainingResult result{.reason = reason, .steps = steps_done_, .evaluation = {}, .checkpoint = {}};
  if (reason == StopReason::kTimeLimit)
    monitor_->info(fmt::format("the time limit of {} minutes is reached after step {}",
                               config_.training.time_limit_minutes, steps_done_));
  if (reason == StopReason::kWallClock)
    monitor_->info(fmt::format("the limit of {} is near: stopped after step {}",
                               short_time(options_.wall_clock_limit), steps_done_));
  if (reason == StopReason::kRequested)
    monitor_->info(fmt::format("stopped after step {}", steps_done_));
  const bool evaluates = reason == StopReason::kFinished || reason == StopReason::kTimeLimit;
  if (evaluates) result.evaluation = evaluate_now();
  const bool whole = !validation_ || result.evaluation.has_value();
  if (evaluates && !whole)
    result.reason = options_.stop_requested && options_.stop_requested() ? StopReason::kRequested
                                                                         : StopReason::kWallClock;
  finished_ = reason == StopReason::kFinished && whole;
  save_at_end();
  result.checkpoint = saved_;
  const char* why[] = {"finished", "time_limit", "wall_clock", "requested"};
  monitor_->event(steps_done_, "stopped", {{"reason", why[static_cast<size_t>(result.reason)]}});
  return result;
}

}  // namespace dsv3
