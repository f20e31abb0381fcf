#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace dsv3 {

/// A metric's value after a step; NaN where the file has null.
struct MetricPoint {
  int64_t step = 0;
  double value = 0;
};
using MetricSeries = std::vector<MetricPoint>;  // steps rise strictly

/// An event line of metrics.jsonl.
struct PastEvent {
  int64_t step = 0;
  double time = 0;      // as RunHistory::times, NaN when the line has none
  std::string name;     // "checkpoint", "resume", …
  std::string details;  // the line's other keys, "key: value, key: value"
};

/// moe/expert_distribution of one step, each layer's loads over their mean.
struct ExpertLoads {
  int64_t step = 0;
  int64_t num_layers = 0, num_experts = 0;
  /// [num_layers][num_experts] load / mean load · kLoadScale, rounded, 255 from there on.
  std::vector<uint8_t> cells;
};
inline constexpr double kLoadScale = 50;

/// What a run's directory tells of it: metrics.jsonl by metric, and config.yaml.
struct RunHistory {
  std::filesystem::path directory;
  std::string name;  // the directory's own
  std::map<std::string, MetricSeries, std::less<>> metrics;
  /// Unix seconds of the ordinary lines; empty in files that have none. They never fall: where the
  /// clock was set back, all that follows is later by as much.
  MetricSeries times;
  std::vector<PastEvent> events;   // in the order of the file
  std::vector<ExpertLoads> loads;  // steps rise strictly
  std::string config;              // config.yaml's text; empty when there is none

  int64_t num_lines = 0;            // that could be read
  int64_t num_broken = 0;           // that could not, the cut one left out
  std::vector<std::string> broken;  // "line 17: what is wrong", at most kMostNamed
  bool last_line_cut = false;       // no newline at the end, and no whole object
  static constexpr size_t kMostNamed = 5;

  /// Empty when the run has no such metric.
  const MetricSeries& series(std::string_view metric) const;
  int64_t count_events(std::string_view event) const;
};

/// Reads DIRECTORY/metrics.jsonl line by line, and config.yaml. A line that is no JSON object with
/// an integer "step" is counted and left out. Where a step comes again (a run that went on from an
/// older checkpoint), the newer lines replace the older ones. Throws IoError when the directory or
/// its metrics.jsonl is missing, or no line can be read.
RunHistory read_run_history(const std::filesystem::path& directory);

}  // namespace dsv3
