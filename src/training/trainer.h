#pragma once

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>

#include "config/config.h"
#include "data/loader.h"
#include "model/model.h"
#include "monitor/run_monitor.h"
#include "optim/adamw.h"
#include "training/evaluate.h"
#include "training/profiler.h"
#include "training/step.h"

namespace dsv3 {

struct TrainerOptions {
  std::filesystem::path directory;  // of the run
  bool overwrite = false;           // move an earlier run aside (training/run_directory.h)
  std::FILE* console = stdout;      // not owned
  bool terminal = false;            // `console` is one
  std::function<bool()>
      stop_requested;  // asked after each step; may be empty (training/stop_signals.h)
  int64_t profile_first =
      0;  // record steps profile_first … profile_last into RUN/profile/; 0 = none
  int64_t profile_last = 0;
};

enum class StopReason : uint8_t { kFinished, kTimeLimit, kRequested };

struct TrainingResult {
  StopReason reason = StopReason::kFinished;
  int64_t steps = 0;  // optimizer steps done
  std::optional<Evaluation>
      evaluation;  // the last one, of the saved weights; none without validation data
  std::filesystem::path checkpoint;
};

inline double seconds_between(std::chrono::steady_clock::time_point from,
                              std::chrono::steady_clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

/// One run from its config: data, model, optimizer, and the loop over steps (docs/ARCHITECTURE.md
/// follows a token through it). Single process.
class Trainer {
 public:
  /// Opens data, takes memory, initialises weights, prepares the run's directory and writes
  /// config.yaml there. Throws std::invalid_argument for a config that cannot train here, IoError,
  /// or LibTorch's error when memory is short.
  Trainer(const Config& config, TrainerOptions options);
  ~Trainer();

  /// Trains to training.steps, the time limit or a requested stop, then evaluates (not after a
  /// requested stop) and saves the weights. Throws std::runtime_error when the loss or the gradient
  /// is no number; weights and earlier checkpoints are then as before that step.
  TrainingResult run();

  /// One optimizer step on the next global batch: gradients, AdamW, router biases. Returns without
  /// waiting for the device. For run() and for tests.
  PendingNumbers step();

  const Config& config() const { return config_; }
  const Model& model() const { return *model_; }
  Model& model() { return *model_; }
  ParameterSet& parameters() { return parameters_; }
  const Tokenizer& tokenizer() const { return train_->tokenizer(); }
  const at::Device& device() const { return device_; }
  int64_t steps_done() const { return steps_done_; }
  std::optional<Evaluation> evaluate_now();

 private:
  using Clock = std::chrono::steady_clock;
  /// What a step's record says beside the numbers from the device.
  struct StepInfo {
    int64_t step = 0, tokens_done = 0, tokens = 0, sequences = 0;
    double learning_rate = 0, data_seconds = 0;
    double checkpoint_seconds = 0;  // that saving held up the loop, since the step before
    double fallback_rate = 0;       // of the attention's calls
  };

  void open_data();
  void build_model();
  void announce();
  GlobalBatch next_global_batch();
  Record make_record(const StepNumbers& numbers, const StepInfo& info, double seconds) const;
  void report(PendingNumbers numbers, const StepInfo& info);
  double seconds_left(int64_t step) const;
  /// Whether the record of this step also holds every layer's numbers.
  bool wants_layers(int64_t step) const;
  std::optional<StopReason> stop_reason() const;
  void profile_before_step();
  void profile_after_step();
  void save();

  Config config_;
  TrainerOptions options_;
  at::Device device_;
  std::unique_ptr<Loader> train_, validation_;
  ParameterSet parameters_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<AdamW> optimizer_;
  std::unique_ptr<RunMonitor> monitor_;
  Profiler profiler_;
  double flops_per_token_ = 0;
  std::optional<double> peak_tflops_;
  int64_t steps_done_ = 0, tokens_done_ = 0;
  StepInfo info_;                     // of the step that was queued last
  Clock::time_point started_, mark_;  // of the loop; of the last report
  double smooth_step_seconds_ = 0;
  double checkpoint_seconds_ = 0;  // that saving has held up the loop, not yet reported
  std::filesystem::path saved_;
};

}  // namespace dsv3
