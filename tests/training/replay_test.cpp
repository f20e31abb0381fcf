#include "training/replay.h"

#include <ATen/TensorOperators.h>

#include <cmath>
#include <map>

#include "support/compare.h"
#include "training/trainer_fixture.h"

namespace dsv3 {
namespace {

class ReplayTest : public test::TrainerFixture {
 protected:
  static at::Tensor weight(Trainer& trainer, const std::string& name) {
    return trainer.parameters().find(name)->weight.value.detach().view(-1);
  }
};

TEST_F(ReplayTest, ShowsEveryLayerAndTheNormsOfTheStep) {
  for (const auto recompute : {Recompute::kNone, Recompute::kFull}) {
    config_.training.recompute = recompute;
    const std::string name = recompute == Recompute::kNone ? "none" : "full";
    auto trainer = make(name, config_);
    auto same = make(name + "2", config_);
    trainer->step().wait();
    same->step().wait();
    const Replay replay = replay_next(*trainer);
    const StepNumbers numbers = same->step().wait();
    EXPECT_EQ(replay.step, 2);
    EXPECT_EQ(replay.loss, numbers.loss);
    EXPECT_NEAR(replay.grad_norm, numbers.grad_norm, 1e-5 * numbers.grad_norm);
    EXPECT_EQ(replay.samples.size(), 4u);
    EXPECT_EQ(replay.first_bad(), "");
    // Two micro-batches: embedding, two layers, the final norm, the MTP module.
    ASSERT_EQ(replay.activations.size(), 2u * (1 + 3 + 3 + 1 + 3));
    const std::vector<std::pair<int64_t, std::string>> expected{
        {-1, "embedding"}, {0, "attention"}, {0, "mlp"},   {0, "block"},
        {1, "attention"},  {1, "moe"},       {1, "block"}, {2, "final_norm"},
        {2, "attention"},  {2, "moe"},       {2, "block"}};
    for (size_t i = 0; i < replay.activations.size(); ++i) {
      EXPECT_EQ(replay.activations[i].layer, expected[i % 11].first);
      EXPECT_EQ(replay.activations[i].name, expected[i % 11].second);
      EXPECT_EQ(replay.activations[i].micro_batch, static_cast<int64_t>(i / 11));
      EXPECT_GT(replay.activations[i].norm, 0);
    }
    for (const auto& gradient : replay.gradients) EXPECT_EQ(gradient.bad, 0);
    for (const auto& bucket : trainer->parameters().buckets())
      EXPECT_EQ(bucket.grads.ne(0).sum().item<int64_t>(), 0);
  }
}

TEST_F(ReplayTest, FindsTheInjectedWeightActivationAndGradient) {
  auto trainer = make("run", config_);
  const std::string o_proj = "model.layers.1.self_attn.o_proj.weight";
  const at::Tensor before = weight(*trainer, o_proj).clone();

  weight(*trainer, o_proj)[3].fill_(NAN);
  EXPECT_NE(replay_next(*trainer).first_bad().find("the weight " + o_proj), std::string::npos);

  // Finite weights whose product overflows in layer 1's attention, and nowhere before.
  weight(*trainer, o_proj).fill_(1e30);
  const std::string kv_b = "model.layers.1.self_attn.kv_b_proj.weight";
  const at::Tensor kv_b_before = weight(*trainer, kv_b).clone();
  weight(*trainer, kv_b).mul_(1e15);
  const Replay overflow = replay_next(*trainer);
  EXPECT_NE(overflow.first_bad().find("the activation attention of micro-batch 0, layer 1:"),
            std::string::npos)
      << overflow.first_bad();
  EXPECT_NE(to_text(overflow).find("<- not finite"), std::string::npos);
  EXPECT_NE(to_text(overflow).find("first bad tensor: the activation attention"),
            std::string::npos);
  weight(*trainer, o_proj).copy_(before);
  weight(*trainer, kv_b).copy_(kv_b_before);

  trainer->parameters().find(o_proj)->weight.grad.view(-1)[5].fill_(INFINITY);
  trainer->parameters().find("model.embed_tokens.weight")->weight.grad.view(-1)[0].fill_(NAN);
  EXPECT_NE(replay_next(*trainer).first_bad().find("the gradient of " + o_proj + ", layer 1: 1 "),
            std::string::npos);
  EXPECT_EQ(replay_next(*trainer).first_bad(), "");
}

/// Every file below a directory with its content.
std::map<std::string, std::string> contents(const std::filesystem::path& directory) {
  std::map<std::string, std::string> found;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(directory))
    found[entry.path().string()] = entry.is_regular_file() ? read_file(entry.path()) : "";
  return found;
}

TEST_F(ReplayTest, AStepOfARunIsThatOfItsMetricsAndTheRunStaysAsItIs) {
  config_.training.deterministic = true;
  config_.training.steps = 6;
  config_.checkpoint.every_steps = 2;
  config_.checkpoint.keep_last = 1;
  config_.checkpoint.keep_every = 2;
  config_.training.spike = {.window = 2, .threshold = 0.1, .skip = true};
  make("run", config_)->run();
  const auto run = directory_.path() / "run";
  const auto before = contents(run);
  std::vector<double> losses;
  for (const auto& record : metrics("run"))
    if (record.contains("train/loss")) losses.push_back(record["train/loss"]);
  for (const int64_t step : {1, 3, 6, 7}) {
    const Replay found = replay(run, step, "");
    EXPECT_EQ(found.step, step);
    EXPECT_EQ(found.from, (step - 1) / 2 * 2);
    if (step <= 6) {
      EXPECT_EQ(found.loss, losses[static_cast<size_t>(step - 1)]);
    }
    EXPECT_EQ(found.first_bad(), "");
  }
  EXPECT_EQ(contents(run), before);
  EXPECT_THROW(replay(run, 0, ""), std::invalid_argument);
  EXPECT_THROW(replay(directory_.path() / "nothing", 1, ""), std::invalid_argument);
}

TEST_F(ReplayTest, ABadWeightOfACheckpointIsFound) {
  const std::string name = "model.layers.1.post_attention_layernorm.weight";
  config_.training.steps = 4;
  std::unique_ptr<Trainer> trainer;
  stop_ = [&] {
    if (trainer->steps_done() == 3) weight(*trainer, name)[2].fill_(NAN);
    return false;
  };
  trainer = make("run", config_);
  trainer->run();
  trainer.reset();
  const Replay found = replay(directory_.path() / "run", 5, "cpu");
  EXPECT_EQ(found.from, 4);
  EXPECT_NE(found.first_bad().find("the weight " + name + ", layer 1: 1 "), std::string::npos)
      << found.first_bad();
}

}  // namespace
}  // namespace dsv3
