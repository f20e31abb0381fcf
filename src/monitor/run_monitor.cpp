#include "monitor/run_monitor.h"

#include <fmt/format.h>

namespace dsv3 {

RunMonitor::RunMonitor(const std::filesystem::path& directory, const Console::Options& console)
    : console_(console), metrics_(directory / "metrics.jsonl"), log_(directory / "log.txt") {}

void RunMonitor::step(const Record& record, double seconds_left) {
  const std::lock_guard lock(mutex_);
  metrics_.write(record);
  console_.progress(record, seconds_left);
}

void RunMonitor::evaluation(const Record& record) {
  {
    const std::lock_guard lock(mutex_);
    metrics_.write(record);
  }
  std::string text = fmt::format("evaluation after step {}: loss {:.4f}", record.step,
                                 record.get(metric::kEvalLoss));
  if (record.has(metric::kEvalBitsPerByte))
    text += fmt::format(", {:.4f} bits per byte", record.get(metric::kEvalBitsPerByte));
  text += fmt::format(
      ", accuracy {:.1f}% over {} tokens ({})", 100 * record.get(metric::kEvalAccuracy),
      short_count(record.get(metric::kEvalTokens)), short_time(record.get(metric::kEvalTime)));
  info(text);
}

void RunMonitor::event(int64_t step, std::string name, EventDetails details) {
  const std::lock_guard lock(mutex_);
  metrics_.write(Event{.step = step, .name = std::move(name), .details = std::move(details)});
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
