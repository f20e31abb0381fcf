#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "monitor/run_history.h"

namespace dsv3 {

/// At most `limit` (at least 8) points that show the curve as all of them would: its first and last
/// point, and of each bucket of neighbours the smallest and the largest value, in their order. A
/// bucket that holds a NaN keeps one, so that gaps stay gaps. Shorter series come back as they are.
MetricSeries thin_out(const MetricSeries& series, size_t limit);

/// At each point the mean of the finite values of `window` points around it; fewer, as far before
/// as behind, where the series begins (a loss falls steeply there), and those there are where it
/// ends. NaN where the series is.
MetricSeries smooth(const MetricSeries& series, size_t window);

/// The odd window that the page smooths a series of `num_points` with: about a fortieth of it, 5 to
/// 501.
size_t smoothing_window(size_t num_points);

/// Series with one common x: means over at most `limit` buckets of neighbouring steps.
struct AlignedSeries {
  std::vector<int64_t> steps;               // the last one of each bucket
  std::vector<std::vector<double>> values;  // [series][steps], NaN for a bucket without a number
};
AlignedSeries bucket_means(const std::vector<const MetricSeries*>& series, size_t limit);

/// Of the finite values: mean of the last `count`, the median, the smallest. NaN when there is
/// none.
double mean_of_last(const MetricSeries& series, size_t count);
double median(const MetricSeries& series);
MetricPoint smallest(const MetricSeries& series);

}  // namespace dsv3
