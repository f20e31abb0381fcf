#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "config/config.h"
#include "nn/parameter.h"

namespace dsv3 {

/// Exponential moving average of the parameters, FP32 in host memory, so that it costs the device
/// nothing but a copy (technical report §3.2.2). Every `every` steps, for the n-th time (from 0):
///   average += (1 - d) · (w - average),   d = min(decay^every, n / (n + 1)),
/// with w the FP32 master weights where there are some: until n / (n + 1) exceeds the decay it is
/// the plain mean, so that the initial weights leave no trace.
///
/// CUDA: the weights are copied on a stream of its own into page-locked memory and averaged by a
/// thread, while the next step runs; the next update of the parameters is queued behind the copy.
/// An update that is due before the last one is averaged waits for it. CPU: averaged at once.
class Ema {
 public:
  /// weights: one tensor for each bucket, FP32 or BF16, alive as long as this.
  Ema(const EmaConfig& config, std::vector<at::Tensor> weights);
  ~Ema();
  Ema(const Ema&) = delete;
  Ema& operator=(const Ema&) = delete;

  /// To be called before the weights are changed: work queued from now on waits for the copy.
  void before_change();
  /// After the weights were changed by step `step` (queued on the current stream).
  void after_step(int64_t step);
  /// Waits until the average holds the last update. Throws what went wrong in the background.
  void wait();

  /// Updates so far.
  int64_t updates() const { return updates_; }
  /// The average, [numel] FP32 for each bucket: valid after wait(), until the next after_step().
  const std::vector<at::Tensor>& average() const { return average_; }
  /// Continues from an average that was filled from a checkpoint.
  void restore(int64_t updates) { updates_ = updates; }

  /// Called, by whatever thread averages, before the average is changed.
  std::function<void()> before_average;

 private:
  void average_from(const std::vector<at::Tensor>& weights, double rate);
  void start_copy();
  void work();

  EmaConfig config_;
  std::vector<at::Tensor> weights_, average_;
  std::vector<at::Tensor> staging_;    // page-locked, like weights_; empty on the CPU
  std::optional<c10::Stream> stream_;  // of the copies
  std::optional<c10::Event> copied_;
  bool must_wait_ = false;  // the current stream has not been told to wait for copied_ yet
  int64_t updates_ = 0;

  std::mutex mutex_;
  std::condition_variable changed_;
  bool busy_ = false, stop_ = false;  // a copy is to be averaged; the thread is to end
  double rate_ = 0;                   // of that update
  std::exception_ptr error_;
  std::thread thread_;
};

/// While it lives, the parameters hold the average (rounded to their type) instead of their own
/// values, which come back bit by bit.
class AveragedWeights {
 public:
  AveragedWeights(ParameterSet& parameters, const std::vector<at::Tensor>& average);
  ~AveragedWeights();
  AveragedWeights(const AveragedWeights&) = delete;
  AveragedWeights& operator=(const AveragedWeights&) = delete;

 private:
  ParameterSet& parameters_;
  std::vector<at::Tensor> own_;  // in host memory: the device may have no room for them twice
};

}  // namespace dsv3
