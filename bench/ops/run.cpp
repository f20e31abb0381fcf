#include "bench/ops/run.h"

#include <ATen/Context.h>

#include <algorithm>
#include <memory>

#include "bench/ops/timer.h"

namespace dsv3::bench {
namespace {

double median_of(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// LibTorch appends the place and a stack trace; the first line says what happened.
std::string first_line(const std::exception& error) {
  const std::string text = error.what();
  return text.substr(0, text.find('\n'));
}

using Runs = std::vector<std::function<void()>>;

/// A way that is ready to be timed, and what was timed so far.
struct Contender {
  WayResult result;
  Sampler sampler;
  std::vector<double> seconds;

  void prepare(Timer& timer, const Runs& runs) {
    attempt([&] { sampler = timer.prepare(runs); });
    result.runs = sampler.runs;
    result.timed = sampler.timed;
  }
  void sample() {
    attempt([&] { seconds.push_back(sampler.sample()); });
  }
  void finish() {
    if (!result.error.empty() || seconds.empty()) return;
    result.median = median_of(seconds);
    result.minimum = *std::min_element(seconds.begin(), seconds.end());
  }

 private:
  void attempt(const std::function<void()>& step) {
    if (!result.error.empty()) return;
    try {
      step();
    } catch (const std::exception& error) {
      result.error = first_line(error);
    }
  }
};

/// Every way once a round, and the copy between them: all see the same clocks.
void alternate(std::vector<Contender>& contenders, const Sampler& copy, int64_t copied_bytes,
               CaseResult& result) {
  std::vector<double> copies;
  for (int64_t round = 0; round < result.rounds; ++round) {
    for (auto& contender : contenders) contender.sample();
    copies.push_back(copy.sample());
  }
  result.copy_bytes_per_second = static_cast<double>(copied_bytes) / median_of(copies);
}

void run_case(const Benchmark& benchmark, const RunOptions& options, Timer& timer,
              const Sampler& copy, CaseResult& result) {
  uint64_t next_seed = options.seed;
  std::vector<std::unique_ptr<Setup>> sets;
  Runs ours, composed;
  for (int64_t i = 0; i < result.sets; ++i) {
    sets.push_back(std::make_unique<Setup>(result.problem, options.device, next_seed++));
    const Work work = benchmark.make(*sets.back());
    ours.push_back(work.ours);
    if (options.composed) composed.push_back(work.composed);
  }
  std::vector<Contender> contenders(1);
  contenders[0].result.way = "ours";
  contenders[0].prepare(timer, ours);
  if (options.composed) {
    contenders.emplace_back().result.way = "composed";
    contenders[1].prepare(timer, composed);
  }
  alternate(contenders, copy, timer.copied_bytes(), result);
  for (auto& contender : contenders) {
    contender.finish();
    result.ways.push_back(contender.result);
  }
}

}  // namespace

double CaseResult::bytes_per_second(const WayResult& way) const {
  return way.median > 0 ? static_cast<double>(plan.bytes) / way.median : 0;
}

double CaseResult::percent_of_copy(const WayResult& way) const {
  return copy_bytes_per_second > 0 ? 100 * bytes_per_second(way) / copy_bytes_per_second : 0;
}

Problem problem_of(const Shape& shape, const RunOptions& options) {
  const bool gpu = options.device.is_cuda();
  const int64_t tokens =
      options.tokens > 0 ? options.tokens : (gpu ? shape.gpu_tokens : kHostTokens);
  const bool whole_model = gpu && options.tokens == 0;
  return {.shape = shape,
          .tokens = tokens,
          .dtype = options.dtype,
          .flat = whole_model ? shape.parameters : tokens * shape.hidden,
          .on_gpu = gpu};
}

int64_t sets_of(const Plan& plan, int64_t cache_bytes) {
  constexpr int64_t kMostSets = 128, kMostAllocated = int64_t{1} << 29;
  const int64_t wanted = 4 * cache_bytes / std::max<int64_t>(1, plan.bytes) + 1;
  const int64_t allocated = std::max({int64_t{1}, plan.bytes, plan.allocated});
  return std::clamp<int64_t>(std::min(wanted, kMostAllocated / allocated), 1, kMostSets);
}

void run_benchmarks(const RunOptions& options, const std::function<void(const Begun&)>& begin,
                    const std::function<void(const CaseResult&)>& done) {
  const auto timer = make_timer(options.device);
  const Sampler copy = timer->prepare_copy();
  at::manual_seed(options.seed);
  const auto all = static_cast<int64_t>(options.benchmarks.size() * options.shapes.size());
  int64_t before = 0;
  for (const auto& benchmark : options.benchmarks) {
    for (const auto& shape : options.shapes) {
      begin({.benchmark = benchmark, .shape = shape, .before = before++, .all = all});
      CaseResult result;
      result.name = benchmark.name;
      result.problem = problem_of(shape, options);
      result.plan = benchmark.plan(result.problem);
      result.rounds = options.rounds > 0 ? options.rounds : (options.device.is_cuda() ? 21 : 5);
      result.sets = sets_of(result.plan, timer->cache_bytes());
      try {
        run_case(benchmark, options, *timer, copy, result);
      } catch (const std::exception& error) {
        result.ways = {{.way = "ours", .error = first_line(error)}};
      }
      timer->release_memory();
      done(result);
    }
  }
}

}  // namespace dsv3::bench
