#include "monitor/run_monitor.h"

#include <fmt/format.h>

#include "base/error.h"
#include "config/load.h"
#include "monitor/prometheus.h"
#include "monitor/tensorboard.h"

namespace dsv3 {

RunMonitor::RunMonitor(const std::filesystem::path& directory, const Console::Options& console,
                       const Config& config)
    : console_(console), metrics_(directory / "metrics.jsonl"), log_(directory / "log.txt") {
  const auto& monitor = config.monitor;
  if (monitor.tensorboard)
    places_.push_back(
        {std::make_unique<TensorBoardSink>(directory / "tensorboard", flatten(config))});
  if (!monitor.prometheus.empty()) {
    const auto absolute = std::filesystem::absolute(directory).lexically_normal();
    places_.push_back({std::make_unique<PrometheusSink>(
        monitor.prometheus,
        (absolute.has_filename() ? absolute : absolute.parent_path()).filename().string())});
  }
  if (monitor.wandb) {
    std::string why;
    wandb_ = WandbBridge::start(directory, why);
    if (wandb_ == nullptr) warning("monitor.wandb: nothing is sent: " + why);
  }
}

RunMonitor::~RunMonitor() {
  if (wandb_ == nullptr || wandb_->finish()) return;
  try {
    warning("monitor.wandb: the bridge failed; wandb.log in the run's directory says why");
  } catch (const std::exception&) {  // a destructor must not throw
  }
}

void RunMonitor::try_writing(bool& failed, const std::function<void()>& write) {
  try {
    write();
    failed = false;
  } catch (const IoError& error) {
    if (!std::exchange(failed, true))
      warning(fmt::format("{}; the run goes on, and the next record tries again", error.what()));
  }
}

void RunMonitor::write(const Record& record) {
  const std::lock_guard lock(mutex_);
  try_writing(metrics_failed_, [&] { metrics_.write(record); });
  for (auto& place : places_) try_writing(place.failed, [&] { place.sink->write(record); });
}

void RunMonitor::step(const Record& record, double seconds_left) {
  const std::lock_guard lock(mutex_);
  write(record);
  console_.progress(record, seconds_left);
}

void RunMonitor::evaluation(const Record& record) {
  write(record);
  std::string text = fmt::format("evaluation after step {}: loss {:.4f}", record.step,
                                 record.get(metric::kEvalLoss));
  if (record.has(metric::kEvalBitsPerByte))
    text += fmt::format(", {:.4f} bits per byte", record.get(metric::kEvalBitsPerByte));
  text += fmt::format(
      ", accuracy {:.1f}% over {} tokens ({})", 100 * record.get(metric::kEvalAccuracy),
      short_count(record.get(metric::kEvalTokens)), short_time(record.get(metric::kEvalTime)));
  if (record.has(metric::kEvalEmaLoss))
    text += fmt::format("; averaged weights: loss {:.4f}", record.get(metric::kEvalEmaLoss));
  info(text);
}

void RunMonitor::event(int64_t step, std::string name, EventDetails details) {
  const std::lock_guard lock(mutex_);
  const Event event{.step = step, .name = std::move(name), .details = std::move(details)};
  try_writing(metrics_failed_, [&] { metrics_.write(event); });
}

void RunMonitor::info(std::string_view text) {
  const std::lock_guard lock(mutex_);
  console_.message(text);
  log_.info(text);
}

void RunMonitor::warning(std::string_view text) {
  const std::lock_guard lock(mutex_);
  console_.warning(text);
  log_.warn(text);
}

}  // namespace dsv3
