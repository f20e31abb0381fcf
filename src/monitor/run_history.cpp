#include "monitor/run_history.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"
#include "monitor/metrics.h"

namespace dsv3 {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// `runs/first/` and `.` have names too.
std::string name_of(const fs::path& directory) {
  fs::path path = fs::absolute(directory).lexically_normal();
  if (path.filename().empty()) path = path.parent_path();
  return path.filename().string();
}

/// Steps that come again are those of a run that went back.
void append(MetricSeries& series, int64_t step, double value) {
  while (!series.empty() && series.back().step >= step) series.pop_back();
  series.push_back({step, value});
}

/// A value of an event in few words; long ones are cut.
std::string short_text(const Json& value) {
  constexpr size_t kLongest = 200;
  std::string text = value.is_string() ? value.get<std::string>()
                                       : value.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (value.is_number_float()) text = fmt::format("{:.4g}", value.get<double>());
  if (text.size() <= kLongest) return text;
  size_t end = kLongest;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80) --end;  // UTF-8
  return text.substr(0, end) + " …";
}

/// False when `table` is not [layers][E] of numbers.
bool read_loads(const Json& table, ExpertLoads& loads) {
  if (!table.is_array() || table.empty()) return false;
  loads.num_layers = static_cast<int64_t>(table.size());
  for (const Json& row : table) {
    if (!row.is_array() || row.empty()) return false;
    if (loads.num_experts == 0) loads.num_experts = static_cast<int64_t>(row.size());
    if (static_cast<int64_t>(row.size()) != loads.num_experts) return false;
    double sum = 0;
    for (const Json& count : row) {
      if (!count.is_number() || count.get<double>() < 0) return false;
      sum += count.get<double>();
    }
    const double scale = sum > 0 ? kLoadScale * static_cast<double>(row.size()) / sum : 0;
    for (const Json& count : row)
      loads.cells.push_back(
          static_cast<uint8_t>(std::min(255.0, std::round(count.get<double>() * scale))));
  }
  return true;
}

void read_event(const Json& line, int64_t step, double time, RunHistory& history) {
  PastEvent event{.step = step, .time = time, .name = short_text(line["event"]), .details = ""};
  for (const auto& [key, value] : line.items()) {
    if (key == "time" || key == "step" || key == "event") continue;
    event.details +=
        fmt::format("{}{}: {}", event.details.empty() ? "" : ", ", key, short_text(value));
  }
  history.events.push_back(std::move(event));
}

/// Makes times of successive lines that never fall: where the machine's clock was set back, it
/// stood still.
class SteadyTime {
 public:
  double operator()(double time) {
    if (std::isnan(time)) return time;
    if (time + added_ < last_) added_ = last_ - time;
    return last_ = time + added_;
  }

 private:
  double last_ = -std::numeric_limits<double>::infinity(), added_ = 0;
};

/// What is wrong with the line, "" when it was taken.
std::string read_line(const std::string& text, SteadyTime& steady, RunHistory& history) {
  const Json line = Json::parse(text, nullptr, false);
  if (!line.is_object()) return "is not a JSON object";
  if (!line.contains("step") || !line["step"].is_number_integer()) return "has no integer \"step\"";
  const auto step = line["step"].get<int64_t>();
  constexpr int64_t kMostSteps = int64_t{1} << 53;  // what a double, and JavaScript, counts exactly
  if (step < 0 || step > kMostSteps) return "has a \"step\" out of range";
  const bool timed = line.contains("time") && line["time"].is_number();
  const double time = steady(timed ? line["time"].get<double>() : kNan);
  if (line.contains("event")) {
    read_event(line, step, time, history);
    return "";
  }
  if (timed) append(history.times, step, time);
  for (const auto& [key, value] : line.items()) {
    if (key == "time" || key == "step") continue;
    if (value.is_number()) append(history.metrics[key], step, value.get<double>());
    if (value.is_null()) append(history.metrics[key], step, kNan);
    if (key != metric::kExpertDistribution) continue;
    ExpertLoads loads{.step = step, .num_layers = 0, .num_experts = 0, .cells = {}};
    if (!read_loads(value, loads))
      return fmt::format("has a {} that is not [layers][experts]", metric::kExpertDistribution);
    while (!history.loads.empty() && history.loads.back().step >= step) history.loads.pop_back();
    history.loads.push_back(std::move(loads));
  }
  return "";
}

}  // namespace

const MetricSeries& RunHistory::series(std::string_view metric) const {
  static const MetricSeries kNone;
  const auto found = metrics.find(metric);
  return found == metrics.end() ? kNone : found->second;
}

int64_t RunHistory::count_events(std::string_view event) const {
  return std::count_if(events.begin(), events.end(),
                       [event](const PastEvent& e) { return e.name == event; });
}

RunHistory read_run_history(const fs::path& directory) {
  if (!fs::is_directory(directory))
    throw IoError(
        fmt::format("{} is not a directory; a report needs that of a run", directory.string()));
  const fs::path path = directory / "metrics.jsonl";
  if (!fs::is_regular_file(path))
    throw IoError(fmt::format("{} is not a run that has begun: it holds no metrics.jsonl",
                              directory.string()));
  RunHistory history;
  history.directory = directory;
  history.name = name_of(directory);
  if (fs::is_regular_file(directory / "config.yaml"))
    history.config = read_file(directory / "config.yaml");

  std::ifstream file(path, std::ios::binary);
  if (!file) throw IoError(fmt::format("cannot open {}", path.string()));
  int64_t number = 0;
  SteadyTime steady;
  for (std::string text; std::getline(file, text);) {
    ++number;
    const std::string wrong = read_line(text, steady, history);
    if (wrong.empty()) {
      ++history.num_lines;
    } else if (file.eof()) {
      history.last_line_cut = true;
    } else {
      if (++history.num_broken <= static_cast<int64_t>(RunHistory::kMostNamed))
        history.broken.push_back(fmt::format("line {} {}", number, wrong));
    }
  }
  if (file.bad()) throw IoError(fmt::format("cannot read {}", path.string()));
  if (history.num_lines == 0)
    throw IoError(fmt::format("{} holds no line that can be read{}", path.string(),
                              history.broken.empty() ? "" : ": " + history.broken.front()));
  return history;
}

}  // namespace dsv3
