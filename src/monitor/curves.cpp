#include "monitor/curves.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "base/error.h"

namespace dsv3 {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// What is kept of the points [begin, end), in their order.
void keep_extremes(const MetricSeries& series, size_t begin, size_t end, MetricSeries& kept) {
  size_t low = end, high = end, gap = end;
  for (size_t i = begin; i < end; ++i) {
    if (!std::isfinite(series[i].value)) {
      if (gap == end) gap = i;
      continue;
    }
    if (low == end || series[i].value < series[low].value) low = i;
    if (high == end || series[i].value > series[high].value) high = i;
  }
  std::array<size_t, 3> chosen{low, high, gap};
  std::sort(chosen.begin(), chosen.end());
  for (size_t k = 0; k < chosen.size(); ++k)
    if (chosen[k] < end && (k == 0 || chosen[k] != chosen[k - 1]))
      kept.push_back(series[chosen[k]]);
}

}  // namespace

MetricSeries thin_out(const MetricSeries& series, size_t limit) {
  DSV3_CHECK(limit >= 8, "{} points show no curve", limit);
  if (series.size() <= limit) return series;
  const bool gaps = std::any_of(series.begin(), series.end(),
                                [](const MetricPoint& p) { return !std::isfinite(p.value); });
  const size_t inner = series.size() - 2, buckets = (limit - 2) / (gaps ? 3 : 2);
  MetricSeries kept{series.front()};
  for (size_t b = 0; b < buckets; ++b)
    keep_extremes(series, 1 + inner * b / buckets, 1 + inner * (b + 1) / buckets, kept);
  kept.push_back(series.back());
  return kept;
}

MetricSeries smooth(const MetricSeries& series, size_t window) {
  // Sums and counts of the finite values before each point.
  std::vector<double> sums{0}, counts{0};
  for (const MetricPoint& point : series) {
    const bool finite = std::isfinite(point.value);
    sums.push_back(sums.back() + (finite ? point.value : 0));
    counts.push_back(counts.back() + (finite ? 1 : 0));
  }
  MetricSeries result;
  result.reserve(series.size());
  for (size_t i = 0; i < series.size(); ++i) {
    const size_t half = std::min(window / 2, i);
    const size_t begin = i - half, end = std::min(i + half + 1, series.size());
    const bool finite = std::isfinite(series[i].value);
    result.push_back({series[i].step,
                      finite ? (sums[end] - sums[begin]) / (counts[end] - counts[begin]) : kNan});
  }
  return result;
}

size_t smoothing_window(size_t num_points) {
  return std::clamp<size_t>(num_points / 40, 5, 500) | 1U;
}

AlignedSeries bucket_means(const std::vector<const MetricSeries*>& series, size_t limit) {
  std::vector<int64_t> steps;
  for (const MetricSeries* s : series)
    for (const MetricPoint& point : *s) steps.push_back(point.step);
  std::sort(steps.begin(), steps.end());
  steps.erase(std::unique(steps.begin(), steps.end()), steps.end());
  AlignedSeries aligned;
  const size_t buckets = std::min(limit, steps.size());
  for (size_t b = 0; b < buckets; ++b)
    aligned.steps.push_back(steps[steps.size() * (b + 1) / buckets - 1]);
  for (const MetricSeries* s : series) {
    std::vector<double>& means = aligned.values.emplace_back();
    size_t next = 0;
    for (const int64_t last : aligned.steps) {
      double sum = 0, count = 0;
      for (; next < s->size() && (*s)[next].step <= last; ++next) {
        if (!std::isfinite((*s)[next].value)) continue;
        sum += (*s)[next].value;
        ++count;
      }
      means.push_back(count > 0 ? sum / count : kNan);
    }
  }
  return aligned;
}

double mean_of_last(const MetricSeries& series, size_t count) {
  double sum = 0, found = 0;
  for (auto point = series.rbegin(); point != series.rend() && found < static_cast<double>(count);
       ++point) {
    if (!std::isfinite(point->value)) continue;
    sum += point->value;
    ++found;
  }
  return found > 0 ? sum / found : kNan;
}

double median(const MetricSeries& series) {
  std::vector<double> values;
  for (const MetricPoint& point : series)
    if (std::isfinite(point.value)) values.push_back(point.value);
  if (values.empty()) return kNan;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*std::max_element(values.begin(), middle) + *middle) / 2;
}

MetricPoint smallest(const MetricSeries& series) {
  MetricPoint best{.step = 0, .value = kNan};
  for (const MetricPoint& point : series)
    if (std::isfinite(point.value) && !(point.value >= best.value)) best = point;
  return best;
}

}  // namespace dsv3
