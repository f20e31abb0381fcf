#include "inference/sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "base/error.h"

namespace dsv3 {
namespace {

/// Ids from the likeliest down, ties to the lower id; only the first `count` are in order.
std::vector<int64_t> ranked(std::span<const float> logits, size_t count) {
  std::vector<int64_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), int64_t{0});
  std::partial_sort(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(count), ids.end(),
                    [&](int64_t a, int64_t b) {
                      const float x = logits[static_cast<size_t>(a)];
                      const float y = logits[static_cast<size_t>(b)];
                      return x != y ? x > y : a < b;
                    });
  ids.resize(count);
  return ids;
}

void check_logits(std::span<const float> logits) {
  require(!logits.empty(), "there are no logits to sample from");
  bool any = false;
  for (size_t i = 0; i < logits.size(); ++i) {
    require(!std::isnan(logits[i]) && logits[i] != INFINITY,
            "the logit of token {} is {}; the weights are broken", i, logits[i]);
    any = any || std::isfinite(logits[i]);
  }
  require(any, "all logits are -inf");
}

}  // namespace

void SamplingOptions::check() const {
  require(std::isfinite(temperature) && temperature >= 0,
          "temperature: expected a number of at least 0, got {}", temperature);
  require(top_k >= 0, "top-k: expected at least 0 (0 = all), got {}", top_k);
  require(top_p > 0 && top_p <= 1, "top-p: expected above 0 and at most 1, got {}", top_p);
}

int64_t sample_token(std::span<const float> logits, const SamplingOptions& options,
                     SamplingRandom& random) {
  options.check();
  check_logits(logits);
  if (options.temperature == 0) {
    return std::distance(logits.begin(), std::max_element(logits.begin(), logits.end()));
  }
  const size_t kept = options.top_k == 0
                          ? logits.size()
                          : std::min(logits.size(), static_cast<size_t>(options.top_k));
  const std::vector<int64_t> ids = ranked(logits, kept);
  const double top = logits[static_cast<size_t>(ids[0])];
  std::vector<double> cumulative(kept);
  double sum = 0;
  for (size_t i = 0; i < kept; ++i) {
    sum += std::exp((logits[static_cast<size_t>(ids[i])] - top) / options.temperature);
    cumulative[i] = sum;
  }
  // The nucleus: the shortest prefix whose share reaches top_p.
  const auto reached = std::lower_bound(cumulative.begin(), cumulative.end(), options.top_p * sum);
  const size_t nucleus =
      std::min(kept, static_cast<size_t>(std::distance(cumulative.begin(), reached)) + 1);
  const double draw = random.uniform() * cumulative[nucleus - 1];
  const auto chosen = std::upper_bound(
      cumulative.begin(), cumulative.begin() + static_cast<std::ptrdiff_t>(nucleus), draw);
  const auto index = std::min(nucleus - 1, static_cast<size_t>(chosen - cumulative.begin()));
  return ids[index];
}

}  // namespace dsv3
