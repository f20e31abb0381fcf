// Schedules: values, every form in YAML, and lists that mix steps and tokens.
#include <cmath>

#include "config_testing.h"

namespace dsv3 {
namespace {

using Shape = SchedulePiece::Shape;
using Unit = SchedulePiece::Unit;
using testing::error_of;
using testing::load;

Schedule rate(const std::string& yaml) {
  return load("training: {steps: 100}\noptimizer: {learning_rate: " + yaml + "}")
      .optimizer.learning_rate;
}

TEST(Schedule, ValuesOfEachShape) {
  const Schedule linear{{{.shape = Shape::kLinear, .from = 2, .to = 4, .length = 10}}};
  EXPECT_EQ(linear.at(0, 99), 2.0);
  EXPECT_EQ(linear.at(5, 0), 3.0);
  EXPECT_EQ(linear.at(10, 0), 4.0);
  EXPECT_EQ(linear.at(1000, 0), 4.0);
  const Schedule cosine{{{.shape = Shape::kCosine, .from = 2, .to = 1, .length = 10}}};
  EXPECT_EQ(cosine.at(0, 0), 2.0);
  EXPECT_NEAR(cosine.at(5, 0), 1.5, 1e-12);
  EXPECT_NEAR(cosine.at(2, 0), 1 + 0.5 * (1 + std::cos(M_PI * 0.2)), 1e-12);
  EXPECT_EQ(cosine.at(10, 0), 1.0);
  const Schedule log{{{.shape = Shape::kLog, .from = 0, .to = 1, .length = 1000}}};
  EXPECT_EQ(log.at(0, 0), 0.0);
  EXPECT_NEAR(log.at(9, 0), 1.0 / 3, 1e-12);
  EXPECT_NEAR(log.at(999, 0), 1.0, 1e-12);
  EXPECT_EQ(log.at(1000, 0), 1.0);
  EXPECT_TRUE(Schedule::constant(3).is_constant());
  EXPECT_FALSE(linear.is_constant());
  EXPECT_EQ(linear.peak(), 4.0);
}

TEST(Schedule, PiecesFollowEachOther) {
  const Schedule s = rate("[{from: 0, to: 1, steps: 10}, {value: 1, steps: 5}, {to: 0, steps: 5}]");
  EXPECT_EQ(s.at(0, 0), 0.0);
  EXPECT_EQ(s.at(5, 0), 0.5);
  EXPECT_EQ(s.at(10, 0), 1.0);
  EXPECT_EQ(s.at(14, 0), 1.0);
  EXPECT_EQ(s.at(15, 0), 1.0);
  EXPECT_NEAR(s.at(17, 0), 0.6, 1e-12);
  EXPECT_EQ(s.at(20, 0), 0.0);
  EXPECT_EQ(s.at(1 << 30, 0), 0.0);
  EXPECT_EQ(rate("[{value: 1, until_steps: 10}, {value: 2, until_steps: 15}, {value: 3}]"),
            rate("[{value: 1, steps: 10}, {value: 2, steps: 5}, {value: 3}]"));
}

TEST(Schedule, UnitsThatMixUnresolvedAreOurMistake) {
  const Schedule s{{{.from = 1, .to = 1, .length = 2}, {.length = 0, .unit = Unit::kTokens}}};
  EXPECT_THROW(s.at(3, 3), std::logic_error);
}

TEST(ScheduleYaml, Shorthands) {
  EXPECT_EQ(rate("{type: constant, value: 0.5}"), Schedule::constant(0.5));
  EXPECT_EQ(rate("{type: linear, from: 1, to: 0, steps: 7}"), rate("[{from: 1, to: 0, steps: 7}]"));
  EXPECT_EQ(rate("{type: linear, from: 1, to: 0}"), rate("[{from: 1, to: 0, steps: 100}]"));
  EXPECT_EQ(rate("{type: cosine, peak: 1, min: 0.1, warmup_steps: 10, total_steps: 50}"),
            rate("[{from: 0, to: 1, steps: 10}, {shape: cosine, to: 0.1, steps: 40}]"));
  EXPECT_EQ(rate("{type: cosine, peak: 1}"), rate("[{shape: cosine, from: 1, to: 0, steps: 100}]"));
  EXPECT_EQ(
      rate("{type: wsd, peak: 1, min: 0.1, warmup_steps: 10, stable_steps: 20, decay_steps: 30}"),
      rate("[{from: 0, to: 1, steps: 10}, {value: 1, steps: 20}, {to: 0.1, steps: 30}]"));
  EXPECT_EQ(
      rate("{type: wsd, peak: 1, warmup_steps: 10, decay_steps: 30, decay: cosine}"),
      rate("[{from: 0, to: 1, steps: 10}, {value: 1, steps: 60}, {shape: cosine, to: 0, steps: "
           "30}]"));
}

TEST(ScheduleYaml, TrialRunsKeepTheShape) {
  EXPECT_EQ(rate("{type: wsd, peak: 1, warmup_steps: 100, decay_steps: 300}"),
            rate("[{from: 0, to: 1, steps: 25}, {to: 0, steps: 75}]"));
  EXPECT_EQ(rate("{type: wsd, peak: 1, warmup_steps: 40, decay_steps: 60}"),
            rate("[{from: 0, to: 1, steps: 40}, {to: 0, steps: 60}]"));
  EXPECT_EQ(rate("{type: cosine, peak: 1, warmup_steps: 100}"),
            rate("[{from: 0, to: 1, steps: 100}]"));
  for (const char* steps : {"1", "2", "3", "50", "599", "600", "601"}) {
    SCOPED_TRACE(steps);
    const std::string file = std::string(DSV3_SOURCE_DIR) + "/configs/deepseek_v3_tiny.yaml";
    const auto run = {std::string("training.steps=") + steps};
    EXPECT_NO_THROW(load_config(file, run));
  }
}

TEST(ScheduleYaml, TheReportsFivePieces) {
  const Config config = load("model: {preset: deepseek_v3}");
  const Schedule& s = config.optimizer.learning_rate;
  ASSERT_EQ(s.pieces.size(), 5u);
  // Where training stands after n steps, counted one by one.
  int64_t tokens = 0;
  for (int64_t step = 0; step < 2000; ++step) {
    EXPECT_DOUBLE_EQ(s.at(step, tokens), 2.2e-4 * static_cast<double>(step) / 2000);
    tokens += global_batch_at(config, step, tokens) * 4096;
  }
  EXPECT_EQ(s.pieces[1].begin, tokens);
  EXPECT_EQ(s.at(2000, tokens), 2.2e-4);
  EXPECT_EQ(s.pieces[1].begin + s.pieces[1].length, 10'000'000'000'000);
  const int64_t far = 150'000;
  EXPECT_EQ(s.at(far, 9'999'999'999'999), 2.2e-4);
  EXPECT_NEAR(s.at(far, 12'150'000'000'000), 1.21e-4, 1e-12);
  EXPECT_EQ(s.at(far, 14'300'000'000'000), 2.2e-5);
  EXPECT_EQ(s.at(far, 14'632'999'999'999), 2.2e-5);
  EXPECT_EQ(s.at(far, 14'633'000'000'000), 7.3e-6);
  EXPECT_EQ(config.model.moe.bias_update_rate.at(0, 14'299'999'999'999), 0.001);
  EXPECT_EQ(config.model.moe.bias_update_rate.at(0, 14'300'000'000'000), 0.0);
  EXPECT_EQ(config.model.mtp.loss_weight.at(0, 10'000'000'000'000), 0.1);
  EXPECT_EQ(config.training.global_batch_size.at(0, 0), 3072);
  EXPECT_EQ(config.training.global_batch_size.at(0, 469'000'000'000), 15360);
}

TEST(ScheduleYaml, TheReportScaledDown) {
  const Schedule s =
      rate("{type: deepseek_v3, peak: 1e-3, warmup_steps: 10, total_tokens: 1.48e9}");
  ASSERT_EQ(s.pieces.size(), 5u);
  EXPECT_EQ(s.pieces[1].begin, 10 * 8 * 4096);
  EXPECT_EQ(s.pieces[1].begin + s.pieces[1].length, 1'000'000'000);
  EXPECT_EQ(s.pieces[2].length, 430'000'000);
  EXPECT_EQ(s.at(100, 500'000'000), 1e-3);
  EXPECT_DOUBLE_EQ(s.at(100, 1'470'000'000), 1e-3 * 7.3e-6 / 2.2e-4);
}

TEST(ScheduleYaml, TokensThenSteps) {
  const Schedule s = rate("[{value: 1, tokens: 100000}, {value: 2, steps: 5}, {value: 3}]");
  // 8 × 4096 = 32768 tokens a step: 100,000 tokens have passed after 4 steps.
  EXPECT_EQ(s.pieces[1].begin, 4);
  EXPECT_EQ(s.at(3, 3 * 32768), 1.0);
  EXPECT_EQ(s.at(4, 4 * 32768), 2.0);
  EXPECT_EQ(s.at(8, 8 * 32768), 2.0);
  EXPECT_EQ(s.at(9, 9 * 32768), 3.0);
}

TEST(ScheduleYaml, BatchThatGrowsMovesTheBoundary) {
  const std::string batch = "[{from: 8, to: 16, steps: 10}, {value: 16}]";
  const Config config =
      load("training: {micro_batch_size: 4, global_batch_size: " + batch +
           "}\ndata: {sequence_length: 10}\n"
           "optimizer: {learning_rate: [{value: 1, steps: 20}, {value: 2, tokens: "
           "50}, {value: 3}]}");
  int64_t tokens = 0;
  for (int64_t step = 0; step < 20; ++step) {
    const int64_t sequences = global_batch_at(config, step, tokens);
    EXPECT_EQ(sequences % 4, 0);
    EXPECT_NEAR(static_cast<double>(sequences), 8 + 0.8 * std::min<double>(10, step), 2.0);
    tokens += sequences * 10;
  }
  EXPECT_EQ(config.optimizer.learning_rate.pieces[1].begin, tokens);
  EXPECT_EQ(load(to_yaml(config)), config);
}

TEST(ScheduleYaml, BatchItselfMayMixUnits) {
  const Config config = load(
      "data: {sequence_length: 10}\n"
      "training: {global_batch_size: [{value: 8, steps: 3}, {value: 16, tokens: 320}, {value: 24, "
      "steps: 2}, {value: 32}]}");
  const Schedule& batch = config.training.global_batch_size;
  EXPECT_EQ(batch.pieces[1].begin, 240);
  EXPECT_EQ(batch.pieces[2].begin, 5);
  std::vector<int64_t> sizes;
  for (int64_t step = 0, tokens = 0; step < 9; ++step) {
    sizes.push_back(global_batch_at(config, step, tokens));
    tokens += sizes.back() * 10;
  }
  EXPECT_EQ(sizes, (std::vector<int64_t>{8, 8, 8, 16, 16, 24, 24, 32, 32}));
}

TEST(ScheduleYaml, Errors) {
  const auto wrong = [](const std::string& yaml) {
    return error_of("optimizer:\n  learning_rate: " + yaml);
  };
  EXPECT_EQ(wrong("fast"),
            "run.yaml:2:18: optimizer.learning_rate: expected a finite number, got fast");
  EXPECT_EQ(wrong("-1"),
            "run.yaml:2:18: optimizer.learning_rate: must be at least 0, at most 1e9, got -1");
  EXPECT_EQ(
      wrong("[]"),
      "run.yaml:2:18: optimizer.learning_rate: a schedule has between 1 and 64 pieces, got 0");
  EXPECT_EQ(wrong("[1]").substr(0, 66),
            "run.yaml:2:19: optimizer.learning_rate: expected a piece such as {");
  EXPECT_EQ(wrong("[{value: 1}, {value: 2, steps: 4}]"),
            "run.yaml:2:19: optimizer.learning_rate: only the last piece may be open: give steps, "
            "tokens, until_steps or until_tokens");
  EXPECT_EQ(wrong("[{value: 1, steps: 0}]"),
            "run.yaml:2:37: optimizer.learning_rate.steps: must be at least 1, at most "
            "1e15, got 0");
  EXPECT_EQ(wrong("[{value: 1, step: 4}]"),
            "run.yaml:2:30: optimizer.learning_rate.step: unknown key, did you mean steps?");
  EXPECT_EQ(wrong("[{value: 1, steps: 4, tokens: 4}]"),
            "run.yaml:2:19: optimizer.learning_rate: steps and tokens are both given, keep one");
  EXPECT_EQ(wrong("[{to: 1, steps: 4}]"),
            "run.yaml:2:19: optimizer.learning_rate: from is missing in the first piece");
  EXPECT_EQ(wrong("[{value: 1, until_steps: 10}, {value: 2, until_steps: 5}]"),
            "run.yaml:2:3: optimizer.learning_rate: piece 2 ends at 5 steps, but begins at 10");
  EXPECT_EQ(wrong("{peak: 1}").substr(0, 81),
            "run.yaml:2:18: optimizer.learning_rate: expected a number, a list of pieces, or a");
  EXPECT_EQ(
      wrong("{type: cosin, peak: 1}"),
      "run.yaml:2:25: optimizer.learning_rate.type: expected one of constant, linear, cosine, "
      "wsd, deepseek_v3, got cosin");
  EXPECT_EQ(wrong("{type: cosine}"),
            "run.yaml:2:18: optimizer.learning_rate: peak is missing, give a number");
  EXPECT_EQ(
      wrong("{type: cosine, peak: 1, warmup_steps: 50, total_steps: 50}"),
      "run.yaml:2:18: optimizer.learning_rate: the pieces before the end take 50, but the end "
      "is at 50");
  EXPECT_EQ(
      error_of("training: {global_batch_size: {type: cosine, peak: 8}}"),
      "run.yaml:1:31: training.global_batch_size: takes the value 0.0 on its way, every value "
      "must be whole, at least 1, at most 16777216");
  EXPECT_EQ(wrong("{type: wsd, peak: 1}"),
            "run.yaml:2:18: optimizer.learning_rate: decay_steps or decay_tokens is missing");
}

}  // namespace
}  // namespace dsv3
