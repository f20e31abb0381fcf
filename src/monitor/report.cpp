#include "monitor/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <utility>

#include "base/error.h"
#include "config/compare.h"
#include "config/load.h"
#include "monitor/curves.h"
#include "monitor/metrics.h"
#include "monitor/report_files.h"
#include "monitor/report_panels.h"

namespace dsv3 {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kMostRuns = 8;      // as many as there are colours
constexpr size_t kMostListed = 200;  // events in the table
constexpr const char* kNothing = "–";
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

std::string number(const char* format, double value) {
  return std::isfinite(value) ? fmt::format(fmt::runtime(format), value) : kNothing;
}

/// The run's config, or why there is none.
std::pair<std::optional<Config>, std::string> config_of(const RunHistory& history) {
  if (history.config.empty()) return {std::nullopt, "it has no config.yaml"};
  try {
    const std::string name = (history.directory / "config.yaml").string();
    return {load_config_text(history.config, name), ""};
  } catch (const std::exception& error) {  // written by another version, or by hand
    return {std::nullopt, error.what()};
  }
}

/// The first line's time, NaN when there is none.
double start_of(const RunHistory& history) {
  return history.times.empty() ? kNan : history.times.front().value;
}

/// Knots of step → tokens and step → seconds since the first line; the page interpolates between.
/// Files without "time" have the sum of the steps' times instead.
Json axis_json(const RunHistory& history) {
  Json axis = Json::object();
  const auto add = [&axis](const char* name, const MetricSeries& series, double offset) {
    Json steps = Json::array(), values = Json::array();
    for (const auto& [step, value] : thin_out(series, kMostPoints)) {
      if (!std::isfinite(value)) continue;
      steps.push_back(step);
      values.push_back(std::round((value - offset) * 1000) / 1000);
    }
    if (!steps.empty()) axis[name] = {{"step", std::move(steps)}, {"value", std::move(values)}};
  };
  add("tokens", history.series(metric::kTokens), 0);
  if (!history.times.empty()) {
    add("seconds", history.times, start_of(history));
    return axis;
  }
  MetricSeries elapsed;
  double sum = 0;
  for (const auto& [step, value] : history.series(metric::kStepTime)) {
    if (std::isfinite(value)) sum += value;
    elapsed.push_back({step, sum});
  }
  add("seconds", elapsed, 0);
  return axis;
}

/// Events by kind, evenly thinned to kMostMarks of each.
Json marks_json(const RunHistory& history) {
  std::map<std::string, std::vector<const PastEvent*>> kinds;
  for (const PastEvent& event : history.events) kinds[event.name].push_back(&event);
  Json marks = Json::array();
  for (const auto& [name, events] : kinds) {
    const size_t drawn = std::min(events.size(), kMostMarks);
    Json steps = Json::array(), texts = Json::array();
    for (size_t i = 0; i < drawn; ++i) {
      const PastEvent& event = *events[i * events.size() / drawn];
      steps.push_back(event.step);
      texts.push_back(event.details);
    }
    marks.push_back({{"name", name}, {"step", steps}, {"text", texts}, {"total", events.size()}});
  }
  return marks;
}

/// The newest events, whole.
Json events_json(const RunHistory& history) {
  Json list = Json::array();
  const size_t first = history.events.size() - std::min(history.events.size(), kMostListed);
  for (size_t i = first; i < history.events.size(); ++i) {
    const PastEvent& event = history.events[i];
    list.push_back({{"step", event.step},
                    {"after", short_time(event.time - start_of(history))},
                    {"name", event.name},
                    {"text", event.details}});
  }
  return list;
}

std::vector<std::string> warnings_of(const RunHistory& history) {
  std::vector<std::string> warnings;
  if (history.num_broken > 0) {
    const auto more = history.num_broken - static_cast<int64_t>(history.broken.size());
    warnings.push_back(fmt::format(
        "{} of metrics.jsonl could not be read: {}{}",
        history.num_broken == 1 ? std::string("1 line")
                                : fmt::format("{} lines", history.num_broken),
        fmt::join(history.broken, "; "), more > 0 ? fmt::format("; and {} more", more) : ""));
  }
  if (history.last_line_cut) warnings.emplace_back("the last line of metrics.jsonl is cut off");
  return warnings;
}

Json run_json(const ReportRun& run, std::string label) {
  Json numbers = Json::array();
  for (const auto& [name, value] : headline(run.history)) numbers.push_back({name, value});
  return {{"label", std::move(label)},          {"path", run.history.directory.string()},
          {"resume", run.resume_command},       {"config", run.history.config},
          {"headline", std::move(numbers)},     {"warnings", warnings_of(run.history)},
          {"axis", axis_json(run.history)},     {"marks", marks_json(run.history)},
          {"events", events_json(run.history)}, {"numEvents", run.history.events.size()}};
}

/// Keys whose values differ between any two runs, a value a run.
Json differences_json(const std::vector<ReportRun>& runs, const std::vector<std::string>& labels) {
  std::vector<std::optional<Config>> configs;
  Json unreadable = Json::array(), rows = Json::array();
  for (size_t i = 0; i < runs.size(); ++i) {
    auto [config, error] = config_of(runs[i].history);
    if (!config) unreadable.push_back(fmt::format("{}: {}", labels[i], error));
    configs.push_back(std::move(config));
  }
  const auto first =
      std::find_if(configs.begin(), configs.end(), [](auto& c) { return c.has_value(); });
  std::vector<std::string> keys;
  std::map<std::string, std::vector<std::string>> values;
  if (first == configs.end()) return {{"rows", rows}, {"unreadable", unreadable}};
  for (size_t i = 0; i < runs.size(); ++i) {
    if (!configs[i]) continue;
    for (const auto& [key, usual, own] : config_differences(**first, *configs[i])) {
      if (!values.contains(key)) {
        keys.push_back(key);
        for (const auto& config : configs) values[key].push_back(config ? usual : kNothing);
      }
      values[key][i] = own;
    }
  }
  for (const std::string& key : keys) rows.push_back({{"key", key}, {"values", values[key]}});
  return {{"rows", rows}, {"unreadable", unreadable}};
}

/// Names of the runs' directories, whole paths where two have the same.
std::vector<std::string> labels_of(const std::vector<ReportRun>& runs) {
  std::vector<std::string> labels;
  for (const ReportRun& run : runs) {
    const bool alone = std::count_if(runs.begin(), runs.end(), [&](const ReportRun& other) {
                         return other.history.name == run.history.name;
                       }) == 1;
    labels.push_back(alone ? run.history.name : run.history.directory.string());
  }
  return labels;
}

/// The template with each {{name}} replaced, in one pass: what is put in is not looked at again.
std::string filled(std::string_view page,
                   const std::map<std::string, std::string, std::less<>>& parts) {
  std::string result;
  while (true) {
    const size_t open = page.find("{{");
    result += page.substr(0, open);
    if (open == std::string_view::npos) return result;
    const size_t close = page.find("}}", open);
    const auto part = parts.find(page.substr(open + 2, close - open - 2));
    DSV3_CHECK(part != parts.end(), "the page's template names an unknown part");
    result += part->second;
    page.remove_prefix(close + 2);
  }
}

}  // namespace

std::vector<std::pair<std::string, std::string>> headline(const RunHistory& history) {
  const auto config = config_of(history).first;
  const MetricSeries& losses = history.series(metric::kLoss);
  const int64_t steps = losses.empty() ? 0 : losses.back().step;
  const MetricSeries& tokens = history.series(metric::kTokens);
  const MetricPoint best = smallest(history.series(metric::kEvalLoss));
  const MetricSeries& eval_bits = history.series(metric::kEvalBitsPerByte);
  const MetricPoint best_bits = smallest(eval_bits);
  const double train_bits = mean_of_last(history.series(metric::kBitsPerByte), 50);
  const double seconds =
      history.times.empty() ? kNan : history.times.back().value - start_of(history);
  const double speed = median(history.series(metric::kTokensPerSecond));
  const auto count = [&history](const char* event) {
    return fmt::format("{}", history.count_events(event));
  };
  return {
      {"steps",
       config ? fmt::format("{} of {}", steps, config->training.steps) : fmt::format("{}", steps)},
      {"tokens", tokens.empty() || !std::isfinite(tokens.back().value)
                     ? kNothing
                     : short_count(tokens.back().value)},
      {"time", std::isfinite(seconds) ? short_time(seconds) : kNothing},
      {"loss, last 50 steps", number("{:.4f}", mean_of_last(losses, 50))},
      {"best evaluation", std::isfinite(best.value)
                              ? fmt::format("{:.4f} at step {}", best.value, best.step)
                              : kNothing},
      {"bits per byte", std::isfinite(best_bits.value)
                            ? number("{:.4f}, best evaluation", best_bits.value)
                            : number("{:.4f}, training", train_bits)},
      {"tokens/s, median", std::isfinite(speed) ? short_count(speed) : kNothing},
      {"MFU, median", number("{:.3f}", median(history.series(metric::kMfu)))},
      {"checkpoints", count("checkpoint")},
      {"resumes", count("resume")},
      {"skipped steps", count("skipped_step")},
      {"loss spikes", count("loss_spike")},
  };
}

std::string escape_html(std::string_view text) {
  std::string result;
  for (const char c : text) {
    switch (c) {
      case '&':
        result += "&amp;";
        break;
      case '<':
        result += "&lt;";
        break;
      case '>':
        result += "&gt;";
        break;
      case '"':
        result += "&quot;";
        break;
      case '\'':
        result += "&#39;";
        break;
      default:
        result += c;
    }
  }
  return result;
}

std::string escape_json_for_html(std::string_view json) {
  std::string result;
  for (const char c : json) {
    switch (c) {
      case '&':
        result += "\\u0026";
        break;
      case '<':
        result += "\\u003c";
        break;
      case '>':
        result += "\\u003e";
        break;
      default:
        result += c;
    }
  }
  return result;
}

std::string report_page(const std::vector<ReportRun>& runs) {
  require(!runs.empty() && runs.size() <= kMostRuns, "a report shows 1 to {} runs, not {}",
          kMostRuns, runs.size());
  const std::vector<std::string> labels = labels_of(runs);
  Json data = {{"runs", Json::array()}, {"panels", report_panels(runs)}};
  for (size_t i = 0; i < runs.size(); ++i) data["runs"].push_back(run_json(runs[i], labels[i]));
  data["loads"] = runs.size() == 1 ? report_loads(runs.front().history) : Json(nullptr);
  data["differences"] = runs.size() > 1 ? differences_json(runs, labels) : Json(nullptr);
  // Names and texts may hold bytes that are no UTF-8: they are replaced.
  const std::string json = data.dump(-1, ' ', false, Json::error_handler_t::replace);
  return filled(report_files::kPageHtml,
                {{"title", escape_html(fmt::format("dsv3 {}", fmt::join(labels, ", ")))},
                 {"style", report_files::kPageCss},
                 {"charts", report_files::kChartsJs},
                 {"heatmap", report_files::kHeatmapJs},
                 {"script", report_files::kPageJs},
                 {"data", escape_json_for_html(json)}});
}

}  // namespace dsv3
