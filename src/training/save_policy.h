#pragma once

#include <cstdint>

#include "config/config.h"

namespace dsv3 {

/// When a run saves on its way. Times are seconds on any clock that does not run backwards, given
/// by the caller.
class SavePolicy {
 public:
  SavePolicy(const CheckpointConfig& config, double now) : config_(config), last_time_(now) {}

  /// Whether to save after `step`: every checkpoint.every_steps, every checkpoint.every_minutes
  /// since the last save, when it was `requested`, or when it is time to try again after failures.
  bool due(int64_t step, double now, bool requested) const;

  /// A save was begun at `now`.
  void begun(double now) { last_time_ = now; }
  /// The save of `step` is on the disk.
  void saved(int64_t step);
  /// A save failed, as is known after `step`. Tries again 1, 2, 4, … at most 1024 steps later; what
  /// else would be due waits as long.
  void failed(int64_t step);

  int64_t last_saved_step() const { return last_step_; }  // -1 = none by this process
  int64_t next_try() const { return retry_at_; }          // step; after failed()

 private:
  CheckpointConfig config_;
  double last_time_;
  int64_t last_step_ = -1;
  int64_t failures_ = 0, retry_at_ = 0;
};

/// Seconds before a wall-clock limit at which a run must stop to be saved in time: two of the
/// longest recent steps, one and a half of the longest save and a reserve of 1 % of the limit, at
/// most a minute. longest_save 0 = none was measured: `bytes` at 200 MB/s are assumed.
double stop_margin(double limit, double longest_step, double longest_save, uint64_t bytes);

}  // namespace dsv3
