#include "training/ema.h"

#include <ATen/ops/empty.h>

#include <cmath>

#include "inference/run.h"
#include "nn/companion.h"
#include "support/compare.h"
#include "training/trainer_fixture.h"

namespace dsv3 {
namespace {

using Numbers = std::vector<double>;

/// The average by its formula, in float64.
struct PlainAverage {
  double decay;
  Numbers average;
  int updates = 0;

  void update(const Numbers& weights) {
    average.resize(weights.size());
    const double n = updates++;
    const double d = std::min(decay, n / (n + 1));
    for (size_t i = 0; i < weights.size(); ++i) average[i] = d * average[i] + (1 - d) * weights[i];
  }
};

Numbers numbers_of(const at::Tensor& flat) {
  const at::Tensor host = flat.detach().to(at::kCPU, at::kDouble);
  return {host.data_ptr<double>(), host.data_ptr<double>() + host.numel()};
}

double largest_difference(const at::Tensor& actual, const Numbers& expected) {
  const Numbers numbers = numbers_of(actual);
  EXPECT_EQ(numbers.size(), expected.size());
  double largest = 0;
  for (size_t i = 0; i < expected.size(); ++i)
    largest = std::max(largest, std::abs(numbers[i] - expected[i]));
  return largest;
}

class EmaTest : public testing::TestWithParam<at::Device> {
 protected:
  uint64_t seed_ = test::fresh_seed();
  test::Random random_{seed_};
};
INSTANTIATE_TEST_SUITE_P(Devices, EmaTest, testing::ValuesIn(test::devices()),
                         [](const auto& info) { return info.param.is_cuda() ? "cuda" : "cpu"; });

TEST_P(EmaTest, IsTheFormulaInFloat64WhateverHappensToTheWeightsAfterwards) {
  SCOPED_TRACE(test::seed_text(seed_));
  for (const int64_t every : {1, 3}) {
    const std::vector<at::Tensor> weights{random_.normal({70001}, at::kFloat, GetParam()),
                                          random_.normal({1}, at::kFloat, GetParam()),
                                          random_.normal({4099}, at::kBFloat16, GetParam())};
    Ema ema({.decay = 0.8, .every = every}, weights);
    std::vector<PlainAverage> plain(3, {.decay = std::pow(0.8, every), .average = {}});
    for (int64_t step = 1; step <= 24; ++step) {
      ema.before_change();
      for (size_t i = 0; i < weights.size(); ++i) {
        weights[i].copy_(random_.normal(weights[i].sizes(), weights[i].scalar_type(), GetParam()));
        if (step % every == 0) plain[i].update(numbers_of(weights[i]));
      }
      ema.after_step(step);
      // What is queued from here on must not be seen.
      ema.before_change();
      for (const auto& weight : weights) weight.fill_(1e6);
    }
    ema.wait();
    EXPECT_EQ(ema.updates(), 24 / every);
    for (size_t i = 0; i < weights.size(); ++i)
      EXPECT_LT(largest_difference(ema.average()[i], plain[i].average), 2e-6) << i;
  }
}

TEST_P(EmaTest, ContinuesToTheSameBits) {
  SCOPED_TRACE(test::seed_text(seed_));
  const std::vector<at::Tensor> weights{random_.normal({5001}, at::kFloat, GetParam())};
  const EmaConfig config{.decay = 0.9};
  Ema whole(config, weights), first(config, weights), second(config, weights);
  for (int64_t step = 1; step <= 8; ++step) {
    whole.before_change();
    first.before_change();
    second.before_change();
    weights[0].copy_(random_.normal({5001}, at::kFloat, GetParam()));
    whole.after_step(step);
    (step <= 5 ? first : second).after_step(step);
    if (step != 5) continue;
    first.wait();
    second.average()[0].copy_(first.average()[0]);
    second.restore(first.updates());
  }
  whole.wait();
  second.wait();
  EXPECT_TRUE(test::same_bits(second.average()[0], whole.average()[0]));
}

TEST_P(EmaTest, TheAverageStandsInForTheWeightsAndLeavesNoTrace) {
  ParameterSet parameters;
  const Model model(test::tiny_model(), parameters);
  parameters.allocate({.dtype = DType::kBF16, .cuda = GetParam().is_cuda()});
  parameters.initialize(3);
  std::vector<at::Tensor> before, average;
  for (const auto& bucket : parameters.buckets()) {
    before.push_back(bucket.values.detach().clone());
    average.push_back(random_.normal({bucket.numel()}, at::kFloat));
  }
  {
    const AveragedWeights guard(parameters, average);
    for (size_t i = 0; i < average.size(); ++i) {
      const at::Tensor& values = parameters.buckets()[i].values;
      EXPECT_TRUE(test::same_bits(values.detach().cpu(), average[i].to(values.scalar_type())));
    }
  }
  for (size_t i = 0; i < before.size(); ++i)
    EXPECT_TRUE(test::same_bits(parameters.buckets()[i].values.detach(), before[i]));
}

class TrainerEmaTest : public test::TrainerFixture {};

TEST_F(TrainerEmaTest, ARunAveragesItsWeightsAndEvaluatesThem) {
  config_.model.dtype = DType::kBF16;  // so that there are masters
  config_.training.steps = 12;
  config_.training.eval_every = 6;
  config_.training.ema = {.decay = 0.7, .every = 2, .evaluate = true};
  std::unique_ptr<Trainer> trainer;
  std::vector<PlainAverage> plain;
  int64_t seen = 0;
  const auto look = [&] {  // once after every other step
    if (trainer->steps_done() != seen && trainer->steps_done() % 2 == 0) {
      seen = trainer->steps_done();
      plain.resize(trainer->ema()->average().size(), {.decay = 0.49, .average = {}});
      for (size_t i = 0; i < plain.size(); ++i)
        plain[i].update(numbers_of(trainer->optimizer().weights()[i]));
    }
    return false;
  };
  stop_ = look;
  trainer = make("run", config_);
  trainer->run();
  look();
  ASSERT_EQ(trainer->ema()->updates(), 6);
  for (size_t i = 0; i < plain.size(); ++i)
    EXPECT_LT(largest_difference(trainer->ema()->average()[i], plain[i].average), 1e-6) << i;

  std::vector<nlohmann::json> evaluations;
  for (const auto& record : metrics("run"))
    if (record.contains("eval/loss")) evaluations.push_back(record);
  ASSERT_EQ(evaluations.size(), 2u);
  const AveragedWeights average(trainer->parameters(), trainer->ema()->average());
  EXPECT_EQ(trainer->evaluate_now()->loss, evaluations.back()["eval/ema_loss"].get<double>());
  EXPECT_NE(evaluations.back()["eval/ema_loss"], evaluations.back()["eval/loss"]);
}

TEST_F(TrainerEmaTest, AResumedRunHasTheSameAverageBitByBit) {
  config_.model.dtype = DType::kBF16;
  config_.training.deterministic = true;
  config_.training.ema = {.decay = 0.9, .every = 2, .evaluate = true};
  config_.training.steps = 11;
  auto whole = make("whole", config_);
  whole->run();
  config_.training.steps = 5;  // between two updates of the average
  make("parts", config_)->run();
  config_.training.steps = 11;
  auto second = make("parts", config_);
  EXPECT_EQ(second->steps_done(), 5);
  EXPECT_EQ(second->ema()->updates(), 2);
  second->run();
  EXPECT_EQ(second->ema()->updates(), whole->ema()->updates());
  for (size_t i = 0; i < whole->optimizer().weights().size(); ++i) {
    EXPECT_TRUE(test::same_bits(second->ema()->average()[i], whole->ema()->average()[i]));
    EXPECT_TRUE(test::same_bits(second->optimizer().weights()[i], whole->optimizer().weights()[i]));
  }
  const auto last = [&](const std::string& name) {
    double loss = 0;
    for (const auto& record : metrics(name))
      if (record.contains("eval/ema_loss")) loss = record["eval/ema_loss"];
    return loss;
  };
  EXPECT_EQ(last("parts"), last("whole"));
}

TEST_F(TrainerEmaTest, AnAverageMayBeginLaterAndAnOldOneMayBeDropped) {
  config_.training.steps = 3;
  make("run", config_)->run();
  config_.training.steps = 6;
  config_.training.ema = {.decay = 0.9};
  auto second = make("run", config_);
  second->run();
  EXPECT_EQ(second->ema()->updates(), 3);
  second.reset();  // it holds the run's lock
  config_.training.steps = 7;
  config_.training.ema = {};
  EXPECT_EQ(make("run", config_)->run().steps, 7);
}

TEST_F(TrainerEmaTest, TheSavedAverageIsOpenedInsteadOfTheWeights) {
  config_.training.ema = {.decay = 0.9};
  auto trainer = make("run", config_);
  trainer->run();
  const auto run = directory_.path() / "run";
  const OpenedModel average = open_model(run, {.averaged = true}), own = open_model(run, {});
  for (const auto& parameter : average.parameters->parameters()) {
    const auto& trained = *trainer->parameters().find(parameter.spec.name);
    EXPECT_TRUE(test::same_bits(own.parameters->find(parameter.spec.name)->value(),
                                trained.value().detach()));
    const at::Tensor expected =
        parameter.spec.trainable
            ? part_of(trained, trainer->ema()->average()[static_cast<size_t>(trained.bucket)])
            : trained.value();
    EXPECT_TRUE(test::same_bits(parameter.value(), expected)) << parameter.spec.name;
  }
  config_.training.ema = {};
  make("without", config_)->run();
  EXPECT_THROW(open_model(directory_.path() / "without", {.averaged = true}),
               std::invalid_argument);
}

TEST_F(TrainerEmaTest, TheAverageChangesNothingOfTheTraining) {
  std::vector<std::vector<at::Tensor>> found;
  for (const double decay : {0.0, 0.9}) {
    config_.training.ema = {.decay = decay, .evaluate = true};
    config_.training.eval_every = 1;
    auto trainer = make(decay > 0 ? "average" : "plain", config_);
    trainer->run();
    found.emplace_back();
    for (const auto& parameter : trainer->parameters().parameters())
      found.back().push_back(parameter.value().detach().clone());
  }
  for (size_t i = 0; i < found[0].size(); ++i)
    EXPECT_TRUE(test::same_bits(found[0][i], found[1][i]));
}

}  // namespace
}  // namespace dsv3
