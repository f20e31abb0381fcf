#include "training/run_directory.h"

#include <gtest/gtest.h>

#include <csignal>

#include "base/error.h"
#include "base/file.h"
#include "training/stop_signals.h"
#include "training/tiny.h"

namespace dsv3 {
namespace {
namespace fs = std::filesystem;

TEST(RunDirectory, AnExistingRunIsMovedAsideNeverDeleted) {
  const test::TemporaryDirectory temporary;
  const auto run = temporary.path() / "runs" / "first";
  EXPECT_FALSE(prepare_run_directory(run, false).has_value());
  EXPECT_FALSE(prepare_run_directory(run, false).has_value()) << "nothing was trained yet";
  write_file_atomically(run / "metrics.jsonl", "{}\n");
  EXPECT_THROW(prepare_run_directory(run, false), std::invalid_argument);
  EXPECT_EQ(prepare_run_directory(run, true), run.parent_path() / "first.1");
  EXPECT_EQ(read_file(run.parent_path() / "first.1" / "metrics.jsonl"), "{}\n");
  EXPECT_FALSE(fs::exists(run / "metrics.jsonl"));
  fs::create_directory(run / "checkpoints" / "step_1");
  EXPECT_THROW(prepare_run_directory(run.string() + "/", false), std::invalid_argument);
  EXPECT_EQ(prepare_run_directory(run.string() + "/", true), run.parent_path() / "first.2");
}

TEST(RunDirectory, OtherThingsInTheWayAreNamed) {
  const test::TemporaryDirectory temporary;
  write_file_atomically(temporary.path() / "file", "x");
  EXPECT_THROW(prepare_run_directory(temporary.path() / "file", true), std::invalid_argument);
  EXPECT_THROW(prepare_run_directory(temporary.path() / "file" / "run", false), IoError);
  EXPECT_EQ(read_file(temporary.path() / "file"), "x");
}

TEST(RunDirectory, PruningKeepsTheNewestAndForeignNames) {
  const test::TemporaryDirectory run;
  for (const char* name : {"step_2", "step_10", "step_9", "step_x", "step_", "best"})
    fs::create_directories(run.path() / "checkpoints" / name);
  prune_checkpoints(run.path(), 0);
  EXPECT_TRUE(fs::exists(run.path() / "checkpoints" / "step_2"));
  prune_checkpoints(run.path(), 2);
  EXPECT_FALSE(fs::exists(run.path() / "checkpoints" / "step_2"));
  for (const char* name : {"step_10", "step_9", "step_x", "step_", "best"})
    EXPECT_TRUE(fs::exists(run.path() / "checkpoints" / name)) << name;
}

TEST(StopSignals, TheFirstIsRememberedAndHandlersReturn) {
  {
    const StopSignals signals;
    EXPECT_FALSE(StopSignals::requested());
    std::raise(SIGTERM);
    EXPECT_TRUE(StopSignals::requested());
  }
  const StopSignals again;
  EXPECT_FALSE(StopSignals::requested());
}

TEST(StopSignals, TheSecondEndsTheProcessWith130) {
  EXPECT_EXIT(
      {
        const StopSignals signals;
        std::raise(SIGINT);
        std::raise(SIGINT);
      },
      testing::ExitedWithCode(130), "stopping after this step");
}

}  // namespace
}  // namespace dsv3
