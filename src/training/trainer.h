#pragma once

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>

#include "checkpoint/saver.h"
#include "config/config.h"
#include "data/loader.h"
#include "model/model.h"
#include "monitor/run_monitor.h"
#include "optim/adamw.h"
#include "training/ema.h"
#include "training/evaluate.h"
#include "training/profiler.h"
#include "training/resume.h"
#include "training/run_directory.h"
#include "training/save_policy.h"
#include "training/step.h"
#include "training/step_watch.h"

namespace dsv3 {

struct TrainerOptions {
  std::filesystem::path directory;         // of the run
  bool overwrite = false;                  // move an earlier run aside instead of going on with it
  std::optional<int64_t> from_step = {};   // go on from this checkpoint, not the newest
  std::filesystem::path resume_from = {};  // a run whose checkpoint is taken and which stays as it
                                           // is; empty: that in `directory` goes on
  std::FILE* console = stdout;             // not owned
  bool terminal = false;                   // `console` is one
  std::function<bool()> stop_requested = {};  // asked after each step (training/stop_signals.h)
  std::function<bool()> save_requested = {};  // the same; true once for each request
  double wall_clock_limit = 0;  // seconds from `started` by which the run must be saved and
                                // stopped; 0 = none
  std::chrono::steady_clock::time_point started = std::chrono::steady_clock::now();
};

enum class StopReason : uint8_t {
  kFinished,   // training.steps are done
  kTimeLimit,  // training.time_limit_minutes are over
  kWallClock,  // TrainerOptions::wall_clock_limit is near
  kRequested
};

struct TrainingResult {
  StopReason reason = StopReason::kFinished;
  int64_t steps = 0;                     // optimizer steps done
  std::optional<Evaluation> evaluation;  // the last one, of the saved weights; none without
                                         // validation data
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
  /// Opens data, takes memory, initialises weights or goes on where the run in the directory was
  /// saved last (training/resume.h), and writes config.yaml. Nothing in the directory is changed
  /// before all that can fail has succeeded. Throws std::invalid_argument for a config that cannot
  /// train here or cannot go on with the run, IoError (a damaged checkpoint is named), or
  /// LibTorch's error when memory is short.
  Trainer(const Config& config, TrainerOptions options);
  ~Trainer();

  /// Trains to training.steps, a time limit or a requested stop, then evaluates (not after a
  /// requested stop or at the wall-clock limit) and saves. A save on the way that fails is reported
  /// and tried again later; the last one throws IoError. A run that was finished before returns at
  /// once. A step whose loss or gradient is no number is skipped and reported
  /// (training/step_watch.h). Throws std::runtime_error after training.max_skipped_steps in a row;
  /// the checkpoints are then as before them.
  TrainingResult run();

  /// One optimizer step on the next global batch: gradients, AdamW, router biases. Returns without
  /// waiting for the device. For run() and for tests.
  PendingNumbers step();
  /// Steps up to `last`, reported, without evaluating or saving. For replays and tests.
  void train_to(int64_t last);

  const Config& config() const { return config_; }
  const Model& model() const { return *model_; }
  Model& model() { return *model_; }
  ParameterSet& parameters() { return parameters_; }
  const Tokenizer& tokenizer() const { return train_->tokenizer(); }
  const at::Device& device() const { return device_; }
  int64_t steps_done() const { return steps_done_; }
  /// Evaluates the weights, and their average where training.ema.evaluate says so. Nothing without
  /// validation data or when it was interrupted.
  std::optional<Evaluation> evaluate_now();
  /// The live tensors that a checkpoint holds.
  StateTensors saved_state() const { return state_of(parameters_, companions()); }
  const AdamW& optimizer() const { return *optimizer_; }
  /// The average of the weights; null without one.
  Ema* ema() { return ema_.get(); }

 private:
  using Clock = std::chrono::steady_clock;
  /// What a step's record says beside the numbers from the device.
  struct StepInfo {
    int64_t step = 0, tokens_done = 0, tokens = 0, sequences = 0;
    double learning_rate = 0, data_seconds = 0;
    double checkpoint_seconds =
        0;                     // that the saves finished since the step before held up the loop
    double fallback_rate = 0;  // of the attention's calls
    std::vector<SampleOrigin> origins;  // of the global batch
  };

  Evaluation evaluate_weights();
  /// Adds what the averaged weights reach; false when it was interrupted.
  bool evaluate_average(Record& record);
  void open_data();
  void build_model();
  /// The run whose checkpoint this one goes on from.
  const std::filesystem::path& resume_source() const;
  /// What a checkpoint holds beside weights and routing biases.
  std::vector<Companion> companions() const;
  TrainingState state() const;
  void restore(const ResumePoint& point);
  /// Makes the directory agree with the checkpoint that was restored; returns what to tell.
  std::vector<std::string> settle_directory(const ResumePoint& point);
  void announce();
  GlobalBatch next_global_batch();
  StepSums accumulate(const GlobalBatch& batch, PhaseTimer* timer = nullptr) const;
  friend struct Replay replay_next(Trainer& trainer);  // training/replay.h
  Record make_record(const StepNumbers& numbers, const StepInfo& info, double seconds) const;
  void report(PendingNumbers numbers, const StepInfo& info);
  double seconds_left(int64_t step) const;
  /// Whether the record of this step also holds every layer's numbers.
  bool wants_layers(int64_t step) const;
  bool out_of_time() const;
  bool must_stop() const;  // a signal or the wall-clock limit
  std::optional<StopReason> stop_reason() const;
  void profile_before_step();
  void profile_after_step();
  void write_profile();
  TrainingResult finish(StopReason reason);
  SaveJob save_job() const;
  void start_save();
  void finish_save(const std::optional<SaveResult>& result);
  void save_at_end();

  Config config_;
  TrainerOptions options_;
  at::Device device_;
  std::unique_ptr<Loader> train_, validation_;
  ParameterSet parameters_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<AdamW> optimizer_;
  std::unique_ptr<StepWatch> watch_;
  std::unique_ptr<RunMonitor> monitor_;
  Profiler profiler_;
  double flops_per_token_ = 0;
  std::optional<double> peak_tflops_;
  int64_t steps_done_ = 0, tokens_done_ = 0;
  StepInfo info_;                     // of the step that was queued last
  Clock::time_point started_, mark_;  // of the loop; of the last report
  double smooth_step_seconds_ = 0;
  double checkpoint_seconds_ = 0;  // that finished saves have held up the loop, not yet reported
  double longest_step_seconds_ = 0, longest_save_seconds_ = 0;
  std::unique_ptr<RunLock> lock_;
  std::unique_ptr<Saver> saver_;  // its threads read parameters_ and the optimizer's state
  std::unique_ptr<Ema> ema_;      // null without an average; its thread asks saver_
  std::optional<SavePolicy> policy_;
  int64_t evaluated_step_ = -1;
  bool finished_ = false;
  std::filesystem::path saved_;  // the newest checkpoint
};

}  // namespace dsv3
