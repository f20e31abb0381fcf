#pragma once

#include <filesystem>
#include <fstream>
#include <string>

#include "monitor/metrics.h"

namespace dsv3 {

/// One ordinary line of metrics.jsonl: {"time": 1790000000.123, "step": 3, "train/loss": 2.5, …}.
/// JSON has no NaN or infinity: they become null.
std::string to_json_line(const Record& record, double unix_seconds);

/// One event line: {"time": …, "step": 40, "event": "checkpoint", "seconds": 1.5, …}. A line is an
/// event exactly when it has the key "event".
std::string to_json_line(const Event& event, double unix_seconds);

/// metrics.jsonl: one object a line, flushed after each, so that a reader beside the run sees whole
/// lines. The time in each is the moment of writing.
class JsonlSink {
 public:
  /// Appends to `path`. Throws IoError when it cannot be opened.
  explicit JsonlSink(std::filesystem::path path);
  /// Throws IoError when the line does not reach the file (a full disk).
  void write(const Record& record);
  void write(const Event& event);

 private:
  void write_line(const std::string& line);

  std::filesystem::path path_;
  std::ofstream file_;
};

}  // namespace dsv3
