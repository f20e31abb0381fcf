#include "training/step_watch.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "kernels/optimizer.h"

namespace dsv3 {
namespace {

constexpr size_t kMaxSamples = 256;  // named in one event
constexpr size_t kMaxTensors = 16;

/// A batch's sequences in words.
std::vector<std::string> describe(const std::vector<SampleOrigin>& origins, const Loader& loader) {
  std::vector<std::string> samples;
  for (const auto& origin : origins) {
    if (samples.size() == kMaxSamples) {
      samples.push_back(fmt::format("and {} more", origins.size() - kMaxSamples));
      break;
    }
    samples.push_back(loader.describe(origin));
  }
  return samples;
}

std::string tensor_text(const BadTensor& bad) {
  return fmt::format("{} {} (layer {}, {} bad numbers)", bad.weight ? "weight" : "gradient of",
                     bad.name, bad.layer, bad.count);
}

}  // namespace

StepWatch::StepWatch(const TrainingConfig& config, const ParameterSet& parameters)
    : spike_(config.spike),
      max_skipped_steps_(config.max_skipped_steps),
      bad_numbers_(parameters),
      spikes_(config.spike.window, config.spike.threshold) {}

StepGuard StepWatch::guard(int64_t step, const StepSums& sums, const GlobalBatch& batch) const {
  StepGuard guard{.losses = sums.scalars, .loss_scale = per_token(batch.valid)};
  if (spike_.skip) guard.loss_limit = spikes_.limit(step);
  return guard;
}

std::optional<std::string> StepWatch::judge(int64_t step, const StepNumbers& numbers,
                                            const std::vector<SampleOrigin>& origins,
                                            const Loader& loader, RunMonitor& monitor) {
  const bool spike = numbers.skip != kernels::kSkipNotFinite && numbers.loss > spikes_.limit(step);
  if (spike) report_spike(step, numbers, describe(origins, loader), monitor);
  spikes_.add(step, numbers.loss);
  skipped_in_a_row_ = numbers.skip != 0 ? skipped_in_a_row_ + 1 : 0;
  if (numbers.skip == 0) return std::nullopt;
  report_skip(step, numbers, describe(origins, loader), monitor);
  if (skipped_in_a_row_ < max_skipped_steps_) return std::nullopt;
  return fmt::format("the last {} steps up to {} were all skipped (training.max_skipped_steps)",
                     skipped_in_a_row_, step);
}

void StepWatch::report_spike(int64_t step, const StepNumbers& numbers,
                             std::vector<std::string> samples, RunMonitor& monitor) {
  const auto window = spikes_.window_of(step).value();
  const double z = (numbers.loss - window.median) / window.sigma;
  monitor.warning(fmt::format(
      "step {}: the loss jumped to {:.4f}, {:.1f} σ above the median {:.4f} of the {} steps before",
      step, numbers.loss, z, window.median, spike_.window));
  monitor.event(step, "loss_spike",
                {{"loss", numbers.loss},
                 {"z", z},
                 {"median", window.median},
                 {"sigma", window.sigma},
                 {"skipped", numbers.skip != 0},
                 {"samples", std::move(samples)}});
}

void StepWatch::report_skip(int64_t step, const StepNumbers& numbers,
                            std::vector<std::string> samples, RunMonitor& monitor) {
  const bool spike = numbers.skip == kernels::kSkipSpike;
  const auto bad = bad_numbers_.take(step);
  EventDetails details{{"reason", std::string(spike ? "loss_spike" : "not_finite")},
                       {"loss", numbers.loss},
                       {"grad_norm", numbers.grad_norm},
                       {"rank", int64_t{0}}};
  std::string cause = "after a loss spike";
  if (!spike) {
    // Gradients that are all finite leave only the losses to blame.
    cause = bad.empty() ? "the loss itself" : tensor_text(bad.front());
    details.emplace_back("tensor", bad.empty() ? "loss" : bad.front().name);
    details.emplace_back("kind", std::string(bad.empty()          ? "loss"
                                             : bad.front().weight ? "weight"
                                                                  : "gradient"));
    details.emplace_back("layer", bad.empty() ? int64_t{-1} : bad.front().layer);
    std::vector<std::string> tensors;
    for (size_t i = 0; i < std::min(bad.size(), kMaxTensors); ++i)
      tensors.push_back(tensor_text(bad[i]));
    details.emplace_back("num_tensors", static_cast<int64_t>(bad.size()));
    details.emplace_back("tensors", std::move(tensors));
  }
  details.emplace_back("in_a_row", skipped_in_a_row_);
  std::string first = samples.empty() ? "unknown" : samples.front();
  if (samples.size() > 1) first += fmt::format(" and {} more", samples.size() - 1);
  details.emplace_back("samples", std::move(samples));
  monitor.warning(fmt::format(
      "step {} was skipped on rank 0, nothing was changed: {}; the loss is {}, the gradient norm "
      "{}; "
      "{} of at most {} in a row; samples: {}{}",
      step, cause, numbers.loss, numbers.grad_norm, skipped_in_a_row_, max_skipped_steps_, first,
      std::isfinite(numbers.loss) || spike
          ? ""
          : "; the forward pass was bad already: --replay finds where"));
  monitor.event(step, "skipped_step", std::move(details));
}

std::string StepWatch::state() const {
  nlohmann::json losses = nlohmann::json::array();
  for (const auto& [step, loss] : spikes_.losses()) losses.push_back({step, loss});
  return nlohmann::json{{"skipped_in_a_row", skipped_in_a_row_}, {"losses", losses}}.dump();
}

void StepWatch::restore(const std::string& json) {
  try {
    const auto value = nlohmann::json::parse(json);
    skipped_in_a_row_ = value.at("skipped_in_a_row").get<int64_t>();
    for (const auto& loss : value.at("losses"))
      spikes_.add(loss.at(0).get<int64_t>(), loss.at(1).get<double>());
  } catch (const nlohmann::json::exception& error) {
    invalid("the saved state of the loss window is damaged: {}", error.what());
  }
}

}  // namespace dsv3
