#include "training/replay.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_vector_norm.h>

#include <stdlib.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/error.h"
#include "checkpoint/catalogue.h"
#include "config/load.h"
#include "ops/autograd.h"

namespace dsv3 {
namespace {

/// Unlike in a training step, every number is waited for.
TensorNorm norm_of(const at::Tensor& tensor, int64_t layer, const std::string& name) {
  const ops::NoRecord guard;
  const at::Tensor x = tensor.detach().reshape({-1});
  const auto type = x.scalar_type() == at::kBFloat16 ? at::kFloat : x.scalar_type();
  const auto norm = [&](double order) {
    return at::linalg_vector_norm(x, order, at::OptionalIntArrayRef(), false, type).item<double>();
  };
  TensorNorm result{.layer = layer, .name = name};
  if (x.numel() == 0) return result;
  result.norm = norm(2);
  result.largest = norm(std::numeric_limits<double>::infinity());
  result.bad = at::isfinite(x).logical_not().sum().item<int64_t>();
  return result;
}

std::vector<TensorNorm> norms_of(const ParameterSet& parameters, bool gradients) {
  std::vector<TensorNorm> norms;
  for (const auto& parameter : parameters.parameters()) {
    const at::Tensor& tensor = gradients ? parameter.weight.grad : parameter.value();
    if (tensor.defined())
      norms.push_back(norm_of(tensor, parameter.spec.layer, parameter.spec.name));
  }
  return norms;
}

std::string row(const TensorNorm& norm) {
  return fmt::format("  {:>5}  {:<58} {:>12.5g} {:>12.5g} {:>10}{}\n",
                     norm.layer < 0 ? "-" : fmt::format("{}", norm.layer), norm.name, norm.norm,
                     norm.largest, norm.bad, norm.bad > 0 ? "  <- not finite" : "");
}

std::string table(const std::string& title, const std::vector<TensorNorm>& norms) {
  std::string text = fmt::format("{}\n  {:>5}  {:<58} {:>12} {:>12} {:>10}\n", title, "layer",
                                 "tensor", "norm", "max |x|", "bad");
  for (const auto& norm : norms) text += row(norm);
  return text;
}

bool is_bad(const TensorNorm& norm) {
  return norm.bad > 0;
}

std::string name_bad(const char* what, const TensorNorm& norm) {
  const std::string place =
      norm.micro_batch < 0 ? "" : fmt::format(" of micro-batch {}", norm.micro_batch);
  return fmt::format("{} {}{}, layer {}: {} numbers are NaN or infinite", what, norm.name, place,
                     norm.layer, norm.bad);
}

/// A directory that is gone at the end: a replay writes nothing that stays.
class ScratchDirectory {
 public:
  ScratchDirectory() {
    std::string name = (std::filesystem::temp_directory_path() / "dsv3_replay_XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr)
      throw IoError(fmt::format("cannot make a directory {}: {}", name, std::strerror(errno)));
    path_ = name;
  }
  ~ScratchDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace

std::string Replay::first_bad() const {
  if (const auto found = std::ranges::find_if(weights, is_bad); found != weights.end())
    return name_bad("the weight", *found);
  if (const auto found = std::ranges::find_if(activations, is_bad); found != activations.end())
    return name_bad("the activation", *found);
  // The backward pass goes through the declarations from their end.
  const auto found = std::find_if(gradients.rbegin(), gradients.rend(), is_bad);
  return found == gradients.rend() ? "" : name_bad("the gradient of", *found);
}

std::string to_text(const Replay& replay) {
  const std::string from =
      replay.from > 0 ? fmt::format("the checkpoint of step {}", replay.from) : "the start";
  std::string text = fmt::format("step {}, replayed from {}\n", replay.step, from);
  text +=
      fmt::format("loss {:.6g}, gradient norm {:.6g}\nsamples\n", replay.loss, replay.grad_norm);
  for (const auto& sample : replay.samples) text += "  " + sample + "\n";
  std::vector<TensorNorm> part;
  for (size_t i = 0; i < replay.activations.size(); ++i) {
    part.push_back(replay.activations[i]);
    const bool last = i + 1 == replay.activations.size() ||
                      replay.activations[i + 1].micro_batch != part.front().micro_batch;
    if (!last) continue;
    text += table(fmt::format("activations of micro-batch {}", part.front().micro_batch), part);
    part.clear();
  }
  text += table("weights before the step", replay.weights);
  text += table("gradients before clipping", replay.gradients);
  const std::string bad = replay.first_bad();
  return text + (bad.empty() ? "every number of this step is finite\n"
                             : fmt::format("first bad tensor: {}\n", bad));
}

Replay replay_next(Trainer& trainer) {
  Replay replay{.step = trainer.steps_done_ + 1};
  replay.weights = norms_of(trainer.parameters_, /*gradients=*/false);
  const GlobalBatch batch = trainer.next_global_batch();
  int64_t micro_batch = -1;
  trainer.model_->set_probe([&](int64_t layer, const char* name, const at::Tensor& activation) {
    // The embedding is the first of each micro-batch.
    if (layer < 0) ++micro_batch;
    replay.activations.push_back(norm_of(activation, layer, name));
    replay.activations.back().micro_batch = micro_batch;
  });
  const StepSums sums = trainer.accumulate(batch);
  trainer.model_->set_probe({});
  replay.gradients = norms_of(trainer.parameters_, /*gradients=*/true);
  replay.loss = sums.scalars[0].item<double>() * per_token(batch.valid);
  double squares = 0;
  for (const auto& gradient : replay.gradients) squares += gradient.norm * gradient.norm;
  replay.grad_norm = std::sqrt(squares);
  for (const auto& part : batch.micro_batches)
    for (const auto& origin : part.origins)
      replay.samples.push_back(trainer.train_->describe(origin));
  trainer.parameters_.zero_gradients();
  return replay;
}

Replay replay(const std::filesystem::path& directory, int64_t step, const std::string& device) {
  require(step >= 1, "step {}: steps are counted from 1", step);
  require(std::filesystem::exists(directory / "config.yaml"), "{} is no run: it has no config.yaml",
          directory.string());
  Config config = load_config(directory / "config.yaml", {});
  if (!device.empty()) config.training.device = device;
  config.training.steps = std::max(config.training.steps, step);
  config.training.max_skipped_steps = std::numeric_limits<int64_t>::max();
  if (config.data.cache_dir.empty())
    config.data.cache_dir = (directory.parent_path() / "token_cache").string();
  config.checkpoint = {};
  config.monitor = {};
  config.profile = {};
  const ScratchDirectory scratch;
  TrainerOptions options{.directory = scratch.path() / "run"};
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> nowhere(std::fopen("/dev/null", "w"),
                                                                std::fclose);
  options.console = nowhere.get();
  const auto entry = newest_whole(directory, step);
  if (entry) {
    options.resume_from = directory;
    options.from_step = entry->step;
  }
  Trainer trainer(config, options);
  trainer.train_to(step - 1);
  Replay result = replay_next(trainer);
  result.from = entry ? entry->step : 0;
  return result;
}

}  // namespace dsv3
