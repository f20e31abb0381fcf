#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <utility>

namespace dsv3 {

/// Finds losses that stand out of those before them, by their robust z-score
///   z = (loss - median) / σ,   σ = max(1.4826 · MAD, 0.001 · |median|),
/// with median and MAD (median absolute deviation) over a window of earlier steps. 1.4826 makes σ
/// the standard deviation of normal numbers. Single outliers in the window move neither.
///
/// A step N is held against steps up to N - 2 only: they are known before step N is queued, also
/// when the host runs one step ahead of the device, so that a resumed run decides as the whole one.
class LossSpikes {
 public:
  struct Window {
    double median = 0, sigma = 0;
  };

  /// window: steps, 0 = nothing is ever a spike; threshold: z beyond which a loss is one.
  LossSpikes(int64_t window, double threshold) : size_(window), threshold_(threshold) {}

  /// Median and σ that step `step` is held against; nothing before the window is full.
  std::optional<Window> window_of(int64_t step) const;
  /// The largest loss that is no spike at `step`; infinity before the window is full.
  double limit(int64_t step) const;
  /// Takes the loss of a step, in order of steps; one that is not finite is left out.
  void add(int64_t step, double loss);

  /// What it remembers, oldest first, for checkpoints.
  const std::deque<std::pair<int64_t, double>>& losses() const { return losses_; }

 private:
  int64_t size_;
  double threshold_;
  std::deque<std::pair<int64_t, double>> losses_;  // step and loss: the window and two more
};

}  // namespace dsv3
