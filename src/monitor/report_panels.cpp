#include "monitor/report_panels.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <set>
#include <string>

#include "monitor/curves.h"
#include "monitor/metrics.h"

namespace dsv3 {
namespace {

using Json = nlohmann::ordered_json;

/// How a metric is drawn: each value thin with the mean over it, the mean alone, a line, or a line
/// with a dot at each value.
enum class Style : uint8_t { kRawAndMean, kMean, kLine, kDots };

struct Curve {
  const char* metric;
  Style style;
};

struct Panel {
  const char* id;
  const char* title;
  const char* unit;
  bool log = false;  // the y axis can be switched; and starts so where `starts_log`
  bool starts_log = false;
  std::vector<Curve> curves;
  const char* note = "";
};

const std::vector<Panel>& panels() {
  static const std::vector<Panel> kPanels{
      {.id = "loss",
       .title = "Loss",
       .unit = "nats per token",
       .log = true,
       .curves = {{metric::kLoss, Style::kRawAndMean},
                  {metric::kMtpLoss, Style::kMean},
                  {metric::kEvalLoss, Style::kDots},
                  {metric::kEvalEmaLoss, Style::kDots}}},
      {.id = "accuracy",
       .title = "Accuracy",
       .unit = "share of tokens",
       .curves = {{metric::kAccuracy, Style::kMean},
                  {metric::kMtpAcceptance, Style::kMean},
                  {metric::kEvalAccuracy, Style::kDots},
                  {metric::kEvalEmaAccuracy, Style::kDots}}},
      {.id = "lr",
       .title = "Learning rate",
       .unit = "",
       .log = true,
       .curves = {{metric::kLearningRate, Style::kLine}}},
      {.id = "grad_norm",
       .title = "Gradient norm",
       .unit = "before clipping",
       .log = true,
       .starts_log = true,
       .curves = {{metric::kGradNorm, Style::kRawAndMean}}},
      {.id = "update",
       .title = "Update to weight",
       .unit = "‖Δw‖ / ‖w‖",
       .log = true,
       .starts_log = true,
       .curves = {{metric::kUpdateToWeight, Style::kRawAndMean}}},
      {.id = "throughput",
       .title = "Throughput",
       .unit = "tokens/s",
       .curves = {{metric::kTokensPerSecond, Style::kRawAndMean}}},
      {.id = "mfu",
       .title = "Model FLOPs utilisation",
       .unit = "share of the peak",
       .curves = {{metric::kMfu, Style::kRawAndMean}}},
      {.id = "memory",
       .title = "Memory",
       .unit = "GB",
       .curves = {{metric::kGpuMemory, Style::kLine}, {metric::kHostMemory, Style::kLine}}},
      {.id = "max_vio",
       .title = "Load above the mean (max_vio)",
       .unit = "largest load / mean − 1",
       .log = true,
       .curves = {{metric::kMaxViolation, Style::kRawAndMean},
                  {metric::kMicroViolation, Style::kMean}}},
      {.id = "bias",
       .title = "Router bias, spread",
       .unit = "largest − smallest",
       .curves = {{metric::kBiasSpread, Style::kLine}}},
      {.id = "evenness",
       .title = "Evenness of the experts",
       .unit = "",
       .curves = {{metric::kEntropy, Style::kMean},
                  {metric::kUtilization, Style::kMean},
                  {metric::kLoadImbalance, Style::kMean}}}};
  return kPanels;
}

constexpr const char* kLayerMetrics[][2] = {
    {metric::kMaxViolation, "max_vio by layer"},
    {metric::kBiasSpread, "Router bias by layer, spread"},
};

constexpr const char* kStepParts[] = {metric::kDataTime,          metric::kForwardTime,
                                      metric::kBackwardTime,      metric::kOptimizerTime,
                                      metric::kCommunicationTime, metric::kCheckpointTime};

bool has_number(const MetricSeries& series) {
  return std::any_of(series.begin(), series.end(),
                     [](const MetricPoint& point) { return std::isfinite(point.value); });
}

/// `window`: steps that a value is the mean of.
Json curve_json(const MetricSeries& series, size_t limit, size_t run, std::string_view name,
                const char* style, size_t window = 1) {
  Json steps = Json::array(), values = Json::array();
  for (const auto& [step, value] : thin_out(series, limit)) {
    steps.push_back(step);
    values.push_back(short_number(value));
  }
  return {{"run", run},       {"name", name},  {"label", name},   {"style", style},
          {"window", window}, {"step", steps}, {"value", values}, {"total", series.size()}};
}

void add_curve(Json& curves, const Curve& curve, size_t run, const RunHistory& history) {
  const MetricSeries& series = history.series(curve.metric);
  if (!has_number(series)) return;
  const auto add = [&](const MetricSeries& points, const char* style, size_t window = 1) {
    curves.push_back(curve_json(points, kMostPoints, run, curve.metric, style, window));
  };
  const size_t window = smoothing_window(series.size());
  if (curve.style == Style::kRawAndMean) add(series, "raw");
  if (curve.style == Style::kRawAndMean || curve.style == Style::kMean)
    add(smooth(series, window), "mean", window);
  if (curve.style == Style::kLine) add(series, "line");
  if (curve.style == Style::kDots) add(series, "dots");
}

Json panel_json(const Panel& panel, const std::vector<ReportRun>& runs) {
  Json curves = Json::array();
  for (size_t run = 0; run < runs.size(); ++run)
    for (const Curve& curve : panel.curves) add_curve(curves, curve, run, runs[run].history);
  return {{"id", panel.id},     {"title", panel.title},       {"unit", panel.unit},
          {"kind", "lines"},    {"log", panel.log},           {"startsLog", panel.starts_log},
          {"note", panel.note}, {"series", std::move(curves)}};
}

/// The layer of "moe/max_vio/layer_3", nothing for another name.
std::optional<int64_t> layer_of(std::string_view name, std::string_view metric) {
  const std::string prefix = fmt::format("{}/layer_", metric);
  if (!name.starts_with(prefix)) return std::nullopt;
  int64_t layer = 0;
  const char* end = name.data() + name.size();
  const auto [stop, error] = std::from_chars(name.data() + prefix.size(), end, layer);
  if (error != std::errc() || stop != end || layer < 0) return std::nullopt;
  return layer;
}

/// In rising order; the file's own order of names is that of text.
std::vector<int64_t> layers_of(const RunHistory& history, std::string_view metric) {
  std::set<int64_t> layers;
  for (const auto& [name, series] : history.metrics)
    if (const auto layer = layer_of(name, metric)) layers.insert(*layer);
  return {layers.begin(), layers.end()};
}

void add_layer_panels(Json& all, const RunHistory& history) {
  for (const auto& [metric, title] : kLayerMetrics) {
    Json curves = Json::array();
    for (const int64_t layer : layers_of(history, metric)) {
      const MetricSeries& series = history.series(name_of_layer(metric, layer));
      if (!has_number(series)) continue;
      curves.push_back(
          curve_json(series, kMostLayerPoints, 0, name_of_layer(metric, layer), "line"));
      curves.back()["label"] = fmt::format("layer {}", layer);
    }
    if (curves.empty()) continue;
    std::string id(metric);
    id = id.substr(id.find('/') + 1) + "_layers";
    all.push_back({{"id", id},
                   {"title", title},
                   {"unit", ""},
                   {"kind", "layers"},
                   {"log", false},
                   {"startsLog", false},
                   {"note", ""},
                   {"series", std::move(curves)}});
  }
}

/// train/step_time in its parts, and what is left of it.
Json step_time_panel(const RunHistory& history) {
  std::vector<const MetricSeries*> parts;
  for (const char* part : kStepParts) parts.push_back(&history.series(part));
  parts.push_back(&history.series(metric::kStepTime));
  AlignedSeries means = bucket_means(parts, kMostBars);
  std::vector<double>& rest = means.values.back();
  for (size_t i = 0; i < rest.size(); ++i) {
    for (size_t part = 0; part + 1 < parts.size(); ++part)
      if (std::isfinite(means.values[part][i])) rest[i] -= means.values[part][i];
    rest[i] = std::max(0.0, rest[i]);
  }
  const auto total = history.series(metric::kStepTime).size();
  Json curves = Json::array();
  for (size_t part = 0; part < parts.size(); ++part) {
    const bool last = part + 1 == parts.size();
    const auto& values = means.values[part];
    if (std::none_of(values.begin(), values.end(), [](double v) { return v > 0; })) continue;
    Json numbers = Json::array();
    for (const double value : values) numbers.push_back(short_number(value));
    const std::string name = last ? "rest" : kStepParts[part];
    curves.push_back({{"run", 0},
                      {"name", name},
                      {"label", last ? "the rest" : name.substr(name.find("time_") + 5)},
                      {"style", "area"},
                      {"window", 1},
                      {"step", means.steps},
                      {"value", std::move(numbers)},
                      {"total", total}});
  }
  const size_t a_bucket =
      means.steps.empty() ? 1 : (total + means.steps.size() - 1) / means.steps.size();
  return {{"id", "step_time"},
          {"title", "Time of a step"},
          {"unit", "s"},
          {"kind", "stack"},
          {"log", false},
          {"startsLog", false},
          {"note", a_bucket > 1 ? fmt::format("means of {} steps", a_bucket) : ""},
          {"series", std::move(curves)}};
}

std::string base64(const std::vector<uint8_t>& bytes) {
  constexpr const char* kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const size_t left = std::min<size_t>(3, bytes.size() - i);
    uint32_t bits = 0;
    for (size_t k = 0; k < 3; ++k) bits = bits << 8 | (k < left ? bytes[i + k] : 0U);
    for (size_t k = 0; k < 4; ++k) text += k <= left ? kDigits[bits >> (18 - 6 * k) & 63U] : '=';
  }
  return text;
}

}  // namespace

Json short_number(double value) {
  if (!std::isfinite(value)) return nullptr;
  return std::strtod(fmt::format("{:.6g}", value).c_str(), nullptr);
}

Json report_loads(const RunHistory& history) {
  if (history.loads.empty()) return nullptr;
  const int64_t rows = history.loads.back().num_layers, columns = history.loads.back().num_experts;
  std::vector<const ExpertLoads*> alike;
  for (const ExpertLoads& loads : history.loads)
    if (loads.num_layers == rows && loads.num_experts == columns) alike.push_back(&loads);
  // A million cells are 1.3 MB of page.
  const auto affordable = static_cast<size_t>(std::max<int64_t>(8, 1'000'000 / (rows * columns)));
  const size_t frames = std::min({alike.size(), affordable, size_t{120}});
  std::vector<int64_t> layers = layers_of(history, metric::kMaxViolation);
  if (static_cast<int64_t>(layers.size()) != rows) {
    layers.clear();
    for (int64_t row = 0; row < rows; ++row) layers.push_back(row);
  }
  Json chosen = Json::array();
  for (size_t i = 0; i < frames; ++i) {
    // The first and the last one, and evenly between.
    const size_t k = frames > 1 ? i * (alike.size() - 1) / (frames - 1) : alike.size() - 1;
    chosen.push_back({{"step", alike[k]->step}, {"cells", base64(alike[k]->cells)}});
  }
  return {{"layers", layers},
          {"experts", columns},
          {"scale", kLoadScale},
          {"total", alike.size()},
          {"frames", std::move(chosen)}};
}

Json report_panels(const std::vector<ReportRun>& runs) {
  Json all = Json::array();
  for (const Panel& panel : panels()) {
    if (Json json = panel_json(panel, runs); !json["series"].empty())
      all.push_back(std::move(json));
    if (std::string_view(panel.id) != "mfu") continue;
    Json time = runs.size() == 1 ? step_time_panel(runs.front().history)
                                 : panel_json({.id = "step_time",
                                               .title = "Time of a step",
                                               .unit = "s",
                                               .log = true,
                                               .curves = {{metric::kStepTime, Style::kMean}}},
                                              runs);
    if (!time["series"].empty()) all.push_back(std::move(time));
  }
  if (runs.size() == 1) add_layer_panels(all, runs.front().history);
  return all;
}

}  // namespace dsv3
