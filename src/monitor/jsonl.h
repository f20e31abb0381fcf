#pragma once

#include <filesystem>
#include <string>

#include "monitor/sink.h"

namespace dsv3 {

/// One ordinary line of metrics.jsonl: {"time": 1790000000.123, "step": 3, "train/loss": 2.5, …};
/// tables are arrays of arrays. JSON has no NaN or infinity: they become null.
std::string to_json_line(const Record& record, double unix_seconds);

/// One event line: {"time": …, "step": 40, "event": "checkpoint", "seconds": 1.5, …}. A line is an
/// event exactly when it has the key "event".
std::string to_json_line(const Event& event, double unix_seconds);

/// metrics.jsonl: one object a line, written whole, so that a reader beside the run sees whole
/// lines only. The time in each is the moment of writing.
class JsonlSink : public Sink {
 public:
  /// Appends to `path`; half a line that a killed process left at the end is cut off. Throws
  /// IoError when it cannot be opened.
  explicit JsonlSink(std::filesystem::path path);
  ~JsonlSink() override;
  JsonlSink(const JsonlSink&) = delete;
  JsonlSink& operator=(const JsonlSink&) = delete;

  /// Throws IoError when the line does not reach the file (a full disk). The file then ends with a
  /// whole line, and what is missing is kept for the next write, up to 64 MB.
  void write(const Record& record) override;
  void write(const Event& event);

 private:
  void write_line(std::string line);

  std::filesystem::path path_;
  int fd_ = -1;
  std::string pending_;
};

}  // namespace dsv3
