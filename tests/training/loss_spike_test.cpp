#include "training/loss_spike.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "support/compare.h"
#include "support/random.h"

namespace dsv3 {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// Median by sorting everything.
double plain_median(std::vector<double> values) {
  std::ranges::sort(values);
  const size_t n = values.size();
  return n % 2 != 0 ? values[n / 2] : 0.5 * (values[n / 2 - 1] + values[n / 2]);
}

/// The limit of step `step` (from 1) from the losses of steps 1 …, by the definition.
double plain_limit(const std::vector<double>& losses, int64_t step, int64_t window,
                   double threshold) {
  std::vector<double> known;
  for (int64_t i = step - 3; i >= 0 && static_cast<int64_t>(known.size()) < window; --i)
    if (std::isfinite(losses[static_cast<size_t>(i)]))
      known.push_back(losses[static_cast<size_t>(i)]);
  if (static_cast<int64_t>(known.size()) < window) return INFINITY;
  const double median = plain_median(known);
  for (double& value : known) value = std::abs(value - median);
  return median + threshold * std::max(1.4826 * plain_median(known), 1e-3 * std::abs(median));
}

TEST(LossSpikes, TheLimitIsMedianPlusDeviationsOfEarlierSteps) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const int64_t window : {1, 2, 5, 16}) {
    LossSpikes spikes(window, 4.0);
    std::vector<double> losses;
    for (int64_t step = 1; step <= 60; ++step) {
      losses.push_back(random.integer(0, 9) == 0 ? kNan : 3.0 + 0.2 * random.normal());
      // Whether the step before is known already must make no difference.
      EXPECT_EQ(spikes.limit(step), plain_limit(losses, step, window, 4.0)) << step;
      if (step >= 2) spikes.add(step - 1, losses[static_cast<size_t>(step - 2)]);
      EXPECT_EQ(spikes.limit(step), plain_limit(losses, step, window, 4.0)) << step;
    }
  }
}

TEST(LossSpikes, AJumpStandsOutAndNoiseDoesNot) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  LossSpikes spikes(64, 8.0);
  const auto loss_at = [&](int64_t step) {  // a falling curve with noise
    return 2.0 + 6.0 / std::sqrt(static_cast<double>(step)) + 0.05 * random.normal();
  };
  for (int64_t step = 1; step <= 400; ++step) {
    const double loss = loss_at(step);
    EXPECT_LE(loss, spikes.limit(step)) << "noise at step " << step;
    spikes.add(step, step % 50 == 0 ? 9.0 : loss);  // outliers do not hide the next one
    if (step > 70) {
      EXPECT_GT(9.0, spikes.limit(step + 1)) << step;
    }
  }
}

TEST(LossSpikes, BeforeTheWindowIsFullAndWithoutOneNothingIsASpike) {
  LossSpikes spikes(8, 1.0), off(0, 1.0);
  for (int64_t step = 1; step <= 9; ++step) {
    EXPECT_TRUE(std::isinf(spikes.limit(step))) << step;
    spikes.add(step, 1.0);
    off.add(step, 1.0);
  }
  EXPECT_DOUBLE_EQ(spikes.limit(10), 1.001);
  EXPECT_TRUE(std::isinf(off.limit(10)));
  EXPECT_EQ(spikes.losses().size(), 9u);
}

}  // namespace
}  // namespace dsv3
