#include "training/loss_spike.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace dsv3 {
namespace {

constexpr int64_t kLag = 2;  // steps between a decision and the newest loss that it knows

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::ranges::nth_element(values, middle);
  if (values.size() % 2 != 0) return *middle;
  return 0.5 * (*middle + *std::max_element(values.begin(), middle));
}

}  // namespace

std::optional<LossSpikes::Window> LossSpikes::window_of(int64_t step) const {
  std::vector<double> values;
  for (auto i = losses_.rbegin(); i != losses_.rend(); ++i) {
    if (i->first > step - kLag) continue;
    values.push_back(i->second);
    if (static_cast<int64_t>(values.size()) == size_) break;
  }
  if (size_ == 0 || static_cast<int64_t>(values.size()) < size_) return std::nullopt;
  Window window{.median = median(values)};
  for (double& value : values) value = std::abs(value - window.median);
  window.sigma = std::max(1.4826 * median(values), 1e-3 * std::abs(window.median));
  return window;
}

double LossSpikes::limit(int64_t step) const {
  const auto window = window_of(step);
  if (!window) return std::numeric_limits<double>::infinity();
  return window->median + threshold_ * window->sigma;
}

void LossSpikes::add(int64_t step, double loss) {
  if (size_ == 0 || !std::isfinite(loss)) return;
  losses_.emplace_back(step, loss);
  if (static_cast<int64_t>(losses_.size()) > size_ + kLag) losses_.pop_front();
}

}  // namespace dsv3
