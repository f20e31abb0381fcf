#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "config/config.h"
#include "data/loader.h"
#include "monitor/run_monitor.h"
#include "optim/adamw.h"
#include "training/bad_numbers.h"
#include "training/loss_spike.h"
#include "training/step.h"

namespace dsv3 {

/// Watches over a run's numbers: has steps with NaN, infinity or (where asked for) a loss spike
/// skipped, and reports them with tensor and samples. The decision is the device's
/// (AdamW::decide()); the host hears of it a step later.
class StepWatch {
 public:
  /// Keeps a reference to `parameters`, allocated with gradients.
  StepWatch(const TrainingConfig& config, const ParameterSet& parameters);

  /// What step `step` is judged by.
  StepGuard guard(int64_t step, const StepSums& sums, const GlobalBatch& batch) const;
  /// Queues the search for bad numbers, between AdamW::decide() and apply().
  void locate(const GradientNorm& norm, int64_t step) { bad_numbers_.locate(norm.skip, step); }

  /// A step's numbers have reached the host: events and warnings for what is wrong with them. The
  /// reason to stop when training.max_skipped_steps in a row were skipped. `origins` are the
  /// samples of its batch, which `loader` gave.
  std::optional<std::string> judge(int64_t step, const StepNumbers& numbers,
                                   const std::vector<SampleOrigin>& origins, const Loader& loader,
                                   RunMonitor& monitor);

  /// Whether the last step that was judged was skipped: no time for a checkpoint, which could push
  /// the last good one out.
  bool skipping() const { return skipped_in_a_row_ > 0; }

  /// What a resumed run must know, as JSON; restore() throws std::invalid_argument when damaged.
  std::string state() const;
  void restore(const std::string& json);

 private:
  void report_skip(int64_t step, const StepNumbers& numbers, std::vector<std::string> samples,
                   RunMonitor& monitor);
  void report_spike(int64_t step, const StepNumbers& numbers, std::vector<std::string> samples,
                    RunMonitor& monitor);

  SpikeConfig spike_;
  int64_t max_skipped_steps_;
  BadNumbers bad_numbers_;
  LossSpikes spikes_;
  int64_t skipped_in_a_row_ = 0;
};

}  // namespace dsv3
