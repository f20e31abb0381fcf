#pragma once

#include <filesystem>
#include <mutex>
#include <string>
#include <string_view>

#include "monitor/console.h"
#include "monitor/jsonl.h"
#include "monitor/run_log.h"

namespace dsv3 {

/// Every place that a run reports to: the console, metrics.jsonl and log.txt in the run's
/// directory. Any thread may report.
class RunMonitor {
 public:
  /// Throws IoError when a file cannot be opened.
  RunMonitor(const std::filesystem::path& directory, const Console::Options& console);

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
  std::mutex mutex_;
  Console console_;
  JsonlSink metrics_;
  RunLog log_;
};

}  // namespace dsv3
