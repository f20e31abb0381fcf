#include "bench/ops/timer.h"

#include <ATen/Parallel.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <thread>

namespace dsv3::bench {
namespace {

constexpr double kSampleSeconds = 5e-3, kWarmUpSeconds = 0.25;
constexpr int64_t kCopyBytes = int64_t{256} << 20;

double seconds_of(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// memcpy in equal parts on as many threads as LibTorch's operators use.
void threaded_copy(char* to, const char* from, int64_t bytes) {
  const int64_t threads = at::get_num_threads();
  std::vector<std::thread> others;
  const auto part = [&](int64_t i) {
    const int64_t begin = bytes * i / threads, end = bytes * (i + 1) / threads;
    std::memcpy(to + begin, from + begin, static_cast<size_t>(end - begin));
  };
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(part, i);
  part(0);
  for (auto& thread : others) thread.join();
}

/// The same work on one set of inputs after the other, from sample to sample.
struct Turn {
  explicit Turn(std::vector<std::function<void()>> runs) : runs(std::move(runs)) {}

  void run() { runs[static_cast<size_t>(done++) % runs.size()](); }
  /// Once over all sets, or for so long; at least once. Returns the seconds of one run.
  double run_for(double seconds) {
    double spent = 0;
    int64_t count = 0;
    do {
      spent += seconds_of([&] { run(); });
    } while (++count < static_cast<int64_t>(runs.size()) && spent < seconds);
    return spent / static_cast<double>(count);
  }

  const std::vector<std::function<void()>> runs;
  int64_t done = 0;
};

class HostTimer final : public Timer {
 public:
  int64_t cache_bytes() const override {
    const int64_t l3 = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return l3 > 0 ? l3 : int64_t{32} << 20;
  }

  Sampler prepare(const std::vector<std::function<void()>>& runs) override {
    const auto turn = std::make_shared<Turn>(runs);
    // Every output's memory is there before it is timed, where that does not take long.
    turn->run_for(kWarmUpSeconds);
    const auto count = repeats_for(turn->run_for(kSampleSeconds), kSampleSeconds);
    return {.sample =
                [=] {
                  return seconds_of([&] {
                           for (int64_t i = 0; i < count; ++i) turn->run();
                         }) /
                         static_cast<double>(count);
                },
            .runs = count,
            .timed = "clock"};
  }

  Sampler prepare_copy() override {
    const auto from = std::make_shared<std::vector<char>>(kCopyBytes, 'a');
    const auto to = std::make_shared<std::vector<char>>(kCopyBytes, 'b');
    return {.sample =
                [=] {
                  return seconds_of([&] { threaded_copy(to->data(), from->data(), kCopyBytes); });
                },
            .runs = 1,
            .timed = "clock"};
  }

  int64_t copied_bytes() const override { return 2 * kCopyBytes; }
};

}  // namespace

int64_t repeats_for(double seconds_of_one, double wanted_seconds) {
  constexpr double kMost = 1000;
  return static_cast<int64_t>(
      std::clamp(std::ceil(wanted_seconds / std::max(seconds_of_one, 1e-9)), 1.0, kMost));
}

std::unique_ptr<Timer> make_timer(const c10::Device& device) {
  if (device.is_cuda()) return cuda::make_timer();
  return std::make_unique<HostTimer>();
}

}  // namespace dsv3::bench
