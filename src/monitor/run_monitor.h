#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "config/config.h"
#include "monitor/console.h"
#include "monitor/jsonl.h"
#include "monitor/run_log.h"
#include "monitor/wandb.h"

namespace dsv3 {

/// Every place that a run reports to: the console, metrics.jsonl and log.txt in the run's
/// directory, and what config.monitor turns on: TensorBoard's event files in tensorboard/, a file
/// for Prometheus, the bridge to Weights & Biases. Any thread may report.
///
/// A place that fails later (a full disk) is warned of once and tried again with the next record;
/// the run goes on.
class RunMonitor {
 public:
  /// Throws IoError when a file cannot be opened.
  RunMonitor(const std::filesystem::path& directory, const Console::Options& console,
             const Config& config = {});
  ~RunMonitor();

  /// One finished step: the progress line and a line of metrics.jsonl.
  void step(const Record& record, double seconds_left);
  /// One evaluation: a line on the console, in the log and in metrics.jsonl.
  void evaluation(const Record& record);
  /// Something else that happened: a line of metrics.jsonl with "event": name (monitor/metrics.h).
  /// Nothing goes to the console; say it there with info() or warning().
  void event(int64_t step, std::string name, EventDetails details = {});
  /// Console and log.
  void info(std::string_view text);
  void warning(std::string_view text);

 private:
  /// An extra sink, and whether its last write failed.
  struct Place {
    std::unique_ptr<Sink> sink;
    bool failed = false;
  };
  void write(const Record& record);
  void try_writing(bool& failed, const std::function<void()>& write);

  std::recursive_mutex mutex_;  // a failed write warns
  Console console_;
  JsonlSink metrics_;
  bool metrics_failed_ = false;
  RunLog log_;
  std::vector<Place> places_;
  std::unique_ptr<WandbBridge> wandb_;
};

}  // namespace dsv3
