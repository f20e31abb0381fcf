#include "monitor/metrics.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace dsv3 {

double Record::get(std::string_view name) const {
  const auto found = std::ranges::find(values, name, &std::pair<std::string, double>::first);
  return found == values.end() ? std::numeric_limits<double>::quiet_NaN() : found->second;
}

bool Record::has(std::string_view name) const {
  return std::ranges::find(values, name, &std::pair<std::string, double>::first) != values.end();
}

std::string name_of_layer(std::string_view metric, int64_t layer) {
  return fmt::format("{}/layer_{}", metric, layer);
}

std::string name_of_depth(std::string_view metric, int64_t depth) {
  return fmt::format("{}/depth_{}", metric, depth);
}

std::string short_count(double value) {
  if (!std::isfinite(value)) return "-";
  if (std::abs(value) < 999.5) return fmt::format("{:.0f}", value);
  for (const char* suffix : {"K", "M", "B", "T", "P"}) {
    value /= 1000;
    // 999.5 would round up to four digits; it belongs to the next suffix.
    if (std::abs(value) < 999.5 || *suffix == 'P') {
      const int decimals = std::abs(value) < 9.995 ? 2 : std::abs(value) < 99.95 ? 1 : 0;
      return fmt::format("{:.{}f}{}", value, decimals, suffix);
    }
  }
  return "-";
}

std::string short_time(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "-";
  const auto whole = static_cast<int64_t>(std::llround(seconds));
  if (whole < 60) return fmt::format("{}s", whole);
  if (whole < 3600) return fmt::format("{}m{:02}s", whole / 60, whole % 60);
  if (whole < 86400) return fmt::format("{}h{:02}m", whole / 3600, whole / 60 % 60);
  return fmt::format("{}d{:02}h", whole / 86400, whole / 3600 % 24);
}

}  // namespace dsv3
