#include "checkpoint/save.h"

#include <gtest/gtest.h>

#include <cerrno>

#include "base/error.h"
#include "base/file.h"
#include "checkpoint/catalogue.h"
#include "checkpoint/fixture.h"
#include "checkpoint/saver.h"
#include "checkpoint/temporary_directory.h"
#include "support/compare.h"
#include "support/random.h"

namespace dsv3 {

namespace fs = std::filesystem;
using test::Fixture, test::random_companion;

namespace {

class SaveTest : public testing::Test {
 protected:
  fs::path at(int64_t step) const { return checkpoint_directory(run_, step); }
  /// Moments in `moments`, masters where the weights are BF16.
  static std::vector<Companion> companions_of(const ParameterSet& parameters,
                                              at::ScalarType moments) {
    return {random_companion(parameters, "exp_avg", moments),
            random_companion(parameters, "exp_avg_sq", moments),
            random_companion(parameters, "master", at::kFloat, at::kBFloat16)};
  }
  SaveJob job(const Fixture& fixture, const std::vector<Companion>& companions, int64_t step) {
    return {.run = run_,
            .step = step,
            .state = state_of(fixture.parameters, companions),
            .options = {.extra_files = {{"state.json", "{}"}}},
            .sync_first = {}};
  }
  std::vector<std::string> names() const {
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(run_ / "checkpoints"))
      found.push_back(entry.path().filename());
    std::ranges::sort(found);
    return found;
  }

  test::TemporaryDirectory directory_;
  fs::path run_ = directory_.path() / "run";
};

TEST_F(SaveTest, EveryNumberComesBackInItsBits) {
  for (const auto dtype : {DType::kF32, DType::kBF16}) {
    for (const auto moments : {at::kFloat, at::kBFloat16}) {
      for (const uint64_t shard : {uint64_t{1} << 30, uint64_t{300}}) {
        Fixture a(dtype), b(dtype);
        const auto saved = companions_of(a.parameters, moments);
        auto loaded = companions_of(b.parameters, moments);
        save_checkpoint(at(7), a.parameters, state_of(a.parameters, saved), a.model, 7,
                        {.max_shard_bytes = shard});
        EXPECT_TRUE(find_damage(at(7), Check::kChecksums).empty());
        EXPECT_EQ(fs::exists(at(7) / "exp_avg.safetensors"), shard > 300);
        load_weights(at(7), b.parameters, 1);
        test::expect_equal(a.parameters, b.parameters);
        for (size_t i = 0; i < saved.size(); ++i) {
          if (saved[i].prefix == "master" && dtype == DType::kF32) continue;  // there is none
          EXPECT_TRUE(has_companion(at(7), saved[i].prefix));
          load_companion(at(7), b.parameters, loaded[i]);
          for (const auto& parameter : a.parameters.parameters()) {
            if (!parameter.spec.trainable) continue;
            const auto& flat = saved[i].flats[static_cast<size_t>(parameter.bucket)];
            const auto& other = loaded[i].flats[static_cast<size_t>(parameter.bucket)];
            ASSERT_EQ(flat.defined(), other.defined());
            if (!flat.defined()) continue;
            EXPECT_TRUE(test::same_bits(part_of(parameter, other), part_of(parameter, flat)))
                << parameter.spec.name;
          }
        }
      }
    }
  }
}

TEST_F(SaveTest, NamesAreThoseOfTheWeightsWithGlobalExperts) {
  Fixture a(DType::kBF16);
  save_checkpoint(at(1), a.parameters,
                  state_of(a.parameters, companions_of(a.parameters, at::kFloat)), a.model, 1);
  const WeightFiles weights(at(1)), moments(at(1), "exp_avg"), masters(at(1), "master");
  const auto* expert = moments.find("exp_avg.model.layers.0.mlp.experts.1.up_proj.weight");
  ASSERT_NE(expert, nullptr);
  EXPECT_EQ(expert->shape, weights.find("model.layers.0.mlp.experts.1.up_proj.weight")->shape);
  // The gate is FP32 and needs no master; the bias is no parameter and has no moments.
  EXPECT_EQ(masters.find("master.model.layers.0.mlp.gate.weight"), nullptr);
  EXPECT_NE(masters.find("master.model.norm.weight"), nullptr);
  for (const auto& name : moments.names())
    EXPECT_EQ(name.find("e_score_correction_bias"), std::string::npos);
}

TEST_F(SaveTest, WhatDoesNotFitIsNamed) {
  Fixture a(DType::kF32), wider(DType::kF32, true, 8), without(DType::kF32, false);
  const auto companions = companions_of(a.parameters, at::kFloat);
  save_checkpoint(at(1), a.parameters, state_of(a.parameters, companions), a.model, 1);
  const auto error = [&](const Fixture& fixture) {
    const auto target = random_companion(fixture.parameters, "exp_avg", at::kFloat);
    try {
      load_companion(at(1), fixture.parameters, target);
    } catch (const std::invalid_argument& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_NE(error(wider).find("exp_avg.model.norm.weight: expected shape [8], got [6]"),
            std::string::npos);
  EXPECT_NE(error(without).find("unexpected (1): exp_avg.model.layers.1.enorm.weight"),
            std::string::npos);
  EXPECT_FALSE(has_companion(at(1), "ema"));
  EXPECT_THROW(
      load_companion(at(1), a.parameters, random_companion(a.parameters, "ema", at::kFloat)),
      IoError);
}

TEST_F(SaveTest, AFailureAtAnyActionLeavesTheCheckpointsBefore) {
  Fixture a(DType::kBF16), b(DType::kBF16);
  const auto companions = companions_of(a.parameters, at::kFloat);
  Saver saver(a.parameters, a.model, {});
  ASSERT_EQ(saver.save_now(job(a, companions, 1)).error, "");
  const std::string before = read_file(at(1) / kManifestName);
  int64_t actions = 0;
  {
    const FileFault counter([&](FileAction, const fs::path&) { return ++actions, 0; });
    ASSERT_EQ(saver.save_now(job(b, companions_of(b.parameters, at::kFloat), 1)).error, "");
  }
  EXPECT_GT(actions, 60);  // seven files, each created, written, synced and renamed
  fs::remove_all(at(1));
  ASSERT_EQ(saver.save_now(job(a, companions, 1)).error, "");
  for (const bool same_step : {false, true}) {
    // Replacing a checkpoint takes one action more: it syncs before the old one goes. After the
    // rename only syncs are left; when they fail, the checkpoint is there, but not for sure.
    const int64_t all = same_step ? actions : actions - 1;
    const int64_t after_rename = same_step ? all - 2 : all - 1;
    for (int64_t failing = 0; failing < all; ++failing) {
      int64_t count = 0;
      SaveResult result;
      {
        const FileFault fault(
            [&](FileAction, const fs::path&) { return count++ == failing ? ENOSPC : 0; });
        result = saver.save_now(job(b, companions, same_step ? 1 : 2));
      }
      EXPECT_NE(result.error.find("No space left on device"), std::string::npos) << failing;
      EXPECT_NE(result.error.find(run_.string()), std::string::npos) << "names no file";
      EXPECT_TRUE(find_damage(at(1), Check::kChecksums).empty()) << failing;
      if (failing >= after_rename) continue;
      EXPECT_EQ(read_file(at(1) / kManifestName), before) << failing;
      EXPECT_EQ(names(), std::vector<std::string>{"step_1"}) << failing;
    }
    fs::remove_all(at(1));
    fs::remove_all(at(2));
    ASSERT_EQ(saver.save_now(job(a, companions, 1)).error, "");
  }
}

TEST_F(SaveTest, OldOnesGoAndMultiplesStay) {
  Fixture a(DType::kF32);
  Saver saver(a.parameters, a.model, {.keep_last = 2, .keep_every = 4});
  for (int64_t step = 1; step <= 7; ++step) ASSERT_EQ(saver.save_now(job(a, {}, step)).error, "");
  EXPECT_EQ(names(), (std::vector<std::string>{"step_4", "step_6", "step_7"}));
}

TEST_F(SaveTest, TheSnapshotIsOfTheMomentWhateverComesAfter) {
  for (const at::Device device : test::devices()) {
    Fixture a(DType::kBF16), b(DType::kBF16);
    a.parameters.allocate({.dtype = DType::kBF16, .cuda = device.is_cuda()});
    a.fill();
    const c10::AutoGradMode off(false);
    auto companions = companions_of(a.parameters, at::kFloat);
    Saver saver(a.parameters, a.model, {});
    saver.prepare(state_of(a.parameters, companions));
    for (int64_t step = 1; step <= 3; ++step) {
      saver.start(job(a, companions, step));
      saver.before_change(device);
      for (const auto& tensor : state_of(a.parameters, companions).all()) tensor.add_(1);
      const auto result = saver.wait();
      ASSERT_TRUE(result.has_value());
      EXPECT_EQ(result->error, "");
      EXPECT_GE(result->seconds, result->stall_seconds);
      EXPECT_FALSE(saver.wait().has_value()) << "a result is fetched once";
      auto loaded = companions_of(b.parameters, at::kFloat);
      load_weights(at(step), b.parameters, 1);
      for (const auto& companion : loaded) load_companion(at(step), b.parameters, companion);
      for (const auto& parameter : a.parameters.parameters()) {
        if (!parameter.spec.trainable) continue;
        const auto& read = *b.parameters.find(parameter.spec.name);
        for (size_t i = 0; i < companions.size(); ++i) {
          const auto& live = companions[i].flats[static_cast<size_t>(parameter.bucket)];
          const auto& back = loaded[i].flats[static_cast<size_t>(read.bucket)];
          if (!live.defined()) continue;
          EXPECT_TRUE(test::same_bits(part_of(read, back).add(1), part_of(parameter, live)))
              << companions[i].prefix << " " << parameter.spec.name << ", step " << step << " on "
              << device.str();
        }
        EXPECT_TRUE(test::same_bits(read.value().detach().add(1), parameter.value().detach()));
      }
    }
  }
}

TEST_F(SaveTest, ABackgroundSaveThatFailsIsReportedAndTheNextSucceeds) {
  Fixture a(DType::kF32);
  Saver saver(a.parameters, a.model, {});
  {
    const FileFault fault([](FileAction action, const fs::path& path) {
      return action == FileAction::kWrite && path.filename() == "model.safetensors.tmp" ? EIO : 0;
    });
    saver.start(job(a, {}, 1));
    const auto result = saver.wait();
    ASSERT_TRUE(result.has_value());
    EXPECT_NE(result->error.find("model.safetensors"), std::string::npos) << result->error;
    EXPECT_NE(result->error.find("Input/output error"), std::string::npos) << result->error;
  }
  EXPECT_TRUE(names().empty());
  saver.start(job(a, {}, 2));
  while (saver.busy()) std::this_thread::yield();
  EXPECT_EQ(saver.poll()->error, "");
  EXPECT_EQ(names(), std::vector<std::string>{"step_2"});
}

TEST_F(SaveTest, ADamagedCheckpointNamesTheOneBefore) {
  Fixture a(DType::kF32);
  Saver saver(a.parameters, a.model, {.keep_last = 0});
  for (const int64_t step : {3, 5, 8}) ASSERT_EQ(saver.save_now(job(a, {}, step)).error, "");
  EXPECT_EQ(latest_checkpoint(run_), at(8));
  EXPECT_NO_THROW(require_undamaged(at(8)));
  fs::resize_file(at(8) / "model.safetensors", 10);
  fs::remove(at(5) / "config.json");
  try {
    require_undamaged(at(8));
    FAIL() << "accepted";
  } catch (const IoError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("step_8 is damaged: model.safetensors: has 10 bytes"), std::string::npos);
    EXPECT_NE(text.find("the newest whole one before it is " + at(3).string()), std::string::npos);
  }
  EXPECT_EQ(newest_whole(run_, 8)->step, 3);
  EXPECT_FALSE(newest_whole(run_, 3).has_value());
  // Weights without a manifest are taken as they are, but not where a run keeps its checkpoints.
  for (const char* name : {kManifestName, "state.json"}) fs::remove(at(8) / name);
  EXPECT_THROW(require_undamaged(at(8)), IoError);
  fs::rename(at(8), run_ / "step_8");
  EXPECT_NO_THROW(require_undamaged(run_ / "step_8"));
}

TEST_F(SaveTest, HalvesAreRemovedAndLaterOnesSetAside) {
  Fixture a(DType::kF32);
  Saver saver(a.parameters, a.model, {.keep_last = 0});
  for (const int64_t step : {3, 5, 8}) ASSERT_EQ(saver.save_now(job(a, {}, step)).error, "");
  for (const char* name : {".step_9.tmp", ".step_2.removed.tmp", "mine", "step_x", ".other.tmp"})
    fs::create_directories(run_ / "checkpoints" / name / "inside");
  EXPECT_EQ(checkpoints_of(run_).size(), 3u);
  EXPECT_EQ(remove_stale(run_), 2);
  EXPECT_EQ(remove_stale(run_), 0);
  EXPECT_EQ(set_aside_after(run_, 3).size(), 2u);
  EXPECT_EQ(latest_checkpoint(run_), at(3));
  ASSERT_EQ(saver.save_now(job(a, {}, 5)).error, "");
  EXPECT_EQ(set_aside_after(run_, 3), std::vector<fs::path>{run_ / "set_aside" / "step_5.1"});
  EXPECT_TRUE(find_damage(run_ / "set_aside" / "step_8", Check::kChecksums).empty());
  EXPECT_EQ(remove_stale(directory_.path() / "nowhere"), 0);
  EXPECT_TRUE(checkpoints_of(directory_.path() / "nowhere").empty());
}

TEST(FileTest, FailuresNameTheFileAndTheCause) {
  const test::TemporaryDirectory directory;
  const auto path = directory.path() / "file";
  write_file_atomically(path, "old");
  for (const auto action :
       {FileAction::kCreate, FileAction::kWrite, FileAction::kSync, FileAction::kRename}) {
    const FileFault fault(
        [action](FileAction asked, const fs::path&) { return asked == action ? EDQUOT : 0; });
    try {
      write_file_atomically(path, "new");
      FAIL() << "accepted";
    } catch (const IoError& error) {
      EXPECT_NE(std::string(error.what()).find(path.string()), std::string::npos) << error.what();
      EXPECT_NE(std::string(error.what()).find("Disk quota exceeded"), std::string::npos);
    }
    EXPECT_EQ(read_file(path), "old");
    EXPECT_FALSE(fs::exists(path.string() + ".tmp"));
  }
  AtomicFile file(path);
  file.write("ab", 2);
  file.write("c", 1);
  EXPECT_EQ(file.size(), 3u);
  EXPECT_EQ(file.checksum(), hash_bytes("abc", 0));
}

}  // namespace
}  // namespace dsv3
