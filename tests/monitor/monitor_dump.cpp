// Writes a run's directory through RunMonitor, for readers.py: random values under real names, a
// table of loads, an evaluation, events, a number that is none, and a second process' part that
// goes on from an earlier step.
//
// Usage: monitor_dump DIRECTORY SEED

#include <cstdio>
#include <filesystem>
#include <limits>
#include <random>
#include <string>

#include "monitor/run_monitor.h"

namespace dsv3 {
namespace {

class Writer {
 public:
  Writer(const std::filesystem::path& run, uint64_t seed) : run_(run), generator_(seed) {
    config_.monitor.tensorboard = true;
    config_.monitor.prometheus = (run / "node.prom").string();
    config_.data.train = {{.path = "text \"with\" quotes.txt"}};
  }

  void part(int64_t first, int64_t last) {
    RunMonitor monitor(run_, {.out = stderr, .total_steps = last, .every = 1000}, config_);
    for (int64_t step = first; step <= last; ++step) {
      monitor.step(record(step), 1);
      if (step % 4 != 0) continue;
      Record evaluation{.step = step, .values = {}, .tables = {}};
      evaluation.add(metric::kEvalLoss, draw());
      evaluation.add(metric::kEvalAccuracy, draw());
      monitor.evaluation(evaluation);
      monitor.event(step, "checkpoint", {{"path", "step_" + std::to_string(step)}});
    }
  }

 private:
  double draw() { return std::normal_distribution<double>()(generator_); }

  Record record(int64_t step) {
    Record record{.step = step, .values = {}, .tables = {}};
    for (const char* name : {metric::kLoss, metric::kLearningRate, metric::kMaxViolation})
      record.add(name, draw());
    record.add(metric::kTokens, static_cast<double>(step) * 1e12);
    record.add(name_of_depth(metric::kMtpAcceptance, 1), draw());
    record.add(metric::kGradNorm,
               step == 2 ? std::numeric_limits<double>::quiet_NaN() : std::abs(draw()));
    if (step % 2 != 0) return record;
    CountTable table{.name = metric::kExpertDistribution, .layers = {3, 61}, .counts = {}};
    for (const int64_t layer : table.layers) {
      record.add(name_of_layer(metric::kMaxViolation, layer), draw());
      auto& counts = table.counts.emplace_back();
      for (int expert = 0; expert < 5; ++expert)
        counts.push_back(
            expert == 3 ? 0 : std::uniform_int_distribution<int64_t>(0, 1 << 20)(generator_));
    }
    record.tables.push_back(std::move(table));
    return record;
  }

  std::filesystem::path run_;
  std::mt19937_64 generator_;
  Config config_;
};

}  // namespace
}  // namespace dsv3

int main(int count, char** arguments) {
  if (count != 3) {
    std::fputs("usage: monitor_dump DIRECTORY SEED\n", stderr);
    return 2;
  }
  dsv3::Writer writer(arguments[1], std::stoull(arguments[2]));
  writer.part(1, 9);
  writer.part(7, 12);  // from a checkpoint of step 6
  return 0;
}
