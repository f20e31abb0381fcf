#include "monitor/tensorboard.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>

#include "base/error.h"
#include "monitor/tensorboard.pb.h"

namespace dsv3 {
namespace {
namespace fs = std::filesystem;
namespace tb = tensorboard;

constexpr auto kFlushEvery = std::chrono::seconds(3);

fs::path event_path(const fs::path& directory) {
  static std::atomic<int> files{0};  // two sinks of one process in one second
  std::error_code error;
  fs::create_directories(directory, error);
  if (error)
    throw IoError(fmt::format("cannot create {}: {}", directory.string(), error.message()));
  // Note: TensorBoard reads files in the order of their names, so the newest must have the largest,
  // also in the second of the one before, and after the clock was set back.
  constexpr std::string_view kStart = "events.out.tfevents.";
  constexpr int64_t kLargest = 9'999'999'999;  // ten digits
  auto number = static_cast<int64_t>(unix_seconds());
  for (const auto& entry : fs::directory_iterator(directory, error)) {
    const std::string name = entry.path().filename().string();
    int64_t other = 0;
    if (name.starts_with(kStart) &&
        std::from_chars(name.data() + kStart.size(), name.data() + name.size(), other).ec ==
            std::errc() &&
        other < kLargest)
      number = std::max(number, other + 1);
  }
  std::array<char, 256> host{};
  if (::gethostname(host.data(), host.size() - 1) != 0) host[0] = 'x';
  return directory /
         fmt::format("{}{:010}.{}.{}.{}", kStart, number, host.data(), ::getpid(), files++);
}

tb::Event event_at(int64_t step) {
  tb::Event event;
  event.set_wall_time(unix_seconds());
  event.set_step(step);
  return event;
}

/// Tokens per expert id as a histogram over the ids.
void fill(tb::Histogram& histogram, const std::vector<int64_t>& counts) {
  double num = 0, sum = 0, squares = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    const auto id = static_cast<double>(i), count = static_cast<double>(counts[i]);
    num += count;
    sum += count * id;
    squares += count * id * id;
    histogram.add_bucket_limit(id + 0.5);
    histogram.add_bucket(count);
  }
  histogram.set_min(-0.5);  // the first bucket's left end
  histogram.set_max(static_cast<double>(counts.size()) - 0.5);
  histogram.set_num(num);
  histogram.set_sum(sum);
  histogram.set_sum_squares(squares);
}

void add_table(tb::Summary& summary, const CountTable& table) {
  std::vector<int64_t> total;
  for (size_t row = 0; row < table.counts.size(); ++row) {
    const auto& counts = table.counts[row];
    total.resize(std::max(total.size(), counts.size()));
    for (size_t i = 0; i < counts.size(); ++i) total[i] += counts[i];
    auto* value = summary.add_value();
    value->set_tag(name_of_layer(table.name, table.layers.at(row)));
    fill(*value->mutable_histo(), counts);
  }
  auto* value = summary.add_value();
  value->set_tag(table.name);
  fill(*value->mutable_histo(), total);
}

/// The hparams plugin's summary: its message travels as metadata beside an empty tensor.
void add_hparams(tb::Summary& summary, const char* tag, const tb::HParamsPluginData& data) {
  auto* value = summary.add_value();
  value->set_tag(tag);
  auto* plugin = value->mutable_metadata()->mutable_plugin_data();
  plugin->set_plugin_name("hparams");
  plugin->set_content(data.SerializeAsString());
  value->mutable_tensor()->set_dtype(1);
  value->mutable_tensor()->mutable_tensor_shape()->add_dim();
}

tb::HParamsPluginData experiment_of(const FlatConfig& hyperparameters) {
  constexpr int32_t kText = 1, kFlag = 2, kNumber = 3;
  tb::HParamsPluginData data;
  for (const auto& [name, value] : hyperparameters) {
    auto* info = data.mutable_experiment()->add_hparam_infos();
    info->set_name(name);
    info->set_type(std::holds_alternative<bool>(value)     ? kFlag
                   : std::holds_alternative<double>(value) ? kNumber
                                                           : kText);
  }
  for (const char* tag : {metric::kLoss, metric::kEvalLoss, metric::kTokensPerSecond})
    data.mutable_experiment()->add_metric_infos()->mutable_name()->set_tag(tag);
  return data;
}

tb::HParamsPluginData session_of(const FlatConfig& hyperparameters) {
  tb::HParamsPluginData data;
  auto* session = data.mutable_session_start_info();
  session->set_start_time_secs(unix_seconds());
  for (const auto& [name, value] : hyperparameters) {
    auto& out = (*session->mutable_hparams())[name];
    if (const auto* flag = std::get_if<bool>(&value))
      out.set_bool_value(*flag);
    else if (const auto* number = std::get_if<double>(&value))
      out.set_number_value(*number);
    else
      out.set_string_value(std::get<std::string>(value));
  }
  return data;
}

}  // namespace

TensorBoardSink::TensorBoardSink(const fs::path& directory, FlatConfig hyperparameters)
    : file_(event_path(directory)), hyperparameters_(std::move(hyperparameters)) {}

void TensorBoardSink::start(int64_t step) {
  tb::Event event = event_at(0);
  event.set_file_version("brain.Event:2");
  file_.append(event.SerializeAsString());
  event = event_at(step);
  event.mutable_session_log()->set_status(tb::SessionLog::START);
  file_.append(event.SerializeAsString());
  event = event_at(0);
  add_hparams(*event.mutable_summary(), "_hparams_/experiment", experiment_of(hyperparameters_));
  add_hparams(*event.mutable_summary(), "_hparams_/session_start_info",
              session_of(hyperparameters_));
  file_.append(event.SerializeAsString());
  started_ = true;
}

void TensorBoardSink::write(const Record& record) {
  if (!started_) start(record.step);
  tb::Event event = event_at(record.step);
  auto& summary = *event.mutable_summary();
  for (const auto& [name, value] : record.values) {
    auto* out = summary.add_value();
    out->set_tag(name);
    out->set_simple_value(static_cast<float>(value));
  }
  for (const auto& table : record.tables) add_table(summary, table);
  file_.append(event.SerializeAsString());
  const auto now = std::chrono::steady_clock::now();
  if (now - flushed_ < kFlushEvery) return;
  file_.flush();
  flushed_ = now;
}

}  // namespace dsv3
