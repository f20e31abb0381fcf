#include "training/phase_timer.h"

#include <c10/core/impl/VirtualGuardImpl.h>

namespace dsv3 {

void PhaseTimer::mark(int phase) {
  phases_.push_back(phase);
  if (!device_.is_cuda()) {
    times_.push_back(Clock::now());
    return;
  }
  events_.emplace_back(at::kCUDA, c10::EventFlag::BACKEND_DEFAULT);  // with a time
  events_.back().record(c10::impl::VirtualGuardImpl(at::kCUDA).getStream(device_));
}

PhaseSeconds PhaseTimer::seconds() const {
  PhaseSeconds seconds{};
  for (size_t i = 0; i + 1 < phases_.size(); ++i) {
    if (phases_[i] == kNone) continue;
    seconds[static_cast<size_t>(phases_[i])] +=
        device_.is_cuda() ? events_[i].elapsedTime(events_[i + 1]) / 1e3
                          : std::chrono::duration<double>(times_[i + 1] - times_[i]).count();
  }
  return seconds;
}

}  // namespace dsv3
