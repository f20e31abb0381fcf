// Runs that are stopped and go on: the bits, the lines of metrics, the files.
#include "training/resume.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <regex>
#include <sstream>

#include "base/error.h"
#include "base/file.h"
#include "checkpoint/catalogue.h"
#include "support/compare.h"
#include "training/stop_signals.h"
#include "training/tiny.h"
#include "training/trainer.h"

namespace dsv3 {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

/// Everything that training has made, and what it reported.
struct Outcome {
  std::vector<at::Tensor> tensors;  // weights, routing biases, moments, masters
  std::vector<json> metrics;        // lines of steps and evaluations, without measured times
};

class ResumeTest : public testing::TestWithParam<at::Device> {
 protected:
  ResumeTest() : config_(test::tiny_config(directory_.path(), test::tiny_text(60))) {
    console_ = std::fopen((directory_.path() / "console").c_str(), "w");
    config_.training.deterministic = true;
    config_.training.steps = 8;
    config_.training.eval_every = 3;
    config_.training.device = GetParam().is_cuda() ? "cuda" : "cpu";
    config_.checkpoint.keep_last = 100;
    // A schedule that changes on the way, in learning rate, batch size and γ.
    config_.optimizer.learning_rate.pieces = {
        {SchedulePiece::Shape::kLinear, 0.0, 3e-3, 5, SchedulePiece::Unit::kSteps},
        {SchedulePiece::Shape::kConstant, 1e-3, 1e-3, 0, SchedulePiece::Unit::kSteps}};
    config_.training.global_batch_size.pieces = {
        {SchedulePiece::Shape::kConstant, 2, 2, 3, SchedulePiece::Unit::kSteps},
        {SchedulePiece::Shape::kConstant, 6, 6, 0, SchedulePiece::Unit::kSteps}};
  }
  ~ResumeTest() override { std::fclose(console_); }

  fs::path run(const std::string& name) const { return directory_.path() / name; }
  /// Stops are asked for when `stop_at_` steps are done.
  std::unique_ptr<Trainer> make(const std::string& name, const Config& config,
                                std::optional<int64_t> from_step = {}) {
    auto trainer = std::make_unique<Trainer>(
        config,
        TrainerOptions{.directory = run(name),
                       .from_step = from_step,
                       .console = console_,
                       .stop_requested = [this] { return current_->steps_done() >= stop_at_; },
                       .save_requested = save_,
                       .wall_clock_limit = limit_});
    current_ = trainer.get();
    return trainer;
  }
  std::vector<json> lines(const std::string& name, bool events) {
    std::istringstream text(read_file(run(name) / "metrics.jsonl"));
    const std::regex measured("time|per_sec|tflops|mfu|memory|seconds");
    std::vector<json> found;
    for (std::string line; std::getline(text, line);) {
      json record = json::parse(line);
      if (record.contains("event") != events) continue;
      json kept;
      for (const auto& [key, value] : record.items())
        if (!std::regex_search(key, measured)) kept[key] = value;
      found.push_back(kept);
    }
    return found;
  }
  Outcome outcome(Trainer& trainer, const std::string& name) {
    Outcome result{.tensors = {}, .metrics = lines(name, false)};
    for (const auto& tensor : trainer.saved_state().all())
      result.tensors.push_back(tensor.cpu().clone());
    return result;
  }
  Outcome train(const std::string& name, const Config& config) {
    auto trainer = make(name, config);
    trainer->run();
    return outcome(*trainer, name);
  }
  void train_until(const std::string& name, const Config& config, int64_t step) {
    stop_at_ = step;
    const auto result = make(name, config)->run();
    EXPECT_EQ(result.reason, StopReason::kRequested);
    EXPECT_EQ(result.steps, step);
    EXPECT_EQ(result.checkpoint, checkpoint_directory(run(name), step));
    stop_at_ = kNever;
  }
  /// The message of the std::invalid_argument or IoError that going on with the run meets.
  std::string refusal(const std::string& name, const Config& config,
                      std::optional<int64_t> from_step = {}) {
    try {
      make(name, config, from_step);
    } catch (const std::exception& error) {
      return error.what();
    }
    ADD_FAILURE() << name << " went on";
    return "";
  }
  static void expect_same(const Outcome& actual, const Outcome& expected) {
    ASSERT_EQ(actual.tensors.size(), expected.tensors.size());
    for (size_t i = 0; i < actual.tensors.size(); ++i)
      EXPECT_TRUE(test::same_bits(actual.tensors[i], expected.tensors[i])) << "tensor " << i;
    ASSERT_EQ(actual.metrics.size(), expected.metrics.size());
    for (size_t i = 0; i < actual.metrics.size(); ++i)
      EXPECT_EQ(actual.metrics[i], expected.metrics[i]) << "line " << i;
  }

  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  const test::TemporaryDirectory directory_;
  Config config_;
  std::FILE* console_ = nullptr;
  const Trainer* current_ = nullptr;
  int64_t stop_at_ = kNever;
  std::function<bool()> save_;
  double limit_ = 0;
};

TEST_P(ResumeTest, AStopAfterEveryStepChangesNoBit) {
  const auto expected = train("whole", config_);
  ASSERT_EQ(expected.metrics.size(), 8u + 3);  // evaluations after 3, 6 and 8
  for (int64_t step = 0; step < config_.training.steps; ++step) {
    SCOPED_TRACE("stopped after step " + std::to_string(step));
    const auto name = "stopped" + std::to_string(step);
    train_until(name, config_, step);
    expect_same(train(name, config_), expected);
  }
  // And after each step of one and the same run.
  for (int64_t step = 1; step < config_.training.steps; ++step) train_until("often", config_, step);
  expect_same(train("often", config_), expected);
}

TEST_P(ResumeTest, EveryWayOfTrainingGoesOnInTheSameBits) {
  const auto check = [&](const std::string& name, const Config& config) {
    SCOPED_TRACE(name);
    const auto expected = train(name + "_whole", config);
    train_until(name, config, 4);
    expect_same(train(name, config), expected);
  };
  Config config = config_;
  config.model.dtype = DType::kBF16;
  check("bf16_with_masters", config);
  config.optimizer.master_weights = false;
  config.optimizer.moment_dtype = DType::kBF16;
  config.optimizer.gradient_dtype = DType::kBF16;
  check("bf16_states", config);
  config = config_;
  config.data.mask_across_documents = true;
  config.data.fim_rate = 0.5;
  config.model.mtp.num_nextn_predict_layers = 2;
  config.training.micro_batch_size = 1;
  check("masked_documents", config);
  config = config_;
  config.training.recompute = Recompute::kFull;
  config.model.tie_word_embeddings = true;
  config.optimizer.decay_embeddings = false;
  check("tied_recomputed", config);
  config = config_;
  config.model.moe.num_experts = 0;
  config.model.mtp.num_nextn_predict_layers = 0;
  check("dense", config);
  config = config_;
  config.training.deterministic = false;
  if (!GetParam().is_cuda()) check("not_deterministic", config);
}

TEST_P(ResumeTest, ARunThatWasKilledGoesOnFromItsLastCheckpoint) {
  const auto expected = train("whole", config_);
  config_.checkpoint.every_steps = 3;
  {
    // Killed after step 5: what a kill leaves is the checkpoint of step 3, lines beyond it, half a
    // line, half a save and half a removal.
    auto trainer = make("killed", config_);
    stop_at_ = 5;
    trainer->run();
    stop_at_ = kNever;
  }
  const auto killed = run("killed");
  fs::remove_all(killed / "checkpoints" / "step_5");
  fs::create_directories(killed / "checkpoints" / ".step_6.tmp");
  write_file_atomically(killed / "checkpoints" / ".step_6.tmp" / "model.safetensors", "half");
  std::ofstream(killed / "metrics.jsonl", std::ios::app) << R"({"time": 1.5, "step": 6, "train/lo)";
  expect_same(train("killed", config_), expected);
  EXPECT_FALSE(fs::exists(killed / "checkpoints" / ".step_6.tmp"));
  EXPECT_NE(read_file(killed / "log.txt").find("removed   1 unfinished save"), std::string::npos);
  EXPECT_NE(read_file(killed / "log.txt").find("dropped   5 lines"), std::string::npos)
      << read_file(killed / "log.txt");
  const auto events = lines("killed", true);
  EXPECT_EQ(std::ranges::count_if(events, [](const json& e) { return e["event"] == "resume"; }), 1);
}

TEST_P(ResumeTest, WithoutACheckpointTheRunStartsAgainInItsPlace) {
  const auto expected = train("whole", config_);
  train_until("killed", config_, 5);
  fs::remove_all(run("killed") / "checkpoints");
  expect_same(train("killed", config_), expected);
  EXPECT_NE(read_file(run("killed") / "log.txt").find("nothing was saved yet"), std::string::npos);
  // But not with another model: the directory may be a mistake.
  train_until("other", config_, 2);
  fs::remove_all(run("other") / "checkpoints");
  config_.model.hidden_size = 48;
  EXPECT_NE(refusal("other", config_).find("model.hidden_size: 32 in the run, 48 now"),
            std::string::npos);
  fs::remove(run("other") / "config.yaml");
  EXPECT_NE(refusal("other", config_).find("--overwrite"), std::string::npos);
}

TEST_P(ResumeTest, AFinishedRunIsLeftAloneUntilItGetsMoreSteps) {
  config_.optimizer.learning_rate = Schedule::constant(1e-3);
  Config longer = config_;
  longer.training.steps = 12;
  const auto expected = train("whole", longer);
  train("run", config_);
  const std::string before = read_file(run("run") / "checkpoints" / "step_8" / "manifest.json");
  const auto again = make("run", config_)->run();
  EXPECT_EQ(again.reason, StopReason::kFinished);
  EXPECT_EQ(again.steps, 8);
  EXPECT_EQ(again.checkpoint, checkpoint_directory(run("run"), 8));
  EXPECT_EQ(read_file(again.checkpoint / "manifest.json"), before);
  const auto lengthened = train("run", longer);
  for (size_t i = 0; i < expected.tensors.size(); ++i)
    EXPECT_TRUE(test::same_bits(lengthened.tensors[i], expected.tensors[i]));
  EXPECT_NE(
      read_file(run("run") / "log.txt").find("changed   training.steps: 8 in the run, 12 now"),
      std::string::npos);
}

TEST_P(ResumeTest, OnlyWhatMayDifferDiffers) {
  train_until("run", config_, 2);
  const auto log = [&] { return read_file(run("run") / "log.txt"); };
  Config config = config_;
  config.model.num_layers = 3;
  config.optimizer.beta2 = 0.9;
  config.data.sequence_length = 8;
  const std::string text = refusal("run", config);
  for (const char* part :
       {"model.num_layers: 2 in the run, 3 now", "optimizer.beta2: 0.95 in the run, 0.9 now",
        "data.sequence_length: 16 in the run, 8 now", "What may change: ", "--overwrite"})
    EXPECT_NE(text.find(part), std::string::npos) << text;
  EXPECT_EQ(text.find('\n'), std::string::npos);
  for (const auto& change : std::vector<std::function<void(Config&)>>{
           [](Config& c) { c.training.seed = 2; }, [](Config& c) { c.model.dtype = DType::kBF16; },
           [](Config& c) { c.optimizer.moment_dtype = DType::kBF16; },
           [](Config& c) { c.data.validation_every = 4; },
           [](Config& c) { c.data.mask_across_documents = true; },
           [](Config& c) { c.model.moe.num_experts_per_token = 1; }}) {
    config = config_;
    change(config);
    EXPECT_NE(refusal("run", config).find("cannot go on with another"), std::string::npos);
  }
  config = config_;
  config.optimizer.learning_rate = Schedule::constant(5e-4);
  config.training.log_every = 2;
  config.training.micro_batch_size = 1;
  config.checkpoint.every_steps = 1;
  config.checkpoint.keep_last = 2;
  train("run", config);
  EXPECT_NE(log().find("changed   training.log_every: 1 in the run, 2 now"), std::string::npos);
  EXPECT_EQ(checkpoints_of(run("run")).size(), 2u);
  EXPECT_EQ(lines("run", false).back()["step"], 8);
  // Other text under the same name is found by the loader's fingerprint.
  train_until("text", config_, 2);
  write_file_atomically(directory_.path() / "text.txt", test::tiny_text(90));
  EXPECT_NE(refusal("text", config_).find("other data or settings"), std::string::npos);
}

TEST_P(ResumeTest, DamageIsNamedWithTheWayOut) {
  config_.checkpoint.every_steps = 2;
  const auto expected = train("run", config_);
  const auto newest = run("run") / "checkpoints" / "step_8";
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(newest)) files.push_back(entry.path());
  ASSERT_GE(files.size(), 7u);
  const std::string way =
      "go on from there with: dsv3 train " + run("run").string() + " --from-step 6";
  test::Random random(test::fresh_seed());
  for (const auto& file : files) {
    SCOPED_TRACE(file.filename());
    const std::string whole = read_file(file);
    const auto expect_named = [&] {
      const std::string text = refusal("run", config_);
      EXPECT_NE(text.find("step_8 is damaged: " + file.filename().string() + ": "),
                std::string::npos)
          << text;
      EXPECT_NE(text.find(way), std::string::npos) << text;
    };
    std::string flipped = whole;
    const auto at = static_cast<size_t>(random.integer(0, static_cast<int64_t>(whole.size()) - 1));
    flipped[at] = static_cast<char>(flipped[at] ^ (1 << random.integer(0, 7)));
    write_file_atomically(file, flipped);
    expect_named();
    write_file_atomically(file, whole.substr(0, whole.size() / 2));
    expect_named();
    fs::remove(file);
    expect_named();
    write_file_atomically(file, whole);
  }
  write_file_atomically(newest / "notes.txt", "mine");
  EXPECT_NE(refusal("run", config_).find("notes.txt: is no part of this checkpoint"),
            std::string::npos);
  // The way out: the run goes on from step 6 and ends in the same bits; nothing is lost.
  EXPECT_NE(refusal("run", config_, 5).find("it has: 2, 4, 6, 8"), std::string::npos);
  auto trainer = make("run", config_, 6);
  trainer->run();
  expect_same(outcome(*trainer, "run"), expected);
  EXPECT_TRUE(fs::exists(run("run") / "set_aside" / "step_8" / "notes.txt"));
  EXPECT_TRUE(find_damage(newest, Check::kChecksums).empty());
  trainer.reset();
  // Nothing whole is left: that is said too.
  for (const auto& entry : checkpoints_of(run("run"))) fs::remove(entry.path / "state.json");
  EXPECT_NE(refusal("run", config_).find("no checkpoint before it is whole"), std::string::npos);
}

TEST_P(ResumeTest, ASaveThatFailsIsTriedAgainAndTrainingGoesOn) {
  const auto expected = train("whole", config_);
  config_.checkpoint.every_steps = 2;
  auto trainer = make("run", config_);
  {
    int64_t failures = 0;
    const FileFault fault([&](FileAction action, const fs::path& path) {
      const bool checkpoint = path.string().find("checkpoints/") != std::string::npos;
      // The first three saves fail, each at its second file.
      const bool fails = action == FileAction::kCreate && checkpoint && failures < 3 &&
                         path.filename() == "config.json.tmp";
      failures += fails;
      return fails ? ENOSPC : 0;
    });
    trainer->run();
    EXPECT_EQ(failures, 3);
  }
  expect_same(outcome(*trainer, "run"), expected);
  const std::string log = read_file(run("run") / "log.txt");
  EXPECT_NE(log.find("the checkpoint of step 2 was not saved: cannot create"), std::string::npos);
  EXPECT_NE(log.find("No space left on device"), std::string::npos);
  EXPECT_TRUE(find_damage(run("run") / "checkpoints" / "step_8", Check::kChecksums).empty());
  const auto events = lines("run", true);
  EXPECT_EQ(
      std::ranges::count_if(events, [](const json& e) { return e["event"] == "save_failed"; }), 3);
}

TEST_P(ResumeTest, TheLastSaveIsTriedAgainThenItsFailureIsAnError) {
  config_.checkpoint.every_steps = 3;
  auto trainer = make("run", config_);
  int64_t tries = 0;
  {
    const FileFault fault([&](FileAction action, const fs::path& path) {
      const bool fails = action == FileAction::kRename && path.filename() == ".step_8.tmp";
      tries += fails;
      return fails ? EROFS : 0;
    });
    try {
      trainer->run();
      FAIL() << "the failure was swallowed";
    } catch (const IoError& error) {
      const std::string text = error.what();
      EXPECT_NE(text.find("the checkpoint of step 8 was not saved: cannot rename"),
                std::string::npos)
          << text;
      EXPECT_NE(text.find("Read-only file system"), std::string::npos) << text;
      EXPECT_NE(text.find("step_6, go on from there with: dsv3 train"), std::string::npos) << text;
    }
  }
  EXPECT_EQ(tries, 3);
  trainer.reset();
  const auto result = make("run", config_)->run();
  EXPECT_EQ(result.steps, 8);
}

TEST_P(ResumeTest, ASignalSavesAndGoesOn) {
  const StopSignals signals;
  save_ = [this] {
    if (current_->steps_done() == 3) std::raise(SIGUSR1);
    return StopSignals::take_save_request();
  };
  const auto result = make("run", config_)->run();
  EXPECT_EQ(result.reason, StopReason::kFinished);
  std::vector<int64_t> steps;
  for (const auto& entry : checkpoints_of(run("run"))) steps.push_back(entry.step);
  EXPECT_EQ(steps, (std::vector<int64_t>{3, 8}));
}

TEST_P(ResumeTest, NearTheWallClockLimitItSavesInTime) {
  config_.training.steps = 1'000'000;
  config_.training.eval_every = 0;
  limit_ = 2.0;
  const auto start = std::chrono::steady_clock::now();
  const auto result = make("run", config_)->run();
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  EXPECT_EQ(result.reason, StopReason::kWallClock);
  EXPECT_FALSE(result.evaluation.has_value()) << "an evaluation may take longer than there is time";
  EXPECT_TRUE(find_damage(result.checkpoint, Check::kChecksums).empty());
  EXPECT_GT(result.steps, 0);
  EXPECT_GT(seconds, 0.5) << "it stopped long before the limit";
  limit_ = 0;
  config_.training.steps = result.steps + 1;
  EXPECT_EQ(make("run", config_)->run().steps, result.steps + 1);
}

TEST_P(ResumeTest, TwoProcessesCannotTrainInOneDirectory) {
  train_until("run", config_, 2);
  const auto first = make("run", config_);
  EXPECT_NE(refusal("run", config_).find("another process is training in"), std::string::npos);
}

TEST_P(ResumeTest, AStopDuringAnEvaluationMakesItUpLater) {
  const auto expected = train("whole", config_);
  // The stop comes when step 3 is done: its evaluation is broken off, and made up by the next one.
  train_until("run", config_, 3);
  EXPECT_EQ(load_training_state(run("run") / "checkpoints" / "step_3").evaluated_step, -1);
  expect_same(train("run", config_), expected);
}

INSTANTIATE_TEST_SUITE_P(Devices, ResumeTest, testing::ValuesIn(test::devices()),
                         [](const auto& info) { return info.param.is_cuda() ? "cuda" : "cpu"; });

TEST(SavePolicy, StepsMinutesRequestsAndRetries) {
  CheckpointConfig config{.every_steps = 10, .every_minutes = 5};
  SavePolicy policy(config, 100);
  EXPECT_TRUE(policy.due(10, 101, false));
  EXPECT_FALSE(policy.due(11, 101, false));
  EXPECT_TRUE(policy.due(11, 101, true)) << "asked for";
  EXPECT_FALSE(policy.due(11, 399, false));
  EXPECT_TRUE(policy.due(11, 400, false)) << "five minutes are over";
  policy.begun(400);
  EXPECT_FALSE(policy.due(12, 401, false));
  // Failures: 1, 2, 4, … steps later, and nothing else in between.
  policy.failed(12);
  EXPECT_EQ(policy.next_try(), 13);
  EXPECT_TRUE(policy.due(13, 401, false));
  policy.failed(19);
  EXPECT_FALSE(policy.due(20, 1000, false)) << "backing off";
  EXPECT_TRUE(policy.due(20, 1000, true));
  EXPECT_TRUE(policy.due(21, 401, false));
  for (int i = 0; i < 40; ++i) policy.failed(100);
  EXPECT_EQ(policy.next_try(), 100 + 1024);
  policy.saved(100);
  EXPECT_EQ(policy.last_saved_step(), 100);
  EXPECT_FALSE(policy.due(101, 401, false));
  EXPECT_FALSE(SavePolicy({.every_steps = 0}, 0).due(7, 1e9, false));
}

TEST(SavePolicy, TheMarginFollowsWhatWasMeasured) {
  EXPECT_DOUBLE_EQ(stop_margin(100, 2, 10, 0), 4 + 15 + 1);
  EXPECT_DOUBLE_EQ(stop_margin(100000, 2, 10, 0), 4 + 15 + 60);
  EXPECT_DOUBLE_EQ(stop_margin(0, 0, 0, 2'000'000'000), 15) << "no save was measured yet";
}

TEST(ResumeCommand, IsQuotedWhereAShellNeedsIt) {
  EXPECT_EQ(resume_command("runs/first"), "dsv3 train runs/first");
  EXPECT_EQ(resume_command("my runs/it's"), "dsv3 train 'my runs/it'\\''s'");
}

}  // namespace
}  // namespace dsv3
