#pragma once

#include <filesystem>
#include <fstream>
#include <string>

#include "monitor/metrics.h"

namespace dsv3 {

/// One line of metrics.jsonl: {"step": 3, "train/loss": 2.5, …}. JSON has no NaN or infinity: they
/// become null.
std::string to_json_line(const Record& record);

/// metrics.jsonl: one object a line, flushed after each, so that a reader beside the run sees whole
/// lines.
class JsonlSink {
 public:
  /// Appends to `path`. Throws IoError when it cannot be opened.
  explicit JsonlSink(std::filesystem::path path);
  /// Throws IoError when the line does not reach the file (a full disk).
  void write(const Record& record);

 private:
  std::filesystem::path path_;
  std::ofstream file_;
};

}  // namespace dsv3
