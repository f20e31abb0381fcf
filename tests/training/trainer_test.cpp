#include "training/trainer.h"

#include <gtest/gtest.h>

#include <csignal>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/file.h"
#include "checkpoint/catalogue.h"
#include "checkpoint/weights.h"
#include "config/load.h"
#include "support/compare.h"
#include "training/stop_signals.h"
#include "training/tiny.h"

namespace dsv3 {
namespace {
namespace fs = std::filesystem;
using nlohmann::json;

class TrainerTest : public testing::Test {
 protected:
  TrainerTest() : config_(test::tiny_config(directory_.path(), test::tiny_text(60))) {
    console_ = std::fopen((directory_.path() / "console").c_str(), "w");
  }
  ~TrainerTest() override { std::fclose(console_); }

  std::unique_ptr<Trainer> make(const std::string& name, const Config& config) {
    return std::make_unique<Trainer>(config, TrainerOptions{.directory = directory_.path() / name,
                                                            .console = console_,
                                                            .stop_requested = stop_});
  }
  TrainingResult train(const std::string& name, const Config& config) {
    return make(name, config)->run();
  }

  std::vector<json> metrics(const std::string& name) {
    std::istringstream lines(read_file(directory_.path() / name / "metrics.jsonl"));
    std::vector<json> records;
    for (std::string line; std::getline(lines, line);) {
      json record = json::parse(line);
      if (!record.contains("event")) records.push_back(std::move(record));
    }
    return records;
  }
  std::vector<double> losses(const std::string& name) {
    std::vector<double> found;
    for (const auto& record : metrics(name))
      if (record.contains("train/loss") && !record["train/loss"].is_null())
        found.push_back(record["train/loss"]);
    return found;
  }

  const test::TemporaryDirectory directory_;
  Config config_;
  std::FILE* console_ = nullptr;
  std::function<bool()> stop_;
};

std::vector<at::Tensor> biases_of(Trainer& trainer) {
  std::vector<at::Tensor> biases;
  for (const auto& parameter : trainer.parameters().parameters())
    if (!parameter.spec.trainable) biases.push_back(parameter.value().clone());
  return biases;
}

TEST_F(TrainerTest, LearnsAFewSentences) {
  config_.training.steps = 150;
  const auto result = train("run", config_);
  EXPECT_EQ(result.reason, StopReason::kFinished);
  EXPECT_EQ(result.steps, 150);
  const auto found = losses("run");
  EXPECT_GT(found.front(), 5.0);
  EXPECT_LT(found.back(), 1.0);
  ASSERT_TRUE(result.evaluation.has_value());
  EXPECT_LT(result.evaluation->loss, 1.0);
}

TEST_F(TrainerTest, ARunDirectoryHoldsConfigMetricsLogAndWeights) {
  config_.training.steps = 5;
  config_.training.eval_every = 2;
  const auto result = train("run", config_);
  const auto run = directory_.path() / "run";
  EXPECT_EQ(result.checkpoint, run / "checkpoints" / "step_5");
  EXPECT_EQ(latest_checkpoint(run), result.checkpoint);
  EXPECT_EQ(load_config(run / "config.yaml", {}), config_);
  EXPECT_NE(read_file(run / "log.txt").find("evaluation after step 4"), std::string::npos);
  std::vector<int64_t> steps, evaluations;
  for (const auto& record : metrics("run")) {
    (record.contains("eval/loss") ? evaluations : steps).push_back(record["step"]);
    if (!record.contains("train/loss")) continue;
    for (const char* name : {"train/lr",
                             "train/grad_norm",
                             "train/tokens_per_sec",
                             "train/step_time",
                             "mtp/loss",
                             "moe/max_vio",
                             "moe/load_imbalance",
                             "train/bits_per_byte",
                             "time",
                             "train/update_to_weight",
                             "train/time_data",
                             "train/time_forward",
                             "train/time_backward",
                             "train/time_optimizer",
                             "train/time_communication",
                             "train/time_checkpoint",
                             "mla/kv_cache_size_mb",
                             "mla/compression_ratio",
                             "mla/fallback_rate",
                             "mtp/acceptance",
                             "mtp/loss/depth_1",
                             "mtp/acceptance/depth_1",
                             "moe/entropy",
                             "moe/utilization",
                             "moe/max_vio_micro",
                             "moe/bias_spread"})
      EXPECT_TRUE(record.contains(name) && record[name].is_number()) << name;
    EXPECT_FALSE(record.contains("train/mfu")) << "a CPU has no known peak";
  }
  EXPECT_EQ(steps, (std::vector<int64_t>{1, 2, 3, 4, 5}));
  EXPECT_EQ(evaluations, (std::vector<int64_t>{2, 4, 5}));
  EXPECT_EQ(metrics("run")[0]["train/tokens"], 4 * 16);
}

TEST_F(TrainerTest, EveryLayersRoutingComesAtItsInterval) {
  config_.training.steps = 7;
  config_.monitor.per_layer_every = 3;
  train("run", config_);
  std::vector<int64_t> steps;
  for (const auto& record : metrics("run")) {
    if (!record.contains("moe/expert_distribution")) {
      EXPECT_FALSE(record.contains("moe/max_vio/layer_1"));
      continue;
    }
    steps.push_back(record["step"]);
    const auto loads = record["moe/expert_distribution"].get<std::vector<std::vector<int64_t>>>();
    ASSERT_EQ(loads.size(), 2u);  // the MoE layer 1 and the MTP module's, 2
    double worst = 0, entropy = 0;
    for (size_t layer = 0; layer < 2; ++layer) {
      ASSERT_EQ(loads[layer].size(), 4u);
      int64_t total = 0, most = 0;
      for (const int64_t load : loads[layer]) {
        total += load;
        most = std::max(most, load);
      }
      // The MTP module has no token at a sequence's last place.
      EXPECT_EQ(total, 4 * (layer == 0 ? 16 : 15) * 2)
          << "tokens of the global batch times choices";
      const auto suffix = "/layer_" + std::to_string(layer + 1);
      const double violation = 4.0 * static_cast<double>(most) / static_cast<double>(total) - 1;
      EXPECT_NEAR(record["moe/max_vio" + suffix], violation, 1e-12);
      worst = std::max(worst, violation);
      entropy += record["moe/entropy" + suffix].get<double>() / 2;
      EXPECT_NEAR(record["moe/bias_spread" + suffix],
                  record["step"] == 1 ? 0.002 : record["moe/bias_spread" + suffix].get<double>(),
                  1e-6)
          << "γ up and γ down after one step";
    }
    EXPECT_NEAR(record["moe/max_vio"], worst, 1e-12);
    EXPECT_NEAR(record["moe/entropy"], entropy, 1e-12);
    // 2 layers × 16 tokens × (16 + 8) FP32; 2 heads × (16 + 8) against 24.
    EXPECT_DOUBLE_EQ(record["mla/kv_cache_size_mb"], 2 * 16 * 24 * 4 / 1e6);
    EXPECT_DOUBLE_EQ(record["mla/compression_ratio"], 2.0);
    EXPECT_EQ(record["mla/fallback_rate"], 0);
  }
  EXPECT_EQ(steps, (std::vector<int64_t>{1, 3, 6}));
  config_.monitor.per_layer_every = 0;
  train("none", config_);
  for (const auto& record : metrics("none"))
    EXPECT_FALSE(record.contains("moe/expert_distribution"));
}

TEST_F(TrainerTest, MicroBatchesOfAnySizeGiveTheSameLosses) {
  config_.training.steps = 6;
  config_.data.mask_across_documents = true;  // unequal valid labels
  std::vector<std::vector<double>> found;
  for (const int64_t size : {1, 2, 4}) {
    config_.training.micro_batch_size = size;
    const auto name = "run" + std::to_string(size);
    train(name, config_);
    found.push_back(losses(name));
  }
  for (size_t i = 0; i < found[0].size(); ++i) {
    EXPECT_NEAR(found[0][i], found[2][i], 1e-5 * found[2][i]) << "step " << i + 1;
    EXPECT_NEAR(found[1][i], found[2][i], 1e-5 * found[2][i]) << "step " << i + 1;
  }
}

TEST_F(TrainerTest, BiasesMoveByGammaOncePerStepAndNotInEvaluation) {
  config_.model.moe.bias_update_rate = Schedule::constant(0.25);
  for (const auto policy : {Recompute::kNone, Recompute::kFull}) {
    config_.training.recompute = policy;
    auto trainer = make(policy == Recompute::kNone ? "none" : "full", config_);
    for (const auto& bias : biases_of(*trainer)) EXPECT_EQ(bias.abs().max().item<float>(), 0);
    trainer->step().wait();
    const auto after_step = biases_of(*trainer);
    ASSERT_EQ(after_step.size(), 2u);  // the MoE layer and the MTP module's
    for (const auto& bias : after_step) {
      EXPECT_EQ(bias.abs().max().item<float>(),
                0.25f);  // one update of γ, whatever the micro-batches
      EXPECT_EQ(bias.abs().ne(0.25f).logical_and(bias.ne(0)).sum().item<int64_t>(), 0);
    }
    ASSERT_TRUE(trainer->evaluate_now().has_value());
    const auto after_evaluation = biases_of(*trainer);
    for (size_t i = 0; i < after_step.size(); ++i)
      EXPECT_TRUE(test::same_bits(after_evaluation[i], after_step[i]));
  }
}

TEST_F(TrainerTest, BiasesStandStillWhenGammaIsZero) {
  config_.model.moe.bias_update_rate = Schedule::constant(0);
  auto trainer = make("run", config_);
  trainer->step().wait();
  for (const auto& bias : biases_of(*trainer)) EXPECT_EQ(bias.abs().max().item<float>(), 0);
}

TEST_F(TrainerTest, TwoDeterministicRunsHaveTheSameBits) {
  config_.training.deterministic = true;
  for (const auto dtype : {DType::kF32, DType::kBF16}) {
    config_.model.dtype = dtype;
    std::vector<at::Tensor> first;
    for (int run = 0; run < 2; ++run) {
      const auto name = std::string(name_of(dtype)) + std::to_string(run);
      auto trainer = make(name, config_);
      trainer->run();
      for (size_t i = 0; i < trainer->parameters().parameters().size(); ++i) {
        const auto value = trainer->parameters().parameters()[i].value().detach().clone();
        if (run == 0)
          first.push_back(value);
        else
          EXPECT_TRUE(test::same_bits(value, first[i]));
      }
    }
    EXPECT_EQ(losses(std::string(name_of(dtype)) + "0"), losses(std::string(name_of(dtype)) + "1"));
  }
  config_.training.seed = 2;
  train("other", config_);
  EXPECT_NE(losses("other"), losses("bf160")) << "the seed has no effect";
}

TEST_F(TrainerTest, TheFirstStepOfAWarmUpLearns) {
  config_.training.steps = 3;
  config_.optimizer.learning_rate.pieces = {
      {SchedulePiece::Shape::kLinear, 0.0, 1e-2, 4, SchedulePiece::Unit::kSteps}};
  train("run", config_);
  const auto records = metrics("run");
  EXPECT_DOUBLE_EQ(records[0]["train/lr"], 0.25e-2);
  EXPECT_DOUBLE_EQ(records[2]["train/lr"], 0.75e-2);
}

TEST_F(TrainerTest, TheBatchSizeFollowsItsSchedule) {
  config_.training.global_batch_size.pieces = {
      {SchedulePiece::Shape::kConstant, 2, 2, 2, SchedulePiece::Unit::kSteps},
      {SchedulePiece::Shape::kConstant, 6, 6, 0, SchedulePiece::Unit::kSteps}};
  train("run", config_);
  std::vector<int64_t> sizes;
  for (const auto& record : metrics("run"))
    if (record.contains("train/loss")) sizes.push_back(record["train/global_batch_size"]);
  EXPECT_EQ(sizes, (std::vector<int64_t>{2, 2, 6, 6}));
}

TEST_F(TrainerTest, EvaluationCountsEveryByteOnceAndChangesNothing) {
  auto trainer = make("run", config_);
  trainer->step().wait();
  const auto first = trainer->evaluate_now();
  const auto second = trainer->evaluate_now();
  ASSERT_TRUE(first && second);
  EXPECT_EQ(first->loss, second->loss);
  // 20 of 60 lines are held out: 10 of each sentence, which line ends belong to is the data room's
  // business.
  EXPECT_EQ(first->tokens - first->bytes, 20) << "one end of document for each line";
  EXPECT_NEAR(first->bits_per_byte,
              first->loss / std::log(2.0) * static_cast<double>(first->tokens) /
                  static_cast<double>(first->bytes),
              1e-9);
  for (const auto& bucket : trainer->parameters().buckets())
    EXPECT_EQ(bucket.grads.ne(0).sum().item<int64_t>(), 0) << "evaluation left gradients";
  config_.training.micro_batch_size = 4;
  auto other = make("other", config_);
  other->step().wait();
  EXPECT_NEAR(other->evaluate_now()->loss, first->loss, 1e-4 * first->loss);
}

TEST_F(TrainerTest, SavedWeightsLoadBack) {
  auto trainer = make("run", config_);
  const auto result = trainer->run();
  ParameterSet loaded;
  const Model model(trainer->config().model, loaded);
  loaded.allocate({.dtype = DType::kF32, .gradients = false});
  load_weights(result.checkpoint, loaded, trainer->config().model.num_layers);
  for (const auto& parameter : trainer->parameters().parameters())
    EXPECT_TRUE(test::same_bits(loaded.find(parameter.spec.name)->value(), parameter.value()))
        << parameter.spec.name;
}

TEST_F(TrainerTest, CheckpointsAreSavedOnTheWayAndOldOnesRemoved) {
  config_.training.steps = 7;
  config_.checkpoint.every_steps = 2;
  config_.checkpoint.keep_last = 2;
  train("run", config_);
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(directory_.path() / "run" / "checkpoints"))
    names.push_back(entry.path().filename());
  std::ranges::sort(names);
  EXPECT_EQ(names, (std::vector<std::string>{"step_6", "step_7"}));
}

TEST_F(TrainerTest, ASignalFinishesTheStepAndSaves) {
  const StopSignals signals;
  config_.training.steps = 1000;
  int calls = 0;
  stop_ = [&calls] {
    if (++calls == 4) std::raise(SIGINT);
    return StopSignals::requested();
  };
  const auto result = train("run", config_);
  EXPECT_EQ(result.reason, StopReason::kRequested);
  EXPECT_EQ(result.steps, 3);
  EXPECT_FALSE(result.evaluation.has_value());
  EXPECT_TRUE(fs::exists(result.checkpoint / "config.json"));
  EXPECT_EQ(losses("run").size(), 3u);
}

TEST_F(TrainerTest, AStopDuringTheLastEvaluationStillSaves) {
  int calls = 0;
  stop_ = [&calls] {
    return ++calls > 6;
  };  // one before each of 4 steps, one at the end, one batch
  const auto result = train("run", config_);
  EXPECT_EQ(result.reason, StopReason::kRequested);
  EXPECT_EQ(result.steps, 4);
  EXPECT_FALSE(result.evaluation.has_value()) << "half an evaluation is none";
  EXPECT_TRUE(fs::exists(result.checkpoint));
}

TEST_F(TrainerTest, TheTimeLimitStopsEvaluatesAndSaves) {
  config_.training.steps = 100000;
  config_.training.time_limit_minutes = 1e-9;
  const auto result = train("run", config_);
  EXPECT_EQ(result.reason, StopReason::kTimeLimit);
  EXPECT_EQ(result.steps, 1);
  EXPECT_TRUE(result.evaluation.has_value());
  EXPECT_TRUE(fs::exists(result.checkpoint));
}

TEST_F(TrainerTest, ALossThatStaysNoNumberStopsTheRunAndNamesTheStep) {
  config_.training.steps = 50;
  config_.optimizer.learning_rate = Schedule::constant(1e30);
  try {
    train("run", config_);
    FAIL() << "the run went on";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("up to 11"), std::string::npos) << error.what();
  }
  EXPECT_EQ(metrics("run").size(), 11u) << "the first step and training.max_skipped_steps";
}

TEST_F(TrainerTest, WhatCannotTrainIsRefused) {
  const auto refused = [&](const Config& config, const std::string& part) {
    try {
      make("refused", config);
      ADD_FAILURE() << "accepted: " << part;
    } catch (const std::invalid_argument& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  };
  Config config = config_;
  config.parallel.tensor_parallel_size = 2;
  refused(config, "tp(2)");
  config = config_;
  config.model.vocab_size = 100;
  refused(config, "vocab_size: 100");
  config = config_;
  config.training.steps = 0;
  refused(config, "training.steps");
  train("refused", config_);  // what failed left nothing in the way
  config = config_;
  config.model.hidden_size = 48;
  refused(config, "--overwrite");
}

}  // namespace
}  // namespace dsv3
