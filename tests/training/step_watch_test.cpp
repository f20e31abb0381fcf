#include "training/step_watch.h"

#include <ATen/ops/full.h>

#include <cmath>
#include <limits>

#include "kernels/optimizer.h"
#include "support/compare.h"
#include "training/trainer_fixture.h"

namespace dsv3 {
namespace {

using nlohmann::json;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr const char* kMoeUp = "model.layers.1.mlp.experts.gate_up_proj";
constexpr const char* kOProj = "model.layers.0.self_attn.o_proj.weight";

class StepWatchTest : public test::TrainerFixture {
 protected:
  /// Weights, biases and the optimizer's state.
  std::vector<at::Tensor> everything(Trainer& trainer) {
    std::vector<at::Tensor> found;
    for (const auto& parameter : trainer.parameters().parameters())
      found.push_back(parameter.value().detach().clone());
    for (const auto& companion : trainer.optimizer().state())
      for (const auto& flat : companion.flats)
        if (flat.defined()) found.push_back(flat.clone());
    return found;
  }
  static at::Tensor gradient(Trainer& trainer, const std::string& name) {
    return trainer.parameters().find(name)->weight.grad.view(-1);
  }
  static at::Tensor weight(Trainer& trainer, const std::string& name) {
    return trainer.parameters().find(name)->weight.value.detach().view(-1);
  }
  static int64_t numel(Trainer& trainer, const std::string& name) {
    return trainer.parameters().find(name)->spec.numel();
  }
};

TEST_F(StepWatchTest, ABadGradientSkipsTheStepAndChangesNoBit) {
  auto trainer = make("run", config_);
  trainer->step().wait();
  for (const double bad : {kNan, kInfinity, -kInfinity}) {
    const auto before = everything(*trainer);
    gradient(*trainer, kMoeUp)[5].fill_(bad);
    const StepNumbers numbers = trainer->step().wait();
    EXPECT_EQ(numbers.skip, kernels::kSkipNotFinite);
    EXPECT_TRUE(std::isfinite(numbers.loss));
    EXPECT_EQ(trainer->optimizer().steps_done(), 1);
    const auto after = everything(*trainer);
    for (size_t i = 0; i < before.size(); ++i) EXPECT_TRUE(test::same_bits(after[i], before[i]));
    for (const auto& bucket : trainer->parameters().buckets())
      EXPECT_EQ(bucket.grads.ne(0).sum().item<int64_t>(), 0) << "the bad gradient stayed";
  }
  EXPECT_EQ(trainer->step().wait().skip, 0) << "the run does not recover";
}

TEST_F(StepWatchTest, TheReportNamesTensorLayerAndSamples) {
  config_.training.steps = 6;
  std::unique_ptr<Trainer> trainer;
  stop_ = [&] {
    if (trainer->steps_done() == 2)
      gradient(*trainer, kMoeUp)[3 * 2 * 16 * 32 + 17 * 32].fill_(kNan);
    if (trainer->steps_done() == 4) weight(*trainer, kOProj)[7].fill_(kNan);
    if (trainer->steps_done() == 5) weight(*trainer, kOProj)[7].fill_(0.01);
    return false;
  };
  trainer = make("run", config_);
  trainer->run();
  const auto skipped = events("run", "skipped_step");
  ASSERT_EQ(skipped.size(), 2u);

  EXPECT_EQ(skipped[0]["step"], 3);
  EXPECT_EQ(skipped[0]["reason"], "not_finite");
  // Expert 3, row 17: the first row of the up-projection is 16.
  EXPECT_EQ(skipped[0]["tensor"], "model.layers.1.mlp.experts.3.up_proj.weight");
  EXPECT_EQ(skipped[0]["kind"], "gradient");
  EXPECT_EQ(skipped[0]["layer"], 1);
  EXPECT_EQ(skipped[0]["rank"], 0);
  EXPECT_EQ(skipped[0]["num_tensors"], 1);
  EXPECT_TRUE(skipped[0]["grad_norm"].is_null());
  EXPECT_GT(skipped[0]["time"].get<double>(), 1e9);

  EXPECT_EQ(skipped[1]["step"], 5);
  EXPECT_EQ(skipped[1]["tensor"], kOProj);
  EXPECT_EQ(skipped[1]["kind"], "weight");
  EXPECT_EQ(skipped[1]["layer"], 0);
  EXPECT_TRUE(skipped[1]["loss"].is_null());

  // The samples are those that a loader of the same config gives at that step.
  LoaderOptions options{.seed = config_.training.seed};
  Loader loader(config_.data, options);
  for (int64_t step = 1; step <= 5; ++step) {
    const Batch batch = loader.next(4);
    const auto event =
        std::ranges::find(skipped, step, [](const json& e) { return e["step"].get<int64_t>(); });
    if (event == skipped.end()) continue;
    std::vector<std::string> expected;
    for (const auto& origin : batch.origins) expected.push_back(loader.describe(origin));
    EXPECT_EQ((*event)["samples"].get<std::vector<std::string>>(), expected);
  }
  const auto log = read_file(directory_.path() / "run" / "log.txt");
  EXPECT_NE(log.find("step 3 was skipped on rank 0"), std::string::npos);
  EXPECT_NE(log.find("experts.3.up_proj.weight (layer 1, 1 bad numbers)"), std::string::npos);
}

TEST_F(StepWatchTest, ALossThatOverflowsIsNamedAsSuch) {
  config_.training.steps = 2;
  auto trainer = make("run", config_);
  // Finite weights whose product is not: the logits overflow.
  weight(*trainer, "model.norm.weight").fill_(1e38);
  weight(*trainer, "lm_head.weight").fill_(1e3);
  trainer->run();
  const auto skipped = events("run", "skipped_step");
  ASSERT_EQ(skipped.size(), 2u);
  EXPECT_EQ(skipped[0]["kind"], "gradient");
  EXPECT_TRUE(skipped[0]["loss"].is_null());
  EXPECT_GT(skipped[0]["num_tensors"], 1);
}

TEST_F(StepWatchTest, TooManySkippedStepsStopTheRunAndLeaveItsCheckpoints) {
  config_.training.steps = 50;
  config_.training.max_skipped_steps = 4;
  config_.checkpoint.every_steps = 1;
  config_.checkpoint.keep_last = 1;
  std::unique_ptr<Trainer> trainer;
  stop_ = [&] {
    // One bad step alone, then all from step 6 on.
    const int64_t done = trainer->steps_done();
    if (done == 2 || done >= 5) gradient(*trainer, "lm_head.weight")[0].fill_(kNan);
    return false;
  };
  trainer = make("run", config_);
  try {
    trainer->run();
    FAIL() << "the run went on";
  } catch (const std::runtime_error& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("the last 4 steps up to 9"), std::string::npos) << text;
    EXPECT_NE(text.find("--replay 9"), std::string::npos) << text;
  }
  trainer.reset();  // ends the save under way
  EXPECT_EQ(events("run", "skipped_step").size(), 5u);
  EXPECT_EQ(events("run", "skipped_step")[0]["in_a_row"], 1);
  EXPECT_EQ(events("run", "skipped_step")[4]["in_a_row"], 4);
  std::vector<std::string> names;
  for (const auto& entry :
       std::filesystem::directory_iterator(directory_.path() / "run" / "checkpoints"))
    names.push_back(entry.path().filename());
  EXPECT_EQ(names, std::vector<std::string>{"step_5"}) << "the last good one";
}

TEST_F(StepWatchTest, SpikesAreReportedAndSkippedWhereAskedFor) {
  for (const bool skip : {false, true}) {
    const std::string name = skip ? "skip" : "report";
    config_.training.steps = 30;
    config_.training.max_skipped_steps = 1000;
    config_.optimizer.learning_rate = Schedule::constant(1e-5);  // the loss only wavers
    // So strict that losses of ordinary steps are spikes, some of them.
    config_.training.spike = {.window = 4, .threshold = 0.5, .skip = skip};
    make(name, config_)->run();
    std::vector<double> losses;
    for (const auto& record : metrics(name))
      if (record.contains("train/loss")) losses.push_back(record["train/loss"]);
    LossSpikes plain(4, 0.5);
    std::vector<int64_t> expected, reported, skipped;
    for (int64_t step = 1; step <= 30; ++step) {
      const double loss = losses[static_cast<size_t>(step - 1)];
      if (loss > plain.limit(step)) expected.push_back(step);
      plain.add(step, loss);
    }
    for (const auto& event : events(name, "loss_spike")) {
      reported.push_back(event["step"]);
      EXPECT_GT(event["z"], 0.5);
      EXPECT_EQ(event["skipped"], skip);
      EXPECT_EQ(event["samples"].size(), 4u);
    }
    for (const auto& event : events(name, "skipped_step")) {
      skipped.push_back(event["step"]);
      EXPECT_EQ(event["reason"], "loss_spike");
    }
    EXPECT_EQ(reported, expected);
    EXPECT_EQ(skipped, skip ? expected : std::vector<int64_t>{});
    EXPECT_FALSE(expected.empty()) << "the test shows nothing";
  }
}

TEST_F(StepWatchTest, AResumedRunSkipsTheSameSpikes) {
  config_.training.deterministic = true;
  config_.training.spike = {.window = 4, .threshold = 0.5, .skip = true};
  config_.training.max_skipped_steps = 1000;
  config_.optimizer.learning_rate = Schedule::constant(1e-5);
  config_.training.steps = 24;
  auto whole = make("whole", config_);
  whole->run();
  for (const int64_t steps : {5, 13, 24}) {
    config_.training.steps = steps;
    make("parts", config_)->run();
  }
  const auto lines = [&](const std::string& name) {
    std::vector<json> found;
    for (const auto& record : metrics(name)) {
      if (record.contains("event") && record["event"] != "loss_spike" &&
          record["event"] != "skipped_step")
        continue;
      json kept;
      for (const auto& [key, value] : record.items())
        if (key.find("time") == std::string::npos && key.find("per_sec") == std::string::npos &&
            key.find("tflops") == std::string::npos && key.find("memory") == std::string::npos)
          kept[key] = value;
      if (!record.contains("eval/loss")) found.push_back(kept);
    }
    return found;
  };
  EXPECT_GT(events("whole", "skipped_step").size(), 1u) << "the test shows nothing";
  EXPECT_EQ(lines("parts"), lines("whole"));
}

TEST_F(StepWatchTest, ItsStateContinues) {
  auto trainer = make("run", config_);
  TrainingConfig training;
  training.spike = {.window = 3, .threshold = 2, .skip = true};
  StepWatch watch(training, trainer->parameters()), again(training, trainer->parameters());
  RunMonitor monitor(directory_.path(), {.out = console_});
  const LoaderOptions options{.seed = 1};
  const Loader loader(config_.data, options);
  for (int64_t step = 1; step <= 6; ++step)
    watch.judge(step, {.loss = 1.0 / 3 + 1e-17 * static_cast<double>(step)}, {}, loader, monitor);
  again.restore(watch.state());
  EXPECT_EQ(again.state(), watch.state());
  GlobalBatch batch;
  batch.valid = 1;
  EXPECT_EQ(again.guard(7, {}, batch).loss_limit, watch.guard(7, {}, batch).loss_limit);
  EXPECT_TRUE(std::isfinite(watch.guard(7, {}, batch).loss_limit));
  EXPECT_THROW(again.restore("{\"losses\": 3}"), std::invalid_argument);
}

TEST_F(StepWatchTest, APieceIsFoundByItsElement) {
  ParameterSpec spec{.name = "stack", .shape = {2, 4, 3}, .pieces = {}};
  for (int64_t expert = 0; expert < 2; ++expert)
    for (int64_t half = 0; half < 2; ++half)
      spec.pieces.push_back({.name = std::to_string(expert) + std::to_string(half),
                             .index = expert,
                             .row_begin = 2 * half,
                             .row_end = 2 * half + 2});
  EXPECT_EQ(piece_name(spec, 0), "00");
  EXPECT_EQ(piece_name(spec, 5), "00");
  EXPECT_EQ(piece_name(spec, 6), "01");
  EXPECT_EQ(piece_name(spec, 12), "10");
  EXPECT_EQ(piece_name(spec, 23), "11");
  const ParameterSpec vector{.name = "v", .shape = {5}, .pieces = {{.name = "w", .row_end = 5}}};
  EXPECT_EQ(piece_name(vector, 4), "w");
}

}  // namespace
}  // namespace dsv3
