#include "training/save_policy.h"

#include <algorithm>

namespace dsv3 {

bool SavePolicy::due(int64_t step, double now, bool requested) const {
  if (requested) return true;
  if (failures_ > 0) return step >= retry_at_;
  if (config_.every_steps > 0 && step % config_.every_steps == 0) return true;
  return config_.every_minutes > 0 && now - last_time_ >= config_.every_minutes * 60;
}

void SavePolicy::saved(int64_t step) {
  last_step_ = step;
  failures_ = 0;
}

void SavePolicy::failed(int64_t step) {
  constexpr int64_t kMostDoublings = 10;
  retry_at_ = step + (int64_t{1} << std::min(failures_, kMostDoublings));
  ++failures_;
}

double stop_margin(double limit, double longest_step, double longest_save, uint64_t bytes) {
  constexpr double kAssumedBytesPerSecond = 200e6;
  const double save =
      longest_save > 0 ? longest_save : static_cast<double>(bytes) / kAssumedBytesPerSecond;
  return 2 * longest_step + 1.5 * save + std::min(0.01 * limit, 60.0);
}

}  // namespace dsv3
